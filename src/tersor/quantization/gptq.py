"""GPTQ: round weights one column after another, and let those that follow make up for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import nn

from tersor.compressor import Compressor
from tersor.config import values
from tersor.config.parse import ConfigList
from tersor.quantization.layerwise import LayerwiseQuantizer, Rounding
from tersor.quantization.second_order import gptq
from tersor.training import Evaluator
from tersor.training.layer_inputs import SecondMoment, unfold_inputs
from tersor.training.ranks import sum_over_processes
from tersor.training.stages import stages


@final
class GPTQQuantizer(LayerwiseQuantizer):
    r"""Rounds the weights of each layer so that its output changes least, with nothing but some calibration data.

    With H the second moment of a layer's inputs, rounding column j of the weight by an error of :math:`e_j` adds
    :math:`e_j^2 / [H^{-1}]_{jj}` to the error of the output, if the columns behind it are moved by
    :math:`-e_j [H^{-1}]_{j,:} / [H^{-1}]_{jj}`. So columns are rounded one after another, each as it has become by then
    (:func:`tersor.quantization.second_order.gptq`). It is the usual way to 3 and 4 bits for language models; on 8 bits
    there is little to win over :class:`PtqQuantizer`. Takes a few seconds a layer, no gradients and no training.

    Give ``granularity: [1, 128]`` for groups of 128 columns that share a scale, which 4 bits and less need on large
    models; by default each output channel has one. The scale of a group is taken when the walk reaches it, from weights
    that have made up for those before. With other granularities scales are those of the original weights.

    Targets other than weights (inputs, outputs, biases) are calibrated afterwards; see
    :class:`tersor.quantization.layerwise.LayerwiseQuantizer`.

    Paper: Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers (ICLR 2023).

    Args:
        model: the model; it is wrapped in place, and its latent weights change.
        config_list: weights of linear layers and convolutions, among others.
        evaluator: not needed.
        calibration: batches like those of training, whose targets are not looked at; more tokens than a layer has
            input features.
        damping: share of the mean diagonal that is added to H; raised, with a warning, where H is singular.
        act_order: take columns of large inputs first. It helps most where a few features are loud, and at few bits.
            Scales of groups are those of the original weights then, and groups stay consecutive columns.
        block_size: columns that are adjusted together; it changes speed and not the result.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: a weight that is no matrix, or that several modules share.
        NumericalError: while calibrating, if H cannot be inverted; it names the layer and the condition number.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.6]]))
        >>> config_list = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int3"}]
        >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.9]])  # a step of one feature is worth one of the other
        >>> quantizer = GPTQQuantizer(layer, config_list, calibration=[x])
        >>> _, calibration = quantizer.compress()
        >>> calibration[""]["weight"]["scale"], quantizer.unwrap_model().weight.data
        (tensor([[0.3333]]), tensor([[1.0000, 0.6667]]))
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        damping: float = 0.01,
        act_order: bool = False,
        block_size: int = 128,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("damping"):
            self.damping = values.number(damping, "share of the mean diagonal", low=0)
        with values.at("block_size"):
            self.block_size = values.whole(block_size, "number of columns", 1)
        self.act_order = act_order
        super().__init__(
            model, config_list, evaluator, calibration=calibration, example_inputs=example_inputs, previous=previous
        )

    def round_weights(self, weights: dict[str, Rounding]) -> None:
        """Stage by stage: gather the moments of the inputs, walk through the columns."""
        for stage in stages(self.model, self.batches(), list(weights)):
            moments = {name: _no_moment(weights[name]) for name in stage.modules}

            def add(name: str, inputs: tuple[Any, ...], moments: dict[str, SecondMoment] = moments) -> None:
                moments[name].add(unfold_inputs(weights[name].module, inputs[0]))

            stage.run(add)
            for name in stage.modules:
                self._round(weights[name], moments.pop(name))

    def _round(self, weight: Rounding, seen: SecondMoment) -> None:
        group_size = _group_size(weight)
        result = gptq(
            weight.rows,
            SecondMoment(*map(sum_over_processes, seen.tensors())).matrix,
            weight.transform.form,
            group_size=group_size,
            fit=weight.fit,
            fixed=weight.scales_of_rows() if group_size is None else None,
            keep=weight.kept_rows,
            act_order=self.act_order,
            block_size=self.block_size,
            damping=self.damping,
            where=weight.target.name,
        )
        each = weight.rows.shape[-1] // result.scale.shape[-1]
        weight.settle(result.rows, *(of.repeat_interleave(each, -1) for of in (result.scale, result.zero_point)))


def _no_moment(weight: Rounding) -> SecondMoment:
    groups, _, columns = weight.rows.shape
    return SecondMoment.zeros(groups, columns, device=weight.rows.device)


def _group_size(weight: Rounding) -> int | None:
    """How many consecutive columns of a row share a scale; None where blocks are none such."""
    grid = torch.Size(weight.transform.cut.grid(weight.latent.shape))
    size = weight.latent.numel() // grid.numel()
    numbers = weight.as_rows(torch.arange(grid.numel(), device=weight.latent.device).view(grid))
    if numbers.shape[-1] % size:
        return None
    parts = numbers.reshape(-1, size)
    return size if bool((parts == parts[:, :1]).all()) else None
