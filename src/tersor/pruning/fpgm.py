"""Geometric median pruning: the filters that the others can replace leave."""

from __future__ import annotations

from typing import final

from torch import Tensor

from tersor.pruning.base import Pruner
from tersor.pruning.scores import geometric_median_distance
from tersor.targets.granularity import Blocks


@final
class FPGMPruner(Pruner):
    r"""Removes the blocks (by default output channels) nearest to the geometric median of their layer.

    :math:`s_j = \sum_k \lVert w_j - w_k \rVert_2`: a filter in the middle of all others carries what they carry.
    Unlike a norm it does not take small for unimportant; prefer it where the norms of a layer hardly differ. Scores of
    different layers are not comparable, so it suits per-layer ratios better than global groups.

    Paper: He, Liu, Wang, Hu, Yang: Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration (CVPR 2019).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio``; the work grows with the square of a target's blocks.
        evaluator: only needed when ``compress`` is to fine-tune.
        example_inputs: see :class:`tersor.compressor.Compressor`.
    """

    works_on_shards = True

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """Sum of L2 distances to all other blocks."""
        return geometric_median_distance(values, blocks)
