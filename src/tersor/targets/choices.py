"""Choices: which blocks of which targets leave together, and which choices are interchangeable.

What the graph says leaves as one (a class of :class:`tersor.graph.coupling.Coupling`: an attention head, a unit of an
LSTM, a channel of a residual stream) may be many blocks of one target and of several. All of them are one *choice*: a
pruner scores it, counts it and masks it as a whole. Targets without a coupling have a choice for each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tersor.config import PruningSpec
from tersor.targets.planned import PlannedTarget


@dataclass(frozen=True, eq=False)
class Part:
    """What one target has in a set of interchangeable choices.

    Attributes:
        target: whose blocks they are.
        blocks: their numbers, shape (choices, blocks of one choice), each row in ascending order; None where each block
            of the target is a choice.
    """

    target: PlannedTarget
    blocks: np.ndarray | None = None

    def __str__(self) -> str:
        return self.target.name

    @property
    def count(self) -> int:
        """The number of choices."""
        assert self.target.blocks is not None
        return self.target.blocks.count if self.blocks is None else self.blocks.shape[0]

    @property
    def width(self) -> int:
        """The number of the target's blocks in one choice."""
        return 1 if self.blocks is None else self.blocks.shape[1]

    @property
    def weight(self) -> int:
        """The number of the target's elements in one choice."""
        assert self.target.blocks is not None
        return self.width * self.target.blocks.block_numel


Choices = tuple[Part, ...]
"""Interchangeable choices, one part for each target that has some: choice i is choice i of all parts."""


def choices(targets: Sequence[PlannedTarget]) -> list[Choices]:
    """What a pruner decides on.

    Targets decide together where they have one ``dependency_group_id``, or belong to one module, share a class and ask
    for the same (the two weights of an LSTM). In a dependency group of targets that the graph does not connect, block i
    of one leaves with block i of the others.

    Choices are interchangeable where their classes run through the same dimensions of the same tensors equally often:
    as long as one of each set stays, no tensor is emptied. Those that cannot leave are left out.

    Args:
        targets: of a plan; those that decide nothing are passed over.

    Returns:
        sets of interchangeable choices, in the order in which their first blocks come.
    """
    signatures: np.ndarray | None = None
    found: list[Choices] = []
    for members in _deciding_together(targets):
        if signatures is None and members[0].coupling is not None:
            signatures = members[0].coupling.signatures()
        if _each_block_for_itself(members, signatures):
            found.append(tuple(Part(member) for member in members))
        else:
            found += _sets(members, signatures, by_position=not _joined_by_graph(members, targets))
    return found


def connected(classes: Sequence[np.ndarray]) -> list[list[int]]:
    """Which members share a class, directly or through others.

    Args:
        classes: those of each member, not negative, in any shape.

    >>> connected([np.array([1, 2]), np.array([5]), np.array([2, 3]), np.array([3])])
    [[0, 2, 3], [1]]
    """
    latest = np.full(1 + max((int(of.max(initial=0)) for of in classes), default=0), -1)  # member with each class
    first = list(range(len(classes)))  # of the members that each is connected with
    for member, of in enumerate(classes):
        earlier = {first[other] for other in np.unique(latest[of]).tolist() if other >= 0}
        latest[of] = member
        if earlier:
            first[member] = min(earlier)
            first = [min(earlier) if own in earlier else own for own in first]
    groups: dict[int, list[int]] = {}
    for member, own in enumerate(first):
        groups.setdefault(own, []).append(member)
    return list(groups.values())


def _deciding_together(targets: Sequence[PlannedTarget]) -> list[list[PlannedTarget]]:
    groups: dict[object, list[PlannedTarget]] = {}
    for target in targets:
        spec = target.config.spec
        if target.decides and isinstance(spec, PruningSpec):
            asked = (target.config.module_name, spec.ratio, spec.sparse_threshold, spec.global_group_id)
            groups.setdefault(spec.dependency_group_id or asked, []).append(target)
    found: list[list[PlannedTarget]] = []
    for key, members in groups.items():
        if isinstance(key, str) or len(members) == 1:
            found.append(members)
        else:
            found += [[members[number] for number in numbers] for numbers in connected(_classes(members))]
    return found


def _classes(members: Sequence[PlannedTarget]) -> list[np.ndarray]:
    return [np.empty(0, dtype=np.int64) if member.classes is None else member.classes for member in members]


