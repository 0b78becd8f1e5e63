"""Recipes that prune, quantize and distil at once: the same as the call, and what is wrong is named."""

import io
import json
from unittest import mock

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from rich.console import Console
from torch.nn import functional as F

import tersor
from tersor.checkpoint import load, read_architecture, save
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.errors import CheckpointError, ConfigError, ConflictError, InvalidValueError, TrainingError, UnknownKeyError
from tersor.recipe import Recipe, describe, prepare, prepare_fusion, read_recipe, run_recipe
from tersor.storage import load_calibration
from tersor.testing.checks import assert_equal, flat
from tests.recipe import toy

HOME = "tests.recipe.toy"
pytestmark = pytest.mark.usefixtures("unwrapped")
X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(2))
PRUNING = {
    "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
    "schedule": {"interval_steps": 2, "total_times": 2},
    "dependency_groups": False,
}
QUANTIZATION = {
    "config_list": [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight", "_input_0"], "quant_dtype": "int8"}],
    "arguments": {"quant_start_step": 3},
}
DISTILLATION = {
    "distiller": "LogitDistiller",
    "arguments": {"temperature": 3.0},
    "teacher": f"{HOME}:teacher",
    "teacher_predict": f"{HOME}:brighter",
}
TUNING = {"epochs": 3, "learning_rate": 0.05, "momentum": 0.5}


@pytest.fixture
def recipe(tmp_path):
    def make(**parts):
        whole = {"model": f"{HOME}:net", "data": f"{HOME}:data", "fine_tuning": TUNING}
        return Recipe.parse({**whole, "output": {"directory": str(tmp_path / "run"), "report": False}, **parts}, "r")

    return make


def run(asked, console=None):
    return run_recipe(asked, progress=False, console=console or Console(file=io.StringIO()))


def by_hand(description, teacher, predict=None):
    """What the recipe stands for, written as a call."""
    torch.manual_seed(0)
    model, data = toy.net(), toy.data()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.5)
    evaluator = tersor.TorchEvaluator.from_loader(data.train, F.cross_entropy, optimizer, progress=False)
    compressor = tersor.compress(
        model, description, evaluator, max_epochs=3, teacher_model=teacher, teacher_predict=predict
    )
    final = tersor.finalize(compressor)
    return compressor, final


def numbers(calibration):
    return {
        f"{module}.{target}.{key}": value
        for module, targets in calibration.items()
        for target, said in targets.items()
        for key, value in said.items()
        if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("grouped", [False, True])
def test_a_recipe_is_the_call_bit_for_bit(recipe, grouped):
    result = run(
        recipe(
            pruning={**PRUNING, "dependency_groups": grouped},
            quantization=QUANTIZATION,
            distillation=DISTILLATION,
        )
    )
    config_list = PRUNING["config_list"]
    if grouped:
        config_list = tersor.auto_set_dependency_group_ids(toy.net(), config_list, toy.data().train[0][0])
    compressor, final = by_hand(
        {
            "pruning": {"config_list": config_list, "schedule": PRUNING["schedule"]},
            "quantization": QUANTIZATION,
            "distillation": {name: DISTILLATION[name] for name in ("distiller", "arguments")},
        },
        toy.teacher(),
        toy.brighter,
    )
    compressor.unwrap_model()
    ours = result.compressors
    assert [own.title for own in ours] == [own.title for own in compressor.chain]
    assert_equal(compressor.model.state_dict(), ours[0].model.state_dict(), "of the masked models")
    assert_equal(flat(compressor.chain[0].get_masks()), flat(ours[0].get_masks()), "of the masks")
    assert_equal(numbers(final.calibration), numbers(result.finalized.calibration), "of the scales")
    assert_equal(final.plain().state_dict(), result.finalized.plain().state_dict(), "of the small models")
    assert result.model.conv2.out_channels == 4
    assert result.finalized.error < 1e-4


def test_what_a_run_leaves(recipe, tmp_path):
    text = io.StringIO()
    asked = recipe(pruning=PRUNING, quantization=QUANTIZATION, distillation=DISTILLATION)
    result = run(asked, Console(file=text, width=250))
    assert [line.split("  ")[0] for line in text.getvalue().splitlines()] == list(result.seconds) == [
        "build", "score before", "plan", "train", "finalize", "score after", "save, load", "compare",
    ]  # fmt: skip
    # 4 x 9 + 4, two for each of 4 channels, 4 x 4 x 9 + 4, 2 x 4 + 2
    assert "ToyNet of 206 parameters, relative error" in text.getvalue()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir()) == [
        "architecture.json",
        "calibration.safetensors",
        "model.safetensors",
    ]
    loaded = load(toy.net, tmp_path / "run" / "checkpoint").eval()
    assert torch.equal(loaded(X), result.finalized.plain(bake=True)(X))
    calibration = load_calibration(tmp_path / "run" / "checkpoint" / "calibration.safetensors")
    assert_equal(numbers(result.finalized.calibration), numbers(calibration), "in the file")
    metadata = read_architecture(tmp_path / "run" / "checkpoint").metadata
    assert Recipe.parse(metadata["recipe"]) == asked
    assert metadata["accuracy"]["after"] == result.comparison.after.accuracy
    # 36 positions x (4 x 9 + 4 x 4 x 9) of the convolutions and 4 x 2 of the last layer
    assert result.comparison.after.macs == 6488
    assert {own.target: own.removed for own in result.sparsity} == {"conv1.weight": 4, "conv2.weight": 4}
    document = json.loads(json.dumps(result.to_dict()))
    assert [own["compressor"] for own in document["fused"]["plans"]] == [
        "AGPPruner(L1NormPruner)", "QATQuantizer", "LogitDistiller",
    ]  # fmt: skip
    assert document["fused"]["error"] == result.finalized.error


