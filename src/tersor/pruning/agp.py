"""Automated gradual pruning: much at first, ever less towards the end."""

from __future__ import annotations

import os
from typing import final

from tersor.errors import InvalidValueError
from tersor.pruning.base import Pruner
from tersor.pruning.rounds import Best, MakeSmall
from tersor.pruning.schedule import ScheduledPruner
from tersor.training import Evaluator


@final
class AGPPruner(ScheduledPruner):
    r"""Raises every ratio and threshold on a cubic curve, from ``initial_ratio`` on.

    After the t-th of T prunings :math:`s_t = s_f + (s_i - s_f) \left(1 - \frac{t}{T}\right)^3` is removed: fast while
    much is redundant, slowly where each weight counts.

    Paper: Zhu, Gupta: To Prune, or Not to Prune: Exploring the Efficacy of Pruning for Model Compression (2017).

    Args:
        pruner: as for every :class:`tersor.pruning.schedule.ScheduledPruner`, like all that is not said here.
        interval_steps: see there.
        total_times: T.
        evaluator: see there.
        initial_ratio: :math:`s_i`; a target whose own ratio is lower stays at that.
        speedup: see there.
        log_dir: see there.
        best: see there.

    Raises:
        InvalidValueError: the initial ratio is not in [0, 1].

    Example:
        >>> import torch
        >>> from tersor.pruning import LevelPruner
        >>> pruner = LevelPruner(torch.nn.Linear(10, 100), [{"op_types": ["Linear"], "sparse_ratio": 0.8}])
        >>> schedule = AGPPruner(pruner, total_times=4)
        >>> [round(schedule.ratio_at(0.8, times), 4) for times in (1, 2, 3, 4)]
        [0.4625, 0.7, 0.7875, 0.8]
    """

    works_on_shards = True

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int | None = None,
        total_times: int = 10,
        evaluator: Evaluator | None = None,
        initial_ratio: float = 0.0,
        *,
        speedup: MakeSmall | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        best: Best = "latest",
    ) -> None:
        if not 0 <= initial_ratio <= 1:
            raise InvalidValueError(f"{initial_ratio!r} is no ratio.", where="initial_ratio", legal=("0 to 1",))
        self.initial_ratio = initial_ratio
        super().__init__(pruner, interval_steps, total_times, evaluator, speedup=speedup, log_dir=log_dir, best=best)

    def ratio_at(self, ratio: float, times: int) -> float:
        """On the cubic curve."""
        initial = min(self.initial_ratio, ratio)
        return ratio + (initial - ratio) * (1 - times / self.total_times) ** 3
