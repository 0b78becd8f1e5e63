"""The functions that a user hands over: are they fit to be called, and what to call them in an error."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from tersor.errors import InvalidValueError, TrainingError


def check_function(role: str, function: Callable[..., Any], arguments: tuple[str, ...], *, more: bool = False) -> None:
    """Refuse a `function` that cannot be called with as many `arguments`, or with these and `more`.

    >>> check_function("loss_fn", lambda outputs, targets: outputs - targets, ("outputs", "targets"))

    Raises:
        InvalidValueError: it is no function.
        TrainingError: it takes other arguments.
    """
    if not callable(function):
        raise InvalidValueError(f"{described(function)} cannot be called.", where=role, legal=("a function",))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin does not tell
        return
    try:
        (signature.bind_partial if more else signature.bind)(*arguments)
    except TypeError as error:
        call = f"{role}({', '.join(arguments)}{', ...' if more else ''})"
        raise TrainingError(
            f"it takes {signature}, but is called as {call}: {error}.",
            where=f"{role} {name_of(function)}",
            remedy="Give it the arguments of that call, in that order.",
        ) from None


def number_of(value: Any) -> float | None:
    """A number, or a tensor with one element, as a float; None for anything else.

    >>> import torch
    >>> number_of(torch.tensor([0.5])), number_of("high")
    (0.5, None)
    """
    single = isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    return float(value) if single else None


def name_of(function: Callable[..., Any]) -> str:
    """What the user calls this function."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def described(value: object) -> str:
    """A value for an error message: its type and a short form of itself."""
    return "None" if value is None else f"the {type(value).__name__} {reprlib.repr(value)}"
