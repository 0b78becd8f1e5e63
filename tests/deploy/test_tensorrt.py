"""TensorRT: what it wants of a program. The engine itself is tested where there is one."""

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.config.dtypes import parse_dtype
from tersor.deploy import CompiledModel, QuantizationSpeedup, engine_config
from tersor.deploy.engines import engine_of, engines
from tersor.deploy.onnx import write_program
from tersor.deploy.tensorrt import TensorRT, operators_of
from tersor.errors import InvalidValueError, MissingExtraError
from tersor.quantization import PtqQuantizer
from tests.deploy.lowered import largest_difference, program_of, program_outputs, ptq

with_tensorrt = pytest.mark.skipif(bool(TensorRT.why_not()), reason=f"TensorRT: {TensorRT.why_not()}")


def layers(*settings):
    """One linear layer for each setting of its input; weights int8."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in settings))
    for layer in model:
        layer.bias.data += 1  # so that ranges are not around zero
    config_list = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"}]
    config_list += [
        {"op_names": [str(index)], "target_names": ["_input_"], **own} for index, own in enumerate(settings)
    ]
    return ptq(model, config_list, torch.randn(16, 8))


def test_it_is_not_here_without_its_package_or_a_gpu(monkeypatch):
    assert engines()["tensorrt"] is TensorRT
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorrt" else object())
    assert TensorRT.why_not() == "not installed: tensorrt"
    with pytest.raises(MissingExtraError, match=r"TensorRT: not installed: tensorrt.*tersor\[tensorrt\]"):
        engine_of("tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert TensorRT.why_not() == "there is no CUDA device"


@pytest.mark.parametrize(
    ("kind", "of_weights", "of_values"),
    [("int8", True, True), ("fp8_e4m3", True, True), ("int4", True, False), ("uint8", False, False),
     ("uint4", False, False), ("int16", False, False), ("fp8_e5m2", False, False), ("int3", False, False)],
)  # fmt: skip
def test_types(kind, of_weights, of_values):
    dtype = parse_dtype(kind)
    for is_activation, has in ((False, of_weights), (True, of_values)):
        reason = TensorRT().lacks(dtype, is_activation=is_activation)
        assert (reason == "") is has
        assert has or kind in reason


def test_what_has_a_zero_point_is_rounded_in_floating_point():
    symmetric, affine = {"quant_scheme": "symmetric"}, {"quant_scheme": "affine"}
    quantizer = layers(
        {"quant_dtype": "int8", **symmetric},
        {"quant_dtype": "uint8", **symmetric},  # around 128
        {"quant_dtype": "uint8", **affine},
        {"quant_dtype": "int8", **affine},
        {"quant_dtype": "int8", "granularity": "per_channel"},
        {"quant_dtype": "int8", "dynamic": True},
        {"quant_dtype": "fp8_e4m3", **symmetric},
    )
    program = program_of(quantizer, torch.randn(2, 8))
    prepared, fallbacks = TensorRT().prepare(program)
    x = 1.5 * torch.randn(5, 8)
    assert largest_difference(program_outputs(prepared, x), program_outputs(program, x)) == 0
    assert [own.reason.partition(":")[0] for own in fallbacks] == [
        "TensorRT has no zero points but 0",
        "TensorRT has no zero points but 0",
        "TensorRT has one scale for an input or output",
        "TensorRT has no dynamic scales",
    ]
    assert [own.where for own in fallbacks] == ["2._input_0", "3._input_0", "4._input_0", "5"]
    kinds = [node.args[3] for node in prepared.exported.graph.nodes if node.target is torch.ops.tersor.quantize.default]
    assert kinds == ["int8", "int8", "fp8_e4m3"]


def test_weights():
    kinds = [
        {"quant_dtype": "int8"},
        {"quant_dtype": "int4", "granularity": [1, 4]},
        {"quant_dtype": "int4"},
        {"quant_dtype": "int8", "granularity": [1, 4]},
        {"quant_dtype": "int8", "quant_scheme": "affine"},
        {"quant_dtype": "fp8_e4m3"},
    ]
    config_list = [{"op_names": [str(at)], "target_names": ["weight"], **own} for at, own in enumerate(kinds)]
    quantizer = ptq(nn.Sequential(*(nn.Linear(8, 8) for _ in kinds)), config_list, torch.randn(16, 8))
    program = program_of(quantizer, torch.randn(2, 8))
    prepared, fallbacks = TensorRT().prepare(program)
    x = torch.randn(5, 8)
    assert largest_difference(program_outputs(prepared, x), program_outputs(program, x)) == 0
    assert [own.where for own in fallbacks] == ["2.weight", "3.weight", "4.weight"]
    assert "int4 in blocks of a matrix alone" in fallbacks[0].reason


def test_the_file_that_the_engine_is_built_from(tmp_path):
    onnx = pytest.importorskip("onnx")
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.randn(4, 1, 4, 4)
    with pytest.MonkeyPatch.context() as patch:  # what it wants can be said without it
        patch.setattr(TensorRT, "why_not", classmethod(lambda cls: ""))
        model, config_list = engine_config(net, x, "tensorrt")
    quantizer = PtqQuantizer(model, config_list, calibration=[x])
    quantizer.compress()
    prepared, fallbacks = TensorRT().prepare(program_of(quantizer, x))
    assert fallbacks == ()
    model = onnx.load(write_program(prepared, tmp_path / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    held = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (2, 4)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = held[node.input[2]]
            assert zero_point.dtype == "int8"
            assert not zero_point.any()
            if node.op_type == "QuantizeLinear":
                assert held[node.input[1]].shape == ()
    weights = [value for value in held.values() if value.ndim > 1]
    assert {value.dtype.name for value in weights} == {"int8"}


def test_unknown_options_are_refused(tmp_path):
    engine, program = TensorRT(), program_of(layers({"quant_dtype": "int8"}), torch.randn(2, 8))
    with pytest.raises(InvalidValueError, match=r"options\['batch'\]: is no option of TensorRT. Legal: min_batch"):
        engine.build(program, tmp_path, {"batch": 3})
    with pytest.raises(InvalidValueError, match="1, 80, 64 do not grow"):
        engine.build(program, tmp_path, {"opt_batch": 80})
    assert list(tmp_path.iterdir()) == []


def test_what_the_inspector_says():
    convolution = {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [{"DataType": "Int8", "Format": "NC/32HW32"}],
    }
    product = {"Name": "fc", "LayerType": "gemm", "Inputs": [{"Format/Datatype": "Row major linear FP32"}]}
    copy = {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Row major Int8 format"}]}
    operators = operators_of({"Layers": [convolution, product, copy, "other"]}, {"conv": 0.25})
    assert [(own.name, own.precision, own.computes) for own in operators] == [
        ("conv", "int8", True),
        ("fc", "float", True),
        ("copy", "int8", False),
        ("other", "float", False),
    ]
    assert [own.milliseconds for own in operators] == [0.25, None, None, None]


@with_tensorrt
def test_int8_runs_on_the_gpu(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(4, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 8)
    )
    x = torch.randn(8, 4, 8, 8)
    model, config_list = engine_config(net.eval(), x, "tensorrt")
    quantizer = PtqQuantizer(model, config_list, calibration=[x])
    quantizer.compress()
    compiled = QuantizationSpeedup(quantizer, x, engine="tensorrt", float_model=net).compile()
    assert compiled.report.coverage == 1
    assert compiled.report.simulation_snr >= min(40, (compiled.report.floor or 46) - 6)
    loaded = CompiledModel.load(compiled.save(tmp_path / "deployed"))
    assert torch.equal(loaded(x), compiled(x))
    with pytest.raises(InvalidValueError, match="is not what the engine was built for"):
        compiled(torch.randn(65, 4, 8, 8))
