"""Rounds of a schedule: prune, make small, train, evaluate, keep; the best is returned, a killed run goes on."""

from __future__ import annotations

import copy
import os
import random
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tersor.config import PruningSpec
from tersor.errors import CheckpointError, ConflictError, InvalidValueError, SpeedupError, TrainingError
from tersor.graph.coupling import Masks
from tersor.pruning.base import Pruner
from tersor.storage import replacing_file
from tersor.targets.planned import PlannedTarget
from tersor.training.ranks import is_first_process, mean_over_processes

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
        if speedup is not None and schedule.example_inputs is None:
            raise ConflictError(
                "a model is made small with example inputs", where="speedup", remedy="Give the pruner example_inputs."
            )
        self.done: list[Round] = []
        self._schedule, self._speedup, self._best = schedule, speedup, best
        self._file = None if log_dir is None else Path(log_dir) / "rounds.pt"
        self._blocks = {target.name: _free(target) for target in schedule.plan.targets if target.decides}
        self._cuts: list[Masks] = []
        self._kept: _Kept | None = None
        self._best_model: nn.Module | None = None
        self._in_place = False

    def run(self, max_steps: int | None, max_epochs: int | None) -> None:
        """All rounds that are not done yet; the best one's model is in place afterwards, whatever happens.

        Raises:
            ConflictError: the model is to be made small while other compressors are fused.
            TrainingError: the best round is asked for, and there is no metric.
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
        fresh = None if evaluator is None else copy.deepcopy(evaluator.state_dict())
        described = self._described(max_steps, max_epochs)
        if self._file is not None and self._file.exists():
            self._resume(described)
        try:
            if not self.done:
                schedule.before_rounds(max_steps, max_epochs)
            while len(self.done) < schedule.total_times:
                self._in_place = False
                self._restart(fresh)
                schedule.pruner.gather()
                schedule.prune_now(self._left if self._cuts else None)
                if self._speedup is not None:
                    self._make_small()
                    self._restart(fresh)
                if evaluator is not None and (max_steps is not None or max_epochs is not None):
                    evaluator.train(schedule.model, schedule, max_steps=max_steps, max_epochs=max_epochs)
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
            with schedule.wrappers.detached() if self._speedup is not None else torch.no_grad():
                self._kept = copy.deepcopy(_Kept(number, schedule.model.state_dict(), schedule.state_dict()))
                self._best_model = None if self._speedup is None else copy.deepcopy(schedule.model)
        self.done.append(Round(number, metric, self._removed()))

    def _is_best(self, metric: float | None) -> bool:
        known = [of.metric for of in self.done if of.metric is not None]
        if self._best == "latest" or metric is None or not known:
            return True
        # Of equal ones the later, which is the sparser.
        return metric >= max(known) if self._best == "maximize" else metric <= min(known)

    def _give_best(self) -> None:
        kept = self._kept
        if kept is not None and self._speedup is None and not self._in_place:
            self._schedule.load_state_dict(kept.compressors)
            self._schedule.model.load_state_dict(kept.model)
            self._in_place = True

    def _make_small(self) -> None:
        schedule = self._schedule
        masks = copy.deepcopy(schedule.get_masks())
        schedule.pruner.unwrap_model(bake=True)
        self._cut(masks)
        schedule.pruner.wrap_anew()
        schedule.share()

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
        names = [
            own.name for own in now.values() if group and getattr(own.config.spec, "global_group_id", None) == group
        ]
        names = names or [target.name]
        weight = {name: blocks.block_numel if (blocks := now[name].blocks) is not None else 1 for name in names}
        before = sum(self._blocks[name] * weight[name] for name in names)
        return sum(_free(now[name]) * weight[name] for name in names) / before

    def _removed(self) -> float:
        """The share of all blocks that is masked or cut."""
        asked = sum(self._blocks.values())
        kept = sum(of.blocks - of.removed for of in self._schedule.sparsity() if of.target in self._blocks)
        stays = sum(
            t.blocks.count - _free(t) for t in self._schedule.plan.targets if t.name in self._blocks and t.blocks
        )
        return 1 - (kept - stays) / asked

    def _described(self, max_steps: int | None, max_epochs: int | None) -> dict[str, Any]:
        """What makes two runs the same."""
        schedule = self._schedule
        targets = {t.name: t.config.spec.as_config() for t in schedule.plan.targets}
        return {
            "schedule": [type(schedule).__name__, schedule.total_times, schedule.ratio_at(1.0, 1)],
            "compressors": [type(item).__name__ for item in (schedule.pruner, *schedule._chain)],
            "targets": targets,
            "length": [max_steps, max_epochs],
        }

    def _save(self, described: Mapping[str, Any]) -> None:
        if self._file is None or not is_first_process():
            return
        state = {
            "run": described,
            "rounds": [asdict(of) for of in self.done],
            "cuts": self._cuts,
            "model": self._schedule.model.state_dict(),
            "compressors": self._schedule.state_dict(),
            "best": None if self._kept is None else vars(self._kept),
            "random": _random_state(),
        }
        with replacing_file(self._file) as temporary:
            torch.save(state, temporary)

    def _resume(self, described: Mapping[str, Any]) -> None:
        """Go on from the log; ``weights_only`` reads tensors, numbers and strings and runs no code."""
        assert self._file is not None
        schedule = self._schedule
        state = torch.load(self._file, weights_only=True)
        if state["run"] != described:
            differing = ", ".join(key for key, value in described.items() if state["run"].get(key) != value)
            raise CheckpointError(
                f"the rounds that it holds are those of another run: its {differing} differ",
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
        schedule.load_state_dict(state["compressors"])
        schedule.model.load_state_dict(state["model"])
        self._in_place = self._kept is not None and self._kept.number == len(self.done)
        _set_random_state(state["random"])


def _free(target: PlannedTarget) -> int:
    """How many of a target's blocks can leave."""
    assert target.blocks is not None
    return target.blocks.count if target.stays is None else int((~target.stays).sum())


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(of) for of in rest)),
        "python": random.getstate(),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
