"""The list of pruners says what the classes say."""

import inspect
from types import ModuleType

import pytest
import torch
from torch import nn

import tersor.pruning
from tersor.errors import ConfigError
from tersor.pruning import Pruner
from tersor.recipe.catalogue import catalogue, summary_of

LISTED = catalogue()
VALUES = {"warmup_step": 1, "cooldown_begin_step": 2}


def test_every_pruner_is_listed_once():
    names = [name for name in vars(tersor.pruning) if name.endswith("Pruner") and name not in ("Pruner", "FixedPruner")]
    assert sorted(own.name for kind in (LISTED.pruners, LISTED.schedules) for own in kind) == sorted(names)
    assert [own.name for own in LISTED.schedules] == ["AGPPruner", "LinearPruner", "LotteryTicketPruner"]


@pytest.mark.parametrize("own", [*LISTED.pruners, *LISTED.schedules], ids=lambda own: own.name)
def test_summary_is_one_plain_line(own):
    assert 20 < len(own.summary) < 120
    assert own.summary.endswith(".")
    assert not set("`\\$\n") & set(own.summary)


@pytest.mark.parametrize("own", LISTED.pruners, ids=lambda own: own.name)
def test_example_inputs_are_needed_where_the_class_refuses_to_do_without(own):
    cls = getattr(tersor.pruning, own.name)
    arguments = {name: VALUES[name] for name in inspect.signature(cls).parameters if name in VALUES}
    if "calibration data" in own.needs:
        arguments["calibration"] = [torch.randn(4, 3)]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    try:
        pruner = cls(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], evaluator=None, **arguments)
        pruner.unwrap_model()
        refused = False
    except ConfigError:
        refused = True
    assert refused == ("example inputs" in own.needs)


def test_needs_and_arguments():
    found = {own.name: own for own in (*LISTED.pruners, *LISTED.schedules)}
    assert found["L1NormPruner"].needs == ()
    assert found["OBSPruner"].needs == ("calibration data", "example inputs")
    assert found["TaylorPruner"].needs == ("training before it prunes",)
    assert found["MovementPruner"].needs == ("training while it prunes",)
    assert found["AGPPruner"].needs == ("a pruner",)
    assert found["TaylorPruner"].arguments == ("training_steps=100", "restores=None")
    assert found["MovementPruner"].arguments[:2] == ("warmup_step", "cooldown_begin_step")
    assert found["AGPPruner"].arguments[-1] == "best='latest'"


def test_another_module_can_be_listed():
    class Mine(Pruner):
        """Removes what I say, :math:`s = 1`."""

        def score(self, values, blocks):
            return values

    home = ModuleType("home")
    home.Mine, home.Pruner, home.other = Mine, Pruner, 3
    assert [(own.name, own.summary) for own in catalogue(home).pruners] == [("Mine", "Removes what I say.")]


def test_a_formula_in_the_middle_leaves_the_word_to_the_module():
    class Wide:
        """Between :math:`a` and :math:`b`."""

    assert summary_of(Wide) == "The list of pruners says what the classes say."
