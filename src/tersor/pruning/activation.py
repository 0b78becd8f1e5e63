"""Activation pruning: the channels that are most often silent, or least active, leave."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import InvalidValueError
from tersor.pruning.learning import LearningPruner
from tersor.targets.channels import activation_channel_dim, channel_dims
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.ranks import sum_over_processes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu6": F.relu6, "gelu": F.gelu}


class ActivationRankPruner(LearningPruner):
    """Base of what ranks channels by the mean of a statistic of their activations over some steps.

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio``: weights of linear layers and convolutions, ranked by the outputs of
            their modules, or inputs and outputs, ranked by themselves.
        evaluator: how the model is trained; without one see :class:`tersor.pruning.learning.LearningPruner`.
        training_steps: over how many steps the activations are watched; everything is put back after them.
        activation: what a module's output goes through before it counts: ``relu``, ``relu6``, ``gelu``, or a function.
            Where a batch norm stands between the two, make the output of the activation the target.
        restores: whether all is put back after these steps.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        InvalidValueError: an unknown activation, or a target of a module whose channels are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 100,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        *,
        restores: bool | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        function = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
        if not callable(function):
            legal = (*map(repr, ACTIVATIONS), "a function")
            raise InvalidValueError(f"{activation!r} is unknown.", where="activation", legal=legal)
        self._activation = function
        self._counts: dict[str, int] = {}
        super().__init__(
            model,
            config_list,
            evaluator,
            training_steps,
            restores=restores,
            example_inputs=example_inputs,
            previous=previous,
        )

    @abstractmethod
    def statistic(self, activations: Tensor) -> Tensor:
        """The importance of single activations, of the same shape."""

    def _wrap_targets(self) -> None:
        for target in self._scored():
            name = target.config.target_name
            if not is_activation(name) and (
                name != "weight" or activation_channel_dim(target.config.module, 4) is None
            ):
                raise InvalidValueError(
                    f"the channels of a {type(target.config.module).__name__}'s output are not known",
                    where=target.name,
                    remedy="Make its output the target: target_names: ['_output_0'].",
                )
        super()._wrap_targets()

    def begin(self) -> None:
        """Look at the activations."""
        self._counts = {}
        for target in self._scored():
            name = target.config.target_name if is_activation(target.config.target_name) else "_output_0"
            self.look_at(target, name, partial(self._look, target))

    def observe(self) -> None:
        """Nothing: the forward passes have been seen."""

    def collect(self) -> dict[str, Tensor]:
        """The mean statistic, over all samples of all processes, in a shape that broadcasts to the target's.

        Raises:
            TrainingError: a module was not called.
        """
        return {target.name: self._mean(target) for target in self._scored()}

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The mean of each block."""
        return blocks.tiles(values.expand(blocks.shape).contiguous()).mean(blocks.inside)

    def own_state(self) -> dict[str, Any]:
        """The masks, the progress, the sums and over how many values they are."""
        return {**super().own_state(), "counts": self._counts}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from the sums."""
        super().load_own_state(state)
        self._counts = dict(state["counts"])

    @torch.no_grad()
    def _look(self, target: PlannedTarget, value: Tensor) -> None:
        importance = self.statistic(self._activation(value.detach())).float()
        if is_activation(target.config.target_name):
            assert target.blocks is not None
            total = importance.sum(target.blocks.undivided, keepdim=True)
        else:
            dim = activation_channel_dim(target.config.module, value.dim())
            total = importance.sum([other for other in range(value.dim()) if other != dim])
        self.add(target, total)
        self._counts[target.name] = self._counts.get(target.name, 0) + value.numel() // total.numel()

    def _mean(self, target: PlannedTarget) -> Tensor:
        remedy = "Leave it out of the config list, or let the training reach it."
        total = self.sum_of(target, missing="nothing passed its module", remedy=remedy)
        count = sum_over_processes(torch.tensor(float(self._counts[target.name]), device=total.device))
        mean = sum_over_processes(total) / count
        if is_activation(target.config.target_name):
            return mean
        rank = self._latent(target).dim()
        out_dim, _ = channel_dims(target.config.module, "weight", rank)
        return mean.reshape([-1 if dim == out_dim else 1 for dim in range(rank)])


@final
class ActivationAPoZRankPruner(ActivationRankPruner):
    r"""Removes the channels whose activations are most often zero.

    The Average Percentage of Zeros of channel c is the share of zeros among its activations over all samples and
    positions, :math:`\mathrm{APoZ}_c = \mathrm{mean}(1[a_c = 0])`; the importance is :math:`1 - \mathrm{APoZ}_c`. It
    means something behind a ReLU; behind a GELU nothing is ever zero, use :class:`ActivationMeanRankPruner` there.

    Paper: Hu, Peng, Tai, Tang: Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
    Architectures (2016).

    Args: those of :class:`ActivationRankPruner`.
    """

    def statistic(self, activations: Tensor) -> Tensor:
        """1 where something passes."""
        return activations != 0


@final
class ActivationMeanRankPruner(ActivationRankPruner):
    r"""Removes the channels of least mean activation, :math:`s_c = \mathrm{mean}(a_c)`.

    Paper: Molchanov, Tyree, Karras, Aila, Kautz: Pruning Convolutional Neural Networks for Resource Efficient Inference
    (ICLR 2017), section 2.2.

    Args: those of :class:`ActivationRankPruner`.
    """

    def statistic(self, activations: Tensor) -> Tensor:
        """The activation itself."""
        return activations
