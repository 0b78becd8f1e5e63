"""A whole run: build, plan, prune, fine-tune, speed up, save, load again, export, compare, report."""

from __future__ import annotations

import copy
import math
from time import perf_counter
from typing import final

import torch
from rich.console import Console
from torch import nn

from tersor.config.values import is_activation
from tersor.deploy import require_onnx
from tersor.deploy.engines import engine_of
from tersor.graph import Masks
from tersor.pruning import Pruner, Round, Sparsity, correct_bias, reestimate_batch_norm
from tersor.pruning.schedule import ScheduledPruner
from tersor.recipe import kept
from tersor.recipe.fusion_run import FusionRun
from tersor.recipe.prepare import Prepared, prepare
from tersor.recipe.rounds import ROUNDS_FILE, kept_round
from tersor.recipe.runner import Runner, RunResult, described, planned
from tersor.recipe.spec import Recipe
from tersor.recipe.stages import Stages
from tersor.speedup import ModelSpeedup
from tersor.targets.granularity import Blocks
from tersor.targets.plan import Plan


def run_recipe(recipe: Recipe, *, progress: bool = True, console: Console | None = None) -> RunResult:
    """Run a recipe from its model to the report.

    The global random state is seeded from the recipe. Where it asks for pruning alone, the model, made small, is saved
    after every epoch of fine-tuning, so a run that is interrupted leaves a checkpoint that `tersor.load` reads. Where a
    schedule prunes in rounds, they are kept instead, and the same recipe goes on after the last whole one. What is
    quantized or distilled as well is one training run (:func:`tersor.compress`) and saved at its end.

    Args:
        recipe: what to do.
        progress: show a bar while training.
        console: where each stage prints its line; the standard error stream where None.

    Raises:
        TersorError: whatever is wrong with the recipe, the model, the training or the files.
        KeyboardInterrupt: after saying which checkpoint is left.
    """
    if recipe.output.onnx:
        require_onnx()
    if recipe.deployment is not None:
        engine_of(recipe.deployment.engine)  # refuse to begin what would end without it
    torch.manual_seed(recipe.seed)
    kind = FusionRun if recipe.alone is None else PruningRun
    return kind(recipe, Stages(console), progress).run()


