"""SmoothQuant: outliers of activations move into the weights, which hold them easily."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import values
from tersor.config.parse import ConfigList
from tersor.errors import InvalidValueError
from tersor.quantization.migration import (
    MigratingQuantizer,
    by_channel,
    product,
    rounded,
    times,
    weight_of,
)
from tersor.quantization.observers import MinMax
from tersor.quantization.scaling import Kernel, ScaleGroup, input_ranges
from tersor.training import Evaluator
from tersor.training.damping import computable
from tersor.training.ranks import sum_over_processes


@final
class SmoothQuantizer(MigratingQuantizer):
    r"""Quantizes activations and weights to int8 after it has moved outliers from the first to the second.

    In transformers some channels of an activation are a hundred times larger than the others, in every token. One scale
    for the whole activation leaves the others next to no values. So channel j of the input is divided by

    .. math:: s_j = \max|X_j|^{\alpha} / \max|W_j|^{1-\alpha}

    and column j of every weight that reads it is multiplied by it; the norm (or other layer) that writes the channel
    takes up the division, so that nothing is added to the model. After that inputs and weights are quantized as usual.

    Factors go through what passes them on: from a norm to the linear layers that read it and nothing else, from values
    to the projection of the output, from the linear half of a gated unit to the layer behind, through ReLU and pooling.
    Where the norm's output is added to something, too (BERT), none can be moved: see :attr:`refused`.

    Paper: Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models (ICML 2023).

    Args:
        model: the model; it is wrapped in place, and its latent weights change by the factors.
        config_list: inputs and weights of linear layers and convolutions: ``target_names: ["_input_0", "weight"]``.
            With ``dynamic: True`` inputs are scaled at run time, each token by itself with granularity ``[-1]``.
        evaluator: its evaluating function is the calibration where no ``calibration`` is given.
        alpha: how much of the difficulty goes into the weights, from 0 to 1; a list is searched, and each group of
            layers that share their input takes the one of the least squared error of its outputs.
        calibration: some hundred samples.
        example_inputs: what the graph is found on; the first calibration batch, where there is none.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Attributes:
        alphas: after calibration, of each group of :attr:`moved`, its alpha.

    Raises:
        InvalidValueError: an alpha out of its range.

    Example:
        >>> net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        >>> _ = net[0].weight.data.copy_(torch.tensor([100.0, 1.0, 1.0, 1.0]))
        >>> config = [{"op_types": ["Linear"], "target_names": ["_input_0", "weight"]}]
        >>> quantizer = SmoothQuantizer(net, config, calibration=[torch.randn(8, 4)])
        >>> _ = quantizer.compress()
        >>> print(*quantizer.moved)
        4 channels: 0.weight, 0.bias -> 1.weight
        >>> bool(net[0].weight[0] < 20)
        True
    """

    alphas: tuple[float, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        alpha: float | Sequence[float] = 0.5,
        *,
        calibration: Iterable[Any] | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("alpha"):
            given = alpha if isinstance(alpha, Sequence) else [alpha]
            self.candidates = tuple(values.number(own, "share from 0 to 1", 0, 1) for own in given)
            if not self.candidates:
                raise InvalidValueError("no alpha is given.", legal=["a number from 0 to 1", "a list of such"])
        super().__init__(
            model, config_list, evaluator, calibration=calibration, example_inputs=example_inputs, previous=previous
        )

    def calibrate(self) -> None:
        """Move factors, then find scales."""
        self.migrate()
        self.fix_ranges(self.transforms())

    def choose(self, groups: tuple[ScaleGroup, ...]) -> list[Tensor]:
        """The paper's factors, with the best alpha of each group."""
        largest = self._activation_maxima()
        choices = [[self._factors(group, largest, alpha) for alpha in self.candidates] for group in groups]
        best = self._errors(groups, choices).argmin(1) if len(self.candidates) > 1 else [0] * len(groups)
        self.alphas = tuple(self.candidates[int(own)] for own in best)
        return [of_group[int(own)] for of_group, own in zip(choices, best, strict=True)]

    def _activation_maxima(self) -> dict[str, Tensor]:
        """Of each quantized layer that was called, the largest magnitude of each input channel."""
        seen = {name: MinMax() for name in self.readers()}
        self.run_watching(lambda name, module, x: seen[name].to(x.device).add(by_channel(module, x)))
        for observer in seen.values():
            observer.synchronize()
        ranges = {name: torch.stack(observer.range()) for name, observer in seen.items()}
        return {name: computable(own.abs().amax(0), "the input", name) for name, own in ranges.items() if own.dim() > 1}

    def _factors(self, group: ScaleGroup, largest: dict[str, Tensor], alpha: float) -> Tensor:
        called = [kernel for kernel, _ in self.read_by(group) if kernel.name in largest]
        activations = group.largest((kernel.inputs, largest[kernel.name]) for kernel in called)
        weights = group.largest((own.inputs, input_ranges(own.matrices(self.used(own)))) for own in group.readers)
        return smoothing(activations, weights, alpha)

    def _errors(self, groups: Sequence[ScaleGroup], choices: Sequence[Sequence[Tensor]]) -> Tensor:
        """Squared errors of the outputs of each group's readers, shape (groups, candidates)."""
        found = torch.zeros(len(groups), len(self.candidates), dtype=torch.float64, device="cpu")
        places = {
            kernel.name: (number, kernel) for number, group in enumerate(groups) for kernel, _ in self.read_by(group)
        }

        def watch(name: str, module: nn.Module, x: Tensor) -> None:
            if name in places:
                number, kernel = places[name]
                for place, factors in enumerate(choices[number]):
                    found[number, place] += self._error(module, kernel, x, groups[number], factors)

        self.run_watching(watch)
        return sum_over_processes(found)

    def _error(self, module: nn.Module, kernel: Kernel, x: Tensor, group: ScaleGroup, factors: Tensor) -> float:
        """The squared error of one layer's output on one batch."""
        weight = weight_of(module)
        on_inputs = group.spread(kernel.inputs, factors)
        scaled = kernel.multiplied(weight, on_inputs)
        inputs = times(module, x, 1 / on_inputs)
        for name, value in (("_input_", inputs), ("weight", scaled)):
            target = self.target_of(module, name)
            if target is not None:
                value.copy_(rounded(self.form(target), self.cut(target), value))
        return float((product(module, inputs, scaled) - product(module, x, weight)).double().square().sum())


def smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    r"""The factors :math:`s_j = \max|X_j|^{\alpha} / \max|W_j|^{1-\alpha}`; 1 where a channel is never used.

    Args:
        activations: the largest magnitude of each channel.
        weights: the largest magnitude of each channel's column, over all weights that read it.
        alpha: how much goes into the weights.

    >>> smoothing(torch.tensor([100.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0]), 0.5)
    tensor([10.0000,  0.5000,  1.0000])
    """
    used = (activations > 0) & (weights > 0)
    return torch.where(used, activations**alpha / weights ** (1 - alpha), 1)
