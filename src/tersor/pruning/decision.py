"""From the scores of blocks to what lives, where blocks leave together."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from tersor.config import PruningSpec
from tersor.errors import ConflictError
from tersor.pruning.allocation import Request, allocate
from tersor.targets.channels import is_norm_scale
from tersor.targets.choices import Choices, Part
from tersor.targets.planned import PlannedTarget

Setting = Literal["sparse_ratio", "min_sparse_ratio", "max_sparse_ratio", "sparse_threshold"]


class RatioNow(Protocol):
    """What a ratio (or threshold) of the config list comes to at this point of a schedule, for one target."""

    def __call__(self, asked: float, target: PlannedTarget, setting: Setting = "sparse_ratio", /) -> float:
        """What stands in the place of a setting that the config list gives as `asked`."""
        ...


def as_asked(asked: float, target: PlannedTarget, setting: Setting = "sparse_ratio", /) -> float:
    """The whole ratio at once."""
    return asked


def decide(sets: Sequence[Choices], scores: Mapping[str, Tensor], ratio_now: RatioNow = as_asked) -> dict[str, Tensor]:
    """Which blocks of each target live.

    A choice is worth the mean score of its blocks, those of all its targets alike. Ratios, thresholds and budgets count
    choices, in each set of interchangeable ones by itself.

    Args:
        sets: what is decided on.
        scores: one for each block, by the name of the target.
        ratio_now: what each ratio and threshold is now.

    Returns:
        one bool for each block, flat, by the name of the target; what belongs to no choice lives.

    Raises:
        ConfigError: see :func:`tersor.pruning.allocation.allocate`.
        EmptyLayerError: all choices of a set would be removed.
    """
    named: set[str] = set()
    together: list[Request] = []  # global groups share budgets; all else is decided set by set
    kept: dict[Hashable, Tensor] = {}
    for parts in sets:
        _check_order(parts)
        group = _group(parts, named)
        blocks = sum(part.width for part in parts)
        # Allocation takes the mean over targets: the factor makes it one over blocks.
        requests = [_request(part, scores[str(part)], len(parts) / blocks, group, ratio_now) for part in parts]
        if any(request.global_group is not None for request in requests):
            together += requests
        else:
            kept.update(allocate(requests))
    kept.update(allocate(together))
    keep: dict[str, Tensor] = {}
    for part in (part for parts in sets for part in parts):
        assert part.target.blocks is not None
        lives = kept.pop(part)
        all_live = torch.ones(part.target.blocks.count, dtype=torch.bool, device=lives.device)
        own = keep.setdefault(str(part), all_live)
        if part.blocks is None:
            banks = part.target.banks
            own.copy_((lives if banks is None else banks.join(lives)).flatten())
        else:
            own[torch.from_numpy(part.blocks).to(lives.device)] = lives[:, None]
    for name in set(scores) - set(keep):
        keep[name] = torch.ones(scores[name].numel(), dtype=torch.bool, device=scores[name].device)
    return keep


def masks_of_neighbours(targets: Sequence[PlannedTarget], keep: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Masks that let leave what was decided on by what neither computes nor reads it.

    A standardized weight is not zero where its parameter is masked: what it computes leaves only when nothing reads it.
    The scale of a norm takes the channel with it that it multiplies: the weights that write the channel are masked too,
    unless another target decided on it and keeps it.

    Args:
        targets: what was decided on.
        keep: what :func:`decide` said of them.
    """
    coupling = next((target.coupling for target in targets if target.coupling is not None), None)
    if coupling is None:
        return {}
    unwritten = np.ones(len(coupling.classes), dtype=bool)
    unwritten[coupling.classes[coupling.written]] = False
    lives, leaves = np.zeros_like(unwritten), np.zeros_like(unwritten)
    for target in targets:
        if target.classes is not None:
            kept = keep[target.name].cpu().numpy()
            lives[target.classes[kept]] = True
            gone = target.classes[~kept]
            scales = is_norm_scale(target.config.module, target.config.target_name)
            leaves[gone if scales else gone[unwritten[gone]]] = True
    leaves &= ~lives
    return coupling.masks_of(leaves) if leaves.any() else {}


def _group(parts: Choices, named: set[str]) -> str | None:
    """A name of its own for each set that several targets share, close to what the user calls it."""
    if len(parts) == 1:
        return None
    config = parts[0].target.config
    given = name = getattr(config.spec, "dependency_group_id", None) or config.module_name
    number = 1
    while name in named:
        number += 1
        name = f"{given} ({number})"
    named.add(name)
    return name


def _check_order(parts: Choices) -> None:
    """Refuse parts that are cut into banks in different orders: block i of one would not leave with block i of all."""
    if len(parts) == 1 or parts[0].blocks is not None or all(part.target.banks is None for part in parts):
        return
    positions = (torch.arange(part.count) for part in parts)
    banks = (part.target.banks for part in parts)
    first, *others = (
        own if cut is None else cut.split(own.view(cut.shape)).flatten()
        for own, cut in zip(positions, banks, strict=True)
    )
    if any(not torch.equal(first, other) for other in others):
        raise ConflictError(
            "the targets of a dependency group share one mask, and these are not balanced alike",
            where=", ".join(str(part) for part in parts),
            remedy="Give them one sparse_pattern or balance_granularity and shapes that agree, or different groups.",
        )


def _request(part: Part, scores: Tensor, factor: float, group: str | None, ratio_now: RatioNow) -> Request:
    spec = part.target.config.spec
    assert isinstance(spec, PruningSpec)

    def now(asked: float | None, setting: Setting) -> float | None:
        return None if asked is None else ratio_now(asked, part.target, setting)

    if part.blocks is not None:
        if part.target.banks is not None:
            raise ConflictError(
                "its blocks leave in runs or with others, so that equal shares of each part cannot be removed",
                where=f"{part.target.config.where} on {part}",
                remedy="Leave out the balance, or choose a granularity of single elements.",
            )
        blocks = torch.from_numpy(part.blocks).to(scores.device)
        wide = scores.flatten().to(torch.promote_types(scores.dtype, torch.float32))
        scores = wide[blocks].sum(1) * factor
    elif part.target.banks is not None:
        scores = part.target.banks.split(scores.reshape(part.target.banks.shape)).flatten()
    return Request(
        key=part,
        scores=scores,
        block_numel=part.weight,
        ratio=now(spec.ratio, "sparse_ratio"),
        threshold=now(spec.sparse_threshold, "sparse_threshold"),
        min_ratio=now(spec.min_sparse_ratio, "min_sparse_ratio"),
        max_ratio=now(spec.max_sparse_ratio, "max_sparse_ratio"),
        global_group=spec.global_group_id,
        normalize=spec.global_normalize is not None,
        dependency_group=group,
        internal_block=part.target.parts,
    )
