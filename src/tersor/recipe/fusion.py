"""Pruning, quantization and distillation of one model from one description, in one training run."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

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
from tersor.recipe.arguments import arguments_of, check_arguments, placed
from tersor.recipe.imports import class_named
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
    checkpoint_dir: str | os.PathLike[str] | None = None,
    checkpoint_steps: int = 100,
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
        checkpoint_dir: where a run that is killed keeps what it has come to; see
            :meth:`tersor.compressor.Compressor.compress`.
        checkpoint_steps: how often.

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
        compressor.compress(max_steps, max_epochs, checkpoint_dir=checkpoint_dir, checkpoint_steps=checkpoint_steps)
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
    where: str = "config",
) -> Compressor:
    """Make the compressors that :func:`compress` runs, for a training loop of one's own, or a look at the timeline.

    Args:
        model: it is wrapped in place.
        config: see :func:`compress`.
        evaluator: see there.
        trains: whether the model will be trained.
        example_inputs: see there.
        teacher: ``teacher_model`` and ``teacher_predict`` of distillers that name none.
        where: what errors call the description.
    """
    if not isinstance(config, Mapping):
        raise InvalidValueError(f"a {type(config).__name__} is no description", where=where, legal=[*KINDS])
    for key in config:
        if key not in KINDS:
            raise UnknownKeyError(f"{key!r} is no key here.", where=where, legal=[*KINDS], remedy=nearest(key, KINDS))
    last: Compressor | None = None
    try:
        for kind in KINDS:
            for place, part in _parts(kind, config.get(kind), f"{where}[{kind!r}]"):
                named = default_of(kind, trains=trains)
                last = _made(model, kind, part, place, named, last, evaluator, example_inputs, teacher or {})
    except BaseException:
        if last is not None:
            last.unwrap_model()
        raise
    if last is None:
        raise ConfigError("it asks for nothing", where=where, legal=[*KINDS])
    return last


def default_of(kind: str, *, trains: bool) -> str:
    """The algorithm of a part that names none.

    >>> default_of("quantization", trains=True), default_of("quantization", trains=False)
    ('QATQuantizer', 'PtqQuantizer')
    """
    return {
        "pruning": "L1NormPruner",
        "quantization": "QATQuantizer" if trains else "PtqQuantizer",
        "distillation": "DynamicLayerwiseDistiller",
    }[kind]


def _parts(kind: str, asked: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What one key holds, as mappings of the keys of a part."""
    keys = (KINDS[kind][0], *PARTS)
    if asked is None:
        return
    if isinstance(asked, Mapping):
        yield where, asked
    elif (
        isinstance(asked, Sequence)
        and not isinstance(asked, str)
        and any(key in part for part in asked for key in keys)
    ):
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
    cls = class_named(part.get(word, default), home, base, f"{where}[{word!r}]")
    needed = arguments_of(cls, ())["config_list"].default is inspect.Parameter.empty
    if "config_list" not in part and needed:
        raise ConfigError("it has no config_list", where=where, legal=legal)
    arguments = dict(part.get("arguments") or {})
    if issubclass(cls, LayerwiseDistiller):
        arguments = {**{name: value for name, value in teacher.items() if value is not None}, **arguments}
    check_arguments(cls, arguments, f"{where}['arguments']", KNOWN)
    schedule = _schedule(part.get("schedule"), f"{where}['schedule']")
    made: Any = cls
    with _placed(arguments, where):
        own = made(
            model,
            part.get("config_list"),
            None if last is not None and last._trainer is not None else evaluator,
            example_inputs=example_inputs,
            previous=last,
            **arguments,
        )
    return schedule(own)


@contextmanager
def _placed(arguments: Collection[str], where: str) -> Iterator[None]:
    """Say which part's config list or argument is wrong."""
    try:
        with placed(arguments, f"{where}['arguments']"):
            yield
    except ConfigError as error:
        if error.where.startswith("config_list"):
            error.where = f"{where}['config_list']{error.where.removeprefix('config_list')}"
        raise


def _schedule(asked: Mapping[str, Any] | None, where: str) -> Callable[[Any], Compressor]:
    """What puts a pruner under its schedule; checked before the pruner is made."""
    if asked is None:
        return lambda pruner: pruner
    arguments = dict(asked)
    named = arguments.pop("pruner", "AGPPruner")
    cls: Any = class_named(named, tersor.pruning, ScheduledPruner, f"{where}['pruner']")
    check_arguments(cls, arguments, where, ("pruner", "evaluator"))

    def scheduled(pruner: Any) -> Compressor:
        try:
            with placed(arguments, where):
                return cls(pruner, **arguments)
        except BaseException:
            pruner.unwrap_model()
            raise

    return scheduled
