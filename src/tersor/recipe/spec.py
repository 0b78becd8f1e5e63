"""What a recipe may say: frozen, validated, and every error names its place.

model: my_package.models:trained_resnet      # a function without arguments
data: my_package.data:cifar                  # returns an object with .train and .test (loaders)
pruning:
  pruner: TaylorPruner
  arguments: {training_steps: 50}
  config_list: [{op_types: [Conv2d], sparse_ratio: 0.5}]
  schedule: {pruner: AGPPruner, interval_steps: 100, total_times: 4}
quantization:
  config_list: [{op_types: [Conv2d], target_names: [weight, _input_0]}]
distillation: {distiller: LogitDistiller, teacher: my_package.models:large_resnet}
fine_tuning: {epochs: 3, optimizer: SGD, learning_rate: 0.01}
deployment: {engine: openvino}
output: {directory: runs/resnet, onnx: true}
"""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainValidator, model_validator

from tersor.config import read_config_file, values
from tersor.config.specs import Parsed
from tersor.deploy import engines
from tersor.errors import ConflictError, InvalidValueError
from tersor.recipe.compression import Distillation, Pruning, Quantization
from tersor.recipe.fields import (
    Batches,
    BatchSizes,
    DeviceName,
    Flag,
    ImportPath,
    OptionalText,
    Share,
    Text,
    one_of,
    optional,
    optional_part,
    part,
    section,
    several,
)
from tersor.recipe.source import ModelSource, source


def _engine(value: object) -> str:
    return values.choice(value, ("auto", *engines()))


class Recovery(Parsed):
    """Repairs without training, right after one-shot pruning.

    Attributes:
        batch_norm: measure the statistics of batch norms anew.
        bias: give each output channel the mean back that it had.
        batches: how many batches of the training data both look at.
    """

    batch_norm: Flag = True
    bias: Flag = False
    batches: Batches = 16


class FineTuning(Parsed):
    """How the model is trained while it is compressed; in each round, where a schedule prunes in rounds.

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
        checkpoint_steps: after so many optimizer steps a training is kept that does more than prune, so that the same
            command goes on with it if it was killed.
    """

    epochs: Annotated[int, PlainValidator(partial(values.whole, kind="number of epochs", low=0))] = 1
    max_steps: Annotated[int | None, optional(partial(values.whole, kind="number of steps", low=1))] = None
    optimizer: Text = "SGD"
    learning_rate: Share = 0.01
    schedule: Annotated[Literal["constant", "cosine", "one_cycle"], one_of("constant", "cosine", "one_cycle")] = (
        "constant"
    )
    momentum: Annotated[float | None, optional(partial(values.number, kind="momentum", low=0, high=1))] = None
    weight_decay: Share = 0.0
    loss: OptionalText = "cross_entropy"
    checkpoint_steps: Annotated[int, PlainValidator(partial(values.whole, kind="number of steps", low=1))] = 100


class Output(Parsed):
    """What a run leaves behind.

    Attributes:
        directory: where; made if missing. While a schedule prunes in rounds, they are kept in ``rounds/``, and while
            more than pruning is trained, that is in ``training/``; the same command goes on from there if it was
            killed.
        checkpoint: the small model, as `tersor.load` reads it, in ``checkpoint/``; after each epoch and at the end.
            Where more than pruning is asked for it is there at the end alone, with rounded weights and the calibration
            beside them.
        onnx: the small model as ``model.onnx``; where it is quantized with rounded weights alone, see `Deployment`.
        report: the comparison as ``report.html``.
        batch_sizes: those at which latency is measured; None takes the example inputs as they are.
    """

    directory: Text = "runs"
    checkpoint: Flag = True
    onnx: Flag = False
    report: Flag = True
    batch_sizes: BatchSizes = None


class Deployment(Parsed):
    """An int8 artefact of the small model for an inference engine, in ``deployment/``.

    It computes what the quantizers of the recipe simulate; without any it is calibrated, without training.

    Attributes:
        engine: its name; ``auto`` is the first that is installed.
        calibration_batches: how many batches of the training data the ranges are taken from, where the recipe has no
            quantizers.
        threads: of the engine; None leaves it to the engine.
        on_failure: ``error`` or ``warn`` where the artefact departs from the simulation, or runs too little in int8.
    """

    engine: Annotated[str, PlainValidator(_engine)] = "auto"
    calibration_batches: Batches = 8
    threads: Annotated[int | None, optional(partial(values.whole, kind="number of threads", low=1))] = None
    on_failure: Annotated[Literal["error", "warn"], one_of("error", "warn")] = "error"


class Recipe(Parsed):
    """A whole run. Paths in it are taken from the current folder.

    Attributes:
        model: an import path, or a mapping of the keys of `ModelSource`.
        data: import path of a function without arguments. What it returns has ``train`` and ``test``, data loaders of
            ``(inputs, targets)`` (``test`` may be None), and if it likes ``example_input`` (else the inputs of the
            first batch) and ``metric(outputs, targets)`` (else the accuracy).
        pruning: how the model is pruned: a mapping of the keys of `Pruning`, a config list alone, or a list of such
            mappings, for several algorithms on different modules.
        quantization: how it is quantized: the same, of `Quantization`.
        distillation: what it learns from a teacher: the same, of `Distillation`. One of the three must be there. What
            stands beside each other is fused, as :func:`tersor.compress` does, and shares one training run.
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

    model: Annotated[ModelSource, BeforeValidator(source)]
    data: ImportPath
    pruning: Annotated[Pruning | tuple[Pruning, ...] | None, section(Pruning)] = None
    quantization: Annotated[Quantization | tuple[Quantization, ...] | None, section(Quantization)] = None
    distillation: Annotated[Distillation | tuple[Distillation, ...] | None, section(Distillation)] = None
    recovery: Annotated[Recovery | None, optional_part(Recovery)] = None
    fine_tuning: Annotated[FineTuning, part(FineTuning)] = FineTuning()
    deployment: Annotated[Deployment | None, optional_part(Deployment)] = None
    output: Annotated[Output, part(Output)] = Output()
    seed: Annotated[int, PlainValidator(partial(values.whole, kind="seed", low=0))] = 0
    device: DeviceName = "cpu"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not any((self.pruning, self.quantization, self.distillation)):
            raise InvalidValueError(
                "'pruning' is missing, and so are 'quantization' and 'distillation': it asks for nothing.",
                legal=self.legal_keys(),
            )
        if self.alone is None and self.recovery is not None:
            raise ConflictError(
                "recovery follows the pruning of a recipe that asks for nothing else",
                where="['recovery']",
                remedy="Leave it out: the training repairs more.",
            )
        quantized, given = several(self.quantization), self.deployment and self.deployment.model_fields_set
        if quantized and given and "calibration_batches" in given:
            raise ConflictError(
                "what is deployed has the ranges that the recipe's quantizers found",
                where="['deployment']['calibration_batches']",
                remedy="Leave it out, or say it under quantization, to a quantizer that is calibrated.",
            )
        return self

    @property
    def alone(self) -> Pruning | None:
        """The pruning, where the recipe asks for nothing beside it: then it may go in rounds, and be recovered from."""
        only = isinstance(self.pruning, Pruning) and self.quantization is None and self.distillation is None
        return self.pruning if only and isinstance(self.pruning, Pruning) else None


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from a YAML or JSON file.

    Raises:
        ConfigError: the file cannot be read, or a key or value in it is wrong; the message names the place.
    """
    return Recipe.parse(read_config_file(path), os.fspath(path))
