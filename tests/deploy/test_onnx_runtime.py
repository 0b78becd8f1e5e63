"""ONNX Runtime computes what a program says, type by type, and in integers where it can."""

import pytest
import torch
from torch import nn

from tersor.config.dtypes import parse_dtype
from tersor.deploy.agreement import snr
from tersor.deploy.lowering import lower
from tersor.quantization import PtqQuantizer

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from tersor.deploy.onnx import write_program  # noqa: E402
from tersor.deploy.onnx_runtime import DISABLED, DISABLED_KEY, FLOATING, INTEGER, OnnxRuntime  # noqa: E402

ROWS = {"quant_dtype": "int8", "granularity": [1, -1]}
BYTES = {"quant_dtype": "uint8", "quant_scheme": "affine"}


def built(net, example, forms, folder):
    torch.manual_seed(0)
    kinds = ["Linear", "Conv2d"]
    kinds = [kind for kind in kinds if any(type(module).__name__ == kind for module in net.modules())]
    config = [{"op_types": kinds, "target_names": list(forms), "target_settings": forms}]
    quantizer = PtqQuantizer(net.eval(), config, calibration=[example])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    program, engine = lower(net, example, calibration), OnnxRuntime()
    prepared, fallbacks = engine.prepare(program)
    engine.build(prepared, folder, {})
    session = engine.open(folder, threads=1, options={})
    (result,) = session.run([example])
    ran = {operator.kind for operator in session.profile([example])}
    return snr(result, program.exported.module()(example)), ran, fallbacks


def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(2, 5, 64)


@pytest.mark.parametrize(
    ("forms", "kernel"),
    [
        ({"weight": ROWS, "_input_0": BYTES}, "MatMulIntegerToFloat"),
        ({"weight": ROWS, "_input_0": {"quant_dtype": "int8"}}, "MatMulIntegerToFloat"),
        ({"weight": ROWS, "_input_0": {"quant_dtype": "int6"}}, "MatMulIntegerToFloat"),
        ({"weight": {**ROWS, "quant_dtype": "int4"}, "_input_0": BYTES}, "MatMulIntegerToFloat"),
        ({"weight": ROWS, "_input_0": {**BYTES, "dynamic": True}}, "DynamicQuantizeMatMul"),
        ({"weight": ROWS, "_input_0": {"quant_dtype": "int8", "dynamic": True}}, "MatMulIntegerToFloat"),
        ({"weight": {"quant_dtype": "int4", "granularity": [1, 32]}}, "MatMulNBits"),
        ({"weight": {"quant_dtype": "fp8_e4m3"}, "_input_0": {"quant_dtype": "fp8_e4m3"}}, "FusedMatMul"),
        ({"weight": ROWS, "_input_0": {"quant_dtype": "int16"}}, "MatMul"),
    ],
    ids=["uint8", "int8", "int6", "int4 weights", "dynamic", "dynamic int8", "blocks", "fp8", "int16"],
)
def test_linear_layers_by_type(forms, kernel, tmp_path):
    decibels, ran, fallbacks = built(*linears(), forms, tmp_path)
    assert decibels > 90
    assert kernel in ran
    assert fallbacks == ()


def test_a_scale_for_each_token_runs_in_floating_point_and_says_so(tmp_path):
    token = {"quant_dtype": "int8", "dynamic": True, "granularity": [-1]}
    decibels, ran, fallbacks = built(*linears(), {"weight": ROWS, "_input_0": token}, tmp_path)
    assert decibels > 90
    assert "MatMulIntegerToFloat" not in ran
    assert [own.where for own in fallbacks] == ["0", "2"]


@pytest.mark.parametrize("activation", [BYTES, {"quant_dtype": "int8"}], ids=["uint8", "int8"])
def test_convolutions_in_integers_with_a_relu_whatever_the_zero_point(activation, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten())
    net, example = nn.Sequential(*net, nn.Linear(16, 3)), torch.randn(2, 4, 10, 10)
    forms = {"weight": {"quant_dtype": "int8"}, "_input_0": activation}
    decibels, ran, _ = built(net, example, forms, tmp_path)
    assert decibels > 40  # one value that lies between two numbers, and is rounded the other way, leaves 55
    assert ran >= {"QLinearConv", "MatMulIntegerToFloat"}
    assert not ran & {"Conv", "FusedConv", "NhwcFusedConv", "Relu", "MaxPool"}


