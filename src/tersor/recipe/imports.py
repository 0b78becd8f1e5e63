"""Objects that a recipe names: ``package.module:name``, or the short name of something that Tersor or PyTorch has."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from tersor.config import values
from tersor.errors import ConfigError, InvalidValueError, TersorError, nearest

FORM = "package.module:callable"
T = TypeVar("T")


def import_path(value: object) -> str:
    """Check the form of an import path; nothing is imported yet.

    Raises:
        InvalidValueError: it is not ``package.module:callable``.

    >>> import_path("my_package.models:resnet")
    'my_package.models:resnet'
    """
    module, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not (colon and name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        raise InvalidValueError(f"{value!r} is no import path.", legal=[FORM])
    return str(value)


def import_object(path: str, where: str = "") -> Callable[..., Any]:
    """Import what an import path names.

    Args:
        path: ``package.module:callable``.
        where: the place in the recipe, for errors.

    Raises:
        ConfigError: it says which part failed: the module, its own import, or the name in it.

    >>> import_object("torch.nn:Linear")
    <class 'torch.nn.modules.linear.Linear'>
    """
    with values.at(where):
        module_name, _, name = import_path(path).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{path!r}: there is no module {error.name!r}.",
                where=where,
                remedy="Install it, or run from the folder that holds it.",
            ) from error
        raise _broken(path, where, error) from error
    except Exception as error:
        raise _broken(path, where, error) from error
    return _callable_in(module, name, path, where)


def call_object(path: str, where: str = "") -> Any:
    """Import what an import path names, and call it without arguments.

    Args:
        path: ``package.module:callable``.
        where: the place in the recipe, for errors.

    Raises:
        ConfigError: it cannot be imported, or fails.

    >>> call_object("builtins:dict")
    {}
    """
    function = import_object(path, where)
    try:
        return function()
    except TersorError:
        raise  # it says what is wrong
    except Exception as error:
        raise ConfigError(
            f"{path!r} failed ({type(error).__name__}: {error}).",
            where=where,
            remedy="It is called without arguments; --traceback shows where.",
        ) from error


def named_object(name: str, home: ModuleType, base: type, where: str) -> Callable[..., Any]:
    """What a short name means in its home module, or what an import path names.

    Args:
        name: a name in `home`, or ``package.module:callable``.
        home: the module of short names.
        base: what a short name must be a subclass of; ``object`` accepts every function too.
        where: the place in the recipe, for errors.

    Raises:
        ConfigError: there is no such thing.

    >>> import torch
    >>> named_object("SGD", torch.optim, torch.optim.Optimizer, "optimizer")
    <class 'torch.optim.sgd.SGD'>
    """
    if ":" in name:
        return import_object(name, where)
    known = {
        key: value
        for key, value in vars(home).items()
        if not key.startswith("_")
        and (callable(value) if base is object else isinstance(value, type) and issubclass(value, base))
        and value is not base
    }
    if name in known:
        return known[name]
    raise InvalidValueError(
        f"{name!r} is not known here.",
        where=where,
        legal=[f"a name in {home.__name__}", FORM],
        remedy=nearest(name, known),
    )


def class_named(named: str | type, home: ModuleType, base: type[T], where: str) -> type[T]:
    """A class that can be made: itself, by its short name or by an import path.

    Args:
        named: the class, or how it is called.
        home: the module of short names.
        base: of what kind it must be.
        where: the place in the recipe, for errors.

    Raises:
        ConfigError: there is no such class.

    >>> import torch
    >>> class_named("SGD", torch.optim, torch.optim.Optimizer, "optimizer")
    <class 'torch.optim.sgd.SGD'>
    """
    found: Any = named_object(named, home, base, where) if isinstance(named, str) else named
    if not (isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found)):
        raise InvalidValueError(
            f"{named!r} is not a class of that kind.", where=where, legal=[f"a final {base.__name__}"]
        )
    return found


def _callable_in(module: ModuleType, name: str, path: str, where: str) -> Callable[..., Any]:
    if not hasattr(module, name):
        raise ConfigError(
            f"{path!r}: the module {module.__name__!r} has no {name!r}.",
            where=where,
            remedy=nearest(name, vars(module)),
        )
    found = getattr(module, name)
    if not callable(found):
        raise ConfigError(f"{path!r} is a {type(found).__name__} and cannot be called.", where=where, legal=[FORM])
    return found


def _broken(path: str, where: str, error: BaseException) -> ConfigError:
    return ConfigError(
        f"{path!r}: its module cannot be imported ({type(error).__name__}: {error}).",
        where=where,
        remedy="Mend that module.",
    )
