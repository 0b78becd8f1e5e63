"""From a recipe's parts to fused compressors: it is put in the form that `tersor.compress` takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

import tersor.distillation
import tersor.quantization
from tersor.compressor import Compressor
from tersor.config import Entry
from tersor.distillation import Distiller
from tersor.errors import ConflictError, TrainingError
from tersor.graph.coupling import Coupling, coupling_of
from tersor.pruning.schedule import ScheduledPruner
from tersor.quantization.base import Quantizer
from tersor.recipe.arguments import COMPRESSOR_PARTS, arguments_of, check_arguments
from tersor.recipe.compression import Distillation, Pruning, Quantization
from tersor.recipe.fields import PartT, several
from tersor.recipe.fusion import default_of, fuse
from tersor.recipe.imports import class_named, import_object
from tersor.recipe.prepare import (
    Built,
    Data,
    build_both,
    build_model,
    groups_and_steps,
    make_evaluator,
    total_steps,
)
from tersor.recipe.pruner import TUNING, Algorithm, batches_of, find_algorithm, refuse_short
from tersor.recipe.spec import Recipe

DISTILLER_PARTS = (*COMPRESSOR_PARTS, "teacher_model", "teacher_predict")
"""What a recipe says beside a distiller's arguments, or knows by itself."""


@dataclass(frozen=True)
class PreparedFusion(Built):
    """A recipe that asks for more than pruning, built.

    Attributes:
        compressor: the last of those that are fused; its model is unwrapped until it starts.
    """

    compressor: Compressor

    @property
    def trains(self) -> bool:
        """Whether the model is trained, where the recipe has epochs."""
        return not all(item.post_training for item in self.compressor.chain)


def prepare_fusion(recipe: Recipe, *, progress: bool = True) -> PreparedFusion:
    """Build everything that a recipe names whose compressors are fused; nothing is trained or compressed yet.

    Args:
        recipe: what to build.
        progress: whether training will show a bar.

    Raises:
        ConfigError: a name cannot be imported, or what it gives is not what it should be, or does not fit the model.
        CheckpointError: the checkpoint of the model, or of a teacher, does not fit.
        TrainingError: the training is too short for what happens meanwhile.
    """
    trains = recipe.fine_tuning.epochs > 0
    parts = _Parts(recipe, trains)
    original, data, example_inputs = build_both(recipe)
    model = copy.deepcopy(original)
    coupling = coupling_of(model, example_inputs)
    description, learning_steps = parts.description(original, model, coupling, data)
    evaluator = make_evaluator(recipe.fine_tuning, model, data, learning_steps, progress=progress)
    compressor = fuse(model, description, evaluator, trains=trains, example_inputs=coupling, where="recipe")
    compressor.unwrap_model()
    _check_length(compressor, total_steps(recipe.fine_tuning, data.train), recipe.fine_tuning.epochs)
    return PreparedFusion(original, model, evaluator, data, example_inputs, compressor)


