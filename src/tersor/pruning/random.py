"""Random pruning: the baseline that every criterion has to beat."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.pruning.base import Pruner
from tersor.targets.granularity import Blocks
from tersor.training import Evaluator


@final
class RandomPruner(Pruner):
    """Removes blocks (by default output channels) drawn at random, each with the same chance.

    After enough fine-tuning it comes close to many criteria, so no figure of another pruner says much without its row:
    Liu, Sun, Zhou, Huang, Darrell: Rethinking the Value of Network Pruning (ICLR 2019).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio``.
        evaluator: only needed when ``compress`` is to fine-tune.
        seed: of the draw; the same seed gives the same masks, and more of the same blocks at a higher ratio.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Example:
        >>> layer = torch.nn.Linear(4, 8)
        >>> _, masks = RandomPruner(layer, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], seed=1).compress()
        >>> int(masks[""]["bias"].sum())
        4
    """

    works_on_shards = True

    def __init__(
        self,
        model: torch.nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        seed: int = 0,
        *,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self.seed = seed
        self._generator = torch.Generator()
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def importance(self) -> dict[str, Tensor]:
        """Uniform scores, drawn anew from the seed for all targets in their order."""
        self._generator.manual_seed(self.seed)
        return dict(super().importance())

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(blocks.grid, generator=self._generator).to(values.device)
