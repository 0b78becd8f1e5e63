"""From the names in a recipe to objects: model, data, evaluator, config list."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tersor.pruning
from tersor.checkpoint import load
from tersor.errors import ConfigError, InvalidValueError
from tersor.pruning import Pruner
from tersor.recipe.imports import import_object, named_object
from tersor.recipe.spec import FineTuning, ModelSource, Recipe
from tersor.targets.dependency import auto_set_dependency_group_ids
from tersor.training import TorchEvaluator
from tersor.training.batches import to_device


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
    original = build_model(recipe.model, "recipe['model']").to(device)
    model = copy.deepcopy(original)
    data = import_object(recipe.data, "recipe['data']")()
    train, test = (_loader(data, name) for name in ("train", "test"))
    evaluator = TorchEvaluator.from_loader(
        train,
        _loss(recipe.fine_tuning),
        make_optimizer(recipe.fine_tuning, model),
        eval_loader=test,
        metric=getattr(data, "metric", None),
        progress=progress,
    )
    example_inputs = getattr(data, "example_input", None)
    example_inputs = to_device(evaluator.dummy_input if example_inputs is None else example_inputs, device)
    config_list = [entry.as_config() for entry in recipe.pruning.config_list]
    if recipe.pruning.dependency_groups:
        config_list = auto_set_dependency_group_ids(model, config_list, example_inputs)
    return Prepared(original, model, pruner, evaluator, example_inputs, config_list)


def build_model(source: ModelSource, where: str) -> nn.Module:
    """Call the function that a recipe names, and load the checkpoint if there is one.

    Args:
        source: the function, and maybe a checkpoint.
        where: the place, for errors.

    Raises:
        ConfigError: the function cannot be imported, or returns no module.
        CheckpointError: the checkpoint does not fit.
    """
    model = import_object(source.build, where)()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{source.build!r} returned {type(model).__name__}.", where=where, legal=["a torch.nn.Module"]
        )
    return model if source.checkpoint is None else load(model, source.checkpoint)


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


def _loss(tuning: FineTuning) -> Any:
    if tuning.loss is None:
        return None
    return named_object(tuning.loss, torch.nn.functional, object, "recipe['fine_tuning']['loss']")


def _loader(data: Any, name: str) -> Any:
    loader = getattr(data, name, None)
    if not (isinstance(loader, Iterable) or (loader is None and name == "test" and hasattr(data, name))):
        raise ConfigError(
            f"the {type(data).__name__} that was returned has no data loader {name!r}.",
            where="recipe['data']",
            legal=["an object with .train and .test, data loaders of (inputs, targets); .test may be None"],
        )
    return loader
