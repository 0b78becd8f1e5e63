"""What a recipe may say."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from tersor.errors import ConfigError, ConflictError, InvalidValueError, UnknownKeyError
from tersor.recipe import Recipe, read_recipe
from tersor.recipe.pruner import find_algorithm

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
WHOLE = {
    "model": "m:net",
    "data": "m:data",
    "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
    "fine_tuning": {"epochs": 2},
    "output": {"directory": "runs/m"},
}


def changed(**parts):
    recipe = copy.deepcopy(WHOLE)
    for name, value in parts.items():
        recipe[name] = (
            {**recipe[name], **value} if isinstance(value, dict) and isinstance(recipe.get(name), dict) else value
        )
    return recipe


def test_defaults_fill_what_is_left_out(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(WHOLE))
    recipe = read_recipe(path)
    assert (recipe.model.build, recipe.model.checkpoint, recipe.seed, recipe.device) == ("m:net", None, 0, "cpu")
    assert (recipe.fine_tuning.epochs, recipe.fine_tuning.optimizer, recipe.fine_tuning.max_steps) == (2, "SGD", None)
    assert recipe.pruning.config_list[0].op_types == ("Conv2d",)
    assert (recipe.output.checkpoint, recipe.output.onnx, recipe.output.report) == (True, False, True)


def test_recipe_survives_json():
    recipe = Recipe.parse(changed(model={"build": "m:net", "checkpoint": "runs/old"}, output={"batch_sizes": [1, 64]}))
    again = Recipe.parse(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again.model_dump() == recipe.model_dump()
    assert again.output.batch_sizes == (1, 64)
    assert again.model.checkpoint == "runs/old"


def test_pruning_in_full_survives_json():
    schedule = {"pruner": "AGPPruner", "total_times": 4, "initial_ratio": 0, "speedup": True, "best": "maximize"}
    recipe = Recipe.parse(
        changed(
            pruning={"pruner": "TaylorPruner", "arguments": {"training_steps": 5}, "schedule": schedule},
            recovery={"bias": True},
        )
    )
    again = Recipe.parse(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert again == recipe
    assert again.pruning.arguments == {"training_steps": 5}
    assert (again.pruning.schedule.initial_ratio, again.pruning.schedule.interval_steps) == (0.0, None)
    assert (again.recovery.batch_norm, again.recovery.bias, again.recovery.batches) == (True, True, 16)
    assert Recipe.parse(changed()).recovery is Recipe.parse(changed()).pruning.schedule is None


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_name_what_there_is(path):
    recipe = read_recipe(path)
    assert (recipe.alone is None) == (path.stem == "mnist_fused")
    algorithm = find_algorithm(recipe.pruning)
    assert algorithm.pruner.__name__ == recipe.pruning.pruner
    assert algorithm.in_rounds == (path.stem == "mnist_rounds")


def test_config_list_may_be_a_file(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(WHOLE["pruning"]["config_list"]))
    assert Recipe.parse(changed(pruning={"config_list": str(path)})).pruning.config_list[0].op_types == ("Conv2d",)


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ({"sede": 1}, UnknownKeyError, r"r: 'sede' is no key here.*Did you mean 'seed'\?"),
        ({"fine_tuning": {"epoch": 1}}, UnknownKeyError, r"r\['fine_tuning'\]: 'epoch' is no key.*'epochs'"),
        ({"pruning": {"arguments": [1]}}, InvalidValueError, r"r\['pruning'\]\['arguments'\]: \[1\] is no mapping"),
        (
            {"pruning": {"schedule": {"total_time": 4}}},
            UnknownKeyError,
            r"r\['pruning'\]\['schedule'\]: 'total_time' is no key.*'total_times'",
        ),
        ({"pruning": {"schedule": {"total_times": 0}}}, InvalidValueError, r"\['total_times'\]: 0 is no number"),
        ({"pruning": {"schedule": {"initial_ratio": 2}}}, InvalidValueError, r"\['initial_ratio'\]: 2 is no ratio"),
        ({"pruning": {"schedule": {"best": "max"}}}, InvalidValueError, r"\['best'\]: 'max'.*maximize"),
        ({"pruning": {"calibration_batches": 0}}, InvalidValueError, r"\['calibration_batches'\]: 0"),
        ({"recovery": {"batchnorm": True}}, UnknownKeyError, r"r\['recovery'\]: .*'batch_norm'"),
        ({"recovery": {"batches": "all"}}, InvalidValueError, r"r\['recovery'\]\['batches'\]: 'all'"),
        ({"output": {"dir": "a"}}, UnknownKeyError, r"r\['output'\]: 'dir' is no key"),
        ({"pruning": {"prunner": "a"}}, UnknownKeyError, r"r\['pruning'\]: 'prunner' is no key.*'pruner'"),
        ({"model": {"build": "m:net", "checkpont": "a"}}, UnknownKeyError, r"r\['model'\]: .*'checkpoint'"),
        ({"model": {"checkpoint": "a"}}, InvalidValueError, r"r\['model'\]: 'build' is missing"),
        ({"model": "m.net"}, InvalidValueError, r"r\['model'\].*'m\.net' is no import path"),
        ({"data": None}, InvalidValueError, r"r\['data'\]: None is no import path"),
        ({"fine_tuning": {"epochs": 1.5}}, InvalidValueError, r"r\['fine_tuning'\]\['epochs'\]: 1\.5 is no number"),
        ({"fine_tuning": {"max_steps": 0}}, InvalidValueError, r"r\['fine_tuning'\]\['max_steps'\]: 0"),
        ({"fine_tuning": {"learning_rate": -1}}, InvalidValueError, r"\['learning_rate'\]: -1"),
        ({"fine_tuning": [1]}, InvalidValueError, r"r\['fine_tuning'\]: \[1\] is no mapping"),
        ({"output": {"onnx": "yes"}}, InvalidValueError, r"r\['output'\]\['onnx'\]: 'yes' is no flag"),
        ({"output": {"batch_sizes": [0]}}, InvalidValueError, r"\['batch_sizes'\]: 0 is no batch size"),
        ({"output": {"directory": ""}}, InvalidValueError, r"\['directory'\]: '' is no text"),
        ({"device": "gpu"}, InvalidValueError, r"r\['device'\]: 'gpu' is no device"),
        ({"seed": -1}, InvalidValueError, r"r\['seed'\]: -1"),
        (
            {"pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratoi": 0.5}]}},
            UnknownKeyError,
            r"r\['pruning'\]\['config_list'\]\[0\].*Did you mean 'sparse_ratio'\?",
        ),
        ({"pruning": {"config_list": []}}, ConfigError, r"r\['pruning'\]\['config_list'\].*empty"),
    ],
)
def test_wrong_recipe_names_the_place(parts, kind, message):
    with pytest.raises(kind, match=message):
        Recipe.parse(changed(**parts), "r")


def test_missing_part_and_foreign_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m:net\ndata: m:data\n")
    with pytest.raises(InvalidValueError, match=r"recipe\.yaml: 'pruning' is missing"):
        read_recipe(path)
    path.write_text("- 1\n")
    with pytest.raises(InvalidValueError, match=r"recipe\.yaml: \[1\] is no mapping"):
        read_recipe(path)
    path.write_text("model: m:net\nmodel: m:other\n")
    with pytest.raises(ConflictError, match=r"recipe\.yaml: the key 'model' stands twice"):
        read_recipe(path)
