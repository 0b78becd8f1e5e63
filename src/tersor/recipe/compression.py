"""How a recipe says what is pruned, quantized and distilled: the form of `tersor.compress`, in a file."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from tersor.config import Entry, values
from tersor.config.specs import Parsed
from tersor.recipe.fields import (
    Arguments,
    Flag,
    OptionalBatches,
    OptionalText,
    Text,
    as_written,
    entries,
    one_of,
    optional,
    optional_part,
)
from tersor.recipe.imports import import_path
from tersor.recipe.source import ModelSource, source


class Schedule(Parsed):
    """Pruning step by step, with a schedule over the pruner.

    With ``interval_steps`` it is done within the fine-tuning; without, in rounds, each of which prunes, fine-tunes as
    long as the recipe says, and evaluates; rounds have no quantization or distillation beside them. What is given here
    and not said to have a default is the class's own.

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
    interval_steps: Annotated[int | None, optional(partial(values.whole, kind="number of steps", low=1))] = None
    initial_ratio: Annotated[float | None, optional(values.ratio)] = None
    reset_weight: Annotated[bool | None, optional(values.flag)] = None
    rewind_steps: Annotated[int | None, optional(partial(values.whole, kind="number of steps", low=0))] = None
    speedup: Flag = False
    best: Annotated[Literal["latest", "maximize", "minimize"], one_of("latest", "maximize", "minimize")] = "latest"


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
    arguments: Arguments = Field(default_factory=dict)
    config_list: Annotated[tuple[Entry, ...], entries("pruning"), as_written]
    calibration_batches: OptionalBatches = None
    dependency_groups: Flag = True
    isomorphic_groups: Flag = False
    schedule: Annotated[Schedule | None, optional_part(Schedule)] = None


class Quantization(Parsed):
    """How the model is quantized, within the same training run.

    Attributes:
        quantizer: a class in `tersor.quantization`, or an import path; ``QATQuantizer`` where it is not said, or
            ``PtqQuantizer`` where nothing is trained.
        arguments: of the quantizer's constructor, by name.
        config_list: the list itself, or the path of a file that holds it.
        calibration_batches: how many batches of the training data are given to a quantizer that is calibrated; 8 where
            it is not said.
    """

    quantizer: OptionalText = None
    arguments: Arguments = Field(default_factory=dict)
    config_list: Annotated[tuple[Entry, ...], entries("quantization"), as_written]
    calibration_batches: OptionalBatches = None


class Distillation(Parsed):
    """What the model learns from a teacher meanwhile.

    Attributes:
        distiller: a class in `tersor.distillation`, or an import path.
        arguments: of the distiller's constructor, by name.
        config_list: the list itself, or the path of a file that holds it; `LogitDistiller` does without.
        teacher: who teaches, said as the model is: an import path, or a mapping of the keys of `ModelSource`. The model
            itself, as it was before compression, where it is not said.
        teacher_predict: import path of ``teacher_predict(batch, teacher)``, which runs it on a batch; by default it
            gets the inputs.
    """

    distiller: Text = "DynamicLayerwiseDistiller"
    arguments: Arguments = Field(default_factory=dict)
    config_list: Annotated[tuple[Entry, ...] | None, entries("distillation"), as_written] = None
    teacher: Annotated[ModelSource | None, BeforeValidator(lambda value: None if value is None else source(value))] = (
        None
    )
    teacher_predict: Annotated[str | None, optional(import_path)] = None
