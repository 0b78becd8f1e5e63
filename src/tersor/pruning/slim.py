"""Network slimming: learned factors, drawn to zero by their magnitude, say which blocks are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.compressor import Compressor
from tersor.config import values
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import ConflictError, TrainingError
from tersor.pruning.learning import LearningPruner
from tersor.targets.channels import is_norm_scale
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.learned import Learned, Learner, put_on
from tersor.wrapping import Stage, TargetStack, Transform


@final
class SlimPruner(LearningPruner):
    r"""Removes the blocks (by default output channels) whose learned factor is least in magnitude.

    For the first ``training_steps`` steps each block of a target is multiplied by a factor :math:`f_j`, which starts at
    1 and is learned together with the weights, while the loss draws factors to zero:

    .. math:: L + \lambda \frac{1}{N} \sum_{j=1}^{N} |f_j|, \qquad W'_j = f_j W_j, \qquad s_j = |f_j|

    over the :math:`N` factors of all targets. Then blocks are pruned, and factors stay as they are; ``unwrap_model()``
    multiplies them into the weights, so that the model computes what it did. The scale of a norm (the ``weight`` of a
    ``BatchNorm2d``) is such a factor already: it is penalised and scored itself, and your own optimizer trains it. That
    is network slimming as it was published; with ``example_inputs`` the channels leave the convolutions around it too.

    Use it where there is time to train and layers matter unequally: with a ``global_group_id`` factors of all layers
    compete, as in the paper. Where a batch norm follows a convolution, choose the norm: it divides out any factor on
    the convolution, so that nothing but the penalty would be learned there.

    Each factor is penalised alike, as in the paper, whose weight of 1e-4 is a ``regular_scale`` of 1 for 10,000
    factors. NNI's penalty, the mean over targets of the sums of their factors, is as strong as this one with a
    ``regular_scale`` of N / (number of targets).

    Paper: Liu, Li, Shen, Huang, Yan, Zhang: Learning Efficient Convolutional Networks through Network Slimming (ICCV
    2017). Factors for blocks of any parameter are NNI's.

    Args:
        model: the model; it is wrapped in place.
        config_list: parameters with ``sparse_ratio`` (or ``sparse_threshold``, on the magnitude of the factor).
        evaluator: how the model is trained; without one, see :class:`tersor.pruning.learning.LearningPruner`.
        training_steps: how many optimizer steps the factors are learned for.
        regular_scale: :math:`\lambda`, how hard factors are drawn to zero.
        learning_rate: of the factors' own Adam.
        restores: whether weights and optimizers are put back after these steps; by default they are kept.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: an input or output is to be decided on, or a tensor that cannot take up its factors.
        InvalidValueError: a number out of its range.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> pruner = SlimPruner(layer, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], training_steps=20)
        >>> optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.01), torch.randn(16, 4)
        >>> pruner.start()
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     pruner.loss(-layer(x)[:, :4].square().sum()).backward()
        ...     pruner.before_step()
        ...     optimizer.step()
        ...     pruner.step()
        >>> pruner.get_masks()[""]["bias"].tolist()  # the loss has no use for the last four
        [True, True, True, True, False, False, False, False]
    """

    restores_by_default = False

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 100,
        regular_scale: float = 1.0,
        *,
        learning_rate: float = 1e-2,
        restores: bool | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("regular_scale"):
            self.regular_scale = values.number(regular_scale, "weight of a penalty", low=0)
        with values.at("learning_rate"):
            self.learning_rate = values.number(learning_rate, "learning rate", low=0)
        self._seen: dict[str, Tensor] = {}
        super().__init__(
            model,
            config_list,
            evaluator,
            training_steps,
            restores=restores,
            example_inputs=example_inputs,
            previous=previous,
        )

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """Add the penalty, while factors are learned."""
        if not self.collecting:
            return loss
        return loss + self.regular_scale * penalty(list(self._factors().values())).to(loss)

    def begin(self) -> None:
        """Learn, from the factors as they are.

        Raises:
            TrainingError: the scale of a norm takes no gradients.
        """
        self._seen = {}
        self._learner.start()
        for name, factor in self._factors().items():
            if not factor.requires_grad:
                raise TrainingError(
                    "it is a factor itself, and it is not trained",
                    where=name,
                    remedy="Set requires_grad, and give it to your optimizer.",
                )

    def observe(self) -> None:
        """A step of the factors' Adam."""
        self._learner.step()

    def on_stop(self) -> None:
        """Keep the factors and learn no more."""
        was_learning = self.collecting
        super().on_stop()
        if was_learning:
            self._learner.stop()
            self._seen = {name: factor.detach().clone() for name, factor in self._factors().items()}

    def collect(self) -> dict[str, Tensor]:
        """The factors as they were after the last step."""
        return self._seen

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The magnitude of each factor; ``values`` are the factors, one a block."""
        return values.abs().view(blocks.grid)

    def own_state(self) -> dict[str, Any]:
        """The masks, the factors and how far their learning has come."""
        return {**super().own_state(), "learner": self._learner.state(), "seen": dict(self._seen)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`own_state` was asked."""
        super().load_own_state(state)
        self._learner.load_state(state["learner"])
        self._seen = dict(state["seen"])

    def _wrap_targets(self) -> None:
        factors: dict[str, Factor] = {}
        for target in self._scored():
            assert target.blocks is not None
            _refuse_unfoldable(target)
            if not is_norm_scale(target.config.module, target.config.target_name) or target.blocks.block_numel > 1:
                factors[target.name] = Factor(target.blocks, self._latent(target))
        for target in self._scored():
            if target.name in factors:
                put_on(target, factors[target.name], self.wrappers)
        self._learner = Learner({name: own.factor for name, own in factors.items()}, self.learning_rate)
        super()._wrap_targets()

    def _factors(self) -> dict[str, Tensor]:
        """Of each target: what was put on it, or the norm's own scale."""
        learned = self._learner.learned
        return {
            target.name: learned[target.name].value
            if target.name in learned
            else self.wrappers[target.config.module_name].tensor(target.config.target_name)
            for target in self._scored()
        }


