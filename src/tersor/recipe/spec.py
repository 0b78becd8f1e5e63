"""What a recipe may say: frozen, validated, and every error names its place.

model: my_package.models:trained_resnet      # a function without arguments
data: my_package.data:cifar                  # returns an object with .train and .test (loaders)
pruning:
  pruner: TaylorPruner
  arguments: {training_steps: 50}
  config_list: [{op_types: [Conv2d], sparse_ratio: 0.5}]
  schedule: {pruner: AGPPruner, total_times: 4, speedup: true}
fine_tuning: {epochs: 3, optimizer: SGD, learning_rate: 0.01}
deployment: {engine: openvino}
output: {directory: runs/resnet, onnx: true}
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator

from tersor.config import Entry, parse_config_list, read_config_file, values
from tersor.config.specs import Parsed
from tersor.deploy import engines
from tersor.errors import InvalidValueError
from tersor.recipe.imports import import_path

PartT = TypeVar("PartT", bound=Parsed)


def _part(cls: type[PartT]) -> BeforeValidator:
    def parse(value: Any) -> PartT:
        return value if isinstance(value, cls) else cls.parse(value)

    return BeforeValidator(parse)


def _optional_part(cls: type[PartT]) -> BeforeValidator:
    return BeforeValidator(lambda value: value if value is None or isinstance(value, cls) else cls.parse(value))


def _optional(check: Callable[[Any], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else check(value))


def _text(value: object) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InvalidValueError(f"{value!r} is no text.")
    return os.fspath(value)


def _batch_sizes(value: object) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, list | tuple) else (value,)
    return tuple(values.whole(size, "batch size", 1) for size in sizes)


def _device(value: object) -> str:
    try:
        return str(torch.device(str(value)))
    except RuntimeError:
        raise InvalidValueError(f"{value!r} is no device.", legal=["cpu", "cuda", "cuda:1", "..."]) from None


def _engine(value: object) -> str:
    return values.choice(value, ("auto", *engines()))


def _entries(value: Any) -> tuple[Entry, ...]:
    return parse_config_list(value, "pruning", where="")


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise InvalidValueError(f"{value!r} is no mapping of arguments.", legal=["{name: value, ...}"])
    return dict(value)


def _one_of(*legal: str) -> PlainValidator:
    return PlainValidator(partial(values.choice, legal=legal))


def _source(value: Any) -> ModelSource:
    if isinstance(value, ModelSource):
        return value
    return ModelSource.parse(value if isinstance(value, Mapping) else {"build": value})


Text = Annotated[str, PlainValidator(_text)]
ImportPath = Annotated[str, PlainValidator(import_path)]
Flag = Annotated[bool, PlainValidator(values.flag)]
Share = Annotated[float, PlainValidator(partial(values.number, kind="non-negative number", low=0))]
Entries = Annotated[
    tuple[Entry, ...],
    PlainValidator(_entries),
    PlainSerializer(lambda entries: [entry.as_config() for entry in entries], return_type=list),
]


class ModelSource(Parsed):
    """Where the model comes from.

    Attributes:
        build: import path of a function without arguments that returns the model, trained or not.
        checkpoint: a folder that `tersor.save` wrote, loaded into what `build` returns.
    """

    build: ImportPath
    checkpoint: Annotated[str | None, _optional(_text)] = None


class Schedule(Parsed):
    """Pruning step by step, with a schedule over the pruner.

    With ``interval_steps`` it is done within the fine-tuning; without, in rounds, each of which prunes, fine-tunes as
    long as the recipe says, and evaluates. What is given here and not said to have a default is the class's own.

    Attributes:
        pruner: a schedule in `tersor.pruning`, or an import path.
        total_times: how often is pruned.
        interval_steps: optimizer steps between two prunings; None for rounds.
        initial_ratio: of `AGPPruner`.
        reset_weight: of `LotteryTicketPruner`.
        rewind_steps: of `LotteryTicketPruner`.
        speedup: whether the model is made small in each round, before it is fine-tuned.
        best: which round's model is kept: the ``latest``, or that of the highest (``maximize``) or lowest metric.
    """

    pruner: Text = "AGPPruner"
    total_times: Annotated[int, PlainValidator(partial(values.whole, kind="number of prunings", low=1))] = 10
    interval_steps: Annotated[int | None, _optional(partial(values.whole, kind="number of steps", low=1))] = None
    initial_ratio: Annotated[float | None, _optional(values.ratio)] = None
    reset_weight: Annotated[bool | None, _optional(values.flag)] = None
    rewind_steps: Annotated[int | None, _optional(partial(values.whole, kind="number of steps", low=0))] = None
    speedup: Flag = False
    best: Annotated[Literal["latest", "maximize", "minimize"], _one_of("latest", "maximize", "minimize")] = "latest"


class Pruning(Parsed):
    """How the model is pruned.

    Attributes:
        pruner: a class in `tersor.pruning` (``tersor pruners`` lists them), or an import path.
        arguments: of the pruner's constructor, by name.
        config_list: the list itself, or the path of a file that holds it.
        calibration_batches: how many batches of the training data are given to a pruner that looks at the inputs of
            layers; 8 where it is not said.
        dependency_groups: let layers whose channels are added or multiplied share one mask.
        isomorphic_groups: then let layers that are built alike share their ratio.
        schedule: prune step by step.
    """

    pruner: Text = "L1NormPruner"
    arguments: Annotated[dict[str, Any], PlainValidator(_arguments)] = Field(default_factory=dict)
    config_list: Entries
    calibration_batches: Annotated[int | None, _optional(partial(values.whole, kind="number of batches", low=1))] = None
    dependency_groups: Flag = True
    isomorphic_groups: Flag = False
    schedule: Annotated[Schedule | None, _optional_part(Schedule)] = None


class Recovery(Parsed):
    """Repairs without training, right after one-shot pruning.

    Attributes:
        batch_norm: measure the statistics of batch norms anew.
        bias: give each output channel the mean back that it had.
        batches: how many batches of the training data both look at.
    """

    batch_norm: Flag = True
    bias: Flag = False
    batches: Annotated[int, PlainValidator(partial(values.whole, kind="number of batches", low=1))] = 16


class FineTuning(Parsed):
    """How the masked model is trained; in each round, where a schedule prunes in rounds.

    Attributes:
        epochs: passes over the training data; 0 leaves it out.
        max_steps: at most so many optimizer steps in all. Steps that a pruner watches or learns by come on top.
        optimizer: a class in `torch.optim`, or an import path.
        learning_rate: of the optimizer; the highest one of a schedule.
        schedule: how the learning rate goes over all steps: ``constant``, ``cosine`` (down to zero) or ``one_cycle``
            (up, then down).
        momentum: for optimizers that have one; 0.9 for SGD where it is not given.
        weight_decay: of the optimizer.
        loss: a function in `torch.nn.functional` or an import path, called with outputs and targets; None where the
            model returns its loss itself.
    """

    epochs: Annotated[int, PlainValidator(partial(values.whole, kind="number of epochs", low=0))] = 1
    max_steps: Annotated[int | None, _optional(partial(values.whole, kind="number of steps", low=1))] = None
    optimizer: Text = "SGD"
    learning_rate: Share = 0.01
    schedule: Annotated[Literal["constant", "cosine", "one_cycle"], _one_of("constant", "cosine", "one_cycle")] = (
        "constant"
    )
    momentum: Annotated[float | None, _optional(partial(values.number, kind="momentum", low=0, high=1))] = None
    weight_decay: Share = 0.0
    loss: Annotated[str | None, _optional(_text)] = "cross_entropy"


class Output(Parsed):
    """What a run leaves behind.

    Attributes:
        directory: where; made if missing. While a schedule prunes in rounds, they are kept in ``rounds/``, and the same
            command goes on after the last whole one if it was killed.
        checkpoint: the small model, as `tersor.load` reads it, in ``checkpoint/``; after each epoch and at the end.
        onnx: the small model as ``model.onnx``.
        report: the comparison as ``report.html``.
        batch_sizes: those at which latency is measured; None takes the example inputs as they are.
    """

    directory: Text = "runs"
    checkpoint: Flag = True
    onnx: Flag = False
    report: Flag = True
    batch_sizes: Annotated[tuple[int, ...] | None, _optional(_batch_sizes)] = None


class Deployment(Parsed):
    """An int8 artefact of the small model for an inference engine, in ``deployment/``, calibrated without training.

    Attributes:
        engine: its name; ``auto`` is the first that is installed.
        calibration_batches: how many batches of the training data the ranges are taken from.
        threads: of the engine; None leaves it to the engine.
        on_failure: ``error`` or ``warn`` where the artefact departs from the simulation, or runs too little in int8.
    """

    engine: Annotated[str, PlainValidator(_engine)] = "auto"
    calibration_batches: Annotated[int, PlainValidator(partial(values.whole, kind="number of batches", low=1))] = 8
    threads: Annotated[int | None, _optional(partial(values.whole, kind="number of threads", low=1))] = None
    on_failure: Annotated[Literal["error", "warn"], _one_of("error", "warn")] = "error"


class Recipe(Parsed):
    """A whole run. Paths in it are taken from the current folder.

    Attributes:
        model: an import path, or a mapping of the keys of `ModelSource`.
        data: import path of a function without arguments. What it returns has ``train`` and ``test``, data loaders of
            ``(inputs, targets)`` (``test`` may be None), and if it likes ``example_input`` (else the inputs of the
            first batch) and ``metric(outputs, targets)`` (else the accuracy).
        pruning: how the model is pruned.
        recovery: repairs without training, right after the pruning; None leaves them out.
        fine_tuning: how it is trained meanwhile.
        deployment: an int8 artefact of what came of it; None leaves it out.
        output: what the run leaves behind.
        seed: of all random numbers.
        device: where the model is trained and measured.

    >>> recipe = Recipe.parse({"model": "m:net", "data": "m:data", "pruning": {"config_list":
    ...     [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]}, "fine_tuning": {"epochs": 2}})
    >>> recipe.model.build, recipe.fine_tuning.epochs, recipe.output.directory
    ('m:net', 2, 'runs')
    >>> Recipe.parse({"modle": "m:net"}, "recipe")
    Traceback (most recent call last):
    tersor.errors.UnknownKeyError: recipe: 'modle' is no key here. ... Did you mean 'model'?
    """

    model: Annotated[ModelSource, BeforeValidator(_source)]
    data: ImportPath
    pruning: Annotated[Pruning, _part(Pruning)]
    recovery: Annotated[Recovery | None, _optional_part(Recovery)] = None
    fine_tuning: Annotated[FineTuning, _part(FineTuning)] = FineTuning()
    deployment: Annotated[Deployment | None, _optional_part(Deployment)] = None
    output: Annotated[Output, _part(Output)] = Output()
    seed: Annotated[int, PlainValidator(partial(values.whole, kind="seed", low=0))] = 0
    device: Annotated[str, PlainValidator(_device)] = "cpu"


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a YAML or JSON file.

    Raises:
        ConfigError: the file cannot be read, or a key or value in it is wrong; the message names the place.
    """
    return Recipe.parse(read_config_file(path), os.fspath(path))
