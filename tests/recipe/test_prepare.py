"""From the names in a recipe to objects."""

import pytest
import torch
from torch import nn

from tersor.checkpoint import save
from tersor.errors import ConfigError
from tersor.pruning import L2NormPruner
from tersor.recipe import FineTuning, Recipe, build_model, prepare
from tersor.recipe.prepare import build_data, make_optimizer, make_schedule
from tests.recipe import toy

RECIPE = {
    "model": "tests.recipe.toy:net",
    "data": "tests.recipe.toy:data",
    "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
}


def recipe(**parts):
    return Recipe.parse({**RECIPE, **parts})


def test_everything_is_built_and_the_original_is_a_model_of_its_own():
    prepared = prepare(recipe(pruning={**RECIPE["pruning"], "pruner": "L2NormPruner"}))
    assert prepared.pruner is L2NormPruner
    assert prepared.example_inputs.shape == (16, 1, 6, 6)
    assert type(prepared.model) is type(prepared.original)
    assert not set(prepared.model.parameters()) & set(prepared.original.parameters())
    assert prepared.evaluator.train(prepared.model, max_epochs=1).steps == 2


def test_checkpoint_is_loaded_into_what_build_returns(tmp_path):
    network = toy.net()
    nn.init.constant_(network.fc.bias, 7.0)
    save(network, tmp_path / "a")
    assert build_model("tests.recipe.toy:net", str(tmp_path / "a")).fc.bias.tolist() == [7.0, 7.0]


def test_optimizer_options():
    network = nn.Linear(1, 1)
    sgd = make_optimizer(FineTuning(learning_rate=0.5, momentum=0.0, weight_decay=0.1), network)
    assert [sgd.defaults[key] for key in ("lr", "momentum", "weight_decay")] == [0.5, 0.0, 0.1]
    assert isinstance(make_optimizer(FineTuning(optimizer="torch.optim:AdamW"), network), torch.optim.AdamW)
    with pytest.raises(ConfigError, match=r"\['momentum'\]: Adam has no momentum"):
        make_optimizer(FineTuning(optimizer="Adam", momentum=0.5), network)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.1), ("cosine", 0.0), ("one_cycle", 0.1 / 25e4)])
def test_schedules_end_with_the_last_step(schedule, last):
    tuning = FineTuning(schedule=schedule, epochs=3, learning_rate=0.1)
    optimizer = make_optimizer(tuning, nn.Linear(1, 1))
    found = make_schedule(tuning, optimizer, toy.data().train)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if found is not None:
            found.step()
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-6)


def test_a_schedule_needs_a_number_of_steps():
    tuning = FineTuning(schedule="cosine")
    with pytest.raises(ConfigError, match=r"\['schedule'\].*no length.*max_steps"):
        make_schedule(tuning, make_optimizer(tuning, nn.Linear(1, 1)), iter([]))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": "tests.recipe.toy:no_module"}, r"recipe\['model'\]: .* returned dict.*torch\.nn\.Module"),
        ({"model": "tests.recipe.toy:nte"}, r"recipe\['model'\]: .*Did you mean 'net'\?"),
        (
            {"data": "tests.recipe.toy:without_loaders"},
            r"recipe\['data'\]: .*without a data loader.*\.train and \.test",
        ),
        ({"fine_tuning": {"optimizer": "SDG"}}, r"recipe\['fine_tuning'\]\['optimizer'\]: 'SDG'.*'SGD'"),
        ({"fine_tuning": {"loss": "cross_entorpy"}}, r"\['loss'\]: 'cross_entorpy'.*'cross_entropy'"),
        (
            {"pruning": {**RECIPE["pruning"], "pruner": "L1Pruner"}},
            r"recipe\['pruning'\]\['pruner'\]: 'L1Pruner'.*Did you mean 'L1NormPruner'\?",
        ),
        (
            {"pruning": {"config_list": [{"op_names": ["conv9"], "sparse_ratio": 0.5}]}},
            r"\['op_names'\]: 'conv9' matches no module",
        ),
    ],
)
def test_wrong_names_are_found_before_anything_is_trained(parts, message):
    with pytest.raises(ConfigError, match=message):
        prepare(recipe(**parts))


def test_data_may_give_example_inputs_and_metric(monkeypatch):
    rich = toy.data()
    rich.example_input, rich.metric, rich.test = torch.zeros(2, 1, 6, 6), max, None
    monkeypatch.setattr(toy, "data", lambda: rich)
    data = build_data("tests.recipe.toy:data", "")
    assert (data.example_inputs is rich.example_input, data.metric, data.test) == (True, max, None)
