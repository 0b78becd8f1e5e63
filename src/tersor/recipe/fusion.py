"""Pruning, quantization and distillation of one model from one description, in one training run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

import tersor.distillation
import tersor.pruning
import tersor.quantization
from tersor.compressor import Compressor
from tersor.distillation import Distiller
from tersor.distillation.layerwise import LayerwiseDistiller
from tersor.errors import ConfigError, InvalidValueError, UnknownKeyError, nearest
from tersor.pruning import Pruner
from tersor.pruning.schedule import ScheduledPruner
from tersor.quantization.base import Quantizer
from tersor.recipe.arguments import check_arguments
from tersor.recipe.imports import named_object
from tersor.training import Evaluator

KINDS: Mapping[str, tuple[str, type[Compressor], ModuleType]] = {
    "pruning": ("pruner", Pruner, tersor.pruning),
    "quantization": ("quantizer", Quantizer, tersor.quantization),
    "distillation": ("distiller", Distiller, tersor.distillation),
}
"""What each part names its algorithm by, the base of those, and where they are."""
PARTS = ("config_list", "arguments", "schedule")
KNOWN = ("model", "config_list", "evaluator", "example_inputs", "previous")
"""Arguments that a part says elsewhere, or that are known."""
T = TypeVar("T")


def compress(
    model: nn.Module,
    config: Mapping[str, Any],
    evaluator: Evaluator | None = None,
    *,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    example_inputs: Any = None,
    teacher_model: nn.Module | None = None,
    teacher_predict: Any = None,
) -> Compressor:
    """Prune, quantize and distil a model at once, from one description.

    Args:
        model: it is wrapped in place, and stays so.
        config: with the keys ``pruning``, ``quantization`` and ``distillation``, each of them optional. A part is a
            config list; or a mapping of ``config_list``, the algorithm (``pruner``, ``quantizer``, ``distiller``: a
            class or its name), its ``arguments``, and for a pruner a ``schedule`` (a mapping of ``pruner``, by default
            ``AGPPruner``, and its arguments); or a list of such mappings, for several algorithms on different
            modules. Without an algorithm it is ``L1NormPruner``; ``QATQuantizer``, or ``PtqQuantizer`` where nothing is
            trained; ``DynamicLayerwiseDistiller``.
        evaluator: how the model is trained.
        max_steps: optimizer steps.
        max_epochs: passes over the data.
        example_inputs: what the model can be run on; by default the evaluator's.
        teacher_model: of all distillers that name none.
        teacher_predict: likewise.

    Returns:
        The last of the fused compressors, finished; give it to :func:`tersor.finalize`. ``chain`` has them all.

    Raises:
        ConfigError: the description is wrong or does not fit the model.
        TrainingError: training is needed, and there is no evaluator or no length.

    Example:
        >>> import torch
        >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(16, 8)
        >>> compressor = compress(net, {
        ...     "pruning": [{"op_names": ["0"], "sparse_ratio": 0.5}],
        ...     "quantization": {"arguments": {"calibration": [x]}, "config_list": [{"op_types": ["Linear"]}]},
        ... }, example_inputs=x)
        >>> [type(item).__name__ for item in compressor.chain]
        ['L1NormPruner', 'PtqQuantizer']
    """
    compressor = fuse(
        model,
        config,
        evaluator,
        trains=max_steps is not None or max_epochs is not None,
        example_inputs=example_inputs,
        teacher={"teacher_model": teacher_model, "teacher_predict": teacher_predict},
    )
    try:
        compressor.compress(max_steps, max_epochs)
    except BaseException:
        compressor.unwrap_model()
        raise
    return compressor


def fuse(
    model: nn.Module,
    config: Mapping[str, Any],
    evaluator: Evaluator | None = None,
    *,
    trains: bool = True,
    example_inputs: Any = None,
    teacher: Mapping[str, Any] | None = None,
) -> Compressor:
    """Make the compressors that :func:`compress` runs, for a training loop of one's own, or a look at the timeline.

    Args:
        model: it is wrapped in place.
        config: see :func:`compress`.
        evaluator: see there.
        trains: whether the model will be trained.
        example_inputs: see there.
        teacher: ``teacher_model`` and ``teacher_predict`` of distillers that name none.
    """
    if not isinstance(config, Mapping):
        raise InvalidValueError(f"a {type(config).__name__} is no description", where="config", legal=[*KINDS])
    for key in config:
        if key not in KINDS:
            raise UnknownKeyError(
                f"{key!r} is no key here.", where="config", legal=[*KINDS], remedy=nearest(key, KINDS)
            )
    defaults = {
        "pruning": "L1NormPruner",
        "quantization": "QATQuantizer" if trains else "PtqQuantizer",
        "distillation": "DynamicLayerwiseDistiller",
    }
    last: Compressor | None = None
    try:
        for kind in KINDS:
            for where, part in _parts(config.get(kind), f"config[{kind!r}]"):
                last = _made(model, kind, part, where, defaults[kind], last, evaluator, example_inputs, teacher or {})
    except BaseException:
        if last is not None:
            last.unwrap_model()
        raise
    if last is None:
        raise ConfigError("it asks for nothing", where="config", legal=[*KINDS])
    return last


def _parts(asked: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What one key holds, as mappings with a config list."""
    if asked is None:
        return
    if isinstance(asked, Mapping):
        yield where, asked
    elif isinstance(asked, Sequence) and not isinstance(asked, str) and any("config_list" in part for part in asked):
        for number, part in enumerate(asked):
            yield f"{where}[{number}]", part
    else:
        yield where, {"config_list": asked}


