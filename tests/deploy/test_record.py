"""The record of a deployment: read without its engine, and told apart from what is damaged."""

import io
import json

import pytest
from rich.console import Console

from tersor.checkpoint import read_architecture
from tersor.deploy import Deployment, DeployReport, read_deployment
from tersor.deploy.engine import Operator
from tersor.deploy.layerwise import Layerwise
from tersor.deploy.lowering import Fallback
from tersor.deploy.record import is_deployment
from tersor.deploy.structure import Input, Signature
from tersor.errors import CheckpointError
from tersor.storage import sha256_of

REPORT = DeployReport(
    "onnxruntime",
    "1.31.1",
    30_000,
    100_000,
    operators=(
        Operator("conv/Conv", "QLinearConv", "int8", 0.5, computes=True),
        Operator("relu", "Relu", "float", 0.25),
        Operator("pool", "MaxPool", "float", 0.5),
    ),
    asked=4,
    int8=1,
    simulation_snr=52.25,
    float_snr=31.5,
    floor=33.0,
    layers=Layerwise(62.5, "fc", 1.0, float("inf")),
    top1=0.5,
    fallbacks=(Fallback("fc.weight", "has no int3"),),
    milliseconds=1.5,
)
SIGNATURE = Signature((Input("x", "float32", (None, 3)),), "tensor")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"what an engine reads")
    record = {
        "format": "tersor-deployment",
        "engine": "onnxruntime",
        "options": {},
        "signature": SIGNATURE.to_dict(),
        "report": REPORT.to_dict(),
        "files": {"model.onnx": sha256_of(tmp_path / "model.onnx")},
    }
    (tmp_path / "deployment.json").write_text(json.dumps(record))
    return tmp_path


def test_what_was_written_is_read(folder):
    found = read_deployment(folder)
    assert found == Deployment(folder, "onnxruntime", {}, SIGNATURE, REPORT, found.files)
    assert found.to_dict()["report"]["coverage"] == 0.25
    found.check_files()
    assert is_deployment(folder)
    assert not is_deployment(folder / "model.onnx")


def test_people_read_it_as_a_table(folder):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(read_deployment(folder))
    text = console.export_text()
    for expected in (
        "onnxruntime 1.31.1",
        "float32 ('any', 3)",
        "30.0 kB, 0.30 of the parameters",
        "1.50 ms",
        "1 of 4 convolutions and products that are quantized",
        "52.2 dB, the same answer for 50.0%",
        "33.0 dB",
        "31.5 dB",
        "has no int3",
        "QLinearConv",
        "2 others",
        "0.750",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("report"), "is damaged .KeyError: 'report'."),
        (lambda record: record["report"].update(speed=3), "is damaged .TypeError: .*speed"),
        (lambda record: record.update(signature=[]), "is damaged .TypeError"),
        (lambda record: record.update(format="zip"), "is no record of a deployment"),
    ],
)
def test_damaged_records(folder, change, message):
    record = json.loads((folder / "deployment.json").read_text())
    change(record)
    (folder / "deployment.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=message):
        read_deployment(folder)


def test_damaged_files(folder, tmp_path):
    (folder / "model.onnx").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"model\.onnx: is damaged: its checksum is another one"):
        read_deployment(folder).check_files()
    (folder / "model.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx: is missing"):
        read_deployment(folder).check_files()
    (folder / "deployment.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        read_deployment(folder)
    with pytest.raises(CheckpointError, match=r"holds no deployment\.json"):
        read_deployment(tmp_path / "nowhere")


def test_a_deployment_is_no_checkpoint_and_the_error_says_what_it_is(folder):
    with pytest.raises(CheckpointError, match=r"is a deployment: .* tersor\.deploy\.CompiledModel\.load"):
        read_architecture(folder)
