"""From a trained model to an artefact: the recipe's part, and which form of a model a calibration belongs to."""

import copy
import warnings

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault

from tersor.deploy import engine_config
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.errors import InvalidValueError, UnmatchedError
from tersor.quantization import PtqQuantizer
from tersor.recipe import Recipe, build_data, deploy, prepare, run_recipe
from tersor.recipe.deployment import _heard, fitting_model
from tersor.recipe.words import describe
from tests.deploy.toy import data, net

WHERE = "tests.deploy.toy"
X = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))
needs_engine = pytest.mark.skipif(bool(OnnxRuntime.why_not()), reason=OnnxRuntime.why_not())


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """In place of the fixture for all tests: torch.export leaves hooks on modules of its own."""


def recipe(tmp_path, **deployment):
    return Recipe.parse(
        {
            "model": f"{WHERE}:net",
            "data": f"{WHERE}:data",
            "pruning": {"config_list": [{"op_names": ["conv1"], "sparse_ratio": 0.5}]},
            "fine_tuning": {"epochs": 0},
            "deployment": deployment,
            "output": {"directory": str(tmp_path)},
        }
    )


def calibrated(model, config_list):
    quantizer = PtqQuantizer(model, config_list, calibration=[X])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    return calibration


def test_a_calibration_finds_the_form_of_the_model_that_it_was_made_on():
    model = net().eval()
    weights = [{"op_names": ["conv1", "conv2"], "target_names": ["weight"], "quant_dtype": "int8"}]
    calibration = calibrated(copy.deepcopy(model), weights)
    assert fitting_model(model, X, calibration) is model
    folded, _ = engine_config(model, X)
    calibration = calibrated(folded, weights)
    found = fitting_model(model, X, calibration)
    # A norm of small variance makes the weights before it larger, for which the scales were not made.
    assert torch.equal(found.conv1.weight, folded.conv1.weight)
    assert not torch.equal(found.conv1.weight, model.conv1.weight)
    with pytest.raises(
        UnmatchedError, match=r"calibration\['conv3'\]: the model has no such module\. Did you mean 'conv"
    ):
        fitting_model(model, X, {"conv3": {}})


@needs_engine
def test_deployed_model_is_measured_and_scored():
    given = build_data(f"{WHERE}:data", "data")
    model = net()
    deployed = deploy(model, given, engine="onnxruntime", calibration_batches=2, threads=1, batch_sizes=[2])
    report = deployed.compiled.report
    assert (report.asked, report.int8) == (2, 2)
    assert report.milliseconds == 1000 * deployed.timings.way("onnxruntime int8").latency[2].median
    assert 20 < report.float_snr < 80
    (inputs, targets) = data().test[0]
    right = (deployed.compiled(inputs).argmax(1) == targets).float().mean().item()
    assert deployed.accuracy == (1.0, right)
    assert [(line.module, line.precision) for line in deployed.lines] == [("conv1", "int8"), ("conv2", "int8")]
    assert model.training
    document = deployed.to_dict()
    assert document["report"]["int8"] == 2
    assert len(document["audit"]) == 2


@needs_engine
def test_a_recipe_goes_from_a_model_to_an_artefact(tmp_path):
    result = run_recipe(recipe(tmp_path, engine="onnxruntime", threads=1), progress=False)
    assert result.files["deployment"] == tmp_path / "deployment"
    assert (tmp_path / "deployment" / "model.onnx").is_file()
    assert result.deployed.compiled.report.int8 == 2
    with torch.no_grad():
        small = result.model.eval()(X)
    assert result.model.conv1.out_channels == 4
    error = (result.deployed.compiled(X) - small).norm() / small.norm()
    assert error < 0.1
    assert result.to_dict()["deployed"]["report"]["asked"] == 2


def test_words_and_wrong_keys(tmp_path):
    asked = recipe(tmp_path, calibration_batches=1)
    assert describe(asked, prepare(asked, progress=False))["deployment"] == (
        "int8 on the first engine that is installed, calibrated on 1 batch of the training data"
    )
    with pytest.raises(InvalidValueError, match=r"\['engine'\]: 'openvno' is not known here.*Did you mean 'openvino'"):
        recipe(tmp_path, engine="openvno")
    with pytest.raises(InvalidValueError, match=r"\['calibration_batches'\]: 0 is no number of batches"):
        recipe(tmp_path, calibration_batches=0)


def test_a_missing_engine_is_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ImportError, match=r"ONNX Runtime: not installed: onnx, onnxscript, onnxruntime"):
        run_recipe(recipe(tmp_path, engine="onnxruntime"), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_warnings_of_an_engine_become_notes_and_others_stay():
    def work():
        with _heard("OpenVINO: ", notes):
            warnings.warn("OpenVINO: 3 dB", stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)

    notes = []
    with pytest.warns(DeprecationWarning, match="old") as caught:
        work()
    assert notes == ["OpenVINO: 3 dB"]
    assert len(caught) == 1
