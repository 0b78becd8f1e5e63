"""The conformance suite passes on a pruner that is right and fails on each way to be wrong."""

import contextlib
import itertools
from unittest import SkipTest

import pytest
import torch
import torch.distributed as dist

from tersor.errors import EmptyLayerError
from tersor.pruning import Pruner
from tersor.pruning.decision import as_asked
from tersor.pruning.learning import LearningPruner
from tersor.testing import PrunerTestCase
from tersor.testing import pruner as suite_module

TESTS = [name for name in vars(PrunerTestCase) if name.startswith("test_")]


class SquarePruner(Pruner):
    """The example of the suite's docstring."""

    def score(self, values, blocks):
        return blocks.tiles(values).square().sum(blocks.inside)


class TestSquarePruner(PrunerTestCase):
    def pruner(self, model, config_list, evaluator, **kwargs):
        return SquarePruner(model, config_list, evaluator, **kwargs)


class DrawsAnew(SquarePruner):
    """Not the same twice."""

    draws = itertools.count()

    def score(self, values, blocks):
        return torch.rand(blocks.grid, generator=torch.Generator().manual_seed(next(self.draws)))


class RemovesLess(SquarePruner):
    def prune(self, ratio_now=as_asked):
        super().prune(lambda *setting: 0.6 * ratio_now(*setting))


class RemovesAllAtOnce(SquarePruner):
    """Deaf to schedules."""

    def prune(self, ratio_now=None):
        super().prune()


class ChangesTheConfigList(SquarePruner):
    def __init__(self, model, config_list, *args, **kwargs):
        config_list[0]["granularity"] = "default"
        super().__init__(model, config_list, *args, **kwargs)


class RemovesElements(SquarePruner):
    """Whatever the granularity, the first elements in place of the first blocks."""

    def apply_decision(self, keep):
        masks = {}
        for target in self._scored():
            mask = torch.ones(target.blocks.shape, dtype=torch.bool)
            mask.view(-1)[: int((~keep[target.name]).sum()) * target.blocks.block_numel + 1] = False
            masks.setdefault(target.config.module_name, {})[target.config.target_name] = mask
        self._apply(masks)


class DecidesEachByItself(SquarePruner):
    """Members of a dependency group lose different channels."""

    def apply_decision(self, keep):
        super().apply_decision({name: own.roll(number) for number, (name, own) in enumerate(keep.items())})


class ChangesWeights(SquarePruner):
    def apply_decision(self, keep):
        super().apply_decision(keep)
        for target in self._scored():
            self._latent(target).add_(0.01)


class LeavesAHook(SquarePruner):
    handles = []

    def on_start(self):
        self.handles.append(self.model.left.register_forward_hook(print_nothing))
        super().on_start()


def print_nothing(module, args, output):
    """A hook."""


class TellsOtherMasks(SquarePruner):
    """Its masks are not those that are simulated."""

    def get_masks(self, *, completed=False):
        masks = super().get_masks(completed=completed)
        return {module: {name: mask.roll(1, 0) for name, mask in own.items()} for module, own in masks.items()}


class ForgetsTheSums(LearningPruner):
    """Watches gradients, and saves none of what it has seen."""

    def begin(self):
        self.sums = {}

    def observe(self):
        for target in self._scored():
            latent = self.wrappers[target.config.module_name].tensor(target.config.target_name)
            self.sums[target.name] = self.sums.get(target.name, 0) + (latent * latent.grad).detach().square()

    def collect(self):
        return self.sums

    def score(self, values, blocks):
        return blocks.tiles(values).sum(blocks.inside)


class RefusesLate(ForgetsTheSums):
    """Trains first, and sees only then that nothing would be left."""

    def refuse_impossible(self):
        pass


class DecidesByRank(SquarePruner):
    def apply_decision(self, keep):
        rank = dist.get_rank() if dist.is_initialized() else 0
        super().apply_decision({name: own.roll(rank) for name, own in keep.items()})


class PrunesInTheEnd(SquarePruner):
    """As NNI does: a training that is fused with it sees the whole model."""

    def on_start(self):
        pass

    def on_finish(self):
        self.prune()


class TrainsAlone(SquarePruner):
    """The others get no share in the training."""

    def on_train(self, max_steps, max_epochs):
        if max_steps is not None:
            self._trainer.train(self.model, max_steps=max_steps)
        return True


class MasksLittle(SquarePruner):
    """What is masked is nearly zero."""

    def _apply(self, masks):
        super()._apply(masks)
        for target in self.plan.targets:
            self.wrappers.mask(*target.place).method = "add"
            self.wrappers.mask(*target.place).value = -0.001