@dataclass
class _Parts:
    """The parts of a recipe with their algorithms, which are looked up and checked before a model is built."""

    recipe: Recipe
    trains: bool
    pruning: list[tuple[Pruning, Algorithm]] = field(init=False)
    quantization: list[tuple[Quantization, type[Quantizer], int | None]] = field(init=False)
    distillation: list[tuple[Distillation, type[Distiller], str]] = field(init=False)
    _teachers: dict[tuple[str, str | None], nn.Module] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        recipe = self.recipe
        self.pruning = [(own, _algorithm(own, where)) for own, where in _places(recipe.pruning, "pruning")]
        self.quantization = [
            (own, *_quantizer(own, self.trains, where)) for own, where in _places(recipe.quantization, "quantization")
        ]
        self.distillation = [
            (own, _distiller(own, where), where) for own, where in _places(recipe.distillation, "distillation")
        ]

    def description(
        self, original: nn.Module, model: nn.Module, coupling: Coupling, data: Data
    ) -> tuple[dict[str, Any], int]:
        """What `tersor.compress` takes, and how many steps pruners train for themselves before."""
        pruning: list[dict[str, Any]] = []
        learning_steps = 0
        for asked, algorithm in self.pruning:
            config_list, steps = groups_and_steps(algorithm, asked, model, coupling, data)
            learning_steps += steps
            pruning.append({"pruner": algorithm.pruner, "config_list": config_list})
            pruning[-1]["arguments"] = _calibrated(algorithm.arguments, algorithm.calibration_batches, data)
            if algorithm.schedule is not None:
                pruning[-1]["schedule"] = {"pruner": algorithm.schedule, **algorithm.schedule_arguments}
        quantization = [
            {
                "quantizer": cls,
                "config_list": _written(own.config_list),
                "arguments": _calibrated(own.arguments, batches, data),
            }
            for own, cls, batches in self.quantization
        ]
        distillation: list[dict[str, Any]] = []
        for own, cls, where in self.distillation:
            distillation.append(
                {"distiller": cls, "arguments": {**own.arguments, **self._teacher(own, cls, where, original)}}
            )
            if own.config_list is not None:
                distillation[-1]["config_list"] = _written(own.config_list)
        recipe = self.recipe
        found = {
            "pruning": _as_asked(recipe.pruning, pruning),
            "quantization": _as_asked(recipe.quantization, quantization),
            "distillation": _as_asked(recipe.distillation, distillation),
        }
        return found, learning_steps

    def _teacher(self, asked: Distillation, cls: type[Distiller], where: str, original: nn.Module) -> dict[str, Any]:
        """The arguments that name the teacher; parts that name the same one share it."""
        found: dict[str, Any] = {}
        legal = arguments_of(cls, ())
        if asked.teacher is not None:
            key = (asked.teacher.build, asked.teacher.checkpoint)
            if key not in self._teachers:
                teacher = build_model(*key, f"{where}['teacher']")
                self._teachers[key] = teacher.to(torch.device(self.recipe.device))
            found["teacher_model"] = self._teachers[key]
        elif "teacher_model" in legal:
            found["teacher_model"] = original
        if asked.teacher_predict is not None:
            found["teacher_predict"] = import_object(asked.teacher_predict, f"{where}['teacher_predict']")
        return found


def _places(asked: PartT | tuple[PartT, ...] | None, kind: str) -> list[tuple[PartT, str]]:
    """The parts of a section, each with its place in the recipe."""
    where = f"recipe[{kind!r}]"
    return [
        (own, f"{where}[{number}]" if isinstance(asked, tuple) else where) for number, own in enumerate(several(asked))
    ]


def _as_asked(asked: object, parts: list[dict[str, Any]]) -> Any:
    """A list, a mapping or None, as the section is, so that errors name the same places."""
    return parts if isinstance(asked, tuple) else parts[0] if parts else None


def _written(config_list: Sequence[Entry]) -> list[dict[str, Any]]:
    return [entry.as_config() for entry in config_list]


def _calibrated(arguments: dict[str, Any], batches: int | None, data: Data) -> dict[str, Any]:
    return dict(arguments) if batches is None else {**arguments, "calibration": list(islice(data.train, batches))}


def _algorithm(asked: Pruning, where: str) -> Algorithm:
    algorithm = find_algorithm(asked, where)
    if algorithm.in_rounds:
        raise ConflictError(
            "rounds make the model small in between, which nothing that is fused with the pruner can follow",
            where=f"{where}['schedule']",
            remedy="Give interval_steps: it then prunes within the one training run.",
        )
    return algorithm


def _quantizer(asked: Quantization, trains: bool, where: str) -> tuple[type[Quantizer], int | None]:
    named = asked.quantizer or default_of("quantization", trains=trains)
    cls = class_named(named, tersor.quantization, Quantizer, f"{where}['quantizer']")
    check_arguments(cls, asked.arguments, f"{where}['arguments']")
    return cls, batches_of(cls, asked.calibration_batches, where)


def _distiller(asked: Distillation, where: str) -> type[Distiller]:
    cls = class_named(asked.distiller, tersor.distillation, Distiller, f"{where}['distiller']")
    check_arguments(cls, asked.arguments, f"{where}['arguments']", DISTILLER_PARTS)
    legal = arguments_of(cls, ())
    for key, argument in (("teacher", "teacher_model"), ("teacher_predict", "teacher_predict")):
        if getattr(asked, key) is not None and argument not in legal:
            raise ConflictError(
                f"{cls.__name__} takes no {argument}", where=f"{where}[{key!r}]", remedy="Leave it out."
            )
    return cls


def _check_length(compressor: Compressor, steps: int | None, epochs: int) -> None:
    """Refuse a training that is too short for what is learned, pruned or rounded meanwhile."""
    for item in compressor.chain:
        if not epochs and (item.needs_training or isinstance(item, ScheduledPruner)):
            raise TrainingError(
                f"{item.title} works while the model trains, and there is no epoch",
                where=f"{TUNING}['epochs']",
                legal=["1 or more"],
            )
        if epochs:
            refuse_short(item, steps, epochs)
