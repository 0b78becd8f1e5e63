"""Checks of single values: each takes what the user wrote and gives the value, or raises `InvalidValueError`.

The errors carry no place; whoever knows it adds it (`at`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from torch import nn

from tersor.errors import ConfigError, InvalidValueError, nearest


@contextmanager
def at(where: str) -> Iterator[None]:
    """Say where the errors raised inside happened.

    >>> with at("config_list[0]['sparse_ratio']"):
    ...     ratio(5)
    Traceback (most recent call last):
    tersor.errors.InvalidValueError: config_list[0]['sparse_ratio']: 5 is no ratio. Legal: a finite number from ...
    """
    try:
        yield
    except ConfigError as error:
        error.where = where + error.where
        raise


def number(value: object, kind: str, low: float = -math.inf, high: float = math.inf, *, remedy: str = "") -> float:
    """A finite real number from `low` to `high`; neither a bool nor text.

    >>> number(1, "ratio", 0, 1)
    1.0
    """
    measured = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(measured) or not low <= measured <= high:
        bounds = f" from {low:g}" * math.isfinite(low) + f" to {high:g}" * math.isfinite(high)
        raise InvalidValueError(f"{value!r} is no {kind}.", legal=[f"a finite number{bounds}"], remedy=remedy)
    return measured


def ratio(value: object) -> float:
    """The share that is removed, from 0 to 1."""
    return number(value, "ratio", 0, 1, remedy="A ratio is the share that is removed: 0.5 removes half.")


def negative(value: object) -> float:
    """A number below 0, and finite: a row of softmax whose inputs are all minus infinity gives NaN."""
    measured = number(value, "value for masked positions")
    if measured >= 0:
        raise InvalidValueError(f"{value!r} is no value for masked positions.", legal=["a number below 0"])
    return measured


def whole(value: object, kind: str, low: int) -> int:
    """An integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise InvalidValueError(f"{value!r} is no {kind}.", legal=[f"an integer of at least {low}"])
    return int(value)


def flag(value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise InvalidValueError(f"{value!r} is no flag.", legal=["True", "False"])
    return value


def choice(value: object, legal: Sequence[str]) -> str:
    """One of a closed set of words."""
    if value not in legal:
        remedy = nearest(value, legal) if isinstance(value, str) else ""
        raise InvalidValueError(f"{value!r} is not known here.", legal=legal, remedy=remedy)
    return str(value)


def identifier(value: object) -> str:
    """A group's name; integers are welcome.

    >>> identifier(3)
    '3'
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InvalidValueError(f"{value!r} names no group.", legal=["text", "an integer"])
    return str(value)


def items(value: object, kind: str) -> tuple[Any, ...]:
    """A list, or one item that stands for a list of one.

    >>> items("conv1", "name"), items(["conv1", "fc"], "name")
    (('conv1',), ('conv1', 'fc'))
    """
    if isinstance(value, str | type):
        return (value,)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise InvalidValueError(f"{value!r} is no list of {kind}s.", legal=[f"a list of {kind}s", f"one {kind}"])
    return tuple(value)


def names(value: object, kind: str = "name", *, may_be_empty: bool = False) -> tuple[str, ...]:
    """Texts, each once, in the order given."""
    texts = items(value, kind)
    for text in texts:
        if not isinstance(text, str):
            raise InvalidValueError(f"{text!r} in {value!r} is no {kind}.", legal=["text"])
    if not texts and not may_be_empty:
        raise InvalidValueError("the list is empty, so it selects nothing.", remedy="Fill it, or leave the key out.")
    return tuple(dict.fromkeys(texts))


def patterns(value: object, *, may_be_empty: bool = False) -> tuple[str, ...]:
    """Regular expressions, kept as texts."""
    texts = names(value, "regular expression", may_be_empty=may_be_empty)
    for text in texts:
        _check_pattern(text)
    return texts


def _check_pattern(text: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        remedy = "Escape what is meant literally: '\\(', '\\['."
        raise InvalidValueError(f"{text!r} is no regular expression: {error}.", remedy=remedy) from None


def types(value: object, *, may_be_empty: bool = False) -> tuple[str | type[nn.Module], ...]:
    """Module classes, or their names."""
    kinds = items(value, "module type")
    for kind in kinds:
        if not isinstance(kind, str) and not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise InvalidValueError(
                f"{kind!r} is no module type.", legal=["a subclass of torch.nn.Module", "a class name", "'default'"]
            )
    if not kinds and not may_be_empty:
        raise InvalidValueError("the list is empty, so it selects nothing.", remedy="Fill it, or leave the key out.")
    return tuple(dict.fromkeys(kinds))


def target_name(value: object) -> str:
    """A parameter, a buffer, an input or an output, in its one canonical spelling.

    >>> target_name("_input_"), target_name("_output_1"), target_name("weight")
    ('_input_0', '_output_1', 'weight')
    """
    if not isinstance(value, str) or not value:
        raise InvalidValueError(
            f"{value!r} names no target.", legal=["a parameter or buffer name", "_input_", "_input_1", "_output_"]
        )
    return f"{value}0" if value in ("_input_", "_output_") else value


def is_activation(target: str) -> bool:
    """Whether a target is an input or an output of its module.

    >>> is_activation("_input_0"), is_activation("weight")
    (True, False)
    """
    return target.startswith(("_input_", "_output_"))


def check_target(target: str, mode: str) -> None:
    """Refuse a target that a kind of compressor cannot work on: a parameter is no signal to imitate."""
    if mode == "distillation" and not is_activation(target):
        raise InvalidValueError(f"{target!r} cannot be distilled.", legal=["_input_0", "_output_0", "_output_key"])


def target_names(value: object) -> tuple[str, ...]:
    """Target names in their canonical spelling, each once."""
    return tuple(dict.fromkeys(target_name(text) for text in names(value, "target name")))