class PassesOverWhatItCannotDo(SquarePruner):
    def prune(self, ratio_now=as_asked):
        with contextlib.suppress(EmptyLayerError):
            super().prune(ratio_now)

    def refuse_nothing(self):
        pass

    def refuse_impossible(self):
        pass


BROKEN = [
    (DrawsAnew, "the_same_seed_gives_the_same_masks", "not the same in a second run: .*mask of left.weight"),
    (RemovesLess, "each_target_loses_its_share", "144 of 432 elements of left.weight are masked; 288 were asked for"),
    (RemovesLess, "least_and_greatest_ratios", "of left.weight are masked"),
    (RemovesLess, "a_global_group_loses_its_share", "were asked for"),
    (ChangesTheConfigList, "each_target_loses_its_share", "the caller's config list became .*granularity"),
    (RemovesElements, "whole_channels_leave", "rows of left.weight are masked in part"),
    (RemovesElements, "each_target_loses_its_share", "289 of 432"),
    (DecidesEachByItself, "a_dependency_group_shares_one_mask", "their masks differ"),
    (ChangesWeights, "unwrapping_gives_the_model_back", "not the same after unwrap_model: left.weight"),
    (LeavesAHook, "unwrapping_gives_the_model_back", "hooks are left behind: .*print_nothing.* on left"),
    (TellsOtherMasks, "masked_equals_small", "outputs of the small model: they differ"),
    (TellsOtherMasks, "masks_travel", "after update_masks"),
    (ForgetsTheSums, "an_interrupted_run_goes_on", "not the same when step [123] was the last before a crash"),
    (ForgetsTheSums, "an_interrupted_schedule_goes_on", "not the same when step (5|11) was the last before a crash"),
    (DecidesByRank, "two_processes_agree", "not the same in the other process: mask of left.weight by evaluator"),
    (PrunesInTheEnd, "pruned_before_the_first_step_of_a_fused_run", r"\[0, 0, 0, 0, 0, 0\] elements are masked"),
    (TrainsAlone, "fused_with_a_quantizer_and_a_distiller", "the distiller saw 0 of 6 steps"),
    (MasksLittle, "fused_with_a_quantizer_and_a_distiller", "is not zero where it is masked"),
    (RemovesAllAtOnce, "schedules_in_one_run", r"LinearPruner: \[0, 344, 344, 344\] .*; \[0, 88, 256, 344\]"),
    (RemovesAllAtOnce, "schedules_in_rounds", "the share that is gone does not grow"),
    (PassesOverWhatItCannotDo, "a_ratio_of_one_is_refused", "EmptyLayerError was not raised"),
    (RefusesLate, "a_ratio_of_one_is_refused", "4 steps were trained before EmptyLayerError"),
    (PassesOverWhatItCannotDo, "nothing_to_prune_is_refused", "ConfigError was not raised"),
]


def suite(pruner_class, **attributes):
    """The suite for a pruner with no arguments, or few training steps."""
    steps = {"training_steps": 4} if hasattr(pruner_class, "watched_steps") else {}

    def pruner(self, model, config_list, evaluator, **kwargs):
        return pruner_class(model, config_list, evaluator, **steps, **kwargs)

    return type("Case", (PrunerTestCase,), {"pruner": pruner, **attributes})()


@pytest.mark.parametrize(("broken", "test", "message"), BROKEN, ids=[f"{of[0].__name__}-{of[1]}" for of in BROKEN])
def test_what_is_wrong_is_found(broken, test, message):
    with pytest.raises(AssertionError, match=message):
        getattr(suite(broken), f"test_{test}")()
    while LeavesAHook.handles:
        LeavesAHook.handles.pop().remove()


def test_each_test_has_a_pruner_that_fails_it():
    assert {f"test_{test}" for _, test, _ in BROKEN} == set(TESTS)


@pytest.mark.parametrize(
    ("attributes", "test", "reason"),
    [
        ({"channels": None}, "masked_equals_small", "it removes no whole channels"),
        ({"joined": ()}, "a_dependency_group_shares_one_mask", "no modules are joined"),
        ({"schedulable": False}, "schedules_in_rounds", "no schedule can be put over it"),
        ({"trains": True}, "pruned_before_the_first_step_of_a_fused_run", "while the model trains"),
    ],
)
def test_what_a_pruner_cannot_do_is_skipped_with_a_reason(attributes, test, reason):
    with pytest.raises(SkipTest, match=reason):
        getattr(suite(SquarePruner, **attributes), f"test_{test}")()


def test_where_processes_cannot_be_joined_the_test_is_skipped(monkeypatch):
    monkeypatch.setattr(suite_module, "why_not_two", lambda: "no gloo here")
    with pytest.raises(SkipTest, match="no gloo here"):
        suite(SquarePruner).test_two_processes_agree()


def test_a_suite_without_a_pruner_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        PrunerTestCase()
