"""The base of all pruners: collect, score, allocate, mask."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import PruningSpec
from tersor.config.values import is_activation
from tersor.errors import ConfigError, ConflictError, MaskError
from tersor.graph.coupling import Masks
from tersor.pruning.align import align, expanded
from tersor.pruning.decision import RatioNow, as_asked, decide, masks_of_neighbours
from tersor.pruning.equivalent import masks_of_weights
from tersor.pruning.on_demand import OnDemand
from tersor.pruning.sparsity import Sparsity, measure_sparsity
from tersor.storage import load_masks
from tersor.targets.activations import values_at
from tersor.targets.choices import choices
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training.ranks import is_joined, of_first_process
from tersor.training.timeline import Event
from tersor.wrapping import whole
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
    penalizes: ClassVar[bool] = False
    """Whether it adds a penalty to the loss, whose weight ``rho`` in the config list may say."""
    completes: bool = True
    """Whether what follows from its masks by the graph is masked too; a pruner that lets masked blocks come back turns
    it off for a while, since no gradient reaches a channel that nothing reads."""

    @abstractmethod
    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The importance of each block of one target.

        Args:
            values: what :meth:`collect` gave for the target, of the target's shape.
            blocks: how it is cut.

        Returns:
            one score for each block, shape ``blocks.grid``; the highest live.
        """

    def collect(self) -> Mapping[str, Tensor]:
        """The values to score for each target, by its name.

        A parameter's are its latent values; an input's or output's what passes in a run on the example inputs.
        Overridden where data or gradients are needed.
        """
        activations = [target.place for target in self._scored() if is_activation(target.config.target_name)]
        passed = values_at(self.model, self.example_inputs, activations) if activations else {}

        def values(target: PlannedTarget) -> Tensor:
            return passed[target.place] if target.place in passed else self._latent(target)

        return OnDemand({target.name: partial(values, target) for target in self._scored()})

    def importance(self) -> Mapping[str, Tensor]:
        """One score for each block of each target, by its name: :meth:`collect`, then :meth:`score`.

        They are computed one target at a time, when they are looked at. Overridden where targets are not scored one by
        one.
        """
        collected = self.collect()
        return OnDemand({target.name: partial(self._score_of, target, collected) for target in self._scored()})

    def _score_of(self, target: PlannedTarget, collected: Mapping[str, Tensor]) -> Tensor:
        assert target.blocks is not None
        values = collected[target.name]
        # The values of an input or output may be those of several samples.
        own = target.blocks.of(values.shape) if is_activation(target.config.target_name) else target.blocks
        return self.score(values, own)

    def gather(self) -> None:
        """Train for as long as the scores need it; a schedule calls it before each of its rounds."""

    def on_start(self) -> None:
        """Prune before the first step."""
        self.gather()
        self.prune()

    def events(self) -> Iterable[Event]:
        """It prunes at the start."""
        yield Event(f"prunes, {', '.join(f'{asked:.3g}' for asked in self.asked())}")

    def asked(self) -> list[float]:
        """The ratios and thresholds that the config list asks for, each once."""
        specs = [target.config.spec for target in self._scored()]
        found = [spec.sparse_ratio if spec.sparse_ratio is not None else spec.sparse_threshold for spec in specs]  # pyright: ignore
        return sorted({float(value) for value in found if value is not None})

    def own_status(self) -> dict[str, float | Tensor]:
        """The share of all elements of its targets that is masked."""
        total = masked = 0.0
        for target in self._scored():
            mask = self.wrappers.mask(*target.place)
            shape = self._shape(*target.place) if not is_activation(target.config.target_name) else None
            if shape is None:
                continue
            total += shape.numel()
            if mask.factors:
                masked += shape.numel() * (1 - mask.product().float().mean().item())
        return {"sparsity": masked / total} if total else {}

    def result(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """The wrapped model and its masks."""
        return self.model, self.get_masks()

    def generate_masks(self) -> dict[str, dict[str, Tensor]]:
        """Collect, score, allocate, mask; the masks are applied at once and returned.

        Raises:
            EmptyLayerError: a layer would be left without anything.
            ConfigError: nothing at all would be pruned.
        """
        self.prune()
        return self.get_masks()

    def prune(self, ratio_now: RatioNow = as_asked) -> None:
        """Collect, score, allocate, mask; the masks are applied at once.

        Args:
            ratio_now: what each ratio and threshold of the config list is at this point of a schedule.

        Raises:
            EmptyLayerError: a layer would be left without anything.
            ConfigError: nothing at all would be pruned.
            ConflictError: the model is sharded, and this pruner needs whole parameters.
        """
        self.refuse_shards()
        with torch.no_grad():
            self.refuse_nothing()
            keep = decide(choices(self.plan.targets), self.importance(), ratio_now)
            self.apply_decision({name: of_first_process(own) for name, own in keep.items()})

    def refuse_nothing(self) -> None:
        """Raise where the config list comes to nothing on this model.

        Raises:
            ConfigError: naming the reasons.
        """
        if not self._scored():
            reasons = sorted({f"{row.module}.{row.target}: {row.reason}" for row in self.plan.rows if row.reason})
            raise ConfigError("nothing would be pruned", where="config_list", remedy="; ".join(reasons[:5]))

    def refuse_impossible(self) -> None:
        """Raise before any training where no scores at all would make what the config list asks for possible.

        Raises:
            EmptyLayerError: a ratio would leave nothing of a layer.
            ConfigError: nothing would be pruned, or settings that cannot hold together.
        """
        self.refuse_nothing()
        equal = {target.name: torch.zeros(target.blocks.grid) for target in self._scored() if target.blocks is not None}
        # What a threshold removes is not known before there are scores.
        decide(
            choices(self.plan.targets),
            equal,
            lambda asked, _target, setting="sparse_ratio", /: 0.0 if setting == "sparse_threshold" else asked,
        )

    def apply_decision(self, keep: Mapping[str, Tensor]) -> None:
        """Mask what does not live, and what follows from it.

        Args:
            keep: one bool for each block, by the name of the target.
        """
        masks: dict[str, dict[str, Tensor]] = {}
        for target in self._scored():
            assert target.blocks is not None
            mask = target.blocks.expand_compact(keep[target.name].view(target.blocks.grid))
            masks.setdefault(target.config.module_name, {})[target.config.target_name] = mask
        align(self.plan.targets, masks, self._shape)
        followers: list[dict[str, dict[str, Tensor]]] = []
        if self.completes:
            followers = [masks_of_neighbours(self._scored(), keep)]
            for weights in (masks_of_weights(target, masks) for target in self._scored()):
                # A weight that is tied computes something else too.
                if all(self.wrappers.owns(module, name) for module, own in weights.items() for name in own):
                    followers.append(weights)
        for module, targets in (item for follower in followers for item in follower.items()):
            for name, mask in targets.items():
                own = masks.setdefault(module, {}).get(name)
                masks[module][name] = mask if own is None else own & mask.to(own.device)
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

    def own_masks(self) -> Masks:
        """The masks that this pruner made, compact."""
        return self._own_masks

    def own_state(self) -> dict[str, Any]:
        """The masks that this pruner made."""
        return {"masks": self._own_masks}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Apply the masks of :meth:`own_state`."""
        self._apply(state["masks"])

    def _wrap_targets(self) -> None:
        self._own_masks: dict[str, dict[str, Tensor]] = {}
        for target in self.plan.targets:
            spec = target.config.spec
            assert isinstance(spec, PruningSpec)
            if spec.rho is not None and not self.penalizes:
                raise ConflictError(
                    f"{type(self).__name__} has no penalty",
                    where=f"{target.config.where}['rho'] on {target.name}",
                    remedy="Leave it out, or use ADMMPruner.",
                )
            mask = self.wrappers.mask(target.config.module_name, target.config.target_name)
            mask.method = spec.apply_method or "mul"
            mask.value = spec.apply_value
        if is_joined():
            self._make_places()

    def _make_places(self) -> None:
        """Make a stack wherever the graph may carry masks to: once ``fully_shard`` was called none can be made."""
        own = {target.name for target in self.plan.targets}
        groups = () if self.plan.coupling is None else self.plan.coupling.groups
        members = [{member.name for member in group.members} for group in groups if group.frozen is None]
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name in sorted({name for names in members if names & own for name in names}):
            module, _, target = name.rpartition(".")
            if name in parameters:
                for place in self.wrappers.tied(module, target):
                    self.wrappers[place[0]].stack(place[1])

    def _scored(self) -> list[PlannedTarget]:
        """Targets that this pruner makes a mask for by itself."""
        return [target for target in self.plan.targets if target.decides]

    def _latent(self, target: PlannedTarget) -> Tensor:
        return whole(self.wrappers[target.config.module_name].tensor(target.config.target_name).detach())

    def _shape(self, module: str, target: str) -> torch.Size | None:
        """A target's shape; the model is run once where that is how an input's or output's shape becomes known."""
        if not target.startswith("_"):
            return self.wrappers[module].tensor(target).shape
        stack = self.wrappers[module].stack(target)
        if stack.shape is None and self.example_inputs is not None:
            self.track_forward()
        return stack.shape

    def _merged(self, *, completed: bool = False) -> dict[str, dict[str, Tensor]]:
        """The masks that the fused pruners made, compact; or those of the pruners alone that complete them."""
        merged: dict[str, dict[str, Tensor]] = {}
        for pruner in self._chain:
            if not isinstance(pruner, Pruner) or (completed and not pruner.completes):
                continue
            for module, targets in pruner.own_masks().items():
                for target, mask in targets.items():
                    known = merged.setdefault(module, {}).get(target)
                    merged[module][target] = mask if known is None else known & mask.to(known.device)
        return merged

    @contextmanager
    def _masks_kept_on_error(self) -> Iterator[None]:
        """Put the masks back that are in place now, if what follows fails."""
        before = self._own_masks
        try:
            yield
        except BaseException:
            self._apply(before)
            raise

    def _apply(self, masks: dict[str, dict[str, Tensor]]) -> None:
        """Make these the pruner's own, and put the masks of all fused pruners in place, carried over by the graph."""
        before, self._own_masks = self._own_masks, masks
        try:
            merged = self._merged()
            coupling = next((item.plan.coupling for item in self._chain if item.plan.coupling is not None), None)
            if coupling is not None:
                complete = coupling.complete(merged, coupling.removed(self._merged(completed=True)))
            else:
                complete = {module: {name: (mask,) for name, mask in own.items()} for module, own in merged.items()}
        except MaskError:
            self._own_masks = before
            raise
        self.wrappers.replace_masks(complete)
