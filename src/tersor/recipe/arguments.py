"""Arguments of a class that a recipe gives by name, checked against its constructor before anything is built."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_type_hints

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from tersor.errors import ConfigError, InvalidValueError, UnknownKeyError, nearest

COMPRESSOR_PARTS = ("model", "config_list", "evaluator", "example_inputs", "previous", "calibration")
"""What a recipe says in other places, or knows by itself."""


def arguments_of(cls: type, others: Collection[str] = COMPRESSOR_PARTS) -> dict[str, inspect.Parameter]:
    """The arguments of a constructor that a recipe may give.

    Args:
        cls: the class.
        others: arguments that come from elsewhere.

    >>> from tersor.pruning import TaylorPruner
    >>> list(arguments_of(TaylorPruner))
    ['training_steps', 'restores']
    """
    parameters = _parameters(cls)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: own for name, own in parameters.items() if own.kind in named and name not in others}


def check_arguments(
    cls: type, arguments: Mapping[str, Any], where: str, others: Collection[str] = COMPRESSOR_PARTS
) -> None:
    """Check names, completeness and types.

    Args:
        cls: the class that is to be made.
        arguments: by name, as the recipe gives them.
        where: the place in the recipe.
        others: arguments that come from elsewhere.

    Raises:
        UnknownKeyError: the constructor has no such argument.
        InvalidValueError: one without a default is missing, or a value has another type.

    >>> from tersor.pruning import TaylorPruner
    >>> check_arguments(TaylorPruner, {"training_step": 50}, "arguments")
    Traceback (most recent call last):
    tersor.errors.UnknownKeyError: arguments: 'training_step' is no argument of TaylorPruner. Legal: training_steps, ...
    """
    legal = arguments_of(cls, others)
    open_ended = any(own.kind is own.VAR_KEYWORD for own in _parameters(cls).values())
    for name in arguments:
        if name not in legal and not (open_ended and name not in others):
            raise UnknownKeyError(
                f"{name!r} is no argument of {cls.__name__}."
                if name not in others
                else f"{name!r} comes from another part of the recipe.",
                where=where,
                legal=legal or ["none"],
                remedy=nearest(name, legal),
            )
    if missing := [name for name, own in legal.items() if own.default is own.empty and name not in arguments]:
        raise InvalidValueError(
            f"{cls.__name__} needs {' and '.join(map(repr, missing))}.",
            where=where,
            legal=legal,
            remedy=f"Give {{{', '.join(f'{name}: ...' for name in missing)}}}.",
        )
    kinds = _types(cls)
    for name, value in arguments.items():
        if name in kinds:
            _check_type(value, kinds[name], f"{where}[{name!r}]")


@contextmanager
def placed(arguments: Collection[str], where: str) -> Iterator[None]:
    """Say where in the recipe an argument stands that a constructor refuses.

    >>> with placed(["p"], "recipe['pruning']['arguments']"):
    ...     raise InvalidValueError("0 is no order of a norm.", where="p")
    Traceback (most recent call last):
    tersor.errors.InvalidValueError: recipe['pruning']['arguments']['p']: 0 is no order of a norm.
    """
    try:
        yield
    except ConfigError as error:
        if error.where in arguments:
            error.where = f"{where}[{error.where!r}]"
        raise


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Those of a constructor, with those of the base that it hands ``**kwargs`` on to in their place."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        own = inspect.signature(base).parameters
        found = {**{name: parameter for name, parameter in own.items() if name not in found}, **found}
        rest = [name for name, parameter in found.items() if parameter.kind is parameter.VAR_KEYWORD]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values()):
            return {name: parameter for name, parameter in found.items() if name not in rest}
    return found


def _types(cls: type) -> dict[str, Any]:
    """The annotations of a constructor; none where they cannot be looked up."""
    try:
        return get_type_hints(getattr(cls, "__init__"))  # noqa: B009 - of the class, and pyright minds the other way
    except (NameError, TypeError):
        return {}


def _check_type(value: object, kind: Any, where: str) -> None:
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError:
        raise InvalidValueError(
            f"{value!r} is not accepted.", where=where, legal=[_spelt(kind)], remedy=_remedy(value)
        ) from None
    except PydanticUserError:  # a class with a schema of its own cannot be configured, nor written in a recipe
        return


def _spelt(kind: Any) -> str:
    """A type, as the reader of an error wants it.

    >>> from typing import Literal
    >>> _spelt(int), _spelt(bool | None), _spelt(Literal["a", "b"])
    ('int', 'bool | None', "'a' | 'b'")
    """
    text = inspect.formatannotation(kind).replace("typing.", "")
    return " | ".join(repr(value) for value in kind.__args__) if text.startswith("Literal[") else text


def _remedy(value: object) -> str:
    """A number such as 1e-4 is text to YAML."""
    try:
        number = float(value) if isinstance(value, str) else None
    except ValueError:
        number = None
    if number is None:
        return ""
    return f"It is text here: write it as a number (to YAML, {value} is none without a point, as in 1.0e-4)."
