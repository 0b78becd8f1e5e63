"""``tersor deploy``, and deployments in ``inspect`` and ``compare``: what they print, and every mistake in one line."""

import importlib.util
import json
import sys
import warnings

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from typer.testing import CliRunner

from tersor.checkpoint import save
from tersor.cli import app
from tersor.deploy import CompiledModel, engine_config
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.quantization import PtqQuantizer
from tersor.storage import save_calibration
from tests.deploy.toy import TwoConvolutions, data, net

TOY = "tests.deploy.toy"
BUILD = ("--build", f"{TOY}:net")
DATA = ("--data", f"{TOY}:data")
pytestmark = pytest.mark.skipif(bool(OnnxRuntime.why_not()), reason=OnnxRuntime.why_not())


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """In place of the fixture for all tests: torch.export leaves hooks on modules of its own."""


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint."""
    return save(net(), tmp_path_factory.mktemp("deploy") / "model")


@pytest.fixture(scope="module")
def deployed(folder):
    """What the command printed, and the folder that it wrote."""
    warnings.simplefilter("ignore")  # as on the command line; the fixture is none of the tests
    result = run("deploy", folder, *BUILD, *DATA, "--engine", "onnxruntime", "--audit", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    return result, folder.parent / "model-onnxruntime"


def test_deploy_writes_a_folder_and_prints_figures_and_audit(deployed, folder):
    result, written = deployed
    assert sorted(path.name for path in written.iterdir()) == ["deployment.json", "model.onnx"]
    for expected in (
        "2 of 2 convolutions and products that are quantized",
        "100.00 % -> ",
        "onnxruntime int8",
        "onnxruntime fp32",
        "eager fp32",
        "conv1/Conv",
        f"Written to {written}.",
    ):
        assert expected in result.stdout
    compiled = CompiledModel.load(written)
    (inputs, _) = data().test[0]
    with torch.no_grad():
        exact = net().eval()(inputs)
    assert (compiled(inputs) - exact).norm() < 0.1 * exact.norm()
    assert compiled.report.milliseconds > 0


def test_inspect_shows_the_record_of_a_deployment(deployed):
    document = json.loads(run("inspect", deployed[1], "--json").stdout)
    assert (document["engine"], document["report"]["int8"], document["report"]["asked"]) == ("onnxruntime", 2, 2)
    assert "QLinearConv" in run("inspect", deployed[1]).stdout


def test_compare_takes_a_deployment(deployed, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)  # whose compiler takes its time
    result = run("compare", f"{TOY}:net", deployed[1], *DATA, "--json")
    names = [own["name"] for own in json.loads(result.stdout)["side_by_side"]["ways"]]
    assert names[0] == "eager fp32"
    assert {"onnxruntime fp32", "onnxruntime int8", "after, onnxruntime int8"} <= set(names)


def test_compare_without_engines_stays_what_it_was():
    document = json.loads(run("compare", f"{TOY}:net", f"{TOY}:net", *DATA, "--json").stdout)
    assert "side_by_side" not in document
    assert document["ratios"]["macs"] == 1


def test_a_calibration_beside_the_checkpoint_is_used_and_json_is_all_that_is_printed(tmp_path):
    network, config_list = engine_config(net(), data().test[0][0], "onnxruntime")
    quantizer = PtqQuantizer(network, config_list[:1], calibration=[data().test[0][0]])  # weights alone
    _, calibration = quantizer.compress()
    save(net(), tmp_path / "model")
    save_calibration(calibration, tmp_path / "model" / "calibration.safetensors")
    result = run(
        "deploy", tmp_path / "model", *BUILD, *DATA, "--engine", "onnxruntime", "--out", tmp_path / "out", "--json"
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["directory"] == str(tmp_path / "out")
    assert [line["reason"] for line in document["audit"]] == ["weights only: its input is not quantized"] * 2
    assert document["report"]["asked"] == 0


def test_smaller_models_are_held_against_the_original(tmp_path, monkeypatch):
    def slower(before, after, example_inputs, engine, *, threads):
        return (f"{before.conv1.out_channels} to {after.conv1.out_channels} with {threads} threads on {engine}",)

    monkeypatch.setattr("tersor.recipe.deployment.slower_layers", slower)
    save(TwoConvolutions(4), tmp_path / "small")
    result = run("deploy", tmp_path / "small", *BUILD, *DATA, "--engine", "onnxruntime", "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert "8 to 4 with 1 threads on onnxruntime" in result.stdout
    assert CompiledModel.load(tmp_path / "small-onnxruntime").report.int8 == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", *BUILD, *DATA), "nowhere: is no checkpoint"),
        (("MODEL", *DATA), "whose code is not known"),
        (("MODEL", *BUILD), "no data to calibrate and to measure with. Give --data, or --recipe."),
        (("MODEL", *BUILD, *DATA, "--engine", "onnxruntme"), "Did you mean 'onnxruntime'?"),
        (("MODEL", *BUILD, "--data", f"{TOY}:dat"), "Did you mean 'data'?"),
        (
            ("MODEL", *BUILD, "--data", f"{TOY}:failing_data"),
            "--data: 'tests.deploy.toy:failing_data' failed (FileNotFoundError: pictures.npz).",
        ),
        (("MODEL", *BUILD, "--data", f"{TOY}:empty_data"), "--data: 'tests.deploy.toy:empty_data' gave no batch."),
        (("MODEL", "--build", "torch.nn:ReLU", *DATA), "is the checkpoint of another model"),
        (
            ("MODEL", *BUILD, *DATA, "--calibration", "nowhere.safetensors"),
            "nowhere.safetensors: there is no such file.",
        ),
        (("MODEL", *BUILD, *DATA, "--out", "src"), "src: is there and holds something else. Name a new folder."),
    ],
)
def test_mistakes_are_one_clear_line_and_exit_code_1(folder, arguments, message):
    result = run("deploy", *(folder if argument == "MODEL" else argument for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_wrong_words_are_wrong_usage(folder):
    result = run("deploy", folder, *BUILD, *DATA, "--on-failure", "shrug")
    assert result.exit_code == 2
    assert "'error', 'warn'" in result.stderr


def test_a_missing_engine_is_told_with_what_installs_it(folder, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "openvino" else there(name, *a))
    result = run("deploy", folder, *BUILD, *DATA, "--engine", "openvino")
    assert result.exit_code == 1
    assert "OpenVINO: not installed: openvino. Install it: pip install 'tersor[openvino]'." in result.stderr


def test_damaged_deployments(deployed, tmp_path):
    (tmp_path / "model.onnx").write_bytes((deployed[1] / "model.onnx").read_bytes()[:-1])
    (tmp_path / "deployment.json").write_text((deployed[1] / "deployment.json").read_text())
    for arguments in (("inspect", tmp_path), ("compare", f"{TOY}:net", tmp_path, *DATA)):
        result = run(*arguments)
        assert result.exit_code == 1
        assert "model.onnx: is damaged: its checksum is another one" in result.stderr
    (tmp_path / "deployment.json").write_text("{}")
    assert "is no record of a deployment" in run("inspect", tmp_path).stderr
    assert "is a deployment, which has no groups" in run("inspect", deployed[1], "--groups").stderr
    result = run("deploy", deployed[1], *BUILD, *DATA)
    assert "is a deployment: a file for an engine" in result.stderr
