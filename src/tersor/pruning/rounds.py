"""Rounds of a schedule: prune, make small, train, evaluate, keep; the best is returned, a killed run goes on."""

from __future__ import annotations

import copy
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tersor.config import PruningSpec
from tersor.errors import CheckpointError, ConflictError, InvalidValueError, SpeedupError, TrainingError
from tersor.graph.coupling import Masks
from tersor.pruning.base import Pruner
from tersor.storage import replacing_file
from tersor.targets.planned import PlannedTarget
from tersor.training.random_state import random_state, set_random_state
from tersor.training.ranks import is_first_process, mean_over_processes, of_each_process, process
from tersor.training.snapshot import plain_name

Best = Literal["latest", "maximize", "minimize"]


class _Small(Protocol):
    def speedup_model(self) -> nn.Module: ...


class MakeSmall(Protocol):
    """What makes a model small, such as :class:`tersor.speedup.ModelSpeedup`."""

    def __call__(self, model: nn.Module, dummy_input: Any, masks_or_file: Masks, /) -> _Small:
        """Prepare it for a model, its example inputs and masks."""
        ...


class Stepwise(Pruner):
    """What rounds ask of a schedule.

    Attributes:
        pruner: what decides.
        total_times: how often is pruned.
    """

    pruner: Pruner
    total_times: int

    @abstractmethod
    def ratio_at(self, ratio: float, times: int) -> float:
        """How much of a ratio is removed after so many of the ``total_times`` prunings."""

    @abstractmethod
    def prune_now(self, left: Callable[[PlannedTarget], float] | None = None) -> None:
        """Prune once more.

        Args:
            left: the share of a target's blocks that is still there, where the model has become small.
        """

    @abstractmethod
    def share(self) -> None:
        """Look at the pruner's plan and wrappers, which are others once the model has become small."""

    def before_rounds(self, max_steps: int | None, max_epochs: int | None) -> None:
        """What happens before the first round."""

    def length_of_round(self, max_steps: int | None, max_epochs: int | None) -> tuple[int | None, int | None]:
        """How many steps and epochs each round trains for, of those that :meth:`compress` was given."""
        return max_steps, max_epochs


@dataclass(frozen=True)
class Round:
    """One round.

    Attributes:
        number: from 1.
        metric: what the evaluator said of the model after it; None where it evaluates nothing.
        removed: the share of all pruned targets' blocks that is gone.
    """

    number: int
    metric: float | None
    removed: float


@dataclass(frozen=True, eq=False)
class _Kept:
    """The best round so far: the model's state, and what its compressors knew."""

    number: int
    model: dict[str, Any]
    compressors: dict[str, Any]


