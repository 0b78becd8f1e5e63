"""One target of a plan: its blocks, and which of them can leave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tersor.config import Granularity, PruningSpec
from tersor.errors import ConfigError, ConflictError
from tersor.graph.coupling import Coupling
from tersor.targets.channels import channel_dims
from tersor.targets.granularity import Blocks, block_of
from tersor.targets.resolve import TargetConfig

OUT_CHANNEL = Granularity(name="out_channel")
ELEMENTS = Granularity(block=(1,))


@dataclass(frozen=True, eq=False)
class PlannedTarget:
    """One target, its setting, and what the graph says about it.

    Attributes:
        config: module, target name and spec.
        blocks: how a pruned parameter is cut into blocks; None for inputs, outputs and other modes.
        stays: which blocks cannot leave, bool, one a block; None where all can, or none can.
        why: why those cannot, or why none can; None where all can.
        classes: the classes of each block, shape (blocks, classes of one), where blocks are whole slices along one
            dimension; None otherwise.
        coupling: what the classes belong to; None where it is not known.
    """

    config: TargetConfig
    blocks: Blocks | None = None
    stays: Tensor | None = None
    why: str | None = None
    classes: np.ndarray | None = None
    coupling: Coupling | None = None

    @property
    def name(self) -> str:
        """``module.target``."""
        return qualified(self.config)

    @property
    def frozen(self) -> str | None:
        """Why none of its blocks can leave; None where at least one can."""
        return self.why if self.stays is None else None

    @property
    def decides(self) -> bool:
        """Whether a pruner makes a mask for it by itself: not aligned, not frozen, and with something to reach."""
        spec = self.config.spec
        return (
            isinstance(spec, PruningSpec)
            and self.blocks is not None
            and self.frozen is None
            and spec.align is None
            and (spec.sparse_ratio, spec.sparse_threshold, spec.min_sparse_ratio) != (None, None, None)
        )


def plan_target(target: TargetConfig, coupling: Coupling | None, default: Granularity) -> PlannedTarget:
    """Cut a target into blocks, and ask the graph which of them cannot leave.

    Args:
        target: what the config list says of it.
        coupling: what depends on what; None where that is not known.
        default: the compressor's own granularity.

    Raises:
        ConflictError: an input or output without ``align``.
        InvalidValueError: a granularity that does not fit the tensor.
    """
    spec = target.spec
    if not isinstance(spec, PruningSpec) or spec.align is not None:
        return PlannedTarget(target)
    if target.target_name.startswith("_"):
        raise ConflictError(
            "an input or output takes its mask from another target",
            where=f"{target.where} on {qualified(target)}",
            remedy="Set align: {'target_name': 'weight', 'dims': [0]} for it in target_settings.",
        )
    tensor = getattr(target.module, target.target_name)
    granularity = spec.granularity or default
    if granularity.name == "default":
        granularity = default
    out_dim, in_dim = channel_dims(target.module, target.target_name, tensor.dim())
    try:
        blocks = Blocks(tuple(tensor.shape), block_of(granularity, tensor.shape, out_dim=out_dim, in_dim=in_dim))
    except ConfigError as error:
        where = f"{target.where}['granularity'] on {qualified(target)}"
        raise type(error)(error.what, where=where, legal=error.legal, remedy=error.remedy) from None
    if blocks.count == 1:
        return PlannedTarget(target, blocks, why="is a single block, and one has to stay")
    if coupling is None or _single_elements(granularity):
        return PlannedTarget(target, blocks)
    classes = _classes(qualified(target), blocks, coupling)
    if classes is None:
        return PlannedTarget(target, blocks)
    return PlannedTarget(target, blocks, *_what_stays(classes, coupling), classes, coupling)


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
