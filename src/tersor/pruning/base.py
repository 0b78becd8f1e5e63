"""The base of all pruners: collect, score, allocate, mask."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import PruningSpec
from tersor.errors import ConfigError
from tersor.graph.coupling import Masks
from tersor.pruning.align import align, expanded
from tersor.pruning.allocation import Request, allocate
from tersor.storage import load_masks
from tersor.targets.granularity import Blocks
from tersor.targets.plan import PlannedTarget
from tersor.wrapping.stack import as_bool, compact


@dataclass(frozen=True)
class Sparsity:
    """What was asked of one target, and what came of it.

    Attributes:
        target: ``module.target``.
        asked: the sparse ratio; None where there is none.
        blocks: how many blocks the target has.
        removed: how many of them its mask removes in whole.
        elements: the share of its elements that are masked, by its own mask or because what they read is gone.
        reason: why less is removed than was asked; empty where it is not.
    """

    target: str
    asked: float | None
    blocks: int
    removed: int
    elements: float
    reason: str


class Pruner(Compressor):
    """Base of all pruners. A new one says how a block is scored, in one file.

    Four steps make masks: :meth:`collect` the values, :meth:`score` each block, allocate the sparsity (ratios,
    thresholds, global and dependency groups: :mod:`tersor.pruning.allocation`), and mask. With example inputs the masks
    are then completed over the coupling groups, so that the masked model computes what the small model will.

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
        self.generate_masks()

    def result(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """The wrapped model and its masks."""
        return self.model, self.get_masks()

    def generate_masks(self) -> dict[str, dict[str, Tensor]]:
        """Collect, score, allocate, mask; the masks are applied at once and returned.

        Raises:
            EmptyLayerError: a layer would be left without anything.
            ConfigError: nothing at all would be pruned.
        """
        targets = self._scored()
        if not targets:
            reasons = sorted({f"{row.module}.{row.target}: {row.reason}" for row in self.plan.rows if row.reason})
            raise ConfigError("nothing would be pruned", where="config_list", remedy="; ".join(reasons[:5]))
        with torch.no_grad():
            collected = self.collect()
            requests = [self._request(target, collected[target.name]) for target in targets]
            keep = allocate(requests)
        self._own_masks = {}
        for target in targets:
            assert target.blocks is not None
            mask = target.blocks.expand_compact(keep[target.name])
            self._own_masks.setdefault(target.config.module_name, {})[target.config.target_name] = mask
        align(self.plan.targets, self._own_masks, self._shape)
        self._apply()
        return self.get_masks()

    def get_masks(self, *, completed: bool = False) -> dict[str, dict[str, Tensor]]:
        """The masks of all fused pruners, ``{module: {target: bool tensor}}``, True keeps.

        Args:
            completed: also what follows from them by the graph (biases, norms, consumers), as it is simulated.

        Returns:
            masks of their parameters' shape, or broadcasting against inputs and outputs. A mask that is the same along
            a dimension is a view that takes no memory there: clone it before you change it.
        """
        return self.wrappers.masks() if completed else expanded(self._merged(), self._shape)

    def update_masks(self, masks: Masks | str | os.PathLike[str]) -> None:
        """Apply masks from elsewhere in place of this pruner's own.

        Args:
            masks: as :meth:`get_masks` returns them (float 0/1 masks too), or the path of a masks file.

        Raises:
            MaskError: they belong to another model; nothing is changed then.
        """
        given = load_masks(masks) if isinstance(masks, (str, os.PathLike)) else masks
        self.wrappers.check_masks(given)
        self._own_masks = {
            module: {target: compact(as_bool(mask, f"{module}.{target}")) for target, mask in targets.items()}
            for module, targets in given.items()
        }
        self._apply()

    def sparsity(self) -> list[Sparsity]:
        """What was asked of each target and what came of it."""
        own, applied = self.get_masks(), self.get_masks(completed=True)
        found: list[Sparsity] = []
        for target in self.plan.targets:
            spec, blocks = target.config.spec, target.blocks
            if blocks is None or not isinstance(spec, PruningSpec):
                continue
            place = target.config.module_name, target.config.target_name
            mask, simulated = (masks.get(place[0], {}).get(place[1]) for masks in (own, applied))
            removed = 0 if mask is None else int((~blocks.split(mask).any(-1)).sum())
            share = 0.0 if simulated is None else float((~simulated).float().mean())
            found.append(Sparsity(target.name, spec.sparse_ratio, blocks.count, removed, share, target.frozen or ""))
        return found

    def _wrap_targets(self) -> None:
        self._own_masks: dict[str, dict[str, Tensor]] = {}
        for target in self.plan.targets:
            spec = target.config.spec
            assert isinstance(spec, PruningSpec)
            mask = self.wrappers.mask(target.config.module_name, target.config.target_name)
            mask.method = spec.apply_method or "mul"
            mask.value = spec.apply_value

    def _scored(self) -> list[PlannedTarget]:
        """Targets that this pruner makes a mask for by itself: not aligned, not frozen, and with something to reach."""
        return [
            target
            for target in self.plan.targets
            if isinstance(spec := target.config.spec, PruningSpec)
            and target.blocks is not None
            and target.frozen is None
            and spec.align is None
            and (spec.sparse_ratio, spec.sparse_threshold, spec.min_sparse_ratio) != (None, None, None)
        ]

    def _latent(self, target: PlannedTarget) -> Tensor:
        return self.wrappers[target.config.module_name].tensor(target.config.target_name).detach()

    def _request(self, target: PlannedTarget, values: Tensor) -> Request:
        spec, blocks = target.config.spec, target.blocks
        assert isinstance(spec, PruningSpec)
        assert blocks is not None
        return Request(
            key=target.name,
            scores=self._protected(target, self.score(values, blocks)),
            block_numel=blocks.block_numel,
            ratio=spec.sparse_ratio,
            threshold=spec.sparse_threshold,
            min_ratio=spec.min_sparse_ratio,
            max_ratio=spec.max_sparse_ratio,
            global_group=spec.global_group_id,
            dependency_group=spec.dependency_group_id,
            internal_block=spec.internal_metric_block,
        )

    def _protected(self, target: PlannedTarget, scores: Tensor) -> Tensor:
        """Blocks that hold an index which cannot leave score highest."""
        coupling, dim = self.plan.coupling, target.cut_dim
        if coupling is None or dim is None or target.blocks is None:
            return scores
        classes = coupling.classes_along(target.name, dim)
        if classes is None or not coupling.frozen[classes].any():
            return scores
        frozen = torch.from_numpy(coupling.frozen[classes]).reshape(target.blocks.grid[dim], -1).any(1)
        return scores.masked_fill(frozen.reshape(scores.shape).to(scores.device), float("inf"))

    def _shape(self, module: str, target: str) -> torch.Size | None:
        """A target's shape; the model is run once where that is how an input's or output's shape becomes known."""
        stack = self.wrappers[module].stack(target)
        if not target.startswith("_"):
            return self.wrappers[module].tensor(target).shape
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

    def _apply(self) -> None:
        """Put the masks of all fused pruners in place, carried over to biases, norms and consumers."""
        merged = self._merged()
        if self.plan.coupling is not None:
            self.wrappers.replace_masks(self.plan.coupling.complete(merged))
        else:
            self.wrappers.replace_masks(
                {module: {target: (mask,) for target, mask in targets.items()} for module, targets in merged.items()}
            )
