"""A compiled model: called, saved, loaded; what is wrong is said in one line."""

import gc
import json

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy import CompiledModel, QuantizationSpeedup
from tersor.deploy.record import DeployReport
from tersor.errors import CheckpointError, InvalidValueError
from tests.deploy.lowered import ptq

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x, *, shift):
        value = self.fc(x)
        return {"value": value, "moved": value + shift, "class": value.argmax(-1)}


X, SHIFT = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4)


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    example = {"shift": SHIFT, "x": X}  # not in the order of forward
    config_list = [
        {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"},
        {"op_types": ["Linear"], "target_names": ["_input_"], "quant_dtype": "uint8", "quant_scheme": "affine"},
    ]
    quantizer = ptq(TwoOutputs(), config_list, [example])
    return QuantizationSpeedup(quantizer, example, engine="onnxruntime", min_coverage=0).compile()


def test_called_like_the_model(compiled):
    result = compiled(X[:3], shift=SHIFT[:3])
    assert list(result) == ["value", "moved", "class"]
    torch.testing.assert_close(result["moved"], result["value"] + 1)
    assert torch.equal(result["class"], result["value"].argmax(-1))
    assert compiled.report.simulation_snr > 100
    assert compiled.latency({"x": X, "shift": SHIFT}, repeats=3, seconds=0.5).median > 0


def test_calls_that_do_not_fit(compiled):
    with pytest.raises(InvalidValueError, match=r"x: float32 \(6, 7\)"):
        compiled(X[:, :7], shift=SHIFT)
    with pytest.raises(InvalidValueError, match="x: float64"):
        compiled(X.double(), shift=SHIFT)
    with pytest.raises(InvalidValueError, match="called with 1 positional"):
        compiled(X)
    with pytest.raises(InvalidValueError, match="called with 2 positional"):
        compiled(X, SHIFT, SHIFT=SHIFT)
    with pytest.raises(InvalidValueError, match="batches of different sizes"):
        compiled(X, shift=SHIFT[:2])


def test_saved_and_loaded(compiled, tmp_path):
    folder = compiled.save(tmp_path / "deployed")
    loaded = CompiledModel.load(folder, threads=1)
    expected, result = compiled(X, shift=SHIFT), loaded(X, shift=SHIFT)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert loaded.report == compiled.report
    loaded.save(folder)  # onto itself
    assert torch.equal(CompiledModel.load(folder)(X, shift=SHIFT)["value"], expected["value"])
    assert [path.name for path in tmp_path.iterdir()] == ["deployed"]


def test_reports_are_json(compiled):
    text = json.dumps(compiled.report.to_dict())
    assert DeployReport.from_dict(json.loads(text)) == compiled.report
    report = DeployReport("x", "1", 2, 3, simulation_snr=float("inf"), asked=4, int8=3)
    assert DeployReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.coverage == 0.75


def test_a_foreign_folder_is_left_alone(compiled, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidValueError, match=r"holds something else\. Name a new folder"):
        compiled.save(tmp_path)
    with pytest.raises(InvalidValueError, match="holds something else"):
        compiled.save(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def damaged(folder, how):
    record = json.loads((folder / "deployment.json").read_text())
    if how == "missing file":
        (folder / "model.onnx").unlink()
    elif how == "flipped byte":
        content = bytearray((folder / "model.onnx").read_bytes())
        content[100] ^= 1
        (folder / "model.onnx").write_bytes(content)
    elif how == "cut record":
        (folder / "deployment.json").write_text("{")
    elif how == "another record":
        (folder / "deployment.json").write_text('{"format": "other"}')
    else:
        del record["signature"]
        (folder / "deployment.json").write_text(json.dumps(record))


@pytest.mark.parametrize("how", ["missing file", "flipped byte", "cut record", "another record", "cut signature"])
def test_damage_is_found(compiled, tmp_path, how):
    folder = compiled.save(tmp_path / "deployed")
    damaged(folder, how)
    with pytest.raises(CheckpointError, match="deployed"):
        CompiledModel.load(folder)
    with pytest.raises(CheckpointError, match="nowhere"):
        CompiledModel.load(tmp_path / "nowhere")


def test_temporary_folders_vanish():
    model = nn.Sequential(nn.Linear(8, 4))
    made = QuantizationSpeedup(model, X, engine="onnxruntime").compile()
    folder = made.folder
    assert (folder / "model.onnx").exists()
    del made
    gc.collect()
    assert not folder.exists()
