"""One target of a plan: its blocks, and which of them can leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.config import Granularity, PruningSpec
from tersor.config.specs import Pattern
from tersor.config.values import is_activation
from tersor.errors import ConfigError, ConflictError, InvalidValueError
from tersor.graph.coupling import Coupling
from tersor.targets.activations import Place
from tersor.targets.channels import activation_channel_dim, channel_dims
from tersor.targets.granularity import Blocks, block_of
from tersor.targets.resolve import TargetConfig

OUT_CHANNEL = Granularity(name="out_channel")
ELEMENTS = Granularity(block=(1,))


@dataclass(frozen=True, eq=False)
class PlannedTarget:
    """One target, its setting, and what the graph says about it.

    Attributes:
        config: module, target name and spec.
        blocks: how a pruned target is cut into blocks; None where its mask comes from elsewhere, and in other modes. Of
            an input or output the first dimension, the samples, has size 1 here.
        banks: how the grid of blocks is cut into parts that lose equally many; None where that is not asked for.
        stays: which blocks cannot leave, bool, one a block; None where all can, or none can.
        why: why those cannot, or why none can; None where all can.
        classes: the classes of each block, shape (blocks, classes of one), where blocks are whole slices along one
            dimension; None otherwise.
        coupling: what the classes belong to; None where it is not known.
    """

    config: TargetConfig
    blocks: Blocks | None = None
    banks: Blocks | None = None
    stays: Tensor | None = None
    why: str | None = None
    classes: np.ndarray | None = None
    coupling: Coupling | None = None

    @property
    def name(self) -> str:
        """``module.target``."""
        return qualified(self.config)

    @property
    def place(self) -> Place:
        """Module and target name."""
        return place(self.config)

    @property
    def frozen(self) -> str | None:
        """Why none of its blocks can leave; None where at least one can."""
        return self.why if self.stays is None else None

    @property
    def free(self) -> int:
        """How many of its blocks can leave."""
        if self.blocks is None or self.frozen is not None:
            return 0
        return self.blocks.count if self.stays is None else int((~self.stays).sum())

    @property
    def parts(self) -> int:
        """The number of equal parts of its blocks of which each loses equally many."""
        if self.banks is not None:
            return self.banks.count
        return getattr(self.config.spec, "internal_metric_block", None) or 1

    @property
    def decides(self) -> bool:
        """Whether a pruner makes a mask for it by itself: not aligned, not frozen, and with something to reach."""
        spec = self.config.spec
        return (
            isinstance(spec, PruningSpec)
            and self.blocks is not None
            and self.frozen is None
            and spec.align is None
            and (spec.ratio, spec.sparse_threshold, spec.min_sparse_ratio) != (None, None, None)
        )


def plan_target(
    target: TargetConfig,
    coupling: Coupling | None,
    default: Granularity,
    *,
    balance: Granularity | None = None,
    shape: torch.Size | None = None,
) -> PlannedTarget:
    """Cut a target into blocks, and ask the graph which of them cannot leave.

    Args:
        target: what the config list says of it.
        coupling: what depends on what; None where that is not known.
        default: the compressor's own granularity.
        balance: its own way to balance, where the config list has none.
        shape: of an input or output.

    Raises:
        ConflictError: an input or output without a ratio or ``align``, or whose shape is not known.
        InvalidValueError: a granularity that does not fit the tensor.
    """
    spec = target.spec
    if not isinstance(spec, PruningSpec) or spec.align is not None:
        return PlannedTarget(target)
    granularity = _granularity(spec, default)
    if is_activation(target.target_name):
        sizes, dims = _activation_dims(target, spec, shape)
        balance = None
    else:
        sizes = getattr(target.module, target.target_name).shape
        out_dim, in_dim = channel_dims(target.module, target.target_name, len(sizes))
        dims = {"out_dim": out_dim, "in_dim": in_dim}
    blocks = _blocks(target, "granularity", granularity, sizes, dims)
    if blocks.count == 1:
        return PlannedTarget(target, blocks, why="is a single block, and one has to stay")
    banks = _banks(target, spec, blocks, dims, balance)
    if coupling is None or is_activation(target.target_name) or _single_elements(granularity):
        return PlannedTarget(target, blocks, banks)
    classes = _classes(qualified(target), blocks, coupling)
    if classes is None:
        return PlannedTarget(target, blocks, banks)
    return PlannedTarget(target, blocks, banks, *_what_stays(classes, coupling), classes, coupling)


def _granularity(spec: PruningSpec, default: Granularity) -> Granularity:
    return default if spec.granularity is None or spec.granularity.name == "default" else spec.granularity


def _blocks(
    target: TargetConfig, key: str, granularity: Granularity, shape: Sequence[int], dims: Mapping[str, int | None]
) -> Blocks:
    try:
        return Blocks(tuple(shape), block_of(granularity, shape, **dims))
    except ConfigError as error:
        where = f"{target.where}[{key!r}] on {qualified(target)}"
        raise type(error)(error.what, where=where, legal=error.legal, remedy=error.remedy) from None


def _activation_dims(
    target: TargetConfig, spec: PruningSpec, shape: torch.Size | None
) -> tuple[torch.Size, dict[str, int | None]]:
    """The shape of one sample of an input or output, and its dimension of channels, whatever these are called."""
    where = f"{target.where} on {qualified(target)}"
    if (spec.ratio, spec.sparse_threshold, spec.min_sparse_ratio) == (None, None, None):
        raise ConflictError(
            "an input or output has neither a ratio of its own nor another target to follow",
            where=where,
            remedy="Set align: {'target_name': 'weight', 'dims': [0]} for it in target_settings, or a sparse_ratio.",
        )
    if shape is None or len(shape) < 2:
        raise ConflictError(
            "the shape of this input or output is not known" if shape is None else f"{tuple(shape)} has no channels",
            where=where,
            remedy="Give example_inputs that reach this module, or take the mask from another target: set align in "
            "target_settings.",
        )
    dim = activation_channel_dim(target.module, len(shape))
    dim = (1 if len(shape) in (2, 4, 5) else len(shape) - 1) if dim is None else dim
    return torch.Size((1, *shape[1:])), {"out_dim": dim, "in_dim": dim, "channel_dim": dim}


def _banks(
    target: TargetConfig,
    spec: PruningSpec,
    blocks: Blocks,
    dims: Mapping[str, int | None],
    balance: Granularity | None,
) -> Blocks | None:
    """How the grid of blocks is cut into the parts that a pattern or a balance asks for."""
    if spec.sparse_pattern is not None:
        in_dim = None if is_activation(target.target_name) else dims["in_dim"]
        return Blocks(blocks.grid, _pattern_bank(target, spec.sparse_pattern, blocks, in_dim))
    asked = spec.balance_granularity or (None if spec.internal_metric_block else balance)
    if asked is None:
        return None
    sizes = _blocks(target, "balance_granularity", asked, blocks.shape, dims).block
    if any(size % part for size, part in zip(sizes, blocks.block, strict=True)):
        raise InvalidValueError(
            f"{sizes} is no multiple of the block {blocks.block}",
            where=f"{target.where}['balance_granularity'] on {qualified(target)}",
            remedy="Balance over whole blocks of the granularity.",
        )
    return Blocks(blocks.grid, tuple(size // part for size, part in zip(sizes, blocks.block, strict=True)))


def _pattern_bank(target: TargetConfig, pattern: Pattern, blocks: Blocks, in_dim: int | None) -> tuple[int, ...]:
    """Consecutive blocks along the input dimension."""
    where = f"{target.where}['sparse_pattern'] on {qualified(target)}"
    if in_dim is None:
        raise ConflictError(
            "a pattern runs along the input dimension of a weight, and this target has none",
            where=where,
            remedy="Use sparse_ratio with balance_granularity.",
        )
    if blocks.grid[in_dim] % pattern.of:
        raise InvalidValueError(
            f"{blocks.grid[in_dim]} blocks along the input dimension cannot be cut into parts of {pattern.of}",
            where=where,
            remedy="Leave this target out. Where a block is more than an element, as with pruners of channels, use "
            "LevelPruner, or set granularity [1].",
        )
    return tuple(pattern.of if dim == in_dim else 1 for dim in range(len(blocks.grid)))


def _single_elements(granularity: Granularity) -> bool:
    return granularity.fill == 1 and set(granularity.block) == {1}


def _classes(name: str, blocks: Blocks, coupling: Coupling) -> np.ndarray | None:
    """The classes of each block, where blocks are whole slices along one dimension."""
    cut = [dim for dim, count in enumerate(blocks.grid) if count > 1]
    classes = coupling.classes_along(name, cut[0]) if len(cut) == 1 else None
    return None if classes is None else classes.reshape(blocks.count, -1)


def _what_stays(classes: np.ndarray, coupling: Coupling) -> tuple[Tensor | None, str | None]:
    """Which blocks hold a class that cannot leave, and why."""
    frozen = coupling.frozen[classes]
    stays = torch.from_numpy(frozen.any(1))
    if not stays.any():
        return None, None
    return None if stays.all() else stays, coupling.reasons[int(classes[frozen][0])]


def qualified(target: TargetConfig) -> str:
    """``module.target``."""
    return f"{target.module_name}.{target.target_name}" if target.module_name else target.target_name


def place(target: TargetConfig) -> Place:
    """Module and target name."""
    return target.module_name, target.target_name