class Rounds:
    """Runs the rounds of one schedule.

    Args:
        schedule: whose rounds they are.
        speedup: makes the model small after each pruning; None keeps it masked.
        log_dir: the folder for ``rounds.pt``; None keeps nothing on the disk.
        best: which round is given back.

    Attributes:
        done: the rounds so far.
    """

    def __init__(
        self,
        schedule: Stepwise,
        speedup: MakeSmall | None,
        log_dir: str | os.PathLike[str] | None,
        best: Best,
    ) -> None:
        if best not in ("latest", "maximize", "minimize"):
            raise InvalidValueError(f"{best!r} is unknown.", where="best", legal=("latest", "maximize", "minimize"))
        if speedup is not None:
            _refuse_what_cannot_be_cut(schedule)
        self.done: list[Round] = []
        self._schedule, self._speedup, self._best = schedule, speedup, best
        self._file = None if log_dir is None else Path(log_dir) / "rounds.pt"
        self._blocks = {target.name: target.free for target in schedule.plan.targets if target.decides}
        self._cuts: list[Masks] = []
        self._kept: _Kept | None = None
        self._best_model: nn.Module | None = None
        self._in_place = self._begun = False

    def run(self, max_steps: int | None, max_epochs: int | None) -> None:
        """All rounds that are not done yet; the best one's model is in place afterwards, whatever happens.

        Raises:
            ConflictError: the model is to be made small while other compressors are fused.
            TrainingError: the best round is asked for, and there is no metric; or the rounds have been run.
            CheckpointError: the log is another run's.
        """
        schedule, evaluator = self._schedule, self._schedule._trainer
        if self._speedup is not None and len(schedule._chain) > 1:
            others = ", ".join(type(item).__name__ for item in schedule._chain if item is not schedule)
            raise ConflictError(
                f"{others} cannot follow a model that is made small between rounds",
                where="speedup",
                remedy="Leave speedup out, and make the model small at the end.",
            )
        if self._begun:
            raise TrainingError(
                "the rounds have been run, also if they were ended too soon",
                where="compress",
                remedy="Build the model, the pruner and the schedule anew; with the same log_dir it then goes on.",
            )
        fresh = None if evaluator is None else copy.deepcopy(evaluator.state_dict())
        described = self._described(max_steps, max_epochs)
        if self._file is not None and self._file.exists():
            self._resume(described)
        self._begun = True
        try:
            if not self.done:
                schedule.before_rounds(max_steps, max_epochs)
            while len(self.done) < schedule.total_times:
                self._in_place = False
                self._restart(fresh)
                schedule.pruner.gather()
                self._restart(fresh)
                schedule.prune_now(self._left if self._cuts else None)
                if self._speedup is not None:
                    self._make_small()
                    self._restart(fresh)
                if evaluator is not None and (max_steps is not None or max_epochs is not None):
                    steps, epochs = schedule.length_of_round(max_steps, max_epochs)
                    evaluator.train(schedule.model, schedule, max_steps=steps, max_epochs=epochs)
                self._record(None if evaluator is None else evaluator.evaluate(schedule.model))
                self._save(described)
        finally:
            self._give_best()

    def result(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """The best round's model and masks; a model that was made small has no masks left."""
        if self._best_model is not None and not self._in_place:
            return self._best_model, {}
        return self._schedule.model, self._schedule.get_masks()

    def _restart(self, fresh: dict[str, Any] | None) -> None:
        """Each round trains with optimizers and schedulers as they were at the beginning."""
        if self._schedule._trainer is not None and fresh is not None:
            self._schedule._trainer.load_state_dict(copy.deepcopy(fresh))

    def _record(self, metric: float | None) -> None:
        schedule = self._schedule
        if metric is not None:
            metric = float(mean_over_processes(torch.tensor(metric, dtype=torch.float64)))
        elif self._best != "latest":
            raise TrainingError(
                "no round can be called best without a metric",
                where="best",
                remedy="Give an evaluator with an evaluating_func that returns a number, or best='latest'.",
            )
        number = len(self.done) + 1
        if self._is_best(metric):
            self._in_place = True
            with nullcontext() if self._speedup is None else schedule.wrappers.detached():
                self._kept = copy.deepcopy(_Kept(number, schedule.model.state_dict(), schedule.state_dict()))
                self._best_model = None if self._speedup is None else copy.deepcopy(schedule.model)
        self.done.append(Round(number, metric, self._removed()))

    def _is_best(self, metric: float | None) -> bool:
        known = [of.metric for of in self.done if of.metric is not None and not math.isnan(of.metric)]
        if self._best == "latest" or metric is None or not known:
            return True
        # Of equal ones the later, which is the sparser; NaN is neither above nor below.
        return metric >= max(known) if self._best == "maximize" else metric <= min(known)

    def _give_best(self) -> None:
        kept = self._kept
        if kept is not None and self._speedup is None and not self._in_place:
            self._load(kept.compressors, kept.model)
            self._in_place = True

    def _load(self, compressors: Mapping[str, Any], model: Mapping[str, Tensor]) -> None:
        """Go back to an earlier state, however many parameters were masked then and are now."""
        self._schedule.load_state_dict(compressors)
        saved = {plain_name(name): tensor for name, tensor in model.items()}
        names = self._schedule.model.state_dict()
        self._schedule.model.load_state_dict({name: saved[plain_name(name)] for name in names})

    def _make_small(self) -> None:
        schedule = self._schedule
        masks = copy.deepcopy(schedule.get_masks())
        asked = {of.target: of.blocks - of.removed for of in schedule.sparsity() if of.target in self._blocks}
        schedule.pruner.unwrap_model(bake=True)
        self._cut(masks)
        schedule.pruner.wrap_anew()
        schedule.share()
        now = {of.target: of.blocks for of in schedule.sparsity()}
        kept = [f"{name} ({now[name] - left})" for name, left in asked.items() if now.get(name, 0) > left]
        if kept:
            warnings.warn(
                f"Masked, and yet not cut: {', '.join(kept)}. These channels stay, and are trained again. Where others "
                "that are joined with them keep them, let auto_set_dependency_group_ids decide them together.",
                stacklevel=2,
            )

    def _cut(self, masks: Masks) -> None:
        assert self._speedup is not None
        schedule = self._schedule
        small = self._speedup(schedule.model, schedule.example_inputs, masks).speedup_model()
        if small is not schedule.model:
            raise SpeedupError(
                "only a graph of this model can be made small, and the optimizer trains the model itself",
                remedy="Leave speedup out, and make the model small at the end.",
            )
        self._cuts.append(masks)

    def _left(self, target: PlannedTarget) -> float:
        """The share of what could leave at first that is still there; of a global group, by its elements."""
        spec = target.config.spec
        group = spec.global_group_id if isinstance(spec, PruningSpec) else None
        now = {own.name: own for own in self._schedule.plan.targets if own.decides and own.name in self._blocks}
        groups = {name: getattr(own.config.spec, "global_group_id", None) for name, own in now.items()}
        names = [name for name, own in groups.items() if group and own == group] or [target.name]
        weight = {name: blocks.block_numel if (blocks := now[name].blocks) is not None else 1 for name in names}
        before = sum(self._blocks[name] * weight[name] for name in names)
        return sum(now[name].free * weight[name] for name in names) / before

    def _removed(self) -> float:
        """The share of all blocks that is masked or cut."""
        asked = sum(self._blocks.values())
        kept = sum(of.blocks - of.removed for of in self._schedule.sparsity() if of.target in self._blocks)
        targets = [target for target in self._schedule.plan.targets if target.name in self._blocks]
        stays = sum(target.blocks.count - target.free for target in targets if target.blocks)
        return 1 - (kept - stays) / asked

    def _described(self, max_steps: int | None, max_epochs: int | None) -> dict[str, Any]:
        """What makes two runs the same: the settings of all compressors, and those of the rounds."""
        return {
            **self._schedule.chain_described(),
            "best": self._best,
            "speedup": self._speedup is not None,
            "max_steps": max_steps,
            "max_epochs": max_epochs,
        }

    def _save(self, described: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        random_states = of_each_process(random_state())
        if not is_first_process():
            return
        state = {
            "run": described,
            "rounds": [asdict(of) for of in self.done],
            "cuts": self._cuts,
            "model": self._schedule.model.state_dict(),
            "compressors": self._schedule.state_dict(),
            "best": None if self._kept is None else vars(self._kept),
            "random": random_states,
        }
        with replacing_file(self._file) as temporary:
            torch.save(state, temporary)

    def _resume(self, described: Mapping[str, Any]) -> None:
        """Go on from the log; ``weights_only`` reads tensors, numbers and strings and runs no code."""
        assert self._file is not None
        schedule = self._schedule
        state = torch.load(self._file, weights_only=True)
        saved = state["run"]
        if saved != described:
            differing = [key for key in {**saved, **described} if saved.get(key) != described.get(key)]
            told = ", ".join(f"{key} ({saved.get(key)}, and {described.get(key)} here)" for key in differing)
            raise CheckpointError(
                f"the rounds that it holds are those of another run, which differs in {told}",
                where=str(self._file),
                remedy="Give another log_dir, or delete this file to begin anew.",
            )
        self.done = [Round(**of) for of in state["rounds"]]
        self._kept = None if state["best"] is None else _Kept(**state["best"])
        if state["cuts"]:
            schedule.pruner.unwrap_model()
            for number, masks in enumerate(state["cuts"], 1):
                self._cut(masks)
                if self._kept is not None and self._kept.number == number:
                    self._best_model = copy.deepcopy(schedule.model)
                    self._best_model.load_state_dict(self._kept.model)
            schedule.pruner.wrap_anew()
            schedule.share()
        self._load(state["compressors"], state["model"])
        self._in_place = self._kept is not None and self._kept.number == len(self.done)
        set_random_state(state["random"][process() % len(state["random"])])


def _refuse_what_cannot_be_cut(schedule: Stepwise) -> None:
    if schedule.example_inputs is None:
        raise ConflictError(
            "a model is made small with example inputs", where="speedup", remedy="Give the pruner example_inputs."
        )
    for target in schedule.plan.targets:
        if target.decides and target.classes is None:
            raise ConflictError(
                "a model gets small by whole channels, and what leaves here are none",
                where=f"speedup: {target.config.where} on {target.name}",
                remedy="Leave speedup out, or choose a pruner and a granularity of output channels.",
            )
