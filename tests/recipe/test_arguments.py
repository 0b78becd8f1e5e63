"""Arguments by name, checked against a constructor."""

import pytest

from tersor.errors import InvalidValueError, UnknownKeyError
from tersor.pruning import ADMMPruner, L1NormPruner, MovementPruner, SparseGPTPruner, TaylorPruner, WandaPruner
from tersor.recipe.arguments import arguments_of, check_arguments, placed


class Open:
    def __init__(self, model, **options):
        pass


class Unresolved:
    def __init__(self, scale: "NoSuchType" = 1.0):  # noqa: F821 - that is the case
        pass


def test_what_the_recipe_says_elsewhere_is_no_argument():
    assert list(arguments_of(SparseGPTPruner)) == ["block_size", "damping"]
    assert list(arguments_of(L1NormPruner)) == []


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (TaylorPruner, {}),
        (TaylorPruner, {"training_steps": 5, "restores": None}),
        (SparseGPTPruner, {"damping": 1}),  # as good as 1.0
        (ADMMPruner, {"granularity": "coarse-grained", "rho": 0.5}),
        (MovementPruner, {"warmup_step": 1, "cooldown_begin_step": 2}),
        (Open, {"anything": 1}),
        (Unresolved, {"scale": "any"}),
    ],
)
def test_fitting_arguments_pass(cls, arguments):
    check_arguments(cls, arguments, "here")


@pytest.mark.parametrize(
    ("cls", "arguments", "kind", "message"),
    [
        (
            TaylorPruner,
            {"training_step": 5},
            UnknownKeyError,
            r"here: 'training_step' is no argument of TaylorPruner\. Legal: training_steps, restores\. "
            r"Did you mean 'training_steps'\?",
        ),
        (L1NormPruner, {"p": 1}, UnknownKeyError, r"'p' is no argument of L1NormPruner\. Legal: none"),
        (WandaPruner, {"calibration": 8}, UnknownKeyError, "'calibration' comes from another part of the recipe"),
        (Open, {"model": 1}, UnknownKeyError, "'model' comes from another part"),
        (
            MovementPruner,
            {"warmup_step": 5},
            InvalidValueError,
            r"here: MovementPruner needs 'cooldown_begin_step'.*Give \{cooldown_begin_step: \.\.\.\}",
        ),
        (TaylorPruner, {"training_steps": 2.5}, InvalidValueError, r"here\['training_steps'\]: 2\.5 .*Legal: int"),
        (TaylorPruner, {"training_steps": True}, InvalidValueError, "True is not accepted"),
        (TaylorPruner, {"restores": "yes"}, InvalidValueError, r"here\['restores'\].*Legal: bool \| None"),
        (ADMMPruner, {"rho": "1e-4"}, InvalidValueError, r"'1e-4' .*Legal: float\. .*as in 1\.0e-4"),
        (ADMMPruner, {"granularity": "fine"}, InvalidValueError, r"Legal: 'fine-grained' \| 'coarse-grained'"),
    ],
)
def test_mistakes_are_named(cls, arguments, kind, message):
    with pytest.raises(kind, match=message):
        check_arguments(cls, arguments, "here")


def test_only_an_argument_gets_its_place():
    with pytest.raises(InvalidValueError, match=r"^here\['p'\]: 0 is no norm"), placed(["p"], "here"):
        raise InvalidValueError("0 is no norm.", where="p")
    with pytest.raises(InvalidValueError, match=r"^config_list\[0\]: wrong"), placed(["p"], "here"):
        raise InvalidValueError("wrong.", where="config_list[0]")
