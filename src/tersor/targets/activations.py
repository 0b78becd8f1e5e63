"""Inputs and outputs of modules as targets: which part of a call is meant, and what shape it has."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import UnmatchedError, nearest
from tersor.graph.inputs import evaluating, run

INPUT, OUTPUT = "_input_", "_output_"
Place = tuple[str, str]
"""Module name and target name."""


def values_at(model: nn.Module, example_inputs: Any, places: Iterable[Place]) -> dict[Place, Tensor]:
    """Run a model once, without gradients and in eval mode, and keep the values of some inputs and outputs.

    Args:
        model: any module; it is left as it was.
        example_inputs: what it is run on.
        places: module and target names, such as ``("conv1", "_output_0")``.

    Returns:
        the value of each place that the run reached and that is a tensor; of several calls the last.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> {place: tuple(x.shape) for place, x in values_at(net, torch.zeros(4, 2), [("0", "_output_0")]).items()}
    {('0', '_output_0'): (4, 3)}
    """
    found: dict[Place, Tensor] = {}

    def keep(place: Place, value: Any) -> Any:
        if isinstance(value, Tensor):
            found[place] = value
        return value

    with ExitStack() as hooks, torch.no_grad(), evaluating(model):
        for place in places:
            hooks.callback(watch_activation(model.get_submodule(place[0]), place[1], _bound(keep, place)).remove)
        run(model, example_inputs)
    return found


def watch_activation(
    module: nn.Module, target: str, function: Callable[[Any], Any]
) -> torch.utils.hooks.RemovableHandle:
    """Call a function with an input or output whenever the module is called; what it returns takes its place.

    It comes before all other hooks, so it sees the value without the mask that simulation puts on it: as with
    parameters, whose latent values are scored.
    """
    if target.startswith(INPUT):
        key = target.removeprefix(INPUT)
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: replace_input(module, args, kwargs, key, function),
            prepend=True,
            with_kwargs=True,
        )
    key = target.removeprefix(OUTPUT)
    return module.register_forward_hook(
        lambda module, args, output: replace_output(output, key, function), prepend=True
    )


def _bound(keep: Callable[[Place, Any], Any], place: Place) -> Callable[[Any], Any]:
    return lambda value: keep(place, value)


def replace_input(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    key: str,
    function: Callable[[Any], Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply a function to one argument of a call of ``module.forward``; one that is not given is passed over.

    Args:
        module: whose ``forward`` is called.
        args: by position.
        kwargs: by name.
        key: a position (``0``) or the name of an argument (``x``), however it is given.
        function: what to apply.

    Returns:
        the arguments with the addressed one replaced.
    """
    arguments, keywords = list(args), dict(kwargs)
    names = list(inspect.signature(module.forward).parameters)
    name = names[int(key)] if key.isdigit() and int(key) < len(names) else key
    position = int(key) if key.isdigit() else names.index(key) if key in names else len(arguments)
    if name in keywords:
        keywords[name] = function(keywords[name])
    elif position < len(arguments):
        arguments[position] = function(arguments[position])
    return tuple(arguments), keywords


def replace_output(output: Any, key: str, function: Callable[[Any], Any]) -> Any:
    """A copy of a module's output with one part changed; the output's own type is kept.

    Args:
        output: a tensor (key ``0``), a tuple, list or named tuple, a mapping, or a dataclass.
        key: a position or a key or field name.
        function: what to do with the addressed part.

    Raises:
        UnmatchedError: the output has no such part.

    >>> replace_output((1, None), "0", lambda value: value + 1)
    (2, None)
    """
    if isinstance(output, Mapping):
        name = _part(key, list(output))
        changed: Any = copy.copy(output)
        changed[name] = function(output[name])
        return changed
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        fields: Any = output
        name = _part(key, fields._fields)
        return fields._replace(**{name: function(getattr(output, name))})
    if isinstance(output, (tuple, list)):
        parts = list(output)
        position = _part(key, range(len(parts)))
        parts[position] = function(parts[position])
        return type(output)(parts)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        name = _part(key, [field.name for field in dataclasses.fields(output)])
        return dataclasses.replace(output, **{name: function(getattr(output, name))})
    return function(output) if key == "0" else output


def _part(key: str, names: Sequence[Any]) -> Any:
    """The part of an output that a key addresses, by its name or by its position."""
    if key in names:
        return key
    if key.isdigit() and int(key) < len(names):
        return names[int(key)]
    raise UnmatchedError(
        f"the module's output has no part {key!r}",
        where=f"{OUTPUT}{key}",
        legal=[f"{OUTPUT}{name}" for name in names],
        remedy=nearest(key, [str(name) for name in names]),
    )
