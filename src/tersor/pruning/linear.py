"""Linear schedule: the same share more each time."""

from __future__ import annotations

from typing import final

from tersor.pruning.schedule import ScheduledPruner


@final
class LinearPruner(ScheduledPruner):
    r"""Raises every ratio and threshold evenly: after the t-th of T prunings :math:`s_t = s_f \frac{t}{T}` is removed.

    Args: those of :class:`tersor.pruning.schedule.ScheduledPruner`.

    Example:
        >>> import torch
        >>> from tersor.pruning import L1NormPruner
        >>> pruner = L1NormPruner(torch.nn.Linear(4, 8), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
        >>> _, masks = LinearPruner(pruner, total_times=2).compress()
        >>> int(masks[""]["bias"].sum())
        4
    """

    works_on_shards = True

    def ratio_at(self, ratio: float, times: int) -> float:
        """Proportional to the number of prunings."""
        return ratio * times / self.total_times