def _made(
    model: nn.Module,
    kind: str,
    part: Mapping[str, Any],
    where: str,
    default: str,
    last: Compressor | None,
    evaluator: Evaluator | None,
    example_inputs: Any,
    teacher: Mapping[str, Any],
) -> Compressor:
    """One compressor, behind those that are there."""
    word, base, home = KINDS[kind]
    legal = (word, *PARTS) if kind == "pruning" else (word, *PARTS[:2])
    for key in part:
        if key not in legal:
            raise UnknownKeyError(f"{key!r} is no key here.", where=where, legal=legal, remedy=nearest(key, legal))
    if "config_list" not in part and part.get(word) != "LogitDistiller":
        raise ConfigError("it has no config_list", where=where, legal=legal)
    cls = _class(part.get(word, default), base, home, f"{where}[{word!r}]")
    arguments = dict(part.get("arguments") or {})
    if issubclass(cls, LayerwiseDistiller):
        arguments = {**{name: value for name, value in teacher.items() if value is not None}, **arguments}
    check_arguments(cls, arguments, f"{where}['arguments']", KNOWN)
    schedule = _schedule(part.get("schedule"), f"{where}['schedule']")
    made: Any = cls
    own = made(
        model,
        part.get("config_list"),
        None if last is not None and last._trainer is not None else evaluator,
        example_inputs=example_inputs,
        previous=last,
        **arguments,
    )
    return schedule(own)


def _schedule(asked: Mapping[str, Any] | None, where: str) -> Callable[[Any], Compressor]:
    """What puts a pruner under its schedule; checked before the pruner is made."""
    if asked is None:
        return lambda pruner: pruner
    arguments = dict(asked)
    cls: Any = _class(arguments.pop("pruner", "AGPPruner"), ScheduledPruner, tersor.pruning, f"{where}['pruner']")
    check_arguments(cls, arguments, where, ("pruner", "evaluator"))

    def scheduled(pruner: Any) -> Compressor:
        try:
            return cls(pruner, **arguments)
        except BaseException:
            pruner.unwrap_model()
            raise

    return scheduled


def _class(named: Any, base: type[T], home: ModuleType, where: str) -> type[T]:
    """A class of a kind, by itself, by its name or by an import path."""
    found: Any = named_object(named, home, base, where) if isinstance(named, str) else named
    if not (isinstance(found, type) and issubclass(found, base) and not inspect.isabstract(found)):
        raise InvalidValueError(f"{named!r} is no {base.__name__} that can be made", where=where)
    return found