@final
class PruningRun(Runner):
    """A recipe that asks for pruning alone: at once, while the model trains, or in rounds."""

    def __init__(self, recipe: Recipe, stages: Stages, progress: bool) -> None:
        super().__init__(recipe, stages, progress)
        self.rounds = self.directory / "rounds"
        self.pruner: Pruner | None = None
        self.round_begun = 0.0

    def what_is_left(self) -> str:
        """Rounds, or a checkpoint."""
        if (self.rounds / ROUNDS_FILE).exists():
            return f"{self.rounds} holds the rounds so far, and the same command goes on after them"
        return super().what_is_left()

    def compressed(self) -> RunResult:
        """Prune, recover, fine-tune, speed up."""
        with self.stage("build") as note:
            prepared = prepare(self.recipe, progress=self.progress, on_round=self._round_is_over)
            note(described(prepared.model))
        before = self.evaluate(prepared, prepared.original, "before")
        pruner = self.pruner = prepared.pruner
        plan = pruner.plan
        with self.stage("plan") as note:
            note(planned(plan))
        model = prepared.model
        try:
            if prepared.algorithm.in_rounds:
                model = self._prune_in_rounds(pruner)
            else:
                self._prune(pruner)
                self._recover(prepared)
                self._fine_tune(prepared, pruner)
            sparsity, masks = tuple(pruner.sparsity()), pruner.get_masks()
        finally:
            pruner.unwrap_model()
        if prepared.speedups.reports:
            sparsity = tuple(_cut_away(plan, model))
        else:
            self._speed_up(prepared, model, masks)
        result = self.conclude(
            prepared,
            model,
            before,
            plans=[plan],
            sparsity=sparsity,
            rounds=_rounds_of(pruner),
            speedups=prepared.speedups.reports,
        )
        if prepared.algorithm.in_rounds:
            kept.forget(self.rounds, ROUNDS_FILE)
        return result

    def _prune(self, pruner: Pruner) -> None:
        with self.stage("prune") as note:
            pruner.start()
            targets = pruner.sparsity()
            if pruner.get_masks():
                note(
                    f"{sum(target.removed for target in targets)} of {sum(target.blocks for target in targets)} blocks"
                )
            else:
                note(f"{type(pruner).__name__} prunes while the model trains")

    def _prune_in_rounds(self, pruner: Pruner) -> nn.Module:
        tuning, asked = self.recipe.fine_tuning, self.recipe.alone
        assert asked is not None
        assert asked.schedule is not None
        if kept.begin(self.recipe, self.rounds, ROUNDS_FILE):
            self.stage.say("resume", f"after the rounds in {self.rounds}")
        self.round_begun = perf_counter()
        with self.stage("rounds") as note:
            model, _ = pruner.compress(tuning.max_steps if tuning.epochs else None, tuning.epochs or None)
            rounds = _rounds_of(pruner)
            best = kept_round(rounds, asked.schedule.best)
            note(f"round {best.number} of {len(rounds)} is kept, {best.removed:.0%} of the blocks removed")
        return model

    def _round_is_over(self, metric: float | None) -> None:
        number = 1 if self.pruner is None else len(_rounds_of(self.pruner)) + 1
        begun, self.round_begun = self.round_begun, perf_counter()
        score = "no test data" if metric is None else f"{metric:.4f}"
        self.stage.over(f"round {number}", self.round_begun - begun, score)

    def _recover(self, prepared: Prepared) -> None:
        recovery, train = self.recipe.recovery, prepared.data.train
        if recovery is None:
            return
        with self.stage("recover") as note:
            if recovery.batch_norm:
                batches = reestimate_batch_norm(prepared.model, train, max_batches=recovery.batches)
                note(f"batch norms measured over {batches} batches")
            if recovery.bias:
                names = correct_bias(prepared.model, prepared.original, train, max_batches=recovery.batches)
                note(f"biases of {len(names)} layers corrected")

    def _fine_tune(self, prepared: Prepared, pruner: Pruner) -> None:
        tuning, steps = self.recipe.fine_tuning, 0
        for epoch in range(1, tuning.epochs + 1):
            left = None if tuning.max_steps is None else tuning.max_steps - steps
            if left == 0:
                break
            with self.stage(f"epoch {epoch}") as note:
                steps += prepared.evaluator.train(prepared.model, pruner, max_steps=left, max_epochs=1).steps
                note(f"{steps} steps")
                self.save(_small_copy(prepared, pruner), {"finished": False, "epoch": epoch})
        pruner.finish()

    def _speed_up(self, prepared: Prepared, model: nn.Module, masks: Masks) -> None:
        with self.stage("speed up") as note:
            prepared.speedups(model, prepared.example_inputs, masks).speedup_model()
            report = prepared.speedups.reports[-1]
            cut = f"{len(report.shapes)} tensors cut" if report.shapes else "nothing to cut: what was removed is zero"
            note(f"{cut}, relative error {report.error:.1g}")


def _small_copy(prepared: Prepared, pruner: Pruner) -> nn.Module:
    """The masked model as it is now, made small, while the masked one goes on training."""
    masks = pruner.get_masks()
    pruner.unwrap_model()
    try:
        model = copy.deepcopy(prepared.model)
    finally:
        pruner.wrap_model()
    if not masks:
        return model
    return ModelSpeedup(model, prepared.example_inputs, masks, verify=False).speedup_model()


def _rounds_of(pruner: Pruner) -> tuple[Round, ...]:
    return tuple(pruner.rounds) if isinstance(pruner, ScheduledPruner) else ()


def _cut_away(plan: Plan, small: nn.Module) -> list[Sparsity]:
    """What was removed of each target of a plan, by the sizes of the model that was made small since."""
    found: list[Sparsity] = []
    for target in plan.targets:
        if target.blocks is None or is_activation(target.config.target_name):
            continue
        left = small.get_submodule(target.config.module_name).get_parameter(target.config.target_name).shape
        block = tuple(min(size, whole) for size, whole in zip(target.blocks.block, left, strict=True))
        removed = target.blocks.count - Blocks(tuple(left), block).count
        share = 1 - left.numel() / math.prod(target.blocks.shape)
        asked = getattr(target.config.spec, "ratio", None)
        found.append(Sparsity(target.name, asked, target.blocks.count, removed, share, target.frozen or ""))
    return found
