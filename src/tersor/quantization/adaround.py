"""AdaRound: learn which weights to round up and which down."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import FloatDtype, values
from tersor.config.parse import ConfigList
from tersor.errors import ConflictError
from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.layerwise import LayerwiseQuantizer, Rounding
from tersor.quantization.learned_rounding import RoundingSettings, adaround
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.layer_inputs import unfold_inputs, weight_rows
from tersor.training.stages import stages


@final
class AdaRoundQuantizer(LayerwiseQuantizer):
    r"""Learns for each weight whether it is rounded up or down, so that the outputs of its layer change least.

    Scales are those of rounding to the nearest. For each layer a number h in [0, 1] for each weight says how far it is
    moved up from the value below; the h are learned by Adam so that the layer gives, on the inputs of the quantized
    model, what it gave in the original model, while a regulariser drives them to 0 or 1
    (:func:`tersor.quantization.learned_rounding.adaround`). Like :class:`GPTQQuantizer` it makes errors of correlated
    inputs cancel; it moves no weight by more than one step, and it makes up for what the layers before have lost.
    Nothing of what is learned stays but the roundings.

    Use it at 4 bits and less on small and middle-sized networks; it takes ``iterations`` small matrix products a layer
    (seconds on one core), and a copy of the model in memory. Layers are reconstructed before their activation function.

    Targets other than weights (inputs, outputs, biases) are calibrated afterwards; see
    :class:`tersor.quantization.layerwise.LayerwiseQuantizer`.

    Paper: Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization
    (ICML 2020). There the error is not divided by that of rounding to the nearest, and 10,000 iterations are made.

    Args:
        model: the model; it is wrapped in place, and its latent weights change.
        config_list: weights of linear layers and convolutions, among others; integer types.
        evaluator: not needed.
        calibration: batches like those of training, whose targets are not looked at; some hundred samples.
        iterations: steps of Adam for each layer.
        batch_size: samples of a step; a sample is a token, or one place of a convolution's kernel.
        samples: how many are kept of each layer, drawn at random from all batches; they bound the memory.
        learning_rate: of Adam.
        regular_scale: what undecided roundings cost, in units of the error of rounding to the nearest.
        warm_start: the share of the iterations before the regulariser sets in.
        seed: of all that is drawn.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: a weight that is no matrix, or that several modules share; a type that is no integer.
        InvalidValueError: a number out of its range.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.43]]))
        >>> config_list = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int2"}]
        >>> quantizer = AdaRoundQuantizer(layer, config_list, calibration=[torch.rand(64, 2)], iterations=100)
        >>> _ = quantizer.compress()
        >>> quantizer.unwrap_model().weight.data
        tensor([[1., 0.]])
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        iterations: int = 1000,
        batch_size: int = 256,
        samples: int = 8192,
        learning_rate: float = 0.03,
        regular_scale: float = 100.0,
        warm_start: float = 0.2,
        seed: int = 0,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self.settings = RoundingSettings(iterations, batch_size, learning_rate, regular_scale, warm_start)
        with values.at("samples"):
            self.samples = values.whole(samples, "number of samples", 1)
        self.seed = seed
        super().__init__(
            model, config_list, evaluator, calibration=calibration, example_inputs=example_inputs, previous=previous
        )

    def round_weights(self, weights: dict[str, Rounding]) -> None:
        """Stage by stage, beside a copy of the model that stays as it was: gather inputs and targets, learn."""
        batches, names, original = list(self.batches()), list(weights), copy.deepcopy(self.model)
        quota = math.ceil(self.samples / len(batches))
        both = zip(stages(self.model, batches, names), stages(original, batches, names), strict=True)
        for stage, exact in both:
            inputs = {name: _Drawn(weights[name].module, quota, self.seed) for name in stage.modules}
            targets = {name: _Drawn(original.get_submodule(name), quota, self.seed) for name in exact.modules}
            stage.run(lambda name, given, inputs=inputs: inputs[name].add(given[0]))
            exact.run(lambda name, given, targets=targets: targets[name].add(given[0], output=True))
            for name in stage.modules:
                weight, scales = weights[name], weights[name].scales_of_rows()
                rows = adaround(
                    weight.rows,
                    inputs.pop(name).all,
                    targets.pop(name).all,
                    weight.transform.form,
                    scales,
                    keep=weight.kept_rows,
                    settings=self.settings,
                    seed=self.seed,
                )
                weight.settle(rows, *scales)

    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """Uniform, of an integer type where it is a weight."""
        dtype = self.form(target).dtype
        if target.config.target_name == "weight" and isinstance(dtype, FloatDtype):
            raise ConflictError(
                f"{dtype.as_config()} is not evenly spaced, and AdaRound learns steps of one size",
                where=f"{target.config.where} on {target.name}",
                remedy="Use an integer type, or GPTQQuantizer.",
            )
        return super().fake_quantize(target)


class _Drawn:
    """Some samples of a layer's inputs, or what the layer makes of them; the same ones wherever the seed is the same.

    Args:
        module: the layer.
        quota: how many are drawn at each call.
        seed: of the draw.
    """

    def __init__(self, module: nn.Module, quota: int, seed: int) -> None:
        self.module = module
        self.quota = quota
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []

    def add(self, x: Tensor, *, output: bool = False) -> None:
        """Draw from an input; keep what the weight makes of it if ``output``."""
        samples = unfold_inputs(self.module, x)
        drawn = torch.randperm(samples.shape[1], generator=self._generator)[: self.quota].to(samples.device)
        samples = samples[:, drawn]
        weight: Any = self.module.weight
        self._parts.append(samples @ weight_rows(self.module, weight).to(samples).mT if output else samples)

    @property
    def all(self) -> Tensor:
        """Shape (groups, samples, columns or rows)."""
        return torch.cat(self._parts, dim=1)