def test_the_teacher_is_the_model_itself_a_function_or_a_checkpoint(recipe, tmp_path):
    other = toy.teacher()
    save(other, tmp_path / "other")
    named = {"build": f"{HOME}:net", "checkpoint": str(tmp_path / "other")}
    features = [{"op_names": ["conv1"], "apply_method": "mse"}]
    prepared = prepare_fusion(
        recipe(
            distillation=[
                {"distiller": "LogitDistiller", "teacher": named},
                {"config_list": features, "teacher": named},
                {"config_list": [{"op_names": ["conv2"]}]},
            ]
        ),
        progress=False,
    )
    first, second, third = (item.teacher for item in prepared.compressor.chain)
    assert torch.equal(first.model.conv1.weight, other.conv1.weight)
    assert first is second
    assert third.model is prepared.original


def test_quantization_alone_without_training_is_calibrated(recipe):
    asked = recipe(quantization=[QUANTIZATION["config_list"][0]], fine_tuning={"epochs": 0})
    words = describe(asked, prepare_fusion(asked, progress=False))
    assert words["quantizer"].startswith("PtqQuantizer(")
    assert words["calibration"] == "on 2 batches of the training data"
    assert words["training"] == "none"
    result = run(asked)
    # Nothing was trained, and the scale of the first input is its greatest magnitude.
    assert torch.equal(result.finalized.plain().conv1.weight, toy.net().conv1.weight)
    scale = result.finalized.calibration["conv1"]["_input_0"]["scale"].item()
    assert scale == pytest.approx(max(x.abs().max().item() for x, _ in toy.data().train) / 127, rel=0.05)


def test_without_a_quantizer_what_stays_masked_is_zero(recipe, tmp_path):
    pruning = {"pruner": "LevelPruner", "config_list": [{"op_names": ["conv2"], "sparse_ratio": 0.75}]}
    result = run(recipe(pruning=pruning, distillation={"distiller": "LogitDistiller"}))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir()) == [
        "architecture.json",
        "model.safetensors",
    ]
    loaded = load(toy.net, tmp_path / "run" / "checkpoint")
    assert (loaded.conv2.weight == 0).sum().item() == 0.75 * 8 * 8 * 9
    assert result.finalized.calibration == {}


def test_a_distiller_without_a_teacher_takes_none(recipe):
    part = {"distiller": f"{HOME}:Quiet", "config_list": [{"op_names": ["fc"]}]}
    prepared = prepare_fusion(recipe(distillation=part), progress=False)
    assert isinstance(prepared.compressor, toy.Quiet)
    with pytest.raises(ConflictError, match=r"recipe\['distillation'\]\['teacher'\]: Quiet takes no teacher_model"):
        prepare_fusion(recipe(distillation={**part, "teacher": f"{HOME}:teacher"}), progress=False)


def test_several_algorithms_of_a_kind_and_batches_for_one(recipe):
    asked = recipe(
        pruning=[
            {"config_list": [{"op_names": ["conv1"], "sparse_ratio": 0.5}]},
            {
                "pruner": "WandaPruner",
                "calibration_batches": 1,
                "config_list": [{"op_names": ["fc"], "sparse_ratio": 0.5}],
            },
        ],
        quantization={**QUANTIZATION, "arguments": {}},
    )
    prepared = prepare_fusion(asked, progress=False)
    assert [item.title for item in prepared.compressor.chain] == ["L1NormPruner", "WandaPruner", "QATQuantizer"]
    assert len(prepared.compressor.chain[1].calibration) == 1
    words = describe(asked, prepared)
    assert list(words) == ["pruner 1", "pruner 2", "calibration 2", "quantizer", "training"]


