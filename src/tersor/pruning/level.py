"""Magnitude pruning: the smallest weights leave."""

from __future__ import annotations

from typing import final

from torch import Tensor

from tersor.pruning.base import Pruner
from tersor.pruning.scores import block_norm
from tersor.targets.granularity import Blocks
from tersor.targets.planned import ELEMENTS


@final
class LevelPruner(Pruner):
    r"""Removes the elements of least magnitude, :math:`s_i = |w_i|`.

    Fine-grained by default: masked weights are zero, the layer keeps its shape, so the model gets sparse and not
    smaller. Use it as the baseline of unstructured sparsity, or for hardware with sparse kernels; for a smaller and
    faster model prune channels (:class:`L1NormPruner`). With a block ``granularity`` a block's score is the sum of its
    magnitudes.

    Paper: Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks (NeurIPS 2015).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio`` (or ``sparse_threshold``).
        evaluator: only needed when ``compress`` is to fine-tune.
        example_inputs: see :class:`tersor.compressor.Compressor`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 5)
        >>> _, masks = LevelPruner(layer, [{"op_types": ["Linear"], "sparse_ratio": 0.75}]).compress()
        >>> masks[""]["weight"].sum().item()
        5
    """

    works_on_shards = True
    default_granularity = ELEMENTS

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """Sum of magnitudes."""
        return block_norm(values, blocks, p=1)
