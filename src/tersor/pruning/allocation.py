"""From scores to what lives: which blocks of which targets are removed.

All that is decided here is *how many* blocks each target loses; they are those of the lowest scores. The rules:

- A ratio r of n blocks is ``floor(r * n + 1e-6)`` blocks (0.29 of 100 is 29, although ``0.29 * 100`` is 28.999...).
  That holds for sparse, least and greatest ratios alike: a least ratio of 0.5 asks for one of three blocks.
- Of equal scores, the lowest index is removed first; in a global group, that of the target that comes first.
- A threshold removes the blocks of a lower score, within the least and the greatest ratio.
- A **dependency group** lives and dies as one *unit*: its scores are averaged, its members share one mask.
- **Internal blocks** cut a unit into consecutive equal parts (the groups of a convolution), which lose equally
  many blocks: ratios and thresholds count in one part.
- A **global group** removes ``floor(r * elements + 1e-6)`` elements from all of its units together, the lowest scores
  first. Each unit stays within its least and greatest ratio and keeps at least one block of every part, whatever the
  ratio. Where units weigh differently (a filter of one layer has more elements than one of another), it ends at the
  first block that is heavier than what is left to remove. Lighter ones of a higher score are not taken in its place:
  to make up for one filter of a wide layer, a narrow layer would lose all of its own.
- Greatest ratios may forbid what a global ratio asks for, and least ratios may ask for more. Then they win, and
  `allocate` returns what is possible: whoever reports compares the masks with the ratio.

Example:
    >>> first = Request("first", torch.arange(500.0), ratio=0.8, global_group="all", max_ratio=0.9)
    >>> second = Request("second", torch.arange(1000.0), ratio=0.8, global_group="all", max_ratio=0.9)
    >>> {key: int((~mask).sum()) for key, mask in allocate([first, second]).items()}
    {'first': 450, 'second': 750}
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.errors import ConflictError, EmptyLayerError, InvalidValueError
from tersor.pruning.scores import mean_over_members

_KEYS = {
    "ratio": "sparse_ratio",
    "threshold": "sparse_threshold",
    "global_group": "global_group_id",
    "normalize": "global_normalize",
}
"""What the user calls the settings on which the members of a dependency group must agree."""


@dataclass(frozen=True, eq=False)
class Request:
    """One target as allocation sees it.

    Args:
        key: what the mask is returned under, and what errors call the target.
        scores: one score per block, of any shape; higher lives.
        block_numel: elements in one block, its weight in a global group.
        ratio: the share of blocks to remove, in [0, 1].
        threshold: remove the blocks of a lower score. With neither ratio nor threshold, only ``min_ratio`` is removed.
        min_ratio: remove at least this share.
        max_ratio: remove at most this share.
        global_group: targets of one name share one budget of elements; they need the same ratio.
        normalize: in the global group, this target's scores count relative to their mean.
        dependency_group: targets of one name share one mask; they need equally many blocks, and the same ratio or
            threshold and global group.
        internal_block: the number of consecutive equal parts that lose equally many blocks; in a dependency group, the
            least common multiple of its members'.
    """

    key: Hashable
    scores: Tensor
    block_numel: int = 1
    ratio: float | None = None
    threshold: float | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None
    global_group: str | None = None
    normalize: bool = False
    dependency_group: str | None = None
    internal_block: int | None = None


@torch.no_grad()
def allocate(requests: Sequence[Request]) -> dict[Hashable, Tensor]:
    """Decide which blocks live.

    Args:
        requests: the targets, each key once.

    Returns:
        For each key a bool tensor of the shape and on the device of its scores; True keeps.

    Raises:
        InvalidValueError: a score is NaN, or a number of blocks does not divide by ``internal_block``.
        ConflictError: settings that cannot hold together, within one target or within one group.
        EmptyLayerError: a ratio, a least ratio or a threshold would remove every block of a target.
    """
    units = _units(requests)
    removed = {unit: unit.asked for unit in units if unit.first.global_group is None}
    groups: dict[str, list[_Unit]] = {}
    for unit in units:
        if unit.first.global_group is not None:
            groups.setdefault(unit.first.global_group, []).append(unit)
    for group in groups.values():
        removed.update(zip(group, _global_counts(group), strict=True))

    masks: dict[Hashable, Tensor] = {}
    for unit in units:
        keep = ~_lowest(unit.scores, removed[unit])
        for member in unit.members:
            masks[member.key] = keep.view(member.scores.shape).to(member.scores.device, copy=len(unit.members) > 1)
    assert len(masks) == len(requests), "a key is there twice"
    return {request.key: masks[request.key] for request in requests}


@dataclass(frozen=True, eq=False)
class _Unit:
    """Targets that share one mask: the members of a dependency group, or one target alone.

    Its scores have the shape (parts, size); all counts are blocks of one part.
    """

    members: tuple[Request, ...]
    scores: Tensor

    @property
    def first(self) -> Request:
        """Any member: they agree on ratio, threshold and global group."""
        return self.members[0]

    @property
    def parts(self) -> int:
        return self.scores.shape[0]

    @property
    def size(self) -> int:
        return self.scores.shape[1]

    @property
    def weight(self) -> int:
        """Elements that go when each part loses one block."""
        return self.parts * sum(member.block_numel for member in self.members)

    @cached_property
    def least(self) -> int:
        """The count that the least ratios of all members ask for."""
        return max(_share(member.min_ratio or 0.0, self.size) for member in self.members)

    @cached_property
    def greatest(self) -> int:
        """The count that the greatest ratios of all members allow."""
        ratios = (1.0 if member.max_ratio is None else member.max_ratio for member in self.members)
        return min(_share(ratio, self.size) for ratio in ratios)

    @property
    def asked(self) -> int:
        """The count that the unit's own ratio or threshold asks for, within its bounds."""
        count, setting = 0, ""
        if self.first.ratio is not None:
            count, setting = _share(self.first.ratio, self.size), f"sparse_ratio {self.first.ratio}"
        elif self.first.threshold is not None:
            # The part with the fewest decides, so that no block that reaches the threshold is removed.
            below = (self.scores < self.first.threshold).sum(dim=1)
            count, setting = int(below.min()), f"sparse_threshold {self.first.threshold}"
        count = min(max(count, self.least), self.greatest)
        if count == self.size:
            raise self.emptied_by(setting)
        return count

    def emptied_by(self, setting: str) -> EmptyLayerError:
        """The error to raise where a setting leaves no block."""
        return EmptyLayerError(
            f"{setting} would remove all {self.scores.numel()} blocks.",
            where=_names(self.members),
            remedy=f"The greatest ratio that is possible is {(self.size - 1) / self.size}: "
            "ask for it, or set it as max_sparse_ratio.",
        )