def test_a_learning_rate_goes_over_the_steps_that_a_pruner_learns_by(recipe):
    pruning = {"pruner": "SlimPruner", "arguments": {"training_steps": 4, "restores": False}}
    asked = recipe(
        pruning={**pruning, "config_list": [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]},
        distillation={"distiller": "LogitDistiller"},
        fine_tuning={**TUNING, "schedule": "cosine"},
    )
    prepared = prepare_fusion(asked, progress=False)
    assert prepared.evaluator._lr_schedulers.T_max == 6 + 4


def test_a_recipe_survives_json_and_one_that_prunes_alone_stays_what_it_was(recipe):
    asked = recipe(pruning=[PRUNING, PRUNING], quantization=QUANTIZATION["config_list"], distillation=DISTILLATION)
    assert Recipe.parse(json.loads(json.dumps(asked.model_dump(mode="json")))) == asked
    assert asked.alone is None
    alone = recipe(pruning=PRUNING["config_list"])
    assert alone.alone is alone.pruning
    assert alone.pruning.config_list[0].op_types == ("Conv2d",)
    assert prepare(alone, progress=False).pruner.title == "L1NormPruner"
    with pytest.raises(ConflictError, match="more than pruning alone"):
        prepare(asked)


@pytest.mark.skipif(bool(OnnxRuntime.why_not()), reason=OnnxRuntime.why_not())
class TestDeployment:
    @pytest.fixture(autouse=True)
    def leaves_nothing_behind(self):
        """In place of the fixture for all tests: torch.export leaves hooks on modules of its own."""

    def test_what_is_deployed_is_what_was_simulated(self, recipe, tmp_path):
        layers = [{"op_types": ["Conv2d", "Linear"], "quant_dtype": "int8", "fuse_names": [["conv1", "bn1"]]}]
        asked = recipe(
            pruning=PRUNING, quantization={**QUANTIZATION, "config_list": layers}, distillation=DISTILLATION,
            deployment={"engine": "onnxruntime", "threads": 1},
        )  # fmt: skip
        with mock.patch("tersor.recipe.deployment.post_training", side_effect=AssertionError):
            result = run(asked)
        assert (result.deployed.compiled.report.int8, result.deployed.compiled.report.asked) == (3, 3)
        assert result.files["deployment"] == tmp_path / "run" / "deployment"
        with torch.no_grad():
            simulated = result.model.eval()(X)
        torch.testing.assert_close(result.deployed.compiled(X), simulated, rtol=1e-3, atol=1e-4)
        words = describe(asked, prepare_fusion(asked, progress=False))
        assert words["deployment"] == "int8 on ONNX Runtime, as it was quantized"


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ({}, InvalidValueError, r"r: 'pruning' is missing, and so are 'quantization' and 'distillation'"),
        ({"quantisation": QUANTIZATION}, UnknownKeyError, r"r: 'quantisation' is no key.*Did you mean 'quantization'"),
        (
            {"quantization": {**QUANTIZATION, "quantiser": "a"}},
            UnknownKeyError,
            r"r\['quantization'\]: 'quantiser' is no key here.*Did you mean 'quantizer'",
        ),
        (
            {"quantization": [{"op_types": ["Linear"], "quant_dtyp": "int8"}]},
            UnknownKeyError,
            r"r\['quantization'\]\['config_list'\]\[0\].*Did you mean 'quant_dtype'",
        ),
        (
            {"distillation": [{"distiller": "LogitDistiller"}, {"distiller": "LogitDistiller", "techer": "a"}]},
            UnknownKeyError,
            r"r\['distillation'\]\[1\]: 'techer' is no key here.*Did you mean 'teacher'",
        ),
        (
            {"distillation": {**DISTILLATION, "teacher": {"build": "m:f", "checkpont": "a"}}},
            UnknownKeyError,
            r"r\['distillation'\]\['teacher'\]: 'checkpont' is no key.*'checkpoint'",
        ),
        (
            {"distillation": {**DISTILLATION, "teacher": "resnet"}},
            InvalidValueError,
            r"r\['distillation'\]\['teacher'\]\['build'\]: 'resnet' is no import path",
        ),
        (
            {"quantization": QUANTIZATION, "recovery": {}},
            ConflictError,
            r"r\['recovery'\]: recovery follows the pruning of a recipe that asks for nothing else.*Leave it out",
        ),
        (
            {"quantization": QUANTIZATION, "deployment": {"calibration_batches": 2}},
            ConflictError,
            r"r\['deployment'\]\['calibration_batches'\]: what is deployed has the ranges",
        ),
    ],
)
def test_a_wrong_key_is_named(recipe, parts, kind, message):
    with pytest.raises(kind, match=message):
        recipe(**parts)


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        (
            {"pruning": {**PRUNING, "schedule": {"total_times": 2}}, "quantization": QUANTIZATION},
            ConflictError,
            r"recipe\['pruning'\]\['schedule'\]: rounds make the model small in between.*Give interval_steps",
        ),
        (
            {"quantization": {**QUANTIZATION, "quantizer": "QATQuantiser"}},
            InvalidValueError,
            r"recipe\['quantization'\]\['quantizer'\]: 'QATQuantiser' is not known here.*Did you mean 'QATQuantizer'",
        ),
        (
            {"quantization": {**QUANTIZATION, "arguments": {"quant_start_stp": 1}}},
            UnknownKeyError,
            r"recipe\['quantization'\]\['arguments'\]: 'quant_start_stp' is no argument.*mean 'quant_start_step'",
        ),
        (
            {"quantization": {**QUANTIZATION, "calibration_batches": 2}},
            ConflictError,
            r"recipe\['quantization'\]\['calibration_batches'\]: QATQuantizer is not calibrated",
        ),
        (
            {"quantization": [{**QUANTIZATION, "quantizer": "PtqQuantizer", "arguments": {"calibration": [1]}}]},
            UnknownKeyError,
            r"recipe\['quantization'\]\[0\]\['arguments'\]: 'calibration' comes from another part of the recipe",
        ),
        (
            {"distillation": {**DISTILLATION, "arguments": {"teacher_model": 1}}},
            UnknownKeyError,
            r"recipe\['distillation'\]\['arguments'\]: 'teacher_model' comes from another part of the recipe",
        ),
        (
            {"distillation": {"teacher": f"{HOME}:teacher"}},
            ConfigError,
            r"recipe\['distillation'\]: it has no config_list",
        ),
        (
            {"distillation": {**DISTILLATION, "teacher": f"{HOME}:techer"}},
            ConfigError,
            r"recipe\['distillation'\]\['teacher'\]: .*Did you mean 'teacher'",
        ),
        (
            {"distillation": {**DISTILLATION, "teacher_predict": f"{HOME}:not_callable"}},
            ConfigError,
            r"recipe\['distillation'\]\['teacher_predict'\]: .*cannot be called",
        ),
        (
            {"quantization": [{"op_names": ["conv9"], "target_names": ["weight"]}]},
            ConfigError,
            r"recipe\['quantization'\]\['config_list'\]\[0\]\['op_names'\]: 'conv9' matches no module",
        ),
        (
            {"distillation": DISTILLATION, "fine_tuning": {"epochs": 0}},
            TrainingError,
            r"recipe\['fine_tuning'\]\['epochs'\]: LogitDistiller works while the model trains",
        ),
        (
            {"pruning": PRUNING, "quantization": QUANTIZATION, "fine_tuning": {"epochs": 1}},
            TrainingError,
            r"recipe\['fine_tuning'\]: 2 times 2 steps are 4, and 2 are given.*Raise epochs",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_trained(recipe, parts, kind, message):
    with pytest.raises(kind, match=message):
        prepare_fusion(recipe(**parts), progress=False)


def test_a_yaml_file_is_enough(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {HOME}:net\ndata: {HOME}:data\n"
        "pruning:\n- {op_types: [Conv2d], sparse_ratio: 0.5}\n"
        "distillation: {distiller: LogitDistiller}\n"
    )
    prepared = prepare_fusion(read_recipe(path), progress=False)
    assert [item.title for item in prepared.compressor.chain] == ["L1NormPruner", "LogitDistiller"]


def test_an_interrupted_run_goes_on(recipe, tmp_path, monkeypatch):
    asked = recipe(
        pruning=PRUNING,
        quantization=QUANTIZATION,
        distillation=DISTILLATION,
        fine_tuning={**TUNING, "checkpoint_steps": 1},
    )
    whole = run(asked)
    text = io.StringIO()
    with monkeypatch.context() as patched:
        torn = toy.data()
        torn.train = toy.InterruptedLoader(torn.train, passes=3)  # one for the inputs, two epochs
        patched.setattr(toy, "data", lambda: torn)
        with pytest.raises(KeyboardInterrupt):
            run(asked, Console(file=text, width=200))
    assert "training holds the training so far, and the same command goes on with it" in text.getvalue()
    with pytest.raises(CheckpointError, match=r"training: keeps a run that was not finished, of a recipe with another"):
        run(recipe(pruning=PRUNING, quantization=QUANTIZATION, fine_tuning={**TUNING, "checkpoint_steps": 1}))
    again = run(asked, Console(file=text, width=200))
    assert "resume" in text.getvalue()
    assert_equal(again.finalized.plain().state_dict(), whole.finalized.plain().state_dict(), "of the small models")
    assert_equal(numbers(again.finalized.calibration), numbers(whole.finalized.calibration), "of the scales")
    assert not (tmp_path / "run" / "training").exists()