def test_the_file_says_which_optimizers_to_keep_off(tmp_path):
    built(*linears(), {"weight": ROWS, "_input_0": BYTES}, tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map[DISABLED_KEY].split(",") == list(DISABLED)


@pytest.mark.parametrize("kind", ["int3", "uint6", "int12", "int32"])
def test_types_that_it_lacks(kind):
    assert OnnxRuntime().lacks(parse_dtype(kind), is_activation=False) == f"has no {kind}"
    assert OnnxRuntime().lacks(parse_dtype("int4"), is_activation=False) == ""


class Attention(nn.Module):
    """A product with a weight, and two of values."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 48)

    def forward(self, x):
        query, key, value = self.fc(x).chunk(3, -1)
        return (query @ key.transpose(1, 2) / 4).softmax(-1) @ value


def test_products_of_values_are_told_from_those_with_a_weight(tmp_path):
    engine, x = OnnxRuntime(), torch.randn(2, 5, 16)
    program, _ = engine.prepare(lower(Attention().eval(), x))
    engine.build(program, tmp_path, {})
    computing = [
        operator for operator in engine.open(tmp_path, threads=1, options={}).profile([x]) if operator.computes
    ]
    assert [operator.attends for operator in computing] == [False, True, True]


class Padded(nn.Module):
    """Padded as TensorFlow does it, more behind than in front."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3, 2), nn.Conv2d(8, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.second(nn.functional.pad(torch.relu(self.first(nn.functional.pad(x, (0, 1, 0, 1)))), (1, 0, 2, 1)))
        return self.third(nn.functional.pad(x, (1, 1, 1, 1), value=0.5))


def test_convolutions_pad_by_themselves(tmp_path):
    torch.manual_seed(0)
    example = torch.randn(2, 2, 8, 8)
    form = {"weight": {"quant_dtype": "int8"}, "_input_0": BYTES, "_output_0": BYTES}
    decibels, ran, _ = built(Padded(), example, form, tmp_path)
    assert decibels > 90
    assert "QLinearConv" in ran
    assert "Conv" not in ran
    graph = onnx.load(tmp_path / "model.onnx").graph
    # What is not zero stays a pad.
    assert [node.op_type for node in graph.node].count("Pad") == 1
    pads = {node.name: list(own.ints) for node in graph.node for own in node.attribute if own.name == "pads"}
    assert pads == {"first/Conv": [0, 0, 1, 1], "second/Conv": [3, 2, 2, 1], "third/Conv": [0, 0, 0, 0]}
    plain, dense = Padded().eval(), tmp_path / "dense.onnx"
    write_program(lower(plain, example), dense)
    (result,) = onnxruntime.InferenceSession(dense).run(None, {"x": example.numpy()})
    assert torch.allclose(torch.from_numpy(result), plain(example), atol=1e-5)


class Turned(nn.Module):
    """One weight, read as it is and turned."""

    def __init__(self, by_linear):
        super().__init__()
        self.encode = nn.Linear(6, 10)
        self.by_linear = by_linear

    def forward(self, x):
        x = torch.relu(self.encode(x))
        return nn.functional.linear(x, self.encode.weight.t()) if self.by_linear else x @ self.encode.weight


@pytest.mark.parametrize("by_linear", [True, False])
def test_a_weight_whose_scales_are_summed_over_is_floating_there(by_linear, tmp_path):
    """As it is, it runs in integers."""
    torch.manual_seed(0)
    net = Turned(by_linear)
    forms = {"weight": {"quant_dtype": "int8", "granularity": "out_channel"}, "_input_": BYTES, "_output_": BYTES}
    agreed, ran, fallbacks = built(net, torch.randn(4, 6), forms, tmp_path)
    assert agreed > 60
    assert ran & INTEGER
    assert ran & FLOATING
    assert [fallback.reason for fallback in fallbacks] == [
        "its weight has scales along what is summed over: in floating point"
    ]
