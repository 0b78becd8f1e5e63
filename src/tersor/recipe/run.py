"""A whole run: build, plan, prune, fine-tune, speed up, save, load again, export, compare, report."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import nn

from tersor.analysis import Comparison, compare
from tersor.checkpoint import load, save
from tersor.config.values import is_activation
from tersor.deploy import check_onnx, export_onnx, require_onnx
from tersor.deploy.engines import engine_of
from tersor.errors import CheckpointError
from tersor.graph import Masks
from tersor.pruning import Pruner, Round, Sparsity, correct_bias, reestimate_batch_norm
from tersor.pruning.schedule import ScheduledPruner
from tersor.recipe.deployment import Deployed, deploy_prepared
from tersor.recipe.prepare import Prepared, prepare
from tersor.recipe.rounds import ROUNDS_FILE, begin_rounds, forget_rounds, kept_round
from tersor.recipe.spec import Recipe
from tersor.recipe.stages import Stages
from tersor.speedup import ModelSpeedup, SpeedupReport
from tersor.speedup.verify import outputs_of, relative_error
from tersor.targets.granularity import Blocks
from tersor.targets.plan import Plan


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        model: the small one.
        plan: what was to be done.
        sparsity: what was asked of each target and what came of it.
        rounds: those of a schedule; empty where it pruned within one training run, or where there is none.
        speedups: for each time the model was made small, what became smaller, what was left alone, and the error of
            the small model against the masked one.
        comparison: the model before and after.
        deployed: the int8 artefact; None where the recipe asks for none.
        files: what was written, by ``checkpoint``, ``onnx``, ``deployment``, ``report``.
        onnx_error: relative error of ONNX Runtime's outputs; None without an export.
        seconds: how long each stage took.
    """

    model: nn.Module
    plan: Plan
    sparsity: tuple[Sparsity, ...]
    rounds: tuple[Round, ...]
    speedups: tuple[SpeedupReport, ...]
    comparison: Comparison
    deployed: Deployed | None
    files: dict[str, Path]
    onnx_error: float | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "comparison": self.comparison.to_dict(),
            "plan": self.plan.to_dict(),
            "sparsity": [asdict(target) for target in self.sparsity],
            "rounds": [asdict(of) for of in self.rounds],
            "speedups": [
                {"error": report.error, "left_alone": [asdict(left) for left in report.left_alone]}
                for report in self.speedups
            ],
            "deployed": None if self.deployed is None else self.deployed.to_dict(),
            "files": {kind: str(path) for kind, path in self.files.items()},
            "onnx_error": self.onnx_error,
            "seconds": self.seconds,
        }


