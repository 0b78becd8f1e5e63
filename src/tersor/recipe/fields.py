"""What the keys of a recipe may hold: types that check a value, and say what would be legal."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BeforeValidator, PlainSerializer, PlainValidator

from tersor.config import Entry, Mode, parse_config_list, values
from tersor.config.specs import Parsed
from tersor.errors import InvalidValueError
from tersor.recipe.imports import import_path

PartT = TypeVar("PartT", bound=Parsed)


def part(cls: type[PartT]) -> BeforeValidator:
    """A mapping of the keys of a class."""
    return BeforeValidator(lambda value: value if isinstance(value, cls) else cls.parse(value))


def optional_part(cls: type[PartT]) -> BeforeValidator:
    """The same, or None."""
    return BeforeValidator(lambda value: value if value is None or isinstance(value, cls) else cls.parse(value))


def section(cls: type[PartT]) -> BeforeValidator:
    """What `tersor.compress` takes under a key: a config list, a mapping of the keys of a class, or several of them."""

    def parse(value: Any) -> PartT | tuple[PartT, ...] | None:
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.parse(value)
        if isinstance(value, list | tuple) and any(_is_part(item, cls) for item in value):
            found: list[PartT] = []
            for number, item in enumerate(value):
                with values.at(f"[{number}]"):
                    found.append(item if isinstance(item, cls) else cls.parse(item))
            return tuple(found)
        return cls.parse({"config_list": value})

    return BeforeValidator(parse)


def _is_part(item: object, cls: type[Parsed]) -> bool:
    """Whether an item of a list is a part, and no entry of a config list."""
    return isinstance(item, cls) or (isinstance(item, Mapping) and any(key in item for key in cls.legal_keys()))


def several(asked: PartT | tuple[PartT, ...] | None) -> tuple[PartT, ...]:
    """The parts of a section.

    >>> several(None), several((1, 2)), several(3)
    ((), (1, 2), (3,))
    """
    return () if asked is None else asked if isinstance(asked, tuple) else (asked,)


def optional(check: Callable[[Any], Any]) -> BeforeValidator:
    """What a check accepts, or None."""
    return BeforeValidator(lambda value: None if value is None else check(value))


def one_of(*legal: str) -> PlainValidator:
    """One of some words."""
    return PlainValidator(partial(values.choice, legal=legal))


def entries(mode: Mode) -> PlainValidator:
    """A config list, or the path of a file that holds it; None stays None."""
    return PlainValidator(lambda value: None if value is None else parse_config_list(value, mode, where=""))


def _written(found: tuple[Entry, ...] | None) -> list[dict[str, Any]] | None:
    return None if found is None else [entry.as_config() for entry in found]


def text(value: object) -> str:
    """Text that is not empty."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InvalidValueError(f"{value!r} is no text.")
    return os.fspath(value)


def batch_sizes(value: object) -> tuple[int, ...]:
    """One, or several."""
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(values.whole(size, "batch size", 1) for size in sizes)


def device(value: object) -> str:
    """The name of a device of torch's."""
    try:
        return str(torch.device(str(value)))
    except RuntimeError:
        raise InvalidValueError(f"{value!r} is no device.", legal=["cpu", "cuda", "cuda:1", "..."]) from None


def arguments(value: Any) -> dict[str, Any]:
    """Arguments by name."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidValueError(f"{value!r} is no mapping of arguments.", legal=["{name: value, ...}"])
    return dict(value)


Text = Annotated[str, PlainValidator(text)]
ImportPath = Annotated[str, PlainValidator(import_path)]
Flag = Annotated[bool, PlainValidator(values.flag)]
Share = Annotated[float, PlainValidator(partial(values.number, kind="non-negative number", low=0))]
Arguments = Annotated[dict[str, Any], PlainValidator(arguments)]
DeviceName = Annotated[str, PlainValidator(device)]
BatchSizes = Annotated[tuple[int, ...] | None, optional(batch_sizes)]
OptionalText = Annotated[str | None, optional(text)]
Batches = Annotated[int, PlainValidator(partial(values.whole, kind="number of batches", low=1))]
OptionalBatches = Annotated[int | None, optional(partial(values.whole, kind="number of batches", low=1))]
as_written = PlainSerializer(_written, return_type=list[dict[str, Any]] | None)
"""Entries, as the user wrote them."""
