"""ExecuTorch: what it computes is what the simulation does, in int8 where XNNPACK has kernels; the rest says why."""

import logging

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn
from torch.nn import functional as F

from tersor.config.dtypes import parse_dtype
from tersor.deploy import CompiledModel, QuantizationSpeedup, engine_config
from tersor.deploy.engines import engine_of, engines
from tersor.deploy.executorch import ExecuTorch
from tersor.deploy.executorch_session import operators_of
from tersor.deploy.lowering import lower
from tersor.errors import CheckpointError, InvalidValueError, MissingExtraError, TraceError
from tersor.quantization import PtqQuantizer
from tests.deploy.lowered import program_of, ptq

needs_executorch = pytest.mark.skipif(bool(ExecuTorch.why_not()), reason=f"ExecuTorch: {ExecuTorch.why_not()}")
BYTE = {"quant_dtype": "int8", "quant_scheme": "affine"}


class Net(nn.Module):
    """What a network of convolutions has: a norm, a pool, a residual sum, a depthwise convolution, linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.MaxPool2d(2)
        self.conv, self.depthwise = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mean, self.fc, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 32), nn.Linear(32, 10)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.conv(x) + x)
        x = F.relu6(self.depthwise(x)) + x
        return self.head(torch.relu(self.fc(self.mean(x).flatten(1))))


class Block(nn.Module):
    """A block of a transformer."""

    def __init__(self):
        super().__init__()
        self.norm, self.query, self.key, self.value = nn.LayerNorm(16), *(nn.Linear(16, 16) for _ in range(3))
        self.out, self.wide, self.narrow = nn.Linear(16, 16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        y = self.norm(x)
        heads = [layer(y).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(x)))


def configured(net, example):
    """What ``engine_config`` gives; it needs no ExecuTorch for that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExecuTorch, "why_not", classmethod(lambda cls: ""))
        return engine_config(net, example, "executorch")


def quantized(net, data):
    model, config = configured(net.eval(), data[0])
    quantizer = PtqQuantizer(model, config, calibration=data)
    quantizer.compress()
    return quantizer


def images(count=4, seed=0):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    quantizer = quantized(Net(), [images(8, seed) for seed in range(3)])
    return QuantizationSpeedup(quantizer, images(), engine="executorch", threads=1).compile()


