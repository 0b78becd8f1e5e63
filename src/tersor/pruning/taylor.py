"""Taylor pruning: what the loss would miss least leaves."""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor

from tersor.config.values import is_activation
from tersor.pruning.learning import LearningPruner
from tersor.pruning.scores import block_norm
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training.ranks import mean_over_processes
from tersor.wrapping import whole


@final
class TaylorPruner(LearningPruner):
    r"""Removes the blocks (by default output channels) whose removal changes the loss least, to first order.

    Setting a parameter to zero changes the loss by :math:`g_i w_i`, its gradient times itself, to first order; the
    importance of a block is :math:`s_j = \sum_{i \in j} (g_i w_i)^2`, averaged over ``training_steps`` steps. It knows
    what the data say, where a norm does not, and takes little more than those steps. Scores of all layers are
    comparable, so it suits global groups. On an input or output, :math:`w` is the value and the mean runs over the
    samples too.

    The steps really train; the weights, the running statistics and the optimizers are put back after them unless
    ``restores`` is False.

    Paper: Molchanov, Mallya, Tyree, Frosio, Kautz: Importance Estimation for Neural Network Pruning (CVPR 2019), the
    method of first order without gates, individual contributions summed.

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio`` (or ``sparse_threshold``, on the importance).
        evaluator: how the model is trained; without one see :class:`tersor.pruning.learning.LearningPruner`.
        training_steps: over how many steps the importance is averaged.
        restores: whether all is put back after these steps.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Example:
        >>> import torch
        >>> from tersor import TorchEvaluator
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> evaluator = TorchEvaluator.from_loader(
        ...     [(torch.randn(8, 2), torch.randn(8, 4))] * 5,
        ...     torch.nn.functional.mse_loss,
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ... )
        >>> pruner = TaylorPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], evaluator, training_steps=5)
        >>> int(pruner.compress()[1]["0"]["bias"].sum())
        4
    """

    works_on_shards = True

    def begin(self) -> None:
        """Look at the gradients of inputs and outputs."""
        for target in self._scored():
            if is_activation(target.config.target_name):
                self.look_at(target, target.config.target_name, partial(self._look, target))

    def observe(self) -> None:
        """Add what this step's gradients say of the parameters."""
        for target in self._scored():
            if not is_activation(target.config.target_name):
                latent = self.wrappers[target.config.module_name].tensor(target.config.target_name)
                if latent.grad is not None:
                    self.add(target, squared_change(whole(latent), whole(latent.grad)))

    def collect(self) -> dict[str, Tensor]:
        """The mean of the squared products, over the steps and over all processes.

        Raises:
            TrainingError: no gradient reached a target.
        """
        return {target.name: self._mean(target) for target in self._scored()}

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """Sum of the squared products."""
        return block_norm(values, blocks, p=1)

    def _look(self, target: PlannedTarget, value: Tensor) -> None:
        if value.requires_grad:
            assert target.blocks is not None
            kept, dims = value.detach(), target.blocks.undivided  # samples, and what differs in length by batch
            value.register_hook(lambda grad: self.add(target, squared_change(kept, grad).sum(dims, keepdim=True)))

    def _mean(self, target: PlannedTarget) -> Tensor:
        remedy = "Is it frozen (requires_grad=False), or its module not called? Leave it out, or let it train."
        return mean_over_processes(self.sum_of(target, missing="no gradient reached it", remedy=remedy) / self._watched)


@torch.no_grad()
def squared_change(value: Tensor, grad: Tensor) -> Tensor:
    """What the loss changes by, to first order, when each element becomes zero; squared.

    >>> squared_change(torch.tensor([3.0, -1.0]), torch.tensor([1.0, 0.5]))
    tensor([9.0000, 0.2500])
    """
    return (value.float() * grad.float()).square()  # in half precision the products would vanish
