"""Lottery tickets: prune what training found small, go back to the beginning, and train again."""

from __future__ import annotations

import os
from typing import Any, final

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.pruning.base import Pruner
from tersor.pruning.rounds import Best
from tersor.pruning.schedule import ScheduledPruner
from tersor.training import Evaluator
from tersor.training.snapshot import Snapshot


@final
class LotteryTicketPruner(ScheduledPruner):
    r"""Finds a sparse network that trains from its initial weights as well as the whole one: a winning ticket.

    The whole network is trained once. Then each of T rounds prunes the same share of what is left,
    :math:`s_t = 1 - (1 - s_f)^{t/T}`, puts what stays back to its values at the beginning, running statistics
    included, and trains again. Give it a model at its initial weights; with ``rewind_steps`` the beginning is that many
    steps into the training, which large networks need.

    Papers: Frankle, Carbin: The Lottery Ticket Hypothesis (ICLR 2019); for rewinding Frankle, Dziugaite, Roy, Carbin:
    Linear Mode Connectivity and the Lottery Ticket Hypothesis (ICML 2020).

    Args:
        pruner: as for every :class:`tersor.pruning.schedule.ScheduledPruner`; its targets have a ``sparse_ratio``.
        interval_steps: see there.
        total_times: T.
        evaluator: see there.
        reset_weight: whether the weights go back; without, this is iterative pruning.
        rewind_steps: how far into the first training the weights go back to; each round then trains for what was left
            of it, with the optimizers and schedulers as they were there.
        log_dir: see there.
        best: see there.

    Raises:
        ConflictError: a target has a threshold in place of a ratio, or the first pruning comes before the beginning.
        InvalidValueError: a number of steps that is negative.

    Attributes:
        origin: what the weights go back to, with the state of the optimizers; None before it is known.
    """

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int | None = None,
        total_times: int = 10,
        evaluator: Evaluator | None = None,
        reset_weight: bool = True,
        *,
        rewind_steps: int = 0,
        log_dir: str | os.PathLike[str] | None = None,
        best: Best = "latest",
    ) -> None:
        if not isinstance(rewind_steps, int) or isinstance(rewind_steps, bool) or rewind_steps < 0:
            raise InvalidValueError(f"{rewind_steps!r} is no number of steps.", where="rewind_steps")
        for target in pruner.plan.targets:
            if target.decides and getattr(target.config.spec, "sparse_threshold", None) is not None:
                raise ConflictError(
                    "a ticket is found by shares of what is left, and a threshold says no share",
                    where=f"{target.config.where} on {target.name}",
                    remedy="Give a sparse_ratio.",
                )
        if interval_steps is not None and rewind_steps > interval_steps:
            raise ConflictError(
                f"the weights cannot go back to step {rewind_steps} at the first pruning, after {interval_steps} steps",
                where="rewind_steps",
                remedy="Make it no longer than the interval.",
            )
        super().__init__(pruner, interval_steps, total_times, evaluator, log_dir=log_dir, best=best)
        self.reset_weight, self.rewind_steps = reset_weight, rewind_steps
        self.origin: Snapshot | None = None
        self._all_steps = self._whole_steps = 0

    def ratio_at(self, ratio: float, times: int) -> float:
        """The same share of what is left each time."""
        return 1 - (1 - ratio) ** (times / self.total_times)

    def on_start(self) -> None:
        """Remember the beginning."""
        super().on_start()
        self._all_steps = self._whole_steps = 0
        if self.rewind_steps == 0:
            self._remember()

    def on_gradients(self) -> None:
        """Before the step behind the beginning: schedulers have by now made theirs."""
        if self.origin is not None and self._all_steps == self.rewind_steps > 0:
            self.origin.note_training()
        super().on_gradients()

    def on_step(self) -> None:
        """Remember the beginning where it lies within the training."""
        self._all_steps += 1
        if self.origin is None and self._all_steps == self.rewind_steps:
            self._remember()
        super().on_step()

    def on_train(self, max_steps: int | None, max_epochs: int | None) -> bool:
        """Refuse what is no training; then as every schedule."""
        if self._trainer is None or (max_steps is None and max_epochs is None):
            raise TrainingError(
                "a ticket is what training finds, and there is no evaluator or no length of training",
                where="compress",
                remedy="Give an evaluator, and call compress(max_steps=...) or compress(max_epochs=...).",
            )
        return super().on_train(max_steps, max_epochs)

    def before_rounds(self, max_steps: int | None, max_epochs: int | None) -> None:
        """Train the whole network."""
        evaluator = self._trainer
        assert evaluator is not None
        evaluator.train(self.model, self, max_steps=max_steps, max_epochs=max_epochs)
        if self.origin is None or self._all_steps == self.rewind_steps > 0:
            raise TrainingError(
                f"the first training ended after {self._all_steps} steps",
                where="rewind_steps",
                legal=(f"0 to {self._all_steps - 1}",),
            )
        self._whole_steps = self._all_steps

    def length_of_round(self, max_steps: int | None, max_epochs: int | None) -> tuple[int | None, int | None]:
        """What was left of the first training where the weights go back to."""
        if not (self.reset_weight and self.rewind_steps):
            return max_steps, max_epochs
        return self._whole_steps - self.rewind_steps, max_epochs

    def after_pruning(self) -> None:
        """Go back."""
        if self.reset_weight:
            assert self.origin is not None
            self.origin.restore()

    def own_state(self) -> dict[str, Any]:
        """Where the schedule stands, and the beginning."""
        origin = None if self.origin is None else self.origin.state_dict()
        return {**super().own_state(), "origin": origin, "steps_so_far": (self._all_steps, self._whole_steps)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_own_state(state)
        self._all_steps, self._whole_steps = state["steps_so_far"]
        if state["origin"] is not None:
            self._remember()
            assert self.origin is not None
            self.origin.load_state_dict(state["origin"])

    def _remember(self) -> None:
        self.origin = Snapshot(self.model, self._trainer, simulation=False)
