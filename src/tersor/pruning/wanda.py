"""Wanda: a weight is worth its magnitude times the norm of what it multiplies."""

from __future__ import annotations

from typing import final

from torch import Tensor

from tersor.config import Granularity
from tersor.pruning.calibrated import CalibratedPruner
from tersor.pruning.decision import RatioNow, decide
from tersor.pruning.scores import block_norm
from tersor.targets.choices import choices
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training.layer_inputs import FeatureNorms, from_rows, weight_rows
from tersor.training.ranks import sum_over_processes


@final
class WandaPruner(CalibratedPruner):
    r"""Removes the weights of least :math:`s_{ij} = |w_{ij}| \cdot \lVert X_j \rVert_2`, in each row by itself.

    :math:`X_j` is the j-th feature of the layer's input over all calibration tokens. A small weight on a loud feature
    counts for as much as a large one on a quiet one, which magnitudes do not see; large language models have such
    features. It costs one pass over the calibration data and changes no weight that stays. Each output row loses the
    same share, unless ``balance_granularity`` or ``sparse_pattern`` says otherwise.

    Paper: Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models (ICLR 2024).

    Args: those of :class:`tersor.pruning.calibrated.CalibratedPruner`.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> config_list = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
        >>> pruner = WandaPruner(layer, config_list, calibration=[torch.tensor([[1.0, 9.0]])])
        >>> pruner.compress()[1][""]["weight"]
        tensor([[False,  True]])
    """

    default_balance = Granularity(block=(1,), pad="back", fill=-1)

    def statistics(self, groups: int, columns: int) -> FeatureNorms:
        """The norm of each feature."""
        return FeatureNorms.zeros(groups, columns)

    def choose(self, target: PlannedTarget, seen: FeatureNorms, ratio_now: RatioNow) -> Tensor:
        """The highest scores of each row."""
        assert target.blocks is not None
        module, weight = target.config.module, self._latent(target)
        norms = FeatureNorms(sum_over_processes(seen.squares)).norms
        rows = weight_rows(module, weight).float().abs() * norms.to(weight.device).unsqueeze(1)
        scores = self.score(from_rows(module, rows).contiguous(), target.blocks)
        return decide(choices([target]), {target.name: scores}, ratio_now)[target.name]

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """Sum of each block."""
        return block_norm(values, blocks, p=1)
