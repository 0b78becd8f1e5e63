"""FixedPruner: masks that were made elsewhere, and stay."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.graph.coupling import Masks
from tersor.pruning.base import Pruner
from tersor.pruning.decision import RatioNow, as_asked
from tersor.targets.granularity import Blocks
from tersor.training import Evaluator
from tersor.wrapping.stack import as_bool, compact


@final
class FixedPruner(Pruner):
    """Keeps masks from elsewhere while a model is trained: nothing is scored, nothing comes back.

    For a model that was pruned before, by another run or another library, and is trained on, quantized or distilled.

    Args:
        model: the model; it is wrapped in place.
        masks: ``{module: {target: mask}}``, of each target's shape or broadcasting to it; True or 1 keeps.
        evaluator: how the model is trained; not needed for a loop of your own.
        example_inputs: see :class:`tersor.compressor.Compressor`; with them what follows from the masks is masked too.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        MaskError: the masks belong to another model, or hold other values than 0 and 1.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> pruner = FixedPruner(layer, {"": {"weight": torch.tensor([[1, 0], [1, 1]])}})
        >>> _ = pruner.compress()
        >>> layer.weight[0, 1].item() == 0
        True
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        evaluator: Evaluator | None = None,
        *,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self._given = {
            module: {target: compact(as_bool(mask, f"{module}.{target}")).clone() for target, mask in targets.items()}
            for module, targets in masks.items()
            if targets
        }
        config_list = [
            {"op_names": [module], "target_names": list(targets), "sparse_ratio": 0.0}
            for module, targets in self._given.items()
        ]
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)
        self.update_masks(self._given)

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """All alike: it is never asked."""
        return torch.zeros(blocks.grid)

    def on_start(self) -> None:
        """The masks are there."""

    def prune(self, ratio_now: RatioNow = as_asked) -> None:
        """The masks are there."""
