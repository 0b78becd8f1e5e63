"""From the names in a recipe to objects: model, data, evaluator, config list."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tersor.checkpoint import load
from tersor.errors import ConfigError, ConflictError, InvalidValueError, TersorError
from tersor.graph.coupling import Coupling, coupling_of
from tersor.pruning import Pruner
from tersor.pruning.learning import LearningPruner
from tersor.recipe.compression import Pruning
from tersor.recipe.imports import call_object, named_object
from tersor.recipe.pruner import PRUNING, Algorithm, check_length, check_recovery, find_algorithm, group
from tersor.recipe.rounds import Narrated, Speedups
from tersor.recipe.spec import FineTuning, Recipe
from tersor.training import TorchEvaluator
from tersor.training.batches import to_device
from tersor.training.loops import LoaderLoop

MISSING = object()


@dataclass(frozen=True)
class Built:
    """What every recipe names, built.

    Attributes:
        original: the model as it was built, on the recipe's device.
        model: a copy that the run changes; what compresses it wraps it when it starts.
        evaluator: trains `model`, and evaluates any.
        data: what is trained and evaluated on.
        example_inputs: what the model can be run on, on the recipe's device.
    """

    original: nn.Module
    model: nn.Module
    evaluator: TorchEvaluator
    data: Data
    example_inputs: Any


@dataclass(frozen=True)
class Prepared(Built):
    """A recipe that asks for pruning alone, built.

    Attributes:
        algorithm: what the pruner is made of.
        pruner: the pruner, or the schedule over it.
        speedups: makes models small, and keeps the reports.
    """

    algorithm: Algorithm
    pruner: Pruner
    speedups: Speedups


@dataclass(frozen=True)
class Data:
    """What the data function of a recipe returned, checked.

    Attributes:
        train: batches to train on.
        test: batches to evaluate on, or None.
        metric: ``metric(outputs, targets)``, or None for the accuracy.
        example_inputs: what the model can be run on; the inputs of the first batch where none were given.
    """

    train: Iterable[Any]
    test: Iterable[Any] | None
    metric: Callable[..., float] | None
    example_inputs: Any


def prepare(
    recipe: Recipe, *, progress: bool = True, on_round: Callable[[float | None], None] | None = None
) -> Prepared:
    """Build everything that a recipe which asks for pruning alone names; nothing is trained or pruned yet.

    Args:
        recipe: what to build.
        progress: whether training will show a bar.
        on_round: called with the metric after each round of a schedule.

    Raises:
        ConfigError: a name cannot be imported, or what it gives is not what it should be.
        CheckpointError: the model's checkpoint does not fit.
        TrainingError: the fine-tuning is too short for what happens meanwhile.
    """
    asked = recipe.alone
    if asked is None:
        raise ConflictError(
            "it asks for more than pruning alone", where="recipe", remedy="Give it to prepare_fusion, or run_recipe."
        )
    algorithm = find_algorithm(asked)
    check_recovery(recipe.recovery, algorithm)
    original, data, example_inputs = build_both(recipe)
    _check_metric(asked, data)
    model = copy.deepcopy(original)
    coupling = coupling_of(model, example_inputs)
    config_list, learning_steps = groups_and_steps(algorithm, asked, model, coupling, data)
    evaluator = make_evaluator(recipe.fine_tuning, model, data, learning_steps, progress=progress)
    watched = evaluator if on_round is None else Narrated(evaluator, on_round)
    pruner = algorithm.make(model, config_list, watched, coupling, data.train)
    pruner.unwrap_model()
    speedups = Speedups()
    pruner = algorithm.schedule_over(pruner, speedup=speedups, log_dir=Path(recipe.output.directory) / "rounds")
    check_length(recipe, algorithm, pruner, total_steps(recipe.fine_tuning, data.train))
    return Prepared(original, model, evaluator, data, example_inputs, algorithm, pruner, speedups)


def build_both(recipe: Recipe) -> tuple[nn.Module, Data, Any]:
    """The model and the data of a recipe, and example inputs where the model is."""
    device = torch.device(recipe.device)
    original = build_model(recipe.model.build, recipe.model.checkpoint, "recipe['model']").to(device)
    data = build_data(recipe.data, "recipe['data']")
    return original, data, to_device(data.example_inputs, device)


def groups_and_steps(
    algorithm: Algorithm, asked: Pruning, model: nn.Module, coupling: Coupling, data: Data
) -> tuple[list[dict[str, Any]], int]:
    """The config list that a pruner is made with, groups and all, and how many steps it trains for itself.

    A first one tells what loses whole channels and how long it learns.

    Args:
        algorithm: what is made.
        asked: the part of the recipe.
        model: the model, unwrapped.
        coupling: the model's.
        data: calibrates.
    """
    draft = algorithm.make(model, [entry.as_config() for entry in asked.config_list], None, coupling, data.train)
    draft.unwrap_model()
    # The optimizers train with it only where the steps are kept.
    steps = draft.watched_steps if isinstance(draft, LearningPruner) and not draft.restores else 0
    return group(model, asked, coupling, draft.plan, algorithm.where), steps


def make_evaluator(
    tuning: FineTuning, model: nn.Module, data: Data, learning_steps: int = 0, *, progress: bool = True
) -> TorchEvaluator:
    """How a recipe trains a model, and evaluates any.

    Args:
        tuning: the recipe's.
        model: what is trained.
        data: on what.
        learning_steps: how many steps pruners train before.
        progress: whether to show a bar.
    """
    optimizer = make_optimizer(tuning, model)
    return TorchEvaluator.from_loader(
        data.train,
        _loss(tuning),
        optimizer,
        make_schedule(tuning, optimizer, data.train, learning_steps),
        scheduler_interval="step",
        eval_loader=data.test,
        metric=data.metric,
        progress=progress,
    )


def build_model(path: str, checkpoint: str | None = None, where: str = "") -> nn.Module:
    """Call the function that builds a model, and load a checkpoint into it if there is one.

    Args:
        path: import path of the function.
        checkpoint: a folder that `tersor.save` wrote, or None.
        where: the place of the path, for errors.

    Raises:
        ConfigError: the function cannot be imported, fails, or returns no module.
        CheckpointError: the checkpoint does not fit.

    >>> build_model("torch.nn:ReLU")
    ReLU()
    """
    model = call_object(path, where)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path!r} returned {type(model).__name__}", where=where, legal=["a torch.nn.Module"])
    return model if checkpoint is None else load(model, checkpoint)


def build_data(path: str, where: str) -> Data:
    """Call the function that gives a recipe its data.

    Args:
        path: import path of the function.
        where: the place, for errors.

    Raises:
        ConfigError: the function cannot be imported, fails, or what it returns has no loaders.
    """
    found = call_object(path, where)
    train, test = (getattr(found, name, MISSING) for name in ("train", "test"))
    if not isinstance(train, Iterable) or not (test is None or isinstance(test, Iterable)):
        raise ConfigError(
            f"{path!r} returned {type(found).__name__} without a data loader train or test.",
            where=where,
            legal=["an object with .train and .test, data loaders of (inputs, targets); .test may be None"],
        )
    example_inputs = getattr(found, "example_input", None)
    if example_inputs is None:
        example_inputs = _first_inputs(train, path, where)
    return Data(train, test, getattr(found, "metric", None), example_inputs)


def _first_inputs(train: Iterable[Any], path: str, where: str) -> Any:
    try:
        return LoaderLoop(train, None, device=None, scheduler_interval="epoch").first_inputs()
    except TersorError:
        raise
    except StopIteration:
        raise ConfigError(f"{path!r} gave no batch.", where=where) from None
    except Exception as error:
        raise ConfigError(
            f"{path!r}: its first batch failed ({type(error).__name__}: {error}).",
            where=where,
            remedy="--traceback shows where.",
        ) from error


def make_optimizer(tuning: FineTuning, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe, over all parameters of the model.

    >>> make_optimizer(FineTuning(optimizer="SGD"), nn.Linear(1, 1)).defaults["momentum"]
    0.9

    Raises:
        ConfigError: there is no such optimizer, or it has no momentum and the recipe gives one.
    """
    kind = named_object(tuning.optimizer, torch.optim, torch.optim.Optimizer, "recipe['fine_tuning']['optimizer']")
    options: dict[str, Any] = {"lr": tuning.learning_rate, "weight_decay": tuning.weight_decay}
    if "momentum" in inspect.signature(kind).parameters:
        options["momentum"] = 0.9 if tuning.momentum is None else tuning.momentum
    elif tuning.momentum is not None:
        raise InvalidValueError(
            f"{tuning.optimizer} has no momentum.", where="recipe['fine_tuning']['momentum']", remedy="Leave it out."
        )
    return kind(model.parameters(), **options)


