"""Inductor: what it compiles computes what the simulation does, in int8; what it cannot run is refused."""

import dataclasses
import zipfile

import pytest
import torch
import torch._inductor  # slow to import, which is no test's fault
from torch import nn

from tersor.config import FloatDtype, IntDtype
from tersor.deploy import CompiledModel, QuantizationSpeedup, engine_config
from tersor.deploy.engines import engine_of
from tersor.deploy.inductor import Inductor, Machine
from tersor.errors import CheckpointError, InvalidValueError, MissingExtraError
from tersor.quantization import PtqQuantizer

needs_compiler = pytest.mark.skipif(bool(Inductor.why_not()), reason=Inductor.why_not())


class Net(nn.Module):
    """What the patterns match and what they must not: convolutions of one channel or transposed, narrow ranges."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.single = nn.Conv2d(1, 3, 3, padding=1)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.fc = nn.Linear(16, 32)
        self.narrow = nn.Linear(32, 10)

    def forward(self, tokens):
        x = self.single(self.table(tokens).unsqueeze(1))
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(self.conv(x) + x)
        x = self.up(x).mean((2, 3))
        return self.narrow(torch.relu(self.fc(x)))


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    batches = [torch.randint(0, 50, (4, 12)) for _ in range(3)]
    model, config = engine_config(Net().eval(), batches[0], "inductor")
    symmetric = {"quant_dtype": "int6", "quant_scheme": "symmetric"}
    config.append({"op_names": ["narrow"], "target_names": ["_input_0"], "target_settings": {"_input_0": symmetric}})
    tensor = {"quant_dtype": "uint8", "quant_scheme": "symmetric", "granularity": [-1, -1]}
    config.append({"op_names": ["narrow"], "target_names": ["weight"], "target_settings": {"weight": tensor}})
    quantizer = PtqQuantizer(model, config, calibration=batches)
    quantizer.compress()
    return QuantizationSpeedup(quantizer, batches[0], engine="inductor", min_coverage=0.6, threads=1).compile()


@needs_compiler
def test_it_computes_what_the_simulation_does_in_int8(compiled):
    report = compiled.report
    assert report.simulation_snr > 80
    assert report.int8 == 4
    layers = {operator.name: (operator.kind, operator.precision) for operator in report.operators if operator.computes}
    assert layers == {
        "single": ("_convolution_pointwise", "float"),
        "stem": ("_qconv_pointwise_tensor", "int8"),
        "conv": ("_qconv2d_pointwise_binary_tensor", "int8"),
        "up": ("convolution", "float"),
        "fc": ("_qlinear_pointwise_tensor", "int8"),
        "narrow": ("_qlinear_pointwise_tensor", "int8"),
    }
    reasons = {fallback.where: fallback.reason for fallback in report.fallbacks}
    assert sorted(reasons) == ["single", "up"]
    assert "mistakes the layout of what a convolution of one channel gives" in reasons["single"]
    assert "no int8 kernel for aten.conv_transpose2d" in reasons["up"]
    assert all(operator.milliseconds is None for operator in report.operators)


@needs_compiler
def test_its_code_and_its_profile_tell_the_same(compiled, tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Softmax(-1)).eval(), torch.randn(4, 8)
    before, after = (
        QuantizationSpeedup(model, x, engine="inductor", dynamic_batch=False, options=options)
        .compile()
        .report.operators
        for options in ({}, Inductor.timed)
    )
    assert [(own.name, own.kind) for own in before] == [(own.name, own.kind) for own in after]
    assert [own.name for own in before if own.computes] == ["0", "2"]
    assert {own.milliseconds for own in before} == {None}
    assert all(own.milliseconds > 0 for own in after)


@needs_compiler
def test_a_package_is_compressed(compiled):
    with zipfile.ZipFile(compiled.folder / "model.pt2") as package:
        parts = package.infolist()
    assert {part.compress_type for part in parts} == {zipfile.ZIP_DEFLATED}
    assert sum(part.compress_size for part in parts) < 0.5 * sum(part.file_size for part in parts)


@needs_compiler
def test_a_package_is_opened_without_a_compiler_on_a_machine_like_this_one(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingExtraError, match="no C\\+\\+ compiler: no-such-compiler is not found"):
        engine_of("inductor")
    loaded = CompiledModel.load(compiled.save(tmp_path / "saved"))
    tokens, threads = torch.randint(0, 50, (9, 12)), torch.get_num_threads()
    assert torch.equal(loaded(tokens), compiled(tokens))
    assert torch.get_num_threads() == threads

    lesser = dataclasses.replace(Machine.here(), capability="DEFAULT")
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: lesser))
    with pytest.raises(CheckpointError, match=r"model\.pt2: was compiled for a processor with .*, and this is DEFAULT"):
        CompiledModel.load(tmp_path / "saved")


@needs_compiler
def test_settings_of_the_compiler_are_checked(tmp_path):
    speedup = QuantizationSpeedup(nn.Linear(4, 3), torch.zeros(2, 4), engine="inductor", options={"max_autotone": 1})
    with pytest.raises(InvalidValueError, match=r"options: 'max_autotone' is no setting of torch\._inductor\.config"):
        speedup.compile()


def test_what_was_compiled_for_another_machine_is_refused():
    here = dataclasses.replace(Machine.here(), features=("avx2",))
    for changes, message in (
        ({"torch": "2.6.0"}, r"where: was compiled for torch 2\.6\.0, and this is "),
        ({"architecture": "sparc"}, "was compiled for a processor of type sparc, and this is "),
        ({"features": ("avx2", "avx9000")}, "was compiled for a processor with avx9000, which this one lacks"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dataclasses.replace(here, **changes).check("where")


@pytest.mark.parametrize("content", ["junk", "zip"])
def test_what_is_no_package_is_refused(tmp_path, content):
    path = tmp_path / "model.pt2"
    if content == "junk":
        path.write_bytes(b"junk")
    else:
        with zipfile.ZipFile(path, "w") as package:
            package.writestr("model/wrapper_metadata.json", "{}")
    with pytest.raises(CheckpointError, match=r"model\.pt2: is no package that Tersor compiled"):
        Inductor().open(tmp_path, threads=None, options={})


def test_types():
    lacks = Inductor().lacks
    assert lacks(IntDtype(3), is_activation=False) == ""
    assert lacks(IntDtype(8, signed=False), is_activation=True) == ""
    assert lacks(IntDtype(16), is_activation=True) == "has no int16 inputs and outputs"
    assert lacks(FloatDtype(4, 3), is_activation=False) == "has no fp8_e4m3 weights"
