"""The pruner of a recipe: found, its arguments checked, made, and put under its schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

import tersor.pruning
from tersor.compressor import Compressor
from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.graph.coupling import Coupling
from tersor.pruning import LotteryTicketPruner, Pruner
from tersor.pruning.rounds import MakeSmall
from tersor.pruning.schedule import ScheduledPruner
from tersor.recipe.arguments import arguments_of, check_arguments, placed
from tersor.recipe.catalogue import SCHEDULE_PARTS, catalogue
from tersor.recipe.compression import Pruning
from tersor.recipe.imports import class_named
from tersor.recipe.spec import Recipe, Recovery
from tersor.targets.dependency import auto_set_dependency_group_ids
from tersor.targets.isomorphic import auto_set_isomorphic_group_ids
from tersor.targets.plan import Plan
from tersor.training import Evaluator

PRUNING = "recipe['pruning']"
TUNING = "recipe['fine_tuning']"
CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Algorithm:
    """What a recipe prunes with: classes and the arguments that they get.

    Attributes:
        pruner: decides what leaves.
        arguments: of the pruner, by name.
        calibration_batches: how many batches the pruner is given to look at; None where it takes none.
        schedule: decides how much leaves when; None prunes once.
        schedule_arguments: of the schedule, by name.
        speedup: whether the schedule makes the model small in each round.
        where: the place in the recipe.
    """

    pruner: type[Pruner]
    arguments: dict[str, Any]
    calibration_batches: int | None
    schedule: type[ScheduledPruner] | None
    schedule_arguments: dict[str, Any]
    speedup: bool
    where: str = PRUNING

    @property
    def in_rounds(self) -> bool:
        """Whether a schedule prunes in rounds rather than within one training run."""
        return self.schedule is not None and "interval_steps" not in self.schedule_arguments

    def make(
        self,
        model: nn.Module,
        config_list: list[Any],
        evaluator: Evaluator | None,
        example_inputs: Any,
        train: Iterable[Any],
    ) -> Pruner:
        """The pruner alone; the model is wrapped.

        Args:
            model: the model.
            config_list: what is to be pruned.
            evaluator: how it is trained.
            example_inputs: what the model can be run on, or its coupling.
            train: batches of training data, the first of which calibrate.
        """
        make: Callable[..., Pruner] = self.pruner
        arguments = dict(self.arguments)
        if self.calibration_batches is not None:
            arguments["calibration"] = list(islice(train, self.calibration_batches))
        with placed(self.arguments, f"{self.where}['arguments']"):
            return make(model, config_list, evaluator=evaluator, example_inputs=example_inputs, **arguments)

    def schedule_over(self, pruner: Pruner, *, speedup: MakeSmall | None = None, log_dir: Path | None = None) -> Pruner:
        """The schedule over a pruner; the pruner itself where there is none.

        Args:
            pruner: what :meth:`make` gave.
            speedup: makes a model small, where the recipe asks for it.
            log_dir: where rounds are kept; None keeps them nowhere.
        """
        if self.schedule is None:
            return pruner
        make: Callable[..., ScheduledPruner] = self.schedule
        arguments = dict(self.schedule_arguments)
        if self.speedup:
            arguments["speedup"] = speedup
        if self.in_rounds:
            arguments["log_dir"] = log_dir
        with placed(arguments, f"{self.where}['schedule']"):
            return make(pruner, **arguments)


def find_algorithm(asked: Pruning, where: str = PRUNING) -> Algorithm:
    """Look up what a recipe prunes with, and check everything that can be checked before a model is built.

    Args:
        asked: a part of the recipe.
        where: its place.

    Raises:
        ConfigError: no such class, arguments that it does not take, or settings that cannot hold together.
    """
    pruner = class_named(asked.pruner, tersor.pruning, Pruner, f"{where}['pruner']")
    if issubclass(pruner, ScheduledPruner):
        raise ConflictError(
            f"{pruner.__name__} is a schedule, which says how much leaves when, and not what",
            where=f"{where}['pruner']",
            remedy=f"Name a pruner here, and schedule: {{pruner: {pruner.__name__}}} beside it.",
        )
    check_arguments(pruner, asked.arguments, f"{where}['arguments']")
    batches = batches_of(pruner, asked.calibration_batches, where)
    schedule, schedule_arguments = _find_schedule(asked, pruner, where)
    speedup = asked.schedule is not None and asked.schedule.speedup
    return Algorithm(pruner, dict(asked.arguments), batches, schedule, schedule_arguments, speedup, where)


def batches_of(cls: type, asked: int | None, where: str) -> int | None:
    """How many batches of the training data a class is calibrated on; None where it takes none.

    Args:
        cls: what is to be made.
        asked: what the recipe says.
        where: the place of the part.

    Raises:
        ConflictError: it takes none, and some are asked for.
    """
    calibrated = "calibration" in arguments_of(cls, ())
    if asked is not None and not calibrated:
        raise ConflictError(
            f"{cls.__name__} is not calibrated", where=f"{where}['calibration_batches']", remedy="Leave it out."
        )
    return (asked or CALIBRATION_BATCHES) if calibrated else None


def group(
    model: nn.Module, asked: Pruning, coupling: Coupling, plan: Plan, where: str = PRUNING
) -> list[dict[str, Any]]:
    """The config list of a part of a recipe with the groups that it wants.

    Args:
        model: the model, unwrapped.
        asked: what is wanted.
        coupling: the model's.
        plan: the pruner's, without groups: it tells which targets lose whole channels, and only these are grouped.
        where: the place of the part.
    """
    config_list: list[dict[str, Any]] = [entry.as_config() for entry in asked.config_list]
    by_channels = {target.place for target in plan.targets if target.classes is not None}
    if asked.dependency_groups and by_channels:
        found = auto_set_dependency_group_ids(model, config_list, coupling)
        for entry in found[len(config_list) :]:
            names = [name for name in entry["op_names"] if (name, entry["target_names"][0]) in by_channels]
            config_list += [{**entry, "op_names": names}] if names else []
    if asked.isomorphic_groups:
        if not by_channels:
            raise ConflictError(
                "no target loses whole channels, so nothing is built alike",
                where=f"{where}['isomorphic_groups']",
                remedy="Leave it out.",
            )
        config_list = auto_set_isomorphic_group_ids(model, config_list, coupling)
    return config_list


def check_length(recipe: Recipe, algorithm: Algorithm, pruner: Pruner, steps: int | None) -> None:
    """Refuse a fine-tuning that is too short for what is learned or pruned meanwhile.

    Args:
        recipe: says how long it is.
        algorithm: says how it is pruned.
        pruner: the pruner, with its schedule.
        steps: how many optimizer steps the fine-tuning has; None where that is not known.

    Raises:
        TrainingError: it is too short.
    """
    learns = algorithm.pruner.needs_training or (algorithm.schedule is not None and not algorithm.in_rounds)
    ticket = algorithm.schedule is not None and issubclass(algorithm.schedule, LotteryTicketPruner)
    if not recipe.fine_tuning.epochs and (learns or ticket):
        raise TrainingError(
            f"{type(pruner).__name__} works while the model trains, and there is no epoch",
            where=f"{TUNING}['epochs']",
            legal=["1 or more"],
        )
    if isinstance(pruner, LotteryTicketPruner) and steps is not None and pruner.rewind_steps > steps:
        raise TrainingError(
            f"the first training has {steps} steps and cannot be gone back to after {pruner.rewind_steps}",
            where=f"{PRUNING}['schedule']['rewind_steps']",
            legal=[f"0 to {steps}"],
        )
    if recipe.fine_tuning.epochs and not algorithm.in_rounds:
        refuse_short(pruner, steps, recipe.fine_tuning.epochs)


def refuse_short(compressor: Compressor, steps: int | None, epochs: int) -> None:
    """Refuse a training that is too short for one compressor.

    Args:
        compressor: it knows.
        steps: how many optimizer steps there are; None where that is not known.
        epochs: how many passes over the data.

    Raises:
        TrainingError: it is too short.
    """
    try:
        compressor.on_train(steps, epochs if steps is None else None)
    except TrainingError as error:
        raise TrainingError(
            error.what, where=TUNING, remedy="Raise epochs or max_steps, or let it need less."
        ) from None


def _find_schedule(
    part: Pruning, pruner: type[Pruner], place: str
) -> tuple[type[ScheduledPruner] | None, dict[str, Any]]:
    asked, where = part.schedule, f"{place}['schedule']"
    if asked is None:
        return None, {}
    if pruner.needs_training:
        raise ConflictError(
            f"{pruner.__name__} has a schedule of its own",
            where=where,
            remedy=f"Leave the schedule out; {pruner.__name__} takes {', '.join(arguments_of(pruner))} as arguments.",
        )
    found = class_named(asked.pruner, tersor.pruning, Pruner, f"{where}['pruner']")
    if not issubclass(found, ScheduledPruner):
        raise ConflictError(
            f"{found.__name__} says what leaves, and not how much when",
            where=f"{where}['pruner']",
            legal=[own.name for own in catalogue().schedules],
            remedy=f"Name {found.__name__} in {place}['pruner'].",
        )
    arguments = {name: value for name, value in asked if value is not None and name not in ("pruner", "speedup")}
    check_arguments(found, arguments, where, SCHEDULE_PARTS)
    if asked.speedup and "speedup" not in inspect.signature(found).parameters:
        raise ConflictError(
            f"{found.__name__} does not make the model small between rounds",
            where=f"{where}['speedup']",
            remedy="Leave it out: the model is made small at the end.",
        )
    if asked.interval_steps is not None and (asked.speedup or asked.best != "latest"):
        raise ConflictError(
            "speedup and best belong to rounds, and interval_steps prunes within one training run",
            where=where,
            remedy="Leave interval_steps out: each round then trains as long as fine_tuning says.",
        )
    return found, arguments


def check_recovery(recovery: Recovery | None, algorithm: Algorithm) -> None:
    """Refuse repairs after what prunes many times, or none at all.

    Raises:
        ConfigError: see there.
    """
    if recovery is None:
        return
    if not (recovery.batch_norm or recovery.bias):
        raise InvalidValueError(
            "nothing is to be recovered.", where="recipe['recovery']", legal=["batch_norm: true", "bias: true"]
        )
    if algorithm.schedule is not None or algorithm.pruner.needs_training:
        who = (algorithm.schedule or algorithm.pruner).__name__
        raise ConflictError(
            f"recovery follows the one pruning of a one-shot run, and {who} prunes many times",
            where="recipe['recovery']",
            remedy="Leave it out: the training in between does more.",
        )
