"""Rounds of a recipe's schedule: what tells of them, what makes models small between them, and whose they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tersor.graph.coupling import Masks
from tersor.pruning.rounds import Best, Round
from tersor.speedup import ModelSpeedup, SpeedupReport
from tersor.training import Evaluator, TrainingResult
from tersor.training.evaluator import TrainingHooks

ROUNDS_FILE = "rounds.pt"


class Narrated(Evaluator):
    """An evaluator that says when a round is over, which is when it was asked to evaluate.

    Args:
        evaluator: does the work.
        on_round: called with each metric.
    """

    def __init__(self, evaluator: Evaluator, on_round: Callable[[float | None], None]) -> None:
        self._evaluator = evaluator
        self._on_round = on_round

    def train(
        self,
        model: nn.Module,
        hooks: TrainingHooks | None = None,
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> TrainingResult:
        """The evaluator's."""
        return self._evaluator.train(model, hooks, max_steps=max_steps, max_epochs=max_epochs)

    def evaluate(self, model: nn.Module) -> float | None:
        """The evaluator's, and said."""
        metric = self._evaluator.evaluate(model)
        self._on_round(metric)
        return metric

    def state_dict(self) -> dict[str, Any]:
        """The evaluator's."""
        return self._evaluator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The evaluator's."""
        self._evaluator.load_state_dict(state)

    @property
    def dummy_input(self) -> Any:
        """The evaluator's."""
        return self._evaluator.dummy_input


@dataclass
class Speedups:
    """Makes models small, and keeps what each time came to.

    Attributes:
        reports: one for each time.
    """

    reports: list[SpeedupReport] = field(default_factory=list)

    def __call__(self, model: nn.Module, dummy_input: Any, masks: Masks, /) -> _Speedup:
        """Prepare it."""
        return _Speedup(ModelSpeedup(model, dummy_input, masks), self.reports)


@dataclass
class _Speedup:
    speedup: ModelSpeedup
    reports: list[SpeedupReport]

    def speedup_model(self) -> nn.Module:
        small = self.speedup.speedup_model()
        assert self.speedup.report is not None
        self.reports.append(self.speedup.report)
        return small


def kept_round(rounds: Sequence[Round], best: Best) -> Round:
    """The round whose model is kept: of equal ones the later, which is the sparser.

    >>> rounds = [Round(1, 0.9, 0.25), Round(2, 0.9, 0.5), Round(3, 0.8, 0.6)]
    >>> [kept_round(rounds, best).number for best in ("latest", "maximize", "minimize")]
    [3, 2, 3]
    """
    if best == "latest":
        return rounds[-1]
    sign = 1 if best == "maximize" else -1
    return max(rounds, key=lambda of: (-math.inf if of.metric is None else sign * of.metric, of.number))
