"""The base of all pruners: collect, score, allocate, mask."""

from __future__ import annotations

import os
from abc import abstractmethod

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import PruningSpec
from tersor.errors import ConfigError, MaskError
from tersor.graph.coupling import Masks
from tersor.pruning.align import align, expanded
from tersor.pruning.decision import decide, masks_of_readers
from tersor.pruning.sparsity import Sparsity, measure_sparsity
from tersor.storage import load_masks
from tersor.targets.choices import choices
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.wrapping.stack import as_bool, compact


class Pruner(Compressor):
    """Base of all pruners. A new one says how a block is scored, in one file.

    Four steps make masks: :meth:`collect` the values, :meth:`score` each block, allocate the sparsity (ratios,
    thresholds, global and dependency groups: :mod:`tersor.pruning.allocation`), and mask. With example inputs, what the
    graph says leaves as one, such as the rows of an attention head, is decided as one (:mod:`tersor.targets.choices`),
    and the masks are then completed over the coupling groups, so that the masked model computes what the small model
    will.

    ``compress()`` returns ``(model, masks)``; the model stays wrapped.
    """

    mode = "pruning"

    @abstractmethod
    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The importance of each block of one target.

        Args:
            values: what :meth:`collect` gave for the target, of the target's shape.
            blocks: how it is cut.

        Returns:
            one score for each block, shape ``blocks.grid``; the highest live.
        """

    def collect(self) -> dict[str, Tensor]:
        """The values to score for each target: its latent parameter. Overridden where data or gradients are needed."""
        return {target.name: self._latent(target) for target in self._scored()}

    def on_start(self) -> None:
        """Prune before the first step; schedules override this."""
        self._prune()

    def result(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """The wrapped model and its masks."""
        return self.model, self.get_masks()

    def generate_masks(self) -> dict[str, dict[str, Tensor]]:
        """Collect, score, allocate, mask; the masks are applied at once and returned.

        Raises:
            EmptyLayerError: a layer would be left without anything.
            ConfigError: nothing at all would be pruned.
        """
        self._prune()
        return self.get_masks()

    def _prune(self) -> None:
        targets = self._scored()
        if not targets:
            reasons = sorted({f"{row.module}.{row.target}: {row.reason}" for row in self.plan.rows if row.reason})
            raise ConfigError("nothing would be pruned", where="config_list", remedy="; ".join(reasons[:5]))
        with torch.no_grad():
            collected = self.collect()
            scores = {t.name: self.score(collected[t.name], t.blocks) for t in targets if t.blocks is not None}
            keep = decide(choices(self.plan.targets), scores)
        masks: dict[str, dict[str, Tensor]] = {}
        for target in targets:
            assert target.blocks is not None
            mask = target.blocks.expand_compact(keep[target.name])
            masks.setdefault(target.config.module_name, {})[target.config.target_name] = mask
        for module, readers in masks_of_readers(targets, keep).items():
            for name, mask in readers.items():
                own = masks.setdefault(module, {}).get(name)
                masks[module][name] = mask if own is None else own & mask.to(own.device)
        align(self.plan.targets, masks, self._shape)
        self._apply(masks)

    def get_masks(self, *, completed: bool = False) -> dict[str, dict[str, Tensor]]:
        """The masks of all fused pruners, ``{module: {target: bool tensor}}``, True keeps.

        Args:
            completed: also what follows from them by the graph (biases, norms, consumers), as it is simulated.

        Returns:
            masks of their parameters' shape, or broadcasting against inputs and outputs. A mask that is the same along
            a dimension is a view that takes no memory there: clone it before you change it.

        Raises:
            MaskError: the model has been made small since.
        """
        return self.wrappers.masks() if completed else expanded(self._merged(), self._shape)

    def update_masks(self, masks: Masks | str | os.PathLike[str]) -> None:
        """Apply masks from elsewhere in place of this pruner's own.

        Args:
            masks: as :meth:`get_masks` returns them (float 0/1 masks too), or the path of a masks file.

        Raises:
            MaskError: they belong to another model, hold other values than 0 and 1, or would empty a layer; nothing is
                changed then.
            CheckpointError: the file is missing, damaged or no masks file.
        """
        given = load_masks(masks) if isinstance(masks, (str, os.PathLike)) else masks
        self.wrappers.check_masks(given)
        own = {
            module: {target: compact(as_bool(mask, f"{module}.{target}")).clone() for target, mask in targets.items()}
            for module, targets in given.items()
        }
        self._apply(own)

    def sparsity(self) -> list[Sparsity]:
        """What was asked of each target and what came of it; also when the model has been made small since."""
        applied: dict[str, dict[str, Tensor]] = {}
        for target in self.plan.targets:
            mask = self.wrappers.mask(target.config.module_name, target.config.target_name)
            if mask.factors:
                applied.setdefault(target.config.module_name, {})[target.config.target_name] = mask.product()
        return measure_sparsity(self.plan, self._merged(), applied)

    def _wrap_targets(self) -> None:
        self._own_masks: dict[str, dict[str, Tensor]] = {}
        for target in self.plan.targets:
            spec = target.config.spec
            assert isinstance(spec, PruningSpec)
            mask = self.wrappers.mask(target.config.module_name, target.config.target_name)
            mask.method = spec.apply_method or "mul"
            mask.value = spec.apply_value

    def _scored(self) -> list[PlannedTarget]:
        """Targets that this pruner makes a mask for by itself."""
        return [target for target in self.plan.targets if target.decides]

    def _latent(self, target: PlannedTarget) -> Tensor:
        return self.wrappers[target.config.module_name].tensor(target.config.target_name).detach()

    def _shape(self, module: str, target: str) -> torch.Size | None:
        """A target's shape; the model is run once where that is how an input's or output's shape becomes known."""
        if not target.startswith("_"):
            return self.wrappers[module].tensor(target).shape
        stack = self.wrappers[module].stack(target)
        if stack.shape is None and self.example_inputs is not None:
            self.track_forward()
        return stack.shape

    def _merged(self) -> dict[str, dict[str, Tensor]]:
        """The masks that the fused pruners made, compact."""
        merged: dict[str, dict[str, Tensor]] = {}
        for pruner in self._chain:
            for module, targets in pruner._own_masks.items() if isinstance(pruner, Pruner) else ():
                for target, mask in targets.items():
                    known = merged.setdefault(module, {}).get(target)
                    merged[module][target] = mask if known is None else known & mask.to(known.device)
        return merged

    def _apply(self, masks: dict[str, dict[str, Tensor]]) -> None:
        """Make these the pruner's own, and put the masks of all fused pruners in place, carried over by the graph."""
        before, self._own_masks = self._own_masks, masks
        try:
            merged = self._merged()
            coupling = next((item.plan.coupling for item in self._chain if item.plan.coupling is not None), None)
            if coupling is not None:
                complete = coupling.complete(merged)
            else:
                complete = {module: {name: (mask,) for name, mask in own.items()} for module, own in merged.items()}
        except MaskError:
            self._own_masks = before
            raise
        self.wrappers.replace_masks(complete)
