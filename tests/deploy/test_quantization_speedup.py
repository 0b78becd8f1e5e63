"""From simulated to real, and the proof: what departs, or does not run in integers, is not handed out."""

from dataclasses import dataclass

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import Tensor, nn

from tersor.config import IntDtype
from tersor.deploy import QuantizationSpeedup
from tersor.deploy.engine import Operator, Session
from tersor.deploy.lowering import Fallback
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.deploy.quantization_speedup import bytes_of
from tersor.deploy.unsupported import fit_types
from tersor.errors import InvalidValueError, VerificationError
from tersor.quantization import BNNQuantizer
from tests.deploy.lowered import largest_difference, program_of, program_outputs, ptq

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
LAYERS = [
    {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"},
    {"op_types": ["Linear"], "target_names": ["_input_", "_output_"], "quant_dtype": "uint8", "quant_scheme": "affine"},
]


def quantized():
    return ptq(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), LAYERS, X)


class Changed(Session):
    """ONNX Runtime's session with a fault."""

    def __init__(self, session, noise, precision):
        self.session, self.noise, self.precision = session, noise, precision

    def run(self, inputs):
        return [self._disturbed(value) for value in self.session.run(inputs)]

    def _disturbed(self, value):
        if not value.is_floating_point():
            return value
        return value + self.noise * value.std() * torch.randn(value.shape)

    def profile(self, inputs):
        return [Operator(f"layer {index}", "Linear", self.precision, computes=True) for index in range(2)]


def with_fault(monkeypatch, noise=0.0, precision="int8"):
    made = OnnxRuntime.open

    def faulty(self, folder, *, threads, options):
        return Changed(made(self, folder, threads=threads, options=options), noise, precision)

    monkeypatch.setattr(OnnxRuntime, "open", faulty)


def test_an_engine_that_computes_something_else(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with_fault(monkeypatch, noise=0.1)  # 20 dB
    quantizer = quantized()
    speedup = QuantizationSpeedup(quantizer, X, engine="onnxruntime")
    with pytest.raises(VerificationError, match=r"ONNX Runtime: the outputs depart .* 2\d\.\d dB, less than"):
        speedup.compile()
    assert speedup.report is None
    assert list(tmp_path.iterdir()) == []
    with pytest.warns(UserWarning, match="the outputs depart from the simulation's"):
        compiled = QuantizationSpeedup(quantizer, X, engine="onnxruntime", on_failure="warn").compile()
    assert 15 < compiled.report.simulation_snr < 25
    assert compiled.report.floor is not None
    assert 15 < compiled.report.layers.snr < 25
    assert compiled.report.layers.where == ""


def test_an_engine_that_computes_in_floating_point(monkeypatch):
    with_fault(monkeypatch, precision="float")
    with pytest.raises(VerificationError, match="0 of 2 quantized operators run in int8; in floating point: layer 0"):
        QuantizationSpeedup(quantized(), X, engine="onnxruntime").compile()
    compiled = QuantizationSpeedup(quantized(), X, engine="onnxruntime", min_coverage=0).compile()
    assert (compiled.report.asked, compiled.report.int8, compiled.report.coverage) == (2, 0, 0)


def test_the_report():
    quantizer = quantized()
    before = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    before.load_state_dict(
        {name.replace(".parametrizations", ""): tensor for name, tensor in before.state_dict().items()}
    )
    compiled = QuantizationSpeedup(quantizer, X, engine="onnxruntime", float_model=before).compile()
    report = compiled.report
    assert report.simulation_snr >= 40
    assert report.coverage == 1
    assert report.float_snr is not None
    assert report.layers is report.floor is None  # not needed
    assert report.float_bytes == bytes_of(before) == 4 * (8 * 16 + 16 + 16 * 4 + 4)
    assert report.top1 == 1
    assert report.bytes > 0


@dataclass
class Output:
    logits: Tensor
    classes: Tensor


class WithClasses(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x, scale=1.0):
        logits = self.fc(x) * scale
        return Output(logits, logits.argmax(-1))


def test_outputs_of_a_class_and_constants():
    quantizer = ptq(WithClasses(), LAYERS, [(X, 2.0)])
    compiled = QuantizationSpeedup(quantizer, (X, 2.0), engine="onnxruntime", min_coverage=0).compile()
    result = compiled(X[:2])
    assert torch.equal(result["classes"], result["logits"].argmax(-1))
    with pytest.raises(InvalidValueError, match=r"scale: 3\.0 is not what it was compiled for. Legal: 2\.0"):
        compiled(X[:2], 3.0)


def test_settings_that_are_refused():
    with pytest.raises(InvalidValueError, match="on_failure"):
        QuantizationSpeedup(nn.Linear(2, 2), X, on_failure="ignore")
    with pytest.raises(InvalidValueError, match="unsupported"):
        QuantizationSpeedup(nn.Linear(2, 2), X, unsupported="skip")
    with pytest.raises(InvalidValueError, match="'onnx' is no engine"):
        QuantizationSpeedup(nn.Linear(2, 2), X, engine="onnx")
    with pytest.raises(InvalidValueError, match="a calibration of its own"):
        QuantizationSpeedup(quantized(), X, {})


class OnlyBytes(OnnxRuntime.__mro__[1]):
    """An engine that has int8 and uint8 alone."""

    name, title, packages, extra, file = "bytes", "Bytes", (), "", "model"

    def lacks(self, dtype, *, is_activation):
        held = isinstance(dtype, IntDtype) and dtype.bits == 8
        return "" if held else f"has no {dtype.as_config()}"

    def prepare(self, program):
        raise NotImplementedError

    def build(self, program, folder, options):
        raise NotImplementedError

    def open(self, folder, *, threads, options):
        raise NotImplementedError


def mixed():
    kinds = ["int8", "int3", "uint4", "int16", "fp8_e4m3"]
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in kinds))
    config_list = [
        {
            "op_names": [str(index)],
            "target_names": ["weight", "_input_"],
            "quant_dtype": kind,
            "quant_scheme": "symmetric",
        }
        for index, kind in enumerate(kinds)
    ]
    return program_of(ptq(model, config_list, X), X)


