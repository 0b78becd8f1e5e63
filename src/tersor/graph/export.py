"""Coupling groups in other programs' words: plain values, JSON, and a picture in Graphviz' language."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

from tersor.graph.members import CouplingGroup, Member
from tersor.storage import replacing_file

FROZEN_LINES = 8
"""Lines of a frozen box; what is behind them is only counted, since nothing of it will ever leave."""
HEAD = (
    "digraph coupling {",
    "  rankdir=TB;",
    '  node [shape=box, style=filled, fillcolor=white, fontname="Helvetica", fontsize=10];',
    '  edge [fontname="Helvetica", fontsize=9];',
)


_Numbered = tuple[int, CouplingGroup]


class _Box(NamedTuple):
    """What is drawn as one node."""

    title: str
    members: tuple[Member, ...]
    is_frozen: bool


def to_dict(groups: Iterable[CouplingGroup]) -> list[dict[str, Any]]:
    """The groups as lists, mappings, strings and numbers."""
    return [
        {"size": group.size, "frozen": group.frozen, "members": [dict(vars(member)) for member in group.members]}
        for group in groups
    ]


def to_json(groups: Iterable[CouplingGroup], path: str | os.PathLike[str] | None = None) -> str:
    """The groups as JSON: an array of objects with ``size``, ``frozen`` and ``members``.

    Args:
        groups: of a model.
        path: where to write it as well, whole or not at all.
    """
    return _written(json.dumps(to_dict(groups), indent=2) + "\n", path)


def to_dot(groups: Iterable[CouplingGroup], path: str | os.PathLike[str] | None = None) -> str:
    """The groups as a graph in the DOT language (``dot -Tsvg groups.dot -o groups.svg`` draws it).

    A box is a group and lists its members: tensor, dimension, range of indices, role. An arrow is a tensor that
    belongs to two groups: it reads the channels of one and writes those of the other, so arrows point the way that the
    model computes. A line without a head is a tensor that does neither (a table of positions). Frozen groups are grey,
    one box for each reason, and of a long one only the first members are listed.

    Args:
        groups: of a model.
        path: where to write it as well, whole or not at all.

    Returns:
        the source, the same for the same groups.
    """
    numbered = list(enumerate(groups))
    boxes = [*_free_boxes(numbered), *_frozen_boxes(numbered)]
    nodes = (_node(number, box) for number, box in enumerate(boxes))
    return _written("\n".join([*HEAD, *nodes, *_edges(boxes), "}"]) + "\n", path)


def _written(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        with replacing_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text


def _free_boxes(numbered: Sequence[_Numbered]) -> Iterator[_Box]:
    for number, group in numbered:
        if group.frozen is None:
            yield _Box(f"group {number}: {group.size} choices", group.members, is_frozen=False)


def _frozen_boxes(numbered: Sequence[_Numbered]) -> Iterator[_Box]:
    """One box for each reason, under the numbers of the groups that it stands for."""
    by_reason: dict[str, list[_Numbered]] = {}
    for number, group in numbered:
        if group.frozen is not None:
            by_reason.setdefault(group.frozen, []).append((number, group))
    for reason, own in by_reason.items():
        numbers = ", ".join(str(number) for number, _ in own)
        title = f"group{'s' if len(own) > 1 else ''} {numbers}: frozen, it {reason}"
        yield _Box(title, tuple(member for _, group in own for member in group.members), is_frozen=True)


def _node(number: int, box: _Box) -> str:
    lines = _lines(box.members)
    if box.is_frozen and len(lines) > FROZEN_LINES:
        lines = [*lines[:FROZEN_LINES], f"and {len(lines) - FROZEN_LINES} more"]
    colours = ', fillcolor="gray90", fontcolor="gray40", color="gray60"' if box.is_frozen else ""
    return f'  g{number} [label="{_text([box.title, *lines])}"{colours}];'


def _lines(members: Iterable[Member]) -> list[str]:
    """A line a member; what one module carries along in the same way (a norm's four tensors) shares a line."""
    lines: dict[object, tuple[list[str], str]] = {}
    for number, member in enumerate(members):
        module, _, target = member.name.rpartition(".")
        place = f"dim {member.dim} [{member.offset}:{member.offset + member.count}] {member.role}"
        key = (module, place) if module and member.role == "carried" else number
        names, _ = lines.setdefault(key, ([], place))
        names.append(target if names else member.name)
    return [f"{', '.join(names)} {place}" for names, place in lines.values()]


def _edges(boxes: Sequence[_Box]) -> Iterator[str]:
    """Tensors that belong to several boxes; those between the same two boxes share an arrow."""
    roles: dict[str, dict[int, set[str]]] = {}
    for number, box in enumerate(boxes):
        for member in box.members:
            roles.setdefault(member.name, {}).setdefault(number, set()).add(member.role)
    tensors: dict[tuple[int, int, str], list[str]] = {}
    for name, places in roles.items():
        sources = [number for number, own in places.items() if "read" in own]
        targets = [number for number, own in places.items() if "written" in own]
        arrows = [(a, b) for a, b in product(sources, targets) if a != b]
        for a, b in arrows or pairwise(places):
            tensors.setdefault((a, b, "" if arrows else ", dir=none"), []).append(name)
    for (a, b, plain), names in tensors.items():
        yield f'  g{a} -> g{b} [label="{_text(names)}"{plain}];'


def _text(lines: Iterable[str]) -> str:
    r"""Lines as the inside of a quoted string; ``\l`` ends one and sets it to the left."""
    return "".join(line.replace("\\", "\\\\").replace('"', '\\"') + "\\l" for line in lines)
