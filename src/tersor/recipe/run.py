"""A whole run: build, plan, prune, fine-tune, speed up, save, load again, export, compare, report."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from tersor.analysis import Comparison, compare
from tersor.checkpoint import load, save
from tersor.deploy import check_onnx, export_onnx, require_onnx
from tersor.errors import CheckpointError
from tersor.graph import Masks
from tersor.pruning import Pruner, Sparsity
from tersor.recipe.prepare import Prepared, prepare
from tersor.recipe.spec import Recipe
from tersor.recipe.stages import Stages
from tersor.speedup import ModelSpeedup, SpeedupReport
from tersor.speedup.verify import outputs_of, relative_error
from tersor.targets.plan import Plan


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        model: the small one.
        plan: what was to be done.
        sparsity: what was asked of each target and what came of it.
        speedup: what became smaller, what was left alone, and the error of the small model against the masked one.
        comparison: the model before and after.
        files: what was written, by ``checkpoint``, ``onnx``, ``report``.
        onnx_error: relative error of ONNX Runtime's outputs; None without an export.
        seconds: how long each stage took.
    """

    model: nn.Module
    plan: Plan
    sparsity: tuple[Sparsity, ...]
    speedup: SpeedupReport
    comparison: Comparison
    files: dict[str, Path]
    onnx_error: float | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "comparison": self.comparison.to_dict(),
            "plan": self.plan.to_dict(),
            "sparsity": [asdict(target) for target in self.sparsity],
            "speedup": {"error": self.speedup.error, "left_alone": [asdict(left) for left in self.speedup.left_alone]},
            "files": {kind: str(path) for kind, path in self.files.items()},
            "onnx_error": self.onnx_error,
            "seconds": self.seconds,
        }


