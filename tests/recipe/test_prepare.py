"""From the names in a recipe to objects."""

import pytest
import torch
from torch import nn

from tersor.checkpoint import save
from tersor.errors import ConfigError, TrainingError
from tersor.pruning import AGPPruner, L2NormPruner
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
    assert isinstance(prepared.pruner, L2NormPruner)
    assert prepared.pruner.model is prepared.model
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


PRUNING = RECIPE["pruning"]


def groups(prepared):
    return {
        target.name: target.config.spec.as_config().get("dependency_group_id")
        for target in prepared.pruner.plan.targets
    }


def test_pruner_gets_its_arguments_and_the_schedule_stands_over_it(tmp_path):
    schedule = {"total_times": 3, "initial_ratio": 0.2, "speedup": True, "best": "maximize"}
    prepared = prepare(
        recipe(
            pruning={**PRUNING, "pruner": "TaylorPruner", "arguments": {"training_steps": 7}, "schedule": schedule},
            output={"directory": str(tmp_path / "run")},
        )
    )
    assert isinstance(prepared.pruner, AGPPruner)
    assert (prepared.pruner.pruner.training_steps, prepared.pruner.total_times) == (7, 3)
    assert prepared.pruner.ratio_at(0.5, 1) == pytest.approx(0.5 - 0.3 * (2 / 3) ** 3)
    assert prepared.algorithm.in_rounds
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("asked", "count"), [(None, 2), (1, 1)])
def test_first_batches_of_the_training_data_calibrate(asked, count):
    prepared = prepare(recipe(pruning={**PRUNING, "pruner": "OBSPruner", "calibration_batches": asked}))
    expected = toy.data().train[:count]
    assert len(prepared.pruner.calibration) == count
    for (x, _), (own, _) in zip(prepared.pruner.calibration, expected, strict=True):
        assert torch.equal(x, own)


def test_only_what_loses_whole_channels_is_grouped(monkeypatch):
    def add(self, x):
        x = self.conv1(x)
        return self.fc((x + self.conv2(x)).mean((2, 3)))

    monkeypatch.setattr(toy.ToyNet, "forward", add)
    names = ["conv1.weight", "conv2.weight"]
    found = groups(prepare(recipe()))
    assert found["conv1.weight"] == found["conv2.weight"] is not None
    for pruner in ("LevelPruner", "WandaPruner", "ADMMPruner"):
        found = groups(prepare(recipe(pruning={**PRUNING, "pruner": pruner})))
        assert [found[name] for name in names] == [None, None]
    coarse = {**PRUNING, "pruner": "ADMMPruner", "arguments": {"granularity": "coarse-grained"}}
    found = groups(prepare(recipe(pruning=coarse)))
    assert found["conv1.weight"] == found["conv2.weight"] is not None


def test_isomorphic_groups_are_added():
    prepared = prepare(
        recipe(
            pruning={"config_list": [{"op_names": ["0", "1"], "sparse_ratio": 0.5}], "isomorphic_groups": True},
            model="tests.recipe.toy:three_layers",
        )
    )
    specs = {target.name: target.config.spec.global_group_id for target in prepared.pruner.plan.targets}
    assert (specs["0.weight"], specs["1.weight"]) == ("isomorphic_0", "isomorphic_0")


def test_learning_rate_lasts_as_long_as_learning_and_fine_tuning():
    tuning = {"epochs": 2, "schedule": "cosine", "learning_rate": 0.1}
    for pruner, steps in (("ADMMPruner", 3 * 5 + 4), ("TaylorPruner", 4)):
        pruning = {**PRUNING, "pruner": pruner, "arguments": {"training_steps": 5}}
        prepared = prepare(recipe(pruning=pruning, fine_tuning=tuning))
        (state,) = prepared.evaluator.state_dict()["lr_schedulers"]
        assert state["T_max"] == steps


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_more_steps_can_be_watched_than_fine_tuning_has(schedule):
    pruning = {**PRUNING, "pruner": "TaylorPruner", "arguments": {"training_steps": 9}}
    prepared = prepare(recipe(pruning=pruning, fine_tuning={"epochs": 1, "schedule": schedule, "learning_rate": 0.1}))
    before = prepared.evaluator.state_dict()["optimizers"][0]["param_groups"][0]["lr"]
    prepared.pruner.start()
    prepared.pruner.unwrap_model()
    after = prepared.evaluator.state_dict()["optimizers"][0]["param_groups"][0]["lr"]
    assert after == pytest.approx(before)  # all was put back
    assert sum(own.removed for own in prepared.pruner.sparsity()) == 8


MOVEMENT = {"warmup_step": 1, "cooldown_begin_step": 2}


