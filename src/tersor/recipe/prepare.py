"""From the names in a recipe to objects: model, data, evaluator, config list."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tersor.pruning
from tersor.checkpoint import load
from tersor.errors import ConfigError, InvalidValueError
from tersor.pruning import Pruner
from tersor.recipe.imports import import_object, named_object
from tersor.recipe.spec import FineTuning, Recipe
from tersor.targets.dependency import auto_set_dependency_group_ids
from tersor.training import TorchEvaluator
from tersor.training.batches import to_device
from tersor.training.loops import LoaderLoop

MISSING = object()


@dataclass(frozen=True)
class Prepared:
    """What a recipe names, built.

    Attributes:
        original: the model as it was built, on the recipe's device.
        model: a copy that the run changes.
        pruner: the class.
        evaluator: trains `model`, and evaluates any.
        example_inputs: what the model can be run on.
        config_list: with dependency groups, where the recipe wants them.
    """

    original: nn.Module
    model: nn.Module
    pruner: type[Pruner]
    evaluator: TorchEvaluator
    example_inputs: Any
    config_list: list[dict[str, Any]]


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


def prepare(recipe: Recipe, *, progress: bool = True) -> Prepared:
    """Build everything that the recipe names; nothing is trained or pruned yet.

    Args:
        recipe: what to build.
        progress: whether training will show a bar.

    Raises:
        ConfigError: a name cannot be imported, or what it gives is not what it should be.
        CheckpointError: the model's checkpoint does not fit.
    """
    device = torch.device(recipe.device)
    pruner: Any = named_object(recipe.pruning.pruner, tersor.pruning, Pruner, "recipe['pruning']['pruner']")
    original = build_model(recipe.model.build, recipe.model.checkpoint, "recipe['model']").to(device)
    model = copy.deepcopy(original)
    data = build_data(recipe.data, "recipe['data']")
    optimizer = make_optimizer(recipe.fine_tuning, model)
    evaluator = TorchEvaluator.from_loader(
        data.train,
        _loss(recipe.fine_tuning),
        optimizer,
        make_schedule(recipe.fine_tuning, optimizer, data.train),
        scheduler_interval="step",
        eval_loader=data.test,
        metric=data.metric,
        progress=progress,
    )
    example_inputs = to_device(data.example_inputs, device)
    config_list = [entry.as_config() for entry in recipe.pruning.config_list]
    if recipe.pruning.dependency_groups:
        config_list = auto_set_dependency_group_ids(model, config_list, example_inputs)
    return Prepared(original, model, pruner, evaluator, example_inputs, config_list)


def build_model(path: str, checkpoint: str | None = None, where: str = "") -> nn.Module:
    """Call the function that builds a model, and load a checkpoint into it if there is one.

    Args:
        path: import path of the function.
        checkpoint: a folder that `tersor.save` wrote, or None.
        where: the place of the path, for errors.

    Raises:
        ConfigError: the function cannot be imported, or returns no module.
        CheckpointError: the checkpoint does not fit.

    >>> build_model("torch.nn:ReLU")
    ReLU()
    """
    model = import_object(path, where)()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{path!r} returned {type(model).__name__}", where=where, legal=["a torch.nn.Module"])
    return model if checkpoint is None else load(model, checkpoint)


def build_data(path: str, where: str) -> Data:
    """Call the function that gives a recipe its data.

    Args:
        path: import path of the function.
        where: the place, for errors.

    Raises:
        ConfigError: the function cannot be imported, or what it returns has no loaders.
    """
    found = import_object(path, where)()
    train, test = (getattr(found, name, MISSING) for name in ("train", "test"))
    if not isinstance(train, Iterable) or not (test is None or isinstance(test, Iterable)):
        raise ConfigError(
            f"{path!r} returned {type(found).__name__} without a data loader train or test.",
            where=where,
            legal=["an object with .train and .test, data loaders of (inputs, targets); .test may be None"],
        )
    example_inputs = getattr(found, "example_input", None)
    if example_inputs is None:
        example_inputs = LoaderLoop(train, None, device=None, scheduler_interval="epoch").first_inputs()
    return Data(train, test, getattr(found, "metric", None), example_inputs)


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


def make_schedule(
    tuning: FineTuning, optimizer: torch.optim.Optimizer, train: Iterable[Any]
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """The schedule of a recipe over all steps of its fine-tuning; None where the learning rate is constant.

    Raises:
        ConfigError: the loader has no length, so the number of steps is not known.
    """
    if tuning.schedule == "constant" or not tuning.epochs:
        return None
    if not isinstance(train, Sized) and tuning.max_steps is None:
        raise ConfigError(
            "the data loader has no length",
            where="recipe['fine_tuning']['schedule']",
            remedy="Give max_steps, or a constant learning rate.",
        )
    steps = [tuning.max_steps, tuning.epochs * len(train) if isinstance(train, Sized) else None]
    total = min(count for count in steps if count is not None)
    if tuning.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    # One step more: OneCycleLR counts the position after the last step, too.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, tuning.learning_rate, total + 1)


def _loss(tuning: FineTuning) -> Any:
    if tuning.loss is None:
        return None
    return named_object(tuning.loss, torch.nn.functional, object, "recipe['fine_tuning']['loss']")