def run_recipe(recipe: Recipe, *, progress: bool = True, console: Console | None = None) -> RunResult:
    """Run a recipe from its model to the report.

    The global random state is seeded from the recipe. After every epoch of fine-tuning the model, made small, is saved;
    so a run that is interrupted leaves a checkpoint that `tersor.load` reads.

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
    torch.manual_seed(recipe.seed)
    return _Run(recipe, Stages(console), progress).run()


class _Run:
    """The stages, in order; what several of them need is kept here."""

    def __init__(self, recipe: Recipe, stages: Stages, progress: bool) -> None:
        self.recipe = recipe
        self.stage = stages
        self.progress = progress
        self.directory = Path(recipe.output.directory)
        self.files: dict[str, Path] = {}

    def run(self) -> RunResult:
        try:
            return self._run()
        except KeyboardInterrupt:
            left = self.files.get("checkpoint")
            self.stage.say(
                "interrupted", f"{left} holds the last whole checkpoint" if left else "nothing was saved yet"
            )
            raise

    def _run(self) -> RunResult:
        with self.stage("build") as note:
            prepared = prepare(self.recipe, progress=self.progress)
            parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
            note(f"{type(prepared.model).__name__} of {parameters:,} parameters")
        before = self._evaluate(prepared, prepared.original, "before")
        pruner = self._plan(prepared)
        try:
            self._prune(pruner)
            self._fine_tune(prepared, pruner)
            sparsity, masks = tuple(pruner.sparsity()), pruner.get_masks()
        finally:
            pruner.unwrap_model()
        speedup = self._speed_up(prepared, masks)
        after = self._evaluate(prepared, prepared.model, "after")
        self._save_and_load(prepared, {"before": before, "after": after})
        onnx_error = self._export(prepared)
        comparison = self._compare(prepared, (before, after), sparsity)
        return RunResult(
            prepared.model, pruner.plan, sparsity, speedup, comparison, self.files, onnx_error, self.stage.seconds
        )

    def _evaluate(self, prepared: Prepared, model: nn.Module, when: str) -> float | None:
        with self.stage(f"score {when}") as note:
            score = prepared.evaluator.evaluate(model)
            note("no test data" if score is None else f"{score:.4f}")
        return score

    def _plan(self, prepared: Prepared) -> Pruner:
        with self.stage("plan") as note:
            pruner = prepared.pruner(
                prepared.model, prepared.config_list, prepared.evaluator, example_inputs=prepared.example_inputs
            )
            actions = Counter(row.action for row in pruner.plan.rows)
            note(", ".join(f"{action} {count} targets" for action, count in actions.items()))
        return pruner

    def _prune(self, pruner: Pruner) -> None:
        with self.stage("prune") as note:
            pruner.start()
            targets = pruner.sparsity()
            note(f"{sum(target.removed for target in targets)} of {sum(target.blocks for target in targets)} blocks")

    def _fine_tune(self, prepared: Prepared, pruner: Pruner) -> None:
        tuning, steps = self.recipe.fine_tuning, 0
        for epoch in range(1, tuning.epochs + 1):
            left = None if tuning.max_steps is None else tuning.max_steps - steps
            if left == 0:
                break
            with self.stage(f"epoch {epoch}") as note:
                steps += prepared.evaluator.train(prepared.model, pruner, max_steps=left, max_epochs=1).steps
                note(f"{steps} steps")
                self._save(_small_copy(prepared, pruner), {"finished": False, "epoch": epoch})
        pruner.finish()

    def _speed_up(self, prepared: Prepared, masks: Masks) -> SpeedupReport:
        with self.stage("speed up") as note:
            speedup = ModelSpeedup(prepared.model, prepared.example_inputs, masks)
            speedup.speedup_model()
            assert speedup.report is not None
            note(f"{len(speedup.report.shapes)} tensors cut, relative error {speedup.report.error:.1g}")
        return speedup.report

    def _save_and_load(self, prepared: Prepared, accuracy: dict[str, float | None]) -> None:
        if not self.recipe.output.checkpoint:
            return
        with self.stage("save, load") as note:
            self._save(prepared.model, {"finished": True, "accuracy": accuracy})
            loaded = load(copy.deepcopy(prepared.original), self.files["checkpoint"], device=self.recipe.device)
            inputs = prepared.example_inputs
            error = relative_error(outputs_of(loaded, inputs), outputs_of(prepared.model, inputs))
            if not error <= 1e-6:
                raise CheckpointError(
                    f"the model that was loaded differs from the one saved by {error:.2g} relative",
                    where=str(self.files["checkpoint"]),
                    remedy="Does the model compute with numbers that are neither parameters nor buffers?",
                )
            note(f"{self.files['checkpoint']}, the same outputs")

    def _save(self, small: nn.Module, metadata: dict[str, Any]) -> None:
        if self.recipe.output.checkpoint:
            metadata = {**metadata, "recipe": self.recipe.model_dump(mode="json")}
            self.files["checkpoint"] = save(small, self.directory / "checkpoint", metadata=metadata)

    def _export(self, prepared: Prepared) -> float | None:
        if not self.recipe.output.onnx:
            return None
        with self.stage("onnx") as note:
            self.files["onnx"] = export_onnx(prepared.model, prepared.example_inputs, self.directory / "model.onnx")
            error = check_onnx(self.files["onnx"], prepared.model, prepared.example_inputs)
            note(f"{self.files['onnx']}, relative error {error:.1g}")
        return error

    def _compare(
        self, prepared: Prepared, accuracy: tuple[float | None, float | None], sparsity: tuple[Sparsity, ...]
    ) -> Comparison:
        with self.stage("compare") as note:
            before, after = accuracy
            comparison = compare(
                prepared.original,
                prepared.model,
                prepared.example_inputs,
                accuracy=None if before is None or after is None else (before, after),
                batch_sizes=self.recipe.output.batch_sizes,
            )
            note(f"{comparison.ratio('macs'):.0%} of the MACs, {comparison.ratio('parameters'):.0%} of the parameters")
            if self.recipe.output.report:
                self.files["report"] = comparison.report(
                    self.directory,
                    title=f"{type(prepared.model).__name__}, compressed",
                    sparsity={target.target.removesuffix(".weight"): target.elements for target in sparsity},
                )
                note(str(self.files["report"]))
        return comparison


def _small_copy(prepared: Prepared, pruner: Pruner) -> nn.Module:
    """The masked model as it is now, made small, while the masked one goes on training."""
    masks = pruner.get_masks()
    pruner.unwrap_model()
    try:
        model = copy.deepcopy(prepared.model)
    finally:
        pruner.wrap_model()
    return ModelSpeedup(model, prepared.example_inputs, masks, verify=False).speedup_model()
