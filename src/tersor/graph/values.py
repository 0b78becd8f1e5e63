"""What a value is made of, and how one of its kind is made again: containers, dataclasses and other objects."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

LITERALS = frozenset(
    {bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, torch.layout}
    | {torch.memory_format}
)
"""Types whose values can be written down in the code of a graph."""


def attributes(value: Any) -> dict[str, Any]:
    """An object's attributes, those in ``__slots__`` included; nothing for classes, functions and modules.

    >>> attributes(slice), attributes(torch.nn.ReLU())
    ({}, {})
    """
    if isinstance(value, (type, nn.Module, ModuleType, FunctionType, Tensor)):
        return {}
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [name for slot in slots for name in ((slot,) if isinstance(slot, str) else slot)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)} | getattr(value, "__dict__", {})


def is_plain(value: Any) -> bool:
    """Whether a value is made of tensors, numbers and such, in tuples, lists and dicts: no object with a state."""
    if isinstance(value, (tuple, list, dict)):
        return all(is_plain(part) for part in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, (Tensor, int, float)) or type(value) in LITERALS


def parts(value: Any) -> Iterator[tuple[Callable[[Any, Any], Any], Any, Any]]:
    """What a value holds: how to take it (``operator.getitem`` or ``getattr``), under which key, and the part."""
    if isinstance(value, Mapping):
        yield from ((operator.getitem, key, part) for key, part in value.items())
    elif isinstance(value, (tuple, list, deque, Set)):
        yield from ((operator.getitem, index, part) for index, part in enumerate(value))
    else:
        yield from ((getattr, name, part) for name, part in attributes(value).items())


def leaves(value: Any, _seen: set[int] | None = None) -> Iterator[Any]:
    """Everything without parts of its own, however deep; what holds itself is entered once."""
    if isinstance(value, (Tensor, int, float)) or type(value) in LITERALS:
        yield value
        return
    seen = set[int]() if _seen is None else _seen
    if id(value) in seen:
        return
    seen.add(id(value))
    empty = True
    for _, _, part in parts(value):
        empty = False
        yield from leaves(part, seen)
    if empty:
        yield value


def rebuilt(kind: Any, state: Mapping[str, Any], items: Iterable[tuple[Any, Any]] = ()) -> Any:
    """An instance with these attributes and, for a dict, these items, made as ``copy.copy`` would: without __init__.

    >>> rebuilt(type("Cache", (), {}), {"length": 3}).length
    3
    """
    made = kind.__new__(kind)
    for key, item in items:
        made[key] = item
    for name, value in state.items():
        object.__setattr__(made, name, value)
    return made
