"""What every run of a recipe does around its compression: score, save, load again, export, deploy, compare."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tersor.analysis import Comparison, compare
from tersor.checkpoint import load, save
from tersor.compressor import Compressor
from tersor.deploy import check_onnx, export_onnx
from tersor.errors import CheckpointError
from tersor.finalize import Finalized
from tersor.pruning import Round, Sparsity
from tersor.recipe.deployment import Deployed, deploy_built
from tersor.recipe.prepare import Built
from tersor.recipe.spec import Recipe
from tersor.recipe.stages import Stages
from tersor.speedup import SpeedupReport
from tersor.speedup.verify import outputs_of, relative_error
from tersor.targets.plan import Plan


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        model: the small one; where it is quantized it still rounds.
        plan: what was to be done; of several compressors the first one's.
        sparsity: what was asked of each target and what came of it.
        rounds: those of a schedule; empty where it pruned within one training run, or where there is none.
        speedups: for each time the model was made small, what became smaller, what was left alone, and the error of
            the small model against the masked one.
        comparison: the model before and after.
        deployed: the int8 artefact; None where the recipe asks for none.
        files: what was written, by ``checkpoint``, ``onnx``, ``deployment``, ``report``.
        onnx_error: relative error of ONNX Runtime's outputs; None without an export.
        seconds: how long each stage took.
        compressors: where more than pruning was asked for, all that were fused, unwrapped, with what they found.
        finalized: likewise what came of them.
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
    compressors: tuple[Compressor, ...] = ()
    finalized: Finalized | None = None

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
            "fused": None if self.finalized is None else self._fused(self.finalized),
        }

    def _fused(self, final: Finalized) -> dict[str, Any]:
        return {
            "plans": [{"compressor": own.title, **own.plan.to_dict()} for own in self.compressors],
            "timeline": self.compressors[-1].timeline().to_dict(),
            "error": final.error,
            "fallbacks": [asdict(fallback) for fallback in final.fallbacks],
        }


class Runner(ABC):
    """The stages that all runs have in common; what several of them need is kept here.

    Args:
        recipe: what to do.
        stages: narrates it.
        progress: show a bar while training.

    Attributes:
        files: what was written by now.
    """

    def __init__(self, recipe: Recipe, stages: Stages, progress: bool) -> None:
        self.recipe = recipe
        self.stage = stages
        self.progress = progress
        self.directory = Path(recipe.output.directory)
        self.files: dict[str, Path] = {}

    def run(self) -> RunResult:
        """The whole run."""
        try:
            return self.compressed()
        except KeyboardInterrupt:
            self.stage.say("interrupted", self.what_is_left())
            raise

    @abstractmethod
    def compressed(self) -> RunResult:
        """The run itself."""

    def what_is_left(self) -> str:
        """After an interruption."""
        left = self.files.get("checkpoint")
        return f"{left} holds the last whole checkpoint" if left else "nothing was saved yet"

    def evaluate(self, built: Built, model: nn.Module, when: str) -> float | None:
        """The metric of a model."""
        with self.stage(f"score {when}") as note:
            score = built.evaluator.evaluate(model)
            note("no test data" if score is None else f"{score:.4f}")
        return score

    def save(self, small: nn.Module | Finalized, metadata: Mapping[str, Any]) -> None:
        """Write the checkpoint, if one is asked for; an older one is replaced."""
        if self.recipe.output.checkpoint:
            folder = self.directory / "checkpoint"
            metadata = {**metadata, "recipe": self.recipe.model_dump(mode="json")}
            self.files["checkpoint"] = (
                small.save(folder, metadata=metadata)
                if isinstance(small, Finalized)
                else save(small, folder, metadata=metadata)
            )

    def conclude(
        self,
        built: Built,
        model: nn.Module,
        before: float | None,
        *,
        plans: Sequence[Plan],
        sparsity: tuple[Sparsity, ...],
        rounds: tuple[Round, ...] = (),
        speedups: Sequence[SpeedupReport] = (),
        compressors: tuple[Compressor, ...] = (),
        finalized: Finalized | None = None,
    ) -> RunResult:
        """Everything after the model has become small.

        Args:
            built: what the recipe names.
            model: the small one.
            before: the metric of the original.
            plans: of all compressors.
            sparsity: see :class:`RunResult`, as the others.
            rounds: see there.
            speedups: see there.
            compressors: see there.
            finalized: see there.
        """
        after = self.evaluate(built, model, "after")
        plain = model if finalized is None else finalized.plain(bake=True)
        metadata = {"accuracy": {"before": before, "after": after}, "rounds": [asdict(of) for of in rounds]}
        self._save_and_load(built, plain if finalized is None else finalized, plain, metadata)
        onnx_error = self._export(built, plain)
        deployed = self._deploy(built, plain, None if finalized is None else finalized.compressor)
        return RunResult(
            model=model,
            plan=plans[0],
            sparsity=sparsity,
            rounds=rounds,
            speedups=tuple(speedups),
            comparison=self._compare(built, plain, (before, after), sparsity),
            deployed=deployed,
            files=self.files,
            onnx_error=onnx_error,
            seconds=self.stage.seconds,
            compressors=compressors,
            finalized=finalized,
        )

    def _save_and_load(
        self, built: Built, small: nn.Module | Finalized, plain: nn.Module, metadata: Mapping[str, Any]
    ) -> None:
        if not self.recipe.output.checkpoint:
            return
        with self.stage("save, load") as note:
            self.save(small, {"finished": True, **metadata})
            loaded = load(copy.deepcopy(built.original), self.files["checkpoint"], device=self.recipe.device)
            inputs = built.example_inputs
            error = relative_error(outputs_of(loaded, inputs), outputs_of(plain, inputs))
            if not error <= 1e-6:
                raise CheckpointError(
                    f"the model that was loaded differs from the one saved by {error:.2g} relative",
                    where=str(self.files["checkpoint"]),
                    remedy="Does the model compute with numbers that are neither parameters nor buffers?",
                )
            note(f"{self.files['checkpoint']}, the same outputs")

    def _export(self, built: Built, plain: nn.Module) -> float | None:
        if not self.recipe.output.onnx:
            return None
        with self.stage("onnx") as note:
            self.files["onnx"] = export_onnx(plain, built.example_inputs, self.directory / "model.onnx")
            error = check_onnx(self.files["onnx"], plain, built.example_inputs)
            note(f"{self.files['onnx']}, relative error {error:.1g}")
        return error

    def _deploy(self, built: Built, plain: nn.Module, compressor: Compressor | None) -> Deployed | None:
        if self.recipe.deployment is None:
            return None
        with self.stage("deploy") as note:
            deployed = deploy_built(self.recipe, built, plain, compressor)
            self.files["deployment"] = deployed.compiled.save(self.directory / "deployment")
            report = deployed.compiled.report
            note(f"{self.files['deployment']}, {report.int8} of {report.asked} products in int8 on {report.engine}")
        return deployed

    def _compare(
        self,
        built: Built,
        plain: nn.Module,
        accuracy: tuple[float | None, float | None],
        sparsity: tuple[Sparsity, ...],
    ) -> Comparison:
        with self.stage("compare") as note:
            before, after = accuracy
            comparison = compare(
                built.original,
                plain,
                built.example_inputs,
                accuracy=None if before is None or after is None else (before, after),
                batch_sizes=self.recipe.output.batch_sizes,
            )
            note(f"{comparison.ratio('macs'):.0%} of the MACs, {comparison.ratio('parameters'):.0%} of the parameters")
            if self.recipe.output.report:
                self.files["report"] = comparison.report(
                    self.directory,
                    title=f"{type(plain).__name__}, compressed",
                    sparsity={target.target.removesuffix(".weight"): target.elements for target in sparsity},
                )
                note(str(self.files["report"]))
        return comparison


def described(model: nn.Module) -> str:
    """A model in words.

    >>> described(nn.Linear(2, 2))
    'Linear of 6 parameters'
    """
    return f"{type(model).__name__} of {sum(own.numel() for own in model.parameters()):,} parameters"


def planned(plan: Plan) -> str:
    """A plan in words."""
    actions = Counter(row.action for row in plan.rows)
    return ", ".join(f"{action} {count} targets" for action, count in actions.items())
