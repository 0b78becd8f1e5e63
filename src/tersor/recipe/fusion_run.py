"""A run of pruning, quantization and distillation at once: one training, then `tersor.finalize`."""

from __future__ import annotations

from typing import final

from tersor.compressor import Compressor
from tersor.finalize import Finalized, finalize
from tersor.pruning import Pruner, Sparsity
from tersor.recipe import kept
from tersor.recipe.fused import PreparedFusion, prepare_fusion
from tersor.recipe.runner import Runner, RunResult, described, planned
from tersor.recipe.spec import Recipe
from tersor.recipe.stages import Stages
from tersor.training.resuming import CHECKPOINT_FILE


@final
class FusionRun(Runner):
    """A recipe that asks for more than pruning alone."""

    def __init__(self, recipe: Recipe, stages: Stages, progress: bool) -> None:
        super().__init__(recipe, stages, progress)
        self.training = self.directory / "training"

    def what_is_left(self) -> str:
        """A run in its midst, or a checkpoint."""
        if (self.training / CHECKPOINT_FILE).exists():
            return f"{self.training} holds the training so far, and the same command goes on with it"
        return super().what_is_left()

    def compressed(self) -> RunResult:
        """Train with all compressors at once, then make the model small with all that they simulate."""
        with self.stage("build") as note:
            prepared = prepare_fusion(self.recipe, progress=self.progress)
            note(described(prepared.model))
        before = self.evaluate(prepared, prepared.original, "before")
        chain = prepared.compressor.chain
        with self.stage("plan") as note:
            note("; ".join(f"{own.title}: {planned(own.plan)}" for own in chain))
        try:
            self._compress(prepared)
            sparsity: tuple[Sparsity, ...] = tuple(
                target for own in chain if isinstance(own, Pruner) for target in own.sparsity()
            )
            final_ = self._finalize(prepared.compressor)
        finally:
            prepared.compressor.unwrap_model()
        result = self.conclude(
            prepared,
            final_.model,
            before,
            plans=[own.plan for own in chain],
            sparsity=sparsity,
            compressors=chain,
            finalized=final_,
        )
        kept.forget(self.training, CHECKPOINT_FILE)
        return result

    def _compress(self, prepared: PreparedFusion) -> None:
        tuning, trains = self.recipe.fine_tuning, self.recipe.fine_tuning.epochs > 0 and prepared.trains
        keeps = trains and not any(item.trains_in_rounds for item in prepared.compressor.chain)
        with self.stage("train" if trains else "compress") as note:
            if keeps and kept.begin(self.recipe, self.training, CHECKPOINT_FILE):
                self.stage.say("resume", f"after the last steps in {self.training}")
            prepared.compressor.compress(
                tuning.max_steps if trains else None,
                tuning.epochs if trains else None,
                checkpoint_dir=self.training if keeps else None,
                checkpoint_steps=tuning.checkpoint_steps,
            )
            status = prepared.compressor.status()
            note(", ".join(f"{word} {float(value):.3g}" for word, value in status.items()))

    def _finalize(self, compressor: Compressor) -> Finalized:
        with self.stage("finalize") as note:
            small = finalize(compressor)
            note(f"{described(small.model)}, relative error {small.error:.1g}")
            for fallback in small.fallbacks:
                note(f"{fallback.where}: {fallback.reason}")
        return small