def kinds_in(program):
    return {
        str(node.args[3]) for node in program.exported.graph.nodes if node.target is torch.ops.tersor.dequantize.default
    }


def test_types_that_the_engine_lacks():
    program, x = mixed(), 1.5 * torch.randn(5, 8)
    expected = program_outputs(program, x)
    with pytest.raises(
        InvalidValueError,
        match=r"1\.weight: Bytes has no int3 for weights of Linear \(nor 7 others.*unsupported='widen'",
    ):
        fit_types(program, OnlyBytes(), "error")
    wide, fallbacks = fit_types(program, OnlyBytes(), "widen")
    assert kinds_in(wide) == {"int8", "uint8"}
    assert Fallback("1.weight", "Bytes has no int3: stored as int8") in fallbacks
    assert Fallback("3.weight", "Bytes has no int16: its values stay in floating point") in fallbacks
    floating, fallbacks = fit_types(program, OnlyBytes(), "float")
    assert kinds_in(floating) == {"int8"}
    assert len(fallbacks) == 8
    for fitted in (wide, floating):
        assert largest_difference(program_outputs(fitted, x), expected) == 0
    assert kinds_in(program) == {"int8", "int3", "uint4", "int16", "fp8_e4m3"}


def test_signs_in_other_types():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    config_list = [{"op_types": ["Linear"], "target_names": ["weight", "_input_"], "quant_dtype": "int1"}]
    quantizer = BNNQuantizer(model, config_list)
    quantizer.start()
    program, x = program_of(quantizer, X), torch.randn(5, 8)
    expected = program_outputs(program, x)
    for unsupported in ("widen", "float"):
        fitted, fallbacks = fit_types(program, OnlyBytes(), unsupported)
        assert largest_difference(program_outputs(fitted, x), expected) == 0
        assert len(fallbacks) == 4


def test_a_graph_that_was_left_in_training_mode_is_compared_in_eval_mode():
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    traced = torch.fx.symbolic_trace(net).train()
    mean = traced.get_submodule("1").running_mean.clone()
    speedup = QuantizationSpeedup(traced, X, engine="onnxruntime")
    speedup.compile()
    assert speedup.report.simulation_snr > 100
    assert torch.equal(traced.get_submodule("1").running_mean, mean)
    assert traced.training
