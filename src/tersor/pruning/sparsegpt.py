"""SparseGPT: remove weights one column after another, and let those that follow make up for them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import PruningSpec
from tersor.config.parse import ConfigList
from tersor.errors import ConflictError
from tersor.pruning.calibrated import CalibratedPruner
from tersor.pruning.decision import RatioNow
from tersor.pruning.scores import block_norm
from tersor.pruning.second_order import sparsegpt
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.layer_inputs import SecondMoment, from_rows, weight_rows
from tersor.training.ranks import sum_over_processes


@final
class SparseGPTPruner(CalibratedPruner):
    r"""Prunes each layer so that its output changes least, and adjusts the weights that stay.

    With H the second moment of a layer's inputs, removing :math:`w_{ij}` and adjusting the columns behind it costs
    :math:`w_{ij}^2 / [H^{-1}]_{jj}^2`, with the inverse taken over these columns. Columns are walked through in blocks;
    in each block the cheapest weights leave, and the rest of the row makes up for them. What is lost at 50 % is a
    fraction of what magnitudes or :class:`WandaPruner` lose, for a few seconds a layer. The weights really change:
    ``unwrap_model`` gives back the adjusted ones.

    Paper: Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (ICML 2023).

    Args:
        model: as for every :class:`tersor.pruning.calibrated.CalibratedPruner`, like all that is not said here.
        config_list: weights with a ``sparse_ratio`` (of the whole matrix) or a ``sparse_pattern``; nothing else says
            how they are shared out.
        evaluator: see there.
        calibration: see there; more tokens than a layer has input features.
        block_size: columns of a block.
        damping: share of the mean diagonal that is added to H.
        example_inputs: see there.
        previous: see there.

    Raises:
        ConflictError: a threshold, a granularity of more than single weights, or a balance other than a pattern.
        NumericalError: while pruning, if H cannot be inverted; it names the layer and the condition number.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        block_size: int = 128,
        damping: float = 0.01,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self.block_size, self.damping = block_size, damping
        super().__init__(
            model, config_list, evaluator, calibration=calibration, example_inputs=example_inputs, previous=previous
        )

    def statistics(self, groups: int, columns: int) -> SecondMoment:
        """The second moment of the inputs."""
        return SecondMoment.zeros(groups, columns)

    def choose(self, target: PlannedTarget, seen: SecondMoment, ratio_now: RatioNow) -> Tensor:
        """Walk through the columns, and write the adjusted weights."""
        spec, module, weight = target.config.spec, target.config.module, self._latent(target)
        assert isinstance(spec, PruningSpec)
        moment = SecondMoment(*map(sum_over_processes, seen.tensors())).matrix.to(weight.device)
        pattern, ratio = spec.sparse_pattern, None
        if pattern is None or ratio_now(pattern.ratio, target) != pattern.ratio:
            asked = [ratio_now(of, target) for of in (spec.ratio, spec.min_sparse_ratio) if of is not None]
            ratio, pattern = min(max(asked), 1.0 if spec.max_sparse_ratio is None else spec.max_sparse_ratio), None
        # A pattern runs along the input channels, which are the innermost columns then.
        inner = torch.arange(moment.shape[-1]).view(-1, math.prod(getattr(module, "kernel_size", (1,))))
        order = (inner.T if pattern is not None else inner).flatten().to(weight.device)
        keep, rows = sparsegpt(
            weight_rows(module, weight)[..., order],
            moment[..., order, :][..., order],
            ratio=ratio,
            keep_of=None if pattern is None else (pattern.keep, pattern.of),
            block_size=self.block_size,
            damping=self.damping,
            where=target.name,
        )
        back = order.argsort()
        weight.copy_(from_rows(module, rows[..., back]))
        return from_rows(module, keep[..., back]).reshape(-1)

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """Magnitude: only what stands in the place of the walk where a plain score is asked for."""
        return block_norm(values, blocks, p=1)

    def _wrap_targets(self) -> None:
        for target in self._scored():
            spec = target.config.spec
            assert isinstance(spec, PruningSpec)
            balanced = spec.balance_granularity or spec.internal_metric_block
            if spec.sparse_threshold is not None or balanced or (target.blocks and target.blocks.block_numel > 1):
                raise ConflictError(
                    "SparseGPT removes a share of single weights, or an N:M pattern",
                    where=f"{target.config.where} on {target.name}",
                    remedy="Give sparse_ratio or sparse_pattern, and nothing else.",
                )
        super()._wrap_targets()