def _units(requests: Iterable[Request]) -> list[_Unit]:
    """The units, in the order in which their first members come."""
    members: dict[object, list[Request]] = {}
    for position, request in enumerate(requests):
        if request.ratio is not None and request.threshold is not None:
            raise ConflictError(
                f"sparse_ratio {request.ratio} and sparse_threshold {request.threshold} both say how much to remove.",
                where=str(request.key),
                remedy="Keep one of them; min_sparse_ratio and max_sparse_ratio go with either.",
            )
        if request.scores.isnan().any():
            raise InvalidValueError(
                "a score is NaN.", where=str(request.key), remedy="Look for NaN or infinity in the values scored."
            )
        group = position if request.dependency_group is None else request.dependency_group
        members.setdefault(group, []).append(request)
    return [_unit(tuple(group)) for group in members.values()]


def _unit(members: tuple[Request, ...]) -> _Unit:
    for setting in _KEYS:
        _agreed(members, setting, "the targets of a dependency group share one mask")
    counts = {member.scores.numel() for member in members}
    if len(counts) > 1:
        listed = ", ".join(f"{member.key}: {member.scores.numel()}" for member in members)
        raise ConflictError(
            f"the targets of a dependency group must have equally many blocks ({listed}).",
            where=f"dependency_group_id {members[0].dependency_group!r}",
            remedy="Give them a granularity of equally many blocks, or different groups.",
        )
    parts, count = math.lcm(*(member.internal_block or 1 for member in members)), counts.pop()
    if count % parts:
        raise InvalidValueError(
            f"{count} blocks cannot be cut into {parts} equal parts.",
            where=f"{_names(members)}: internal_metric_block",
            legal=(divisor for divisor in range(1, count + 1) if count % divisor == 0),
        )
    unit = _Unit(members, mean_over_members([member.scores for member in members]).view(parts, -1))
    if unit.least > unit.greatest:
        raise ConflictError(
            f"of {count} blocks, at least {unit.least * parts} must go and at most {unit.greatest * parts} may.",
            where=_names(members),
            remedy="Lower min_sparse_ratio or raise max_sparse_ratio.",
        )
    if unit.least == unit.size:
        raise unit.emptied_by(f"min_sparse_ratio {max(member.min_ratio or 0.0 for member in members)}")
    return unit


