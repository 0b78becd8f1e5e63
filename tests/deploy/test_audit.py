"""The audit: which convolutions and products run in int8, which do not and why."""

import io
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from rich.console import Console
from torch import nn

from tersor.deploy import QuantizationSpeedup, audit
from tersor.deploy.audit import audit_table
from tersor.deploy.engine import Operator
from tersor.deploy.lowering import Fallback, lower
from tersor.quantization import PtqQuantizer
from tests.deploy.toy import Attention, net

X = torch.randn(4, 3, 8)


def ran(*operators, fallbacks=()):
    """What an engine says that it ran, without the engine."""
    return SimpleNamespace(report=SimpleNamespace(operators=operators, fallbacks=fallbacks))


def computing(name, precision="int8", milliseconds=1.0):
    return Operator(name, "any", precision, milliseconds, computes=True)


def calibrated(model, config_list, x):
    quantizer = PtqQuantizer(model, config_list, calibration=[x])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    return calibration


@pytest.fixture(scope="module")
def attention():
    """One linear layer with weights alone, the other in full."""
    torch.manual_seed(0)
    model = Attention().eval()
    config_list = [
        {"op_names": ["query"], "target_names": ["weight"], "quant_dtype": "int8"},
        {"op_names": ["value"], "target_names": ["weight", "_input_0"], "quant_dtype": "int8"},
    ]
    return lower(model, X, calibrated(model, config_list, X))


def test_names_lead_to_modules_and_every_row_has_its_reason(attention):
    compiled = ran(
        computing("query/MatMul_token_3", "float", 0.25),
        computing("/MatMul", "float", 0.5),
        computing("value/MatMul"),
        computing("/MatMul.2", "float"),
        Operator("Softmax_3", "Softmax", "float", 9.0),
    )
    lines = audit(compiled, attention)
    assert [(line.module, line.kind, line.operator, line.precision) for line in lines] == [
        ("query", "linear", "query/MatMul_token_3", "float"),
        ("", "matmul", "/MatMul", "float"),
        ("value", "linear", "value/MatMul", "int8"),
        ("", "matmul", "/MatMul.2", "float"),
    ]
    assert [line.reason for line in lines] == [
        "weights only: its input is not quantized",
        "a product of two values, as in attention, that the calibration leaves in floating point",
        "",
        "a product of two values, as in attention, that the calibration leaves in floating point",
    ]
    assert sum(line.milliseconds for line in lines) == 2.75


def test_an_engine_that_falls_back_is_told_and_its_own_reason_comes_first(attention):
    operators = [computing(f"Product_{index}", "float") for index in range(4)]
    assert audit(ran(*operators), attention)[2].reason == "the engine fell back to floating point"
    told = ran(*operators, fallbacks=(Fallback("value.weight", "has no int3"),))
    assert audit(told, attention)[2].reason == "has no int3"


def test_operators_without_names_are_matched_in_order_where_none_is_missing(attention):
    operators = [computing(f"Product_{index}", "float", index) for index in range(4)]
    assert [line.milliseconds for line in audit(ran(*operators), attention)] == [0, 1, 2, 3]


def test_a_quantized_product_is_the_one_in_int8(attention):
    """OpenVINO merges the products of attention into something else, and renames a layer."""
    lines = audit(ran(computing("query/MatMul", "float"), computing("Multiply_7", milliseconds=5)), attention)
    assert [(line.operator, line.precision) for line in lines] == [
        ("query/MatMul", "float"),
        ("", "float"),
        ("Multiply_7", "int8"),
        ("", "float"),
    ]


def test_operators_that_cannot_be_told_apart_are_told_as_far_as_they_agree(attention):
    lines = audit(ran(computing("Product_1"), computing("Product_2")), attention)
    assert [(line.operator, line.precision, line.milliseconds) for line in lines] == [
        ("", "float", None),
        ("", "float", None),
        ("", "int8", None),
        ("", "float", None),
    ]
    unnamed = audit(ran(computing("1"), computing("2"), computing("3", "float")), attention)[2]
    assert (unnamed.precision, unnamed.reason) == (None, "the engine's profile does not name it")


def test_several_operators_of_one_layer_count_together(attention):
    lines = audit(ran(computing("value/MatMul", milliseconds=1), computing("value/Conv", "float", 2)), attention)
    assert (lines[2].operator, lines[2].precision, lines[2].milliseconds) == ("value/MatMul, value/Conv", "float", 3)


def test_what_no_calibration_names(attention):
    program = lower(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)).eval(), torch.randn(3, 4))
    lines = audit(ran(computing("0/Gemm", "float"), computing("1/Gemm", "float")), program)
    assert {line.module: line.reason for line in lines} == dict.fromkeys("01", "not in the calibration")


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # torch.export, on the flat weights of a copy
def test_recurrent_layers_and_attention_in_one_operator():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            y = self.memory(x)[0].unsqueeze(1)
            return nn.functional.scaled_dot_product_attention(y, y, y)

    program = lower(Both().eval(), X)
    lines = audit(
        ran(computing("memory/LSTM", "float"), computing("/MatMul", "float", 1), computing("/MatMul_2", "float", 2)),
        program,
    )
    assert [(line.module, line.kind, line.milliseconds) for line in lines] == [
        ("memory", "lstm", 1),
        ("", "scaled_dot_product_attention", 3),
    ]
    assert "floating point" in lines[0].reason
    assert "engine_config() takes it apart" in lines[1].reason


def test_on_an_engine(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, x = net().eval(), torch.randn(4, 1, 6, 6)
    affine = {"quant_scheme": "affine"}
    config_list = [
        {
            "op_names": ["conv1"],
            "target_names": ["weight", "_input_0", "_output_0"],
            "quant_dtype": "int8",
            "target_settings": {"_input_0": affine, "_output_0": affine},
        }
    ]
    speedup = QuantizationSpeedup(model, x, calibrated(model, config_list, x), "onnxruntime")
    compiled = speedup.compile()
    first, second = audit(compiled, speedup.program)
    assert (first.module, first.precision, first.reason) == ("conv1", "int8", "")
    assert first.operator.startswith("conv1/Conv")
    assert (second.module, second.precision, second.reason) == ("conv2", "float", "not in the calibration")
    profiled = {operator.name: operator.milliseconds for operator in compiled.report.operators}
    assert second.milliseconds == profiled[second.operator] > 0
    content = compiled.save(tmp_path / "deployed").joinpath("model.onnx").read_bytes()
    assert b".py" not in content  # no path of a source file


def test_table_has_a_row_for_each():
    lines = audit(ran(computing("0/Gemm", "float")), lower(nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(3, 4)))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(audit_table(lines))
    assert (
        "│ 0      │ linear   │ 0/Gemm            │ float     │ 1.000 │ not in the calibration │"
        in console.export_text()
    )