def _joined_by_graph(members: Sequence[PlannedTarget], targets: Sequence[PlannedTarget]) -> bool:
    """Whether the members share classes, directly or through others of their group, which may decide nothing."""
    if len(members) == 1:
        return True
    group = getattr(members[0].config.spec, "dependency_group_id", None)
    mates = [
        target for target in targets if group and getattr(target.config.spec, "dependency_group_id", None) == group
    ]
    mates = [*members, *(mate for mate in mates if mate not in members)]
    return set(range(len(members))) <= set(connected(_classes(mates))[0])


def _each_block_for_itself(members: Sequence[PlannedTarget], signatures: np.ndarray | None) -> bool:
    """Whether block i of each member is the whole of choice i, and all are interchangeable: the usual case."""
    classes = members[0].classes
    if classes is None or signatures is None:
        return all(member.classes is None for member in members)
    of = signatures[classes]
    return (
        classes.shape[1] == 1
        and bool((of == of[0]).all() and (np.diff(classes[:, 0]) > 0).all())
        and all(member.stays is None for member in members)
        and all(member.classes is not None and np.array_equal(member.classes, classes) for member in members[1:])
    )


def _sets(members: Sequence[PlannedTarget], signatures: np.ndarray | None, *, by_position: bool) -> list[Choices]:
    """The sets of interchangeable choices of targets that decide together."""
    counts = [member.blocks.count for member in members if member.blocks is not None]
    if by_position and len(set(counts)) > 1:
        return [tuple(Part(member) for member in members)]  # they cannot share a mask, and allocation says so
    choice = _numbered(_together(np.vstack(_things(members, by_position))))
    total = int(choice.max()) + 1
    stays, kind = np.zeros(total, dtype=bool), np.zeros(total, dtype=np.int64)
    of_member = np.split(choice, np.cumsum(counts)[:-1])
    # Drawn from another seed than the marks of signatures, which they are added to.
    marks = np.random.default_rng(1).integers(1, 2**62, size=len(members), dtype=np.int64)
    for member, own, mark in zip(members, of_member, marks, strict=True):
        if member.stays is not None:
            stays[own[member.stays.numpy()]] = True
        # Sums wrap around, and tell choices apart as well as if they did not.
        told = 0 if signatures is None or member.classes is None else signatures[member.classes].sum(1)
        np.add.at(kind, own, mark + told)
    kinds = dict.fromkeys(kind[~stays].tolist())
    return [_interchangeable(members, of_member, ~stays & (kind == value)) for value in kinds]


def _things(members: Sequence[PlannedTarget], by_position: bool) -> list[np.ndarray]:
    """What the blocks of each member belong to, as numbers, shape (blocks, k): classes, and the position as -1 - i."""
    things: list[np.ndarray] = []
    for member in members:
        assert member.blocks is not None
        position = -1 - np.arange(member.blocks.count)[:, None]
        if member.classes is None:
            things.append(position)
        else:
            things.append(np.hstack([member.classes, position]) if by_position else member.classes)
    widest = max(of.shape[1] for of in things)
    return [np.pad(of, ((0, 0), (0, widest - of.shape[1])), "edge") for of in things]


def _numbered(values: np.ndarray) -> np.ndarray:
    """Equal numbers for equal values, from 0 in the order in which they come."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number]


def _interchangeable(members: Sequence[PlannedTarget], choice_of: Sequence[np.ndarray], inside: np.ndarray) -> Choices:
    """One set: the choices that are inside, by target."""
    parts: list[Part] = []
    for member, choice in zip(members, choice_of, strict=True):
        blocks = np.flatnonzero(inside[choice])
        if len(blocks):
            ordered = blocks[np.argsort(choice[blocks], kind="stable")]
            parts.append(Part(member, ordered.reshape(int(inside.sum()), -1)))
    return tuple(parts)


def _together(things: np.ndarray) -> np.ndarray:
    """Which rows have a number in common, directly or through others: shape (rows, k) to one number a row."""
    values, places = np.unique(things, return_inverse=True)
    places = places.reshape(things.shape)
    lowest = np.arange(len(values))
    while things.shape[1] > 1:
        before = lowest.copy()
        np.minimum.at(lowest, places, before[places].min(1, keepdims=True))
        lowest = lowest[lowest]  # halves the way that is left
        if np.array_equal(before, lowest):
            break
    return lowest[places[:, 0]]