def _global_counts(units: Sequence[_Unit]) -> list[int]:
    """How many blocks each part of each unit of a global group loses."""
    members = [member for unit in units for member in unit.members]
    ratio = _agreed(members, "ratio", "the targets of a global group share one budget")
    if ratio is None:
        raise ConflictError(
            "a global group shares one sparse_ratio, and none is set.",
            where=f"global_group_id {units[0].first.global_group!r} ({_names(members)})",
            remedy="Set sparse_ratio. A sparse_threshold needs no group: it is the same for all targets that have it.",
        )
    budget = _share(ratio, sum(unit.weight * unit.size for unit in units))
    budget -= sum(unit.weight * unit.least for unit in units)
    candidates = [_candidates(unit).to(units[0].scores.device) for unit in units]
    lengths = [len(scores) for scores in candidates]
    chosen = _cheapest(torch.cat(candidates), lengths, [unit.weight for unit in units], budget)
    return [unit.least + int(part.sum()) for unit, part in zip(units, chosen.split(lengths), strict=True)]


def _candidates(unit: _Unit) -> Tensor:
    """The scores of the blocks that a unit may lose or keep, in any order.

    These are all but the lowest, which its least ratio takes, and the highest, which its greatest protects. Where a
    unit has several parts, one block of each goes at a time, and their mean stands for them.
    """
    greatest = min(unit.greatest, unit.size - 1)
    if unit.parts > 1:
        return _ranked(unit).sort(dim=1).values.mean(dim=0)[unit.least : greatest]
    return _partition(_ranked(unit), unit.least, greatest)[0, unit.least : greatest]


def _ranked(unit: _Unit) -> Tensor:
    """A unit's scores as they are compared with those of others."""
    mean = unit.scores.mean()
    return unit.scores / mean if unit.first.normalize and bool(mean != 0) else unit.scores


def _cheapest(scores: Tensor, lengths: Sequence[int], weights: Sequence[int], budget: int) -> Tensor:
    """A bool mask of the lowest scores, as many as fit into the budget together.

    Args:
        scores: the candidates of all units, one unit after the other.
        lengths: the number of candidates of each unit.
        weights: what one candidate of each unit weighs.
        budget: elements to remove; where it is not above 0, nothing is chosen.
    """
    if len(set(weights)) == 1:
        count = min(max(budget, 0) // weights[0], len(scores))
        return _lowest(scores.view(1, -1), count).view(-1)
    weight = torch.tensor(weights, device=scores.device).repeat_interleave(torch.tensor(lengths, device=scores.device))
    order = scores.argsort(stable=True)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[order[: int((weight[order].cumsum(0) <= budget).sum())]] = True
    return chosen


def _lowest(scores: Tensor, count: int) -> Tensor:
    """A bool mask of exactly the `count` lowest scores in each row, of equal ones those of the lowest index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    kth = _partition(scores, count - 1)[:, count - 1 : count]
    below, tied = scores < kth, scores == kth
    missing = count - below.sum(dim=1, keepdim=True)
    return below | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= missing))


def _partition(scores: Tensor, *ranks: int) -> Tensor:
    """Each row reordered so that at each rank stands what sorting would put there, with nothing greater before it."""
    if scores.device.type == "cpu":  # Several times faster than torch's kthvalue and sort.
        return torch.from_numpy(np.partition(scores.numpy(), ranks, axis=1))
    return scores.sort(dim=1).values


def _share(ratio: float, total: int) -> int:
    """The whole number that a ratio of a total comes to; the margin undoes the rounding of decimal fractions."""
    return math.floor(ratio * total + 1e-6)


def _agreed(members: Sequence[Request], setting: str, why: str) -> Any:
    """The value of a setting on which all members agree."""
    first = members[0]
    value = getattr(first, setting)
    for other in members[1:]:
        if (differing := getattr(other, setting)) != value:
            raise ConflictError(
                f"{_KEYS[setting]} is {value} for {first.key} but {differing} for {other.key}, and {why}.",
                where=_KEYS[setting],
                remedy="Give them one value, or different groups.",
            )
    return value


def _names(members: Iterable[Request]) -> str:
    return ", ".join(str(member.key) for member in members)
