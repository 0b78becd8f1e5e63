"""Taylor pruning: what the loss would miss least leaves."""

from __future__ import annotations

from typing import Any, final

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tersor.config.values import is_activation
from tersor.errors import TrainingError
from tersor.pruning.learning import LearningPruner
from tersor.pruning.scores import block_norm
from tersor.targets.activations import watch_activation
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training.ranks import mean_over_processes


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

    _handles: tuple[RemovableHandle, ...] = ()

    def begin(self) -> None:
        """Forget the sums, and look at the gradients of inputs and outputs."""
        self._sums: dict[str, Tensor] = {}
        self._samples = 0
        self._handles = tuple(
            watch_activation(target.config.module, target.config.target_name, self._looking_at(target))
            for target in self._scored()
            if is_activation(target.config.target_name)
        )

    def observe(self) -> None:
        """Add what this step's gradients say of the parameters."""
        for target in self._scored():
            if not is_activation(target.config.target_name):
                latent = self.wrappers[target.config.module_name].tensor(target.config.target_name)
                if latent.grad is not None:
                    self._add(target, (latent.detach() * latent.grad).float().square())

    def end(self) -> None:
        """Look away."""
        for handle in self._handles:
            handle.remove()

    def collect(self) -> dict[str, Tensor]:
        """The mean of the squared products, over the steps and over all processes.

        Raises:
            TrainingError: no gradient reached a target.
        """
        return {target.name: self._mean(target) for target in self._scored()}

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """Sum of the squared products."""
        return block_norm(values, blocks, p=1)

    def own_state(self) -> dict[str, Any]:
        """The masks, the progress and the sums."""
        return {**super().own_state(), "sums": getattr(self, "_sums", {})}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from the sums."""
        super().load_own_state(state)
        self._sums = dict(state["sums"])

    def _looking_at(self, target: PlannedTarget) -> Any:
        assert target.blocks is not None
        dims = target.blocks.undivided  # samples, and what may have another length in each batch

        def look(value: Any) -> Any:
            if isinstance(value, Tensor) and value.requires_grad:
                kept = value.detach()
                value.register_hook(lambda grad: self._add(target, (kept * grad).float().square().sum(dims, True)))
            return value

        return look

    def _add(self, target: PlannedTarget, squares: Tensor) -> None:
        known = self._sums.get(target.name)
        self._sums[target.name] = squares if known is None else known + squares

    def _mean(self, target: PlannedTarget) -> Tensor:
        total = self._sums.get(target.name)
        if total is None:
            raise TrainingError(
                "no gradient reached it in the watched steps",
                where=target.name,
                remedy="Is it frozen (requires_grad=False), or its module not called? Leave it out, or let it train.",
            )
        return mean_over_processes(total / self.watched_steps)
