"""Where an argument of a graph's node stands, and how one is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

Path = tuple[int | str, ...]
"""``("args", 1, 0)``: the first item of the second argument. The bounds of a slice are its items 0 and 1."""


def argument_path(node: fx.Node, position: int, *names: str) -> Path | None:
    """Where an argument stands that may be given by position or by one of these names; None where it is not given."""
    if position < len(node.args):
        return ("args", position)
    return next((("kwargs", name) for name in names if name in node.kwargs), None)


def argument_at(node: fx.Node, path: Path) -> Any:
    """The argument at a path."""
    value: Any = {"args": node.args, "kwargs": node.kwargs}
    for key in path:
        value = _items(value)[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return value


def replace_argument(node: fx.Node, path: Path, new: Any) -> None:
    """Replace the argument at a path."""
    kind, *rest = path
    if kind == "args":
        node.args = _replaced(tuple(node.args), rest, new)
    else:
        node.kwargs = _replaced(dict(node.kwargs), rest, new)


def path_text(path: Path) -> str:
    """A path in words.

    >>> path_text(("args", 1, 0))
    'args[1][0]'
    """
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def _items(value: Any) -> Mapping[Any, Any] | Sequence[Any]:
    return [value.start, value.stop, value.step] if isinstance(value, slice) else value


def _replaced(value: Any, path: Sequence[int | str], new: Any) -> Any:
    if not path:
        return new
    key, *rest = path
    items = _items(value)
    if isinstance(items, Mapping):
        return {**items, key: _replaced(items[key], rest, new)}
    changed = [_replaced(item, rest, new) if place == key else item for place, item in enumerate(items)]
    if isinstance(value, slice):
        return slice(*changed)
    return changed if isinstance(value, list) else tuple(changed)