def run_recipe(recipe: Recipe, *, progress: bool = True, console: Console | None = None) -> RunResult:
    """Run a recipe from its model to the report.

    The global random state is seeded from the recipe. After every epoch of fine-tuning the model, made small, is saved;
    so a run that is interrupted leaves a checkpoint that `tersor.load` reads. Where a schedule prunes in rounds, they
    are kept instead, and the same recipe goes on after the last whole one.

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
    return _Run(recipe, Stages(console), progress).run()


class _Run:
    """The stages, in order; what several of them need is kept here."""

    def __init__(self, recipe: Recipe, stages: Stages, progress: bool) -> None:
        self.recipe = recipe
        self.stage = stages
        self.progress = progress
        self.directory = Path(recipe.output.directory)
        self.rounds = self.directory / "rounds"
        self.files: dict[str, Path] = {}
        self.pruner: Pruner | None = None
        self.round_begun = 0.0

    def run(self) -> RunResult:
        try:
            return self._run()
        except KeyboardInterrupt:
            self.stage.say("interrupted", self._what_is_left())
            raise

    def _what_is_left(self) -> str:
        if (self.rounds / ROUNDS_FILE).exists():
            return f"{self.rounds} holds the rounds so far, and the same command goes on after them"
        left = self.files.get("checkpoint")
        return f"{left} holds the last whole checkpoint" if left else "nothing was saved yet"

    def _run(self) -> RunResult:
        with self.stage("build") as note:
            prepared = prepare(self.recipe, progress=self.progress, on_round=self._round_is_over)
            parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
            note(f"{type(prepared.model).__name__} of {parameters:,} parameters")
        before = self._evaluate(prepared, prepared.original, "before")
        pruner = self.pruner = prepared.pruner
        plan = self._plan(pruner)
        try:
            if prepared.algorithm.in_rounds:
                prepared = replace(prepared, model=self._prune_in_rounds(pruner))
            else:
                self._prune(pruner)
                self._recover(prepared)
                self._fine_tune(prepared, pruner)
            sparsity, masks = tuple(pruner.sparsity()), pruner.get_masks()
        finally:
            pruner.unwrap_model()
        if prepared.speedups.reports:
            sparsity = tuple(_cut_away(plan, prepared.model))
        else:
            self._speed_up(prepared, masks)
        after = self._evaluate(prepared, prepared.model, "after")
        self._save_and_load(
            prepared,
            {"accuracy": {"before": before, "after": after}, "rounds": [asdict(of) for of in _rounds_of(pruner)]},
        )
        onnx_error = self._export(prepared)
        deployed = self._deploy(prepared)
        comparison = self._compare(prepared, (before, after), sparsity)
        if prepared.algorithm.in_rounds:
            forget_rounds(self.rounds)
        return RunResult(
            model=prepared.model,
            plan=plan,
            sparsity=sparsity,
            rounds=_rounds_of(pruner),
            speedups=tuple(prepared.speedups.reports),
            comparison=comparison,
            deployed=deployed,
            files=self.files,
            onnx_error=onnx_error,
            seconds=self.stage.seconds,
        )

    def _evaluate(self, prepared: Prepared, model: nn.Module, when: str) -> float | None:
        with self.stage(f"score {when}") as note:
            score = prepared.evaluator.evaluate(model)
            note("no test data" if score is None else f"{score:.4f}")
        return score

    def _plan(self, pruner: Pruner) -> Plan:
        with self.stage("plan") as note:
            actions = Counter(row.action for row in pruner.plan.rows)
            note(", ".join(f"{action} {count} targets" for action, count in actions.items()))
        return pruner.plan

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
        tuning, schedule = self.recipe.fine_tuning, self.recipe.pruning.schedule
        assert schedule is not None
        if begin_rounds(self.recipe, self.rounds):
            self.stage.say("resume", f"after the rounds in {self.rounds}")
        self.round_begun = perf_counter()
        with self.stage("rounds") as note:
            model, _ = pruner.compress(tuning.max_steps if tuning.epochs else None, tuning.epochs or None)
            rounds = _rounds_of(pruner)
            kept = kept_round(rounds, schedule.best)
            note(f"round {kept.number} of {len(rounds)} is kept, {kept.removed:.0%} of the blocks removed")
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
                self._save(_small_copy(prepared, pruner), {"finished": False, "epoch": epoch})
        pruner.finish()

    def _speed_up(self, prepared: Prepared, masks: Masks) -> None:
        with self.stage("speed up") as note:
            prepared.speedups(prepared.model, prepared.example_inputs, masks).speedup_model()
            report = prepared.speedups.reports[-1]
            cut = f"{len(report.shapes)} tensors cut" if report.shapes else "nothing to cut: what was removed is zero"
            note(f"{cut}, relative error {report.error:.1g}")

    def _save_and_load(self, prepared: Prepared, metadata: dict[str, Any]) -> None:
        if not self.recipe.output.checkpoint:
            return
        with self.stage("save, load") as note:
            self._save(prepared.model, {"finished": True, **metadata})
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

    def _deploy(self, prepared: Prepared) -> Deployed | None:
        if self.recipe.deployment is None:
            return None
        with self.stage("deploy") as note:
            deployed = deploy_prepared(self.recipe, prepared)
            self.files["deployment"] = deployed.compiled.save(self.directory / "deployment")
            report = deployed.compiled.report
            note(f"{self.files['deployment']}, {report.int8} of {report.asked} products in int8 on {report.engine}")
        return deployed

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