@pytest.mark.parametrize(
    ("pruning", "parts", "kind", "message"),
    [
        (
            {"pruner": "AGPPruner"},
            {},
            ConfigError,
            r"\['pruner'\]: AGPPruner is a schedule.*schedule: \{pruner: AGPPruner\}",
        ),
        ({"pruner": "torch.nn:Linear"}, {}, ConfigError, "is not a class of that kind"),
        (
            {"arguments": {"training_steps": 5}},
            {},
            ConfigError,
            r"recipe\['pruning'\]\['arguments'\]: 'training_steps' is no argument of L1NormPruner",
        ),
        (
            {"pruner": "TaylorPruner", "arguments": {"training_steps": 0}},
            {},
            ConfigError,
            r"\['arguments'\]\['training_steps'\]: 0 is no number of steps",
        ),
        ({"calibration_batches": 3}, {}, ConfigError, r"\['calibration_batches'\]: L1NormPruner is not calibrated"),
        ({"schedule": {"pruner": "L1NormPruner"}}, {}, ConfigError, "Legal: AGPPruner, LinearPruner, Lottery"),
        ({"schedule": {"pruner": "APGPruner"}}, {}, ConfigError, r"Did you mean 'AGPPruner'\?"),
        (
            {"schedule": {"pruner": "LinearPruner", "initial_ratio": 0.1}},
            {},
            ConfigError,
            r"\['schedule'\]: 'initial_ratio' is no argument of LinearPruner",
        ),
        ({"schedule": {"reset_weight": False}}, {}, ConfigError, "'reset_weight' is no argument of AGPPruner"),
        (
            {"schedule": {"pruner": "LotteryTicketPruner", "speedup": True}},
            {},
            ConfigError,
            r"\['speedup'\]: LotteryTicketPruner does not",
        ),
        ({"schedule": {"interval_steps": 1, "speedup": True}}, {}, ConfigError, "belong to rounds"),
        (
            {"pruner": "MovementPruner", "arguments": MOVEMENT, "schedule": {}},
            {},
            ConfigError,
            r"\['schedule'\]: MovementPruner has a schedule of its own",
        ),
        ({"pruner": "MovementPruner"}, {}, ConfigError, "needs 'warmup_step' and 'cooldown_begin_step'"),
        (
            {"schedule": {"best": "maximize"}},
            {"data": "tests.recipe.toy:untested_data"},
            ConfigError,
            "without test data",
        ),
        ({"schedule": {}}, {"recovery": {}}, ConfigError, r"\['recovery'\]: .* AGPPruner prunes many times"),
        (
            {"pruner": "MovementPruner", "arguments": MOVEMENT},
            {"recovery": {}},
            ConfigError,
            "MovementPruner prunes many times",
        ),
        ({}, {"recovery": {"batch_norm": False}}, ConfigError, "nothing is to be recovered"),
        ({"pruner": "LevelPruner", "isomorphic_groups": True}, {}, ConfigError, "no target loses whole channels"),
        (
            {"schedule": {"interval_steps": 10, "total_times": 3}},
            {},
            TrainingError,
            r"recipe\['fine_tuning'\]: 3 times 10 steps are 30, and 2 are given\. Raise epochs or max_steps",
        ),
        (
            {"pruner": "MovementPruner", "arguments": {**MOVEMENT, "cooldown_begin_step": 9}},
            {},
            TrainingError,
            r"recipe\['fine_tuning'\]: 2 steps of training are less than 9",
        ),
        (
            {"pruner": "MovementPruner", "arguments": MOVEMENT},
            {"fine_tuning": {"epochs": 0}},
            TrainingError,
            r"\['epochs'\]: MovementPruner works while the model trains",
        ),
        (
            {"schedule": {"pruner": "LotteryTicketPruner"}},
            {"fine_tuning": {"epochs": 0}},
            TrainingError,
            r"\['epochs'\]: LotteryTicketPruner works while",
        ),
        (
            {"schedule": {"pruner": "LotteryTicketPruner", "rewind_steps": 3}},
            {},
            TrainingError,
            r"\['rewind_steps'\]: the first training has 2 steps.*Legal: 0 to 2",
        ),
    ],
)
def test_wrong_ways_to_prune_are_found_before_anything_is_trained(pruning, parts, kind, message):
    with pytest.raises(kind, match=message):
        prepare(recipe(pruning={**PRUNING, **pruning}, **parts))


def test_data_may_give_example_inputs_and_metric(monkeypatch):
    rich = toy.data()
    rich.example_input, rich.metric, rich.test = torch.zeros(2, 1, 6, 6), max, None
    monkeypatch.setattr(toy, "data", lambda: rich)
    data = build_data("tests.recipe.toy:data", "")
    assert (data.example_inputs is rich.example_input, data.metric, data.test) == (True, max, None)