def total_steps(tuning: FineTuning, train: Iterable[Any]) -> int | None:
    """How many optimizer steps the fine-tuning has; None where the data loader has no length and nothing limits it.

    >>> total_steps(FineTuning(epochs=3), [1, 2]), total_steps(FineTuning(epochs=3, max_steps=5), [1, 2])
    (6, 5)
    """
    steps = [tuning.max_steps, tuning.epochs * len(train) if isinstance(train, Sized) else None]
    return min((count for count in steps if count is not None), default=None)


def make_schedule(
    tuning: FineTuning, optimizer: torch.optim.Optimizer, train: Iterable[Any], learning_steps: int = 0
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule of a recipe over all steps of its fine-tuning; None where the learning rate is constant.

    Args:
        tuning: the recipe's.
        optimizer: whose learning rate it is.
        train: the batches of one epoch.
        learning_steps: how many steps the pruner trains before.

    Raises:
        ConfigError: the loader has no length, so the number of steps is not known.
    """
    if tuning.schedule == "constant" or not tuning.epochs:
        return None
    steps = total_steps(tuning, train)
    if steps is None:
        raise ConfigError(
            "the data loader has no length",
            where="recipe['fine_tuning']['schedule']",
            remedy="Give max_steps, or a constant learning rate.",
        )
    total = steps + learning_steps
    if tuning.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    # One step more: OneCycleLR counts the position after the last step, too.
    return _OneCycle(optimizer, tuning.learning_rate, total + 1)


class _OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """Stays where it ends: a pruner may watch more steps than the fine-tuning has, and go back to the beginning."""

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch < self.total_steps - 1:
            super().step(epoch)


def _check_metric(asked: Pruning, data: Data) -> None:
    schedule = asked.schedule
    if schedule is not None and schedule.best != "latest" and data.test is None:
        raise ConflictError(
            "no round can be called best without test data",
            where=f"{PRUNING}['schedule']['best']",
            remedy="Let the data function return .test, or leave best out.",
        )


def _loss(tuning: FineTuning) -> Any:
    if tuning.loss is None:
        return None
    return named_object(tuning.loss, torch.nn.functional, object, "recipe['fine_tuning']['loss']")