@final
class Factor(Transform):
    """Multiplies each block of its target by one learned number.

    Args:
        blocks: how the target is cut.
        latent: the target's tensor, whose device and type the factor takes; its type at least float32.
    """

    stage = Stage.SCALE

    def __init__(self, blocks: Blocks, latent: Tensor) -> None:
        super().__init__()
        self.blocks = blocks
        dtype = torch.promote_types(latent.dtype, torch.float32)
        self.factor = Learned(torch.ones(blocks.grid, dtype=dtype, device=latent.device))

    def forward(self, value: Tensor) -> Tensor:
        """The scaled value, same shape and dtype."""
        return value * self.blocks.expand_compact(self.factor.value).to(value)

    def fold(self, latent: Tensor) -> None:
        """Multiply the factor into the parameter and start again from 1: what is computed stays the same."""
        latent.copy_(self(latent))
        self.factor.value.fill_(1)


def penalty(factors: Sequence[Tensor]) -> Tensor:
    """The mean magnitude over all factors of all targets.

    >>> penalty([torch.tensor([1.0, -2.0]), torch.tensor([3.0])])
    tensor(2.)
    """
    sums = [factor.abs().sum().to(factors[0].device) for factor in factors]
    return torch.stack(sums).sum() / sum(factor.numel() for factor in factors)


def _refuse_unfoldable(target: PlannedTarget) -> None:
    module, name = target.config.module, target.config.target_name
    others = parametrize.is_parametrized(module, name) and any(
        not isinstance(item, TargetStack)
        for item in module.parametrizations[name]  # pyright: ignore
    )
    if is_activation(name) or others:
        raise ConflictError(
            "a factor on it can be folded into no parameter"
            + (", since another parametrization computes it" if others else ""),
            where=f"{target.config.where} on {target.name}",
            remedy="Remove that parametrization first." if others else "Prune the weight of this module instead.",
        )
