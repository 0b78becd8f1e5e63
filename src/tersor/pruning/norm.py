"""Norm pruning: the output channels with the smallest filters leave."""

from __future__ import annotations

from typing import final

from torch import Tensor

from tersor.pruning.base import Pruner
from tersor.pruning.scores import block_norm
from tersor.targets.granularity import Blocks


@final
class L1NormPruner(Pruner):
    r"""Removes the blocks (by default output channels) of least L1 norm, :math:`s_j = \sum_{i \in j} |w_i|`.

    The usual first choice for structured pruning: needs no data, costs nothing, and is hard to beat after fine-tuning.
    Give ``example_inputs`` so that what depends on a channel leaves with it, and set dependency groups
    (:func:`tersor.auto_set_dependency_group_ids`) where layers are added.

    Paper: Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets (ICLR 2017).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio`` (or ``sparse_threshold``, on the norm).
        evaluator: only needed when ``compress`` is to fine-tune.
        example_inputs: see :class:`tersor.compressor.Compressor`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 3))
        >>> config_list = [{"op_names": ["0"], "sparse_ratio": 0.5}]
        >>> pruner = L1NormPruner(net, config_list, example_inputs=torch.zeros(1, 1, 8, 8))
        >>> _, masks = pruner.compress()
        >>> [(name, tuple(masks[name]["weight"].shape), int(masks[name]["weight"].sum())) for name in masks]
        [('0', (8, 1, 3, 3), 36)]
    """

    works_on_shards = True

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """L1 norm of each block."""
        return block_norm(values, blocks, p=1)


@final
class L2NormPruner(Pruner):
    r"""Removes the blocks (by default output channels) of least L2 norm, :math:`s_j = (\sum_{i \in j} w_i^2)^{1/2}`.

    Like :class:`L1NormPruner`; large single weights count for more.

    Paper: as for L1; the norms are compared in Molchanov, Tyree, Karras, Aila, Kautz: Pruning Convolutional Neural
    Networks for Resource Efficient Inference (ICLR 2017).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio`` (or ``sparse_threshold``, on the norm).
        evaluator: only needed when ``compress`` is to fine-tune.
        example_inputs: see :class:`tersor.compressor.Compressor`.
    """

    works_on_shards = True

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """L2 norm of each block."""
        return block_norm(values, blocks, p=2)