def test_it_stands_last_and_says_how_to_install_it(monkeypatch):
    assert list(engines()) == ["onnxruntime", "openvino", "inductor", "tensorrt", "executorch"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ExecuTorch.why_not() == "not installed: executorch"
    with pytest.raises(MissingExtraError, match=r"ExecuTorch: not installed: executorch.*tersor\[executorch\]"):
        engine_of("executorch")
    # A folder of that name in the working directory looks like the package.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "executorch" else None)
    assert ExecuTorch.why_not() == "not installed: executorch"


@pytest.mark.parametrize(
    ("kind", "of_weights", "of_values"),
    [("int8", True, True), ("uint8", True, True), ("int4", True, True), ("int1", True, False),
     ("int16", False, False), ("fp8_e4m3", False, False)],
)  # fmt: skip
def test_types(kind, of_weights, of_values):
    for is_activation, has, what in ((False, of_weights, "weights"), (True, of_values, "inputs and outputs")):
        reason = ExecuTorch().lacks(parse_dtype(kind), is_activation=is_activation)
        assert reason == ("" if has else f"has no {kind} {what}")


def test_it_wants_the_outputs_of_linear_layers_rounded_too():
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    _, config = configured(net, torch.randn(2, 4))
    wanted = {
        (name, target): own["target_settings"][target]
        for own in config
        for name in own["op_names"]
        for target in own["target_names"]
    }
    weight = {"quant_dtype": "int8", "quant_scheme": "symmetric"}
    # That of layer 2 is rounded by layer 4, behind the activation.
    assert wanted == {
        ("0", "weight"): weight, ("2", "weight"): weight, ("4", "weight"): weight, ("0", "_input_0"): BYTE,
        ("2", "_input_0"): BYTE, ("4", "_input_0"): BYTE, ("0", "_output_0"): BYTE, ("4", "_output_0"): BYTE,
    }  # fmt: skip


def test_what_a_profile_says():
    events = [
        ("Convert (NC) #1", 0.5), ("Convolution (NHWC, QC8) IGEMM #1", 2.0), ("Invalid Unary Op #1", 0.1),
        ("Fully Connected (NC, F32) GEMM #1", 1.0), ("DELEGATE_CALL", 4.0), ("OPERATOR_CALL", 3.0),
        ("native_call_bmm.out", 3.0), ("Batch Matrix Multiply (NC, F32) GEMM #1", 1.0), ("DELEGATE_CALL", 1.0),
        ("Convolution (NHWC, QC8) IGEMM #1", 2.0), ("DELEGATE_CALL", 2.0), ("Method::execute", 12.0),
    ]  # fmt: skip
    operators = operators_of(events, [["conv", "fc"], [""], ["two", "names"]])
    assert [(own.name, own.precision, own.milliseconds, own.computes, own.attends) for own in operators] == [
        ("Convert (NC)", "float", 0.5, False, False),
        ("conv", "int8", 2.0, True, False),
        ("Invalid Unary Op", "float", 0.1, False, False),
        ("fc", "float", 1.0, True, False),
        ("bmm", "float", 3.0, True, True),
        ("Batch Matrix Multiply (NC, F32) GEMM", "float", 1.0, True, True),
        ("Convolution (NHWC, QC8) IGEMM", "int8", 2.0, True, False),
    ]


def test_unknown_options_are_refused_and_so_are_volumes(tmp_path):
    net, x = nn.Sequential(nn.Conv3d(1, 1, 2)), torch.randn(2, 1, 3, 3, 3)
    program = program_of(ptq(net, [{"op_names": ["0"], "target_names": ["weight"], "quant_dtype": "int8"}], x), x)
    for options, message in (
        ({"max_batches": 3}, r"options\['max_batches'\]: is no option of ExecuTorch. Legal: max_batch"),
        ({"max_batch": 0}, r"options\['max_batch'\]: 0 is no size of a batch"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            ExecuTorch().build(program, tmp_path, options)
    with pytest.raises(TraceError, match=r"0: ExecuTorch has no kernel for aten\.conv3d\.default"):
        ExecuTorch().build(program, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


# With the package


@needs_executorch
def test_it_computes_what_the_simulation_does_in_int8(compiled):
    report = compiled.report
    assert report.simulation_snr > 60
    assert (report.int8, report.asked, report.fallbacks) == (5, 5, ())
    layers = {operator.name: (operator.kind, operator.precision) for operator in report.operators if operator.computes}
    assert layers == {
        "stem": ("Convolution (NHWC, QC8) IGEMM", "int8"),
        "conv": ("Convolution (NHWC, QC8) IGEMM", "int8"),
        "depthwise": ("Convolution (NHWC, QC8) DWConv", "int8"),
        "fc": ("Fully Connected (NC, QS8, QC8W) GEMM", "int8"),
        "head": ("Fully Connected (NC, QS8, QC8W) GEMM", "int8"),
    }
    kinds = [operator.kind for operator in report.operators]
    assert kinds.count("Max Pooling (NHWC, S8)") == 1
    assert kinds.count("Convert (NC)") <= 4  # at the ends of the two parts, and nowhere between
    assert all(operator.milliseconds >= 0 for operator in report.operators)


@needs_executorch
def test_any_batch_up_to_the_largest(compiled):
    x = images(64, seed=5)
    whole = compiled(x)
    for start, count in ((0, 1), (3, 2), (10, 33)):
        assert torch.equal(compiled(x[start : start + count]), whole[start : start + count])
    assert torch.equal(compiled(x.to(memory_format=torch.channels_last)), whole)
    with pytest.raises(
        InvalidValueError, match=r"input 0: \(65, 3, 12, 12\) is larger than \(64, 3, 12, 12\), for which"
    ):
        compiled(torch.cat([x, x[:1]]))


@needs_executorch
def test_saved_and_loaded_by_sessions_that_share_the_threads_of_the_process(compiled, tmp_path):
    x, handlers = images(3, seed=7), list(logging.root.handlers)
    expected = compiled(x)
    loaded = CompiledModel.load(compiled.save(tmp_path / "saved"), threads=2)
    for _ in range(3):  # what was loaded with other threads must not run with these
        assert torch.equal(loaded(x), expected)
        assert torch.equal(compiled(x), expected)
    assert logging.root.handlers == handlers
    assert {file.name for file in (tmp_path / "saved").iterdir()} == {"model.pte", "modules.json", "deployment.json"}


@needs_executorch
@pytest.mark.parametrize("damage", ["junk", "half", "names"])
def test_damaged_files_are_refused(compiled, tmp_path, damage):
    content = (compiled.folder / "model.pte").read_bytes()
    (tmp_path / "model.pte").write_bytes(
        {"junk": b"junk" * 99, "half": content[: len(content) // 2]}.get(damage, content)
    )
    if damage != "names":
        (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(
        CheckpointError, match=r"modules\.json: cannot be read" if damage == "names" else "cannot open it"
    ):
        ExecuTorch().open(tmp_path, threads=None, options={})


@needs_executorch
def test_a_fixed_batch_in_floating_point():
    net, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    compiled = QuantizationSpeedup(net, x, engine="executorch", dynamic_batch=False).compile()
    assert compiled.report.simulation_snr > 100
    assert [own.name for own in compiled.report.operators if own.computes] == ["0", "2"]
    with pytest.raises(InvalidValueError):
        compiled(torch.randn(4, 8))
    with pytest.raises(TraceError, match=r"ExecuTorch cannot run it: .*error 0x"):
        compiled.session.run([torch.randn(2, 8)])


@needs_executorch
@pytest.mark.parametrize(("example", "options", "largest"), [(4, {"max_batch": 9}, 9), (70, {}, 71)])
def test_the_largest_batch_is_as_asked_or_holds_the_example(example, options, largest, tmp_path):
    engine, program = ExecuTorch(), lower(nn.Linear(3, 2), torch.randn(example, 3))
    engine.build(program, tmp_path, options)
    session = engine.open(tmp_path, threads=1, options=options)
    assert session.run([torch.randn(largest, 3)])[0].shape == (largest, 2)
    with pytest.raises(InvalidValueError, match=r"options={'max_batch': \.\.\.}"):
        session.run([torch.randn(largest + 1, 3)])
    assert {str(own.upper) for own in program.exported.range_constraints.values()} == {"int_oo"}


@needs_executorch
def test_a_block_of_a_transformer():
    torch.manual_seed(0)
    data = [torch.randn(6, 5, 16) for _ in range(3)]
    quantizer = quantized(Block(), data)
    report = QuantizationSpeedup(quantizer, data[0], engine="executorch", dynamic_batch=False).compile().report
    assert report.simulation_snr > 40
    computing = {own.name: own.precision for own in report.operators if own.computes and not own.attends}
    assert computing == dict.fromkeys(("query", "key", "value", "out", "wide", "narrow"), "int8")
    assert sum(own.attends for own in report.operators) == 2
