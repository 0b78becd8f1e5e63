"""Is a pruner right? A suite that prunes a small network in every way that a config list and a schedule allow."""

from __future__ import annotations

import copy
import math
import tempfile
from pathlib import Path
from unittest import SkipTest

import torch
from torch import Tensor

from tersor.errors import ConfigError, EmptyLayerError, TersorError
from tersor.pruning.schedule import ScheduledPruner
from tersor.speedup import ModelSpeedup
from tersor.speedup.verify import outputs_of
from tersor.storage import load_masks, save_masks
from tersor.testing.checks import (
    assert_equal,
    assert_exact,
    assert_same_outputs,
    assert_zero_where_masked,
    decided,
    elements_of,
    flat,
    hooks_of,
    mask_of,
    removed,
    values_of,
)
from tersor.testing.lifecycle import assert_nothing_left, by_both_ways
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.testing.scenarios import RATIO, Pruning, PruningScenarios
from tersor.testing.toys import EXAMPLE, FRESH, ToyNetwork, ToyTraining


class PrunerTestCase(PruningScenarios):
    """What must hold for every pruner; subclass it for each of your own.

    Exact shares in every mode of the config list, one result for one seed and on every process, models that come back
    as they were, masks that travel, runs that go on after a crash, quantizers and distillers beside it, schedules over
    it, and errors where nothing can be done. Each is a test on a network of 1,181 parameters; all take about a second.

    Say by :meth:`~tersor.testing.scenarios.PruningScenarios.pruner` how one is made, and by the attributes of
    :class:`tersor.testing.scenarios.PruningScenarios` what it cannot do. A test of that is skipped with the reason.

    Example, in a file that pytest collects::

        class SquarePruner(Pruner):
            def score(self, values, blocks):
                return blocks.tiles(values).square().sum(blocks.inside)

        class TestSquarePruner(PrunerTestCase):
            def pruner(self, model, config_list, evaluator, **kwargs):
                return SquarePruner(model, config_list, evaluator, **kwargs)
    """

    # Ratios

    def test_each_target_loses_its_share(self) -> None:
        """Of each target 0.75 of the blocks are masked, rounded down; the caller's config list is as before."""
        config_list = self._config()
        before = copy.deepcopy(config_list)
        with self._pruned(config_list) as pruning:
            deciding = {target.config.module_name for target in decided(pruning.pruner)}
            assert deciding == set(self.modules), f"targets of {sorted(deciding)} alone are pruned"
            assert_exact(pruning.pruner, RATIO)
            assert config_list == before, f"the caller's config list became {config_list}"

    def test_whole_channels_leave(self) -> None:
        """By output channels, each row of a weight is masked in whole or not at all."""
        with self._pruned(self._by_channels()) as pruning:
            masks = pruning.pruner.get_masks()
            for target in decided(pruning.pruner):
                rows = _rows(mask_of(masks, target))
                assert torch.equal(rows.all(1), rows.any(1)), f"rows of {target.name} are masked in part"
            assert_exact(pruning.pruner, RATIO)

    def test_least_and_greatest_ratios(self) -> None:
        """``max_sparse_ratio`` and ``min_sparse_ratio`` bound what a ratio removes, exactly."""
        for ratio, bounds, reached in ((0.75, {"max_sparse_ratio": 0.5}, 0.5), (0.25, {"min_sparse_ratio": 0.6}, 0.6)):
            with self._pruned(self._config(ratio, **bounds)) as pruning:
                assert_exact(pruning.pruner, reached)

    def test_a_global_group_loses_its_share(self) -> None:
        """All targets of a group together lose 0.75 of their elements, short of that by less than one block."""
        if not self.groups:
            raise SkipTest("it ranks no targets against each other")
        with self._pruned(self._config(global_group_id="all")) as pruning:
            targets, masks = decided(pruning.pruner), pruning.pruner.get_masks()
            asked = math.floor(RATIO * sum(mask_of(masks, target).numel() for target in targets))
            largest = max(target.blocks.block_numel * target.parts for target in targets if target.blocks)
            gone = sum(removed(mask_of(masks, target)) for target in targets)
            assert asked - largest < gone <= asked, f"{gone} elements are masked; {asked} were asked for"

    def test_a_dependency_group_shares_one_mask(self) -> None:
        """Two convolutions whose outputs are added lose the same channels, 6 of 8."""
        if not self.joined:
            raise SkipTest("no modules are joined")
        with self._pruned(self._by_channels(dependency_group_id="sum", op_names=list(self.joined))) as pruning:
            masks = pruning.pruner.get_masks()
            lives = [_rows(masks[name]["weight"]).any(1) for name in self.joined]
            assert all(torch.equal(lives[0], other) for other in lives), f"their masks differ: {lives}"
            assert removed(lives[0]) == 6, f"{removed(lives[0])} of 8 channels are masked; 6 were asked for"

    # The same each time, and everywhere

    def test_the_same_seed_gives_the_same_masks(self) -> None:
        """Two runs give masks and weights that are equal bit by bit."""
        found: list[dict[str, Tensor]] = []
        for _ in range(2):
            with self._pruned(self._config()) as pruning:
                found.append(pruning.result())
        assert_equal(found[0], found[1], "in a second run")

    def test_two_processes_agree(self) -> None:
        """Two processes that see different halves of the data come to the same masks and weights."""
        if reason := why_not_two():
            raise SkipTest(reason)

        def on_half(rank: int) -> dict[str, Tensor]:
            return by_both_ways(
                lambda way: self._pruning(self._config(), way, rank=rank),
                lambda pruning: self._compress(pruning.pruner),
                self._loop,
                self.steps,
            )

        assert_equal(*in_two_processes(on_half), "in the other process")

    # Nobody's property

    def test_unwrapping_gives_the_model_back(self) -> None:
        """Weights, buffers, modes and hooks are as before; one that learns leaves a model that computes the same."""
        with self._pruning(self._config()) as pruning:
            model = pruning.model
            pruning.pruner.unwrap_model()
            before, hooks, modes = values_of(model), hooks_of(model), [module.training for module in model.modules()]
            pruning.pruner.wrap_model()
            self._compress(pruning.pruner)
            simulated = outputs_of(model, FRESH)
            pruning.pruner.unwrap_model(bake=self._may_learn)
            assert_nothing_left(model, hooks)
            assert [module.training for module in model.modules()] == modes, "modules are in another mode"
            if self._may_learn:
                assert_same_outputs(model, FRESH, simulated, self.tolerance, "outputs of the baked model")
            else:
                assert_equal(before, values_of(model), "after unwrap_model")

    # What is simulated is what comes out

    def test_masked_equals_small(self) -> None:
        """What ``ModelSpeedup`` makes of the masks computes what the masked model does, at another batch size."""
        with self._pruned(self._by_channels()) as pruning:
            masked, masks = outputs_of(pruning.model, FRESH), pruning.pruner.get_masks()
            pruning.pruner.unwrap_model()
            small = ModelSpeedup(pruning.model, EXAMPLE, masks).speedup_model()
            before, after = (sum(of.numel() for of in model.parameters()) for model in (ToyNetwork(), small))
            assert after < before, f"all {before} parameters are still there"
            assert_same_outputs(small, FRESH, masked, self.tolerance, "outputs of the small model")

    def test_masks_travel(self) -> None:
        """Masks mean the same to a pruner of another model with the same weights, handed over or by a file."""
        with self._pruned(self._config()) as pruning, tempfile.TemporaryDirectory() as folder:
            simulated, masks = outputs_of(pruning.model, FRESH), copy.deepcopy(pruning.pruner.get_masks())
            file = save_masks(masks, Path(folder) / "masks.safetensors")
            assert_equal(flat(masks), flat(load_masks(file)), "in the file")
            pruning.pruner.unwrap_model()
            for given in (masks, file):
                model = copy.deepcopy(pruning.model)
                other = self.pruner(model, self._config(), ToyTraining(model).evaluator, example_inputs=EXAMPLE)
                try:
                    other.update_masks(given)
                    assert_equal(flat(masks), flat(other.get_masks()), "after update_masks")
                    assert_same_outputs(model, FRESH, simulated, self.tolerance, "outputs under masks from elsewhere")
                finally:
                    other.unwrap_model()

    # Crashes

    def test_an_interrupted_run_goes_on(self) -> None:
        """A loop that ends after some of its steps and goes on in new objects comes to the same bits.

        New objects load what ``torch.save`` wrote, with ``weights_only=True``.
        """
        self._assert_goes_on(self.steps, sorted({1, 2, self.steps // 2, self.steps - 1}))

    def test_an_interrupted_schedule_goes_on(self) -> None:
        """The same under a schedule."""
        for schedule in self._schedules(interval_steps=self.steps, total_times=2):
            self._assert_goes_on(2 * self.steps, [self.steps - 1, self.steps, 2 * self.steps - 1], schedule)

    # With others

    def test_fused_with_a_quantizer_and_a_distiller(self) -> None:
        """One training run serves all three, whichever was made first, and masked values are exactly zero."""
        for first in (True, False):
            with self._fused(first=first) as (pruning, distiller):
                pruning.pruner.compress(max_steps=self.steps)
                assert_exact(pruning.pruner, RATIO)
                assert_zero_where_masked(pruning.pruner)
                seen, runs = len(distiller.losses), [len(run) for run in pruning.training.runs]
                assert seen == self.steps, f"the distiller saw {seen} of {self.steps} steps"
                assert runs[-1] == self.steps, f"they ran for {runs} steps; the last run was to be of {self.steps}"

    def test_pruned_before_the_first_step_of_a_fused_run(self) -> None:
        """Who needs no training has pruned when that of the others begins."""
        if self.trains:
            raise SkipTest("its masks are made while the model trains")
        for first in (True, False):
            with self._fused(first=first) as (pruning, _):
                history = pruning.history()
                pruning.pruner.compress(max_steps=self.steps)
                asked = sum(elements_of(RATIO, target) for target in decided(pruning.pruner))
                reached = history[-self.steps :]
                assert reached == [asked] * self.steps, (
                    f"{reached} elements are masked at each step; {asked} were asked for"
                )

    # Step by step

    def test_schedules_in_one_run(self) -> None:
        """Each pruning of a schedule removes exactly what is due by then, and never less than before."""
        times, steps = 3, 3 * self.steps + 1
        for schedule in self._schedules(interval_steps=self.steps, total_times=times):
            with self._pruning(self._config(), schedule=schedule) as pruning:
                made, history = pruning.pruner, pruning.history()
                assert isinstance(made, ScheduledPruner)
                made.compress(max_steps=steps)
                ratios = [0.0, *(made.ratio_at(RATIO, number) for number in range(1, times + 1))]
                due = [sum(elements_of(ratio, target) for target in decided(made)) for ratio in ratios]
                reached = history[-steps :: self.steps]
                assert reached == due, f"{type(made).__name__}: {reached} elements are masked; {due} were due"
                assert history == sorted(history), f"{type(made).__name__}: fewer are masked than before: {history}"
                assert_exact(made, RATIO)

    def test_schedules_in_rounds(self) -> None:
        """What is gone grows from round to round, up to exactly what was asked for."""
        for schedule in self._schedules(total_times=3):
            with self._pruning(self._config(), schedule=schedule) as pruning:
                made = pruning.pruner
                assert isinstance(made, ScheduledPruner)
                made.compress(max_steps=1)
                gone = [of.removed for of in made.rounds]
                assert len(gone) == 3, f"{len(gone)} of 3 rounds were run"
                assert 0 < gone[0] <= gone[1] <= gone[2] > gone[0], f"the share that is gone does not grow: {gone}"
                assert_exact(made, RATIO)

    # Refusals

    def test_a_ratio_of_one_is_refused(self) -> None:
        """An empty layer is an error, before any training, and leaves no mask behind."""
        with self._pruning(self._config(1.0)) as pruning:
            self._assert_refuses(pruning, EmptyLayerError)

    def test_nothing_to_prune_is_refused(self) -> None:
        """A config list that comes to nothing is an error, before any training."""
        with self._pruning([{"op_names": list(self.modules)}]) as pruning:
            self._assert_refuses(pruning, ConfigError)

    def _assert_refuses(self, pruning: Pruning, error: type[TersorError]) -> None:
        before = values_of(pruning.model)
        try:
            self._compress(pruning.pruner)
        except error:
            steps = sum(len(run) for run in pruning.training.runs)
            assert not steps, f"{steps} steps were trained before {error.__name__}"
            assert not pruning.pruner.get_masks(), f"masks are left behind after {error.__name__}"
            assert_equal(before, values_of(pruning.model), f"after {error.__name__}")
        else:
            raise AssertionError(f"{error.__name__} was not raised")


def _rows(mask: Tensor) -> Tensor:
    return mask.reshape(len(mask), -1)
