"""Post-training quantization: scales from calibration data, weights as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

from torch import nn

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.errors import ConflictError, InvalidValueError
from tersor.quantization.calibrated import CalibratedQuantizer, ObserverChoice, switch_off
from tersor.quantization.equalization import equalize
from tersor.training import Evaluator
from tersor.training.recovery import correct_bias, output_moments


@final
class PtqQuantizer(CalibratedQuantizer):
    r"""Quantizes a trained model by what a few batches show; nothing is trained.

    The model runs once over the calibration data, as it is, and observers watch the inputs and outputs that are to be
    quantized; parameters are at hand. The range that an observer chooses gives scale and zero point
    (:class:`tersor.quantization.Format`), and from then on values are rounded. Parameters themselves stay bit for bit
    what they were: ``unwrap_model(bake=True)`` writes the rounded ones.

    - **8 bits** are nearly free this way with one scale for each output channel (the default). With 4 bits use groups
      (``granularity: [1, 128]``), :class:`GPTQQuantizer` and its kin, or train (:class:`QATQuantizer`).
    - **Weights alone**, or with inputs that are ``dynamic``, need no calibration data.
    - **Bias correction** gives each output channel the mean back that rounding took from it, one layer after another
      (:func:`tersor.training.recovery.correct_bias`); it costs a pass over the data for each layer. The means are
      measured before, so no copy of the model is made. Biases that are targets themselves are quantized after that.
    - **Equalisation** (:func:`tersor.quantization.equalization.equalize`) rescales channels from layer to layer so that
      one scale fits them all, which helps where weights have one scale for the whole tensor. Fold batch norms before.

    Papers: Krishnamoorthi: Quantizing Deep Convolutional Networks for Efficient Inference (2018); Nagel, Fournarakis,
    Amjad, Bondarenko, van Baalen, Blankevoort: A White Paper on Neural Network Quantization (2021), section 3.

    Args:
        model: the model; it is wrapped in place.
        config_list: dicts, or the path of a YAML or JSON file; ``observer`` there overrides what is said here.
        evaluator: its evaluating function is the calibration where no ``calibration`` is given.
        calibration: batches like those of training, whose targets are not looked at; some hundred samples.
        observer: of inputs and outputs, see :mod:`tersor.quantization.observers`: a name, or a function that makes one
            for a format, such as ``lambda form: ByHistogram(partial(percentile_range, percentile=99.9))``.
        weight_observer: of parameters, likewise; below 8 bits ``mse`` may be better or worse: try both.
        bias_correction: whether biases are corrected (NNI: ``is_bias_correction``).
        equalize: whether layers are equalised first.
        example_inputs: see :class:`tersor.compressor.Compressor`; equalisation runs the model on them, or on the first
            calibration batch.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        InvalidValueError: an observer that does not exist, or bias correction without batches.

    Attributes:
        corrected: the names of the modules whose biases were corrected.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.27, 0.333]]))
        >>> config_list = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"}]
        >>> model, calibration = PtqQuantizer(layer, config_list).compress()
        >>> model.weight, calibration[""]["weight"]["scale"]
        (tensor([[1.2700, 0.3300]], ...), tensor([[0.0100]]))
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        *,
        calibration: Iterable[Any] | None = None,
        observer: ObserverChoice = "mse",
        weight_observer: ObserverChoice = "minmax",
        bias_correction: bool = False,
        equalize: bool = False,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        self.observer = observer
        self.weight_observer = weight_observer
        self.bias_correction = bias_correction
        self.equalize = equalize
        self.corrected: list[str] = []
        if bias_correction and calibration is None:
            raise InvalidValueError(
                "it runs the model on the same batches again and again, and there is none",
                where="bias_correction",
                remedy="Give calibration=, some hundred samples, in place of an evaluating function.",
            )
        super().__init__(
            model,
            config_list,
            evaluator,
            calibration=calibration,
            example_inputs=example_inputs,
            previous=previous,
        )

    def calibrate(self) -> None:
        """Ranges from the model as it was; then quantize, correct biases, and quantize these."""
        found = self.transforms()
        switch_off(found)
        if self.equalize:
            self._equalize()
        wanted = output_moments(self.model, list(self.batches())) if self.bias_correction else None
        biases = [own for own in found if wanted is not None and own[0].config.target_name == "bias"]
        others = [own for own in found if own not in biases]
        self.fix_ranges(others)
        if wanted is not None:
            self.corrected = correct_bias(self.model, wanted, list(self.batches()))
            self.fix_ranges(biases)

    def _equalize(self) -> None:
        example, masks = self.example(), self.wrappers.masks()
        with self.wrappers.detached():
            done = equalize(self.model, example, masks=masks)
        if not done.groups:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(done.refused.items())[:3])
            raise ConflictError(
                f"no two layers could be equalised ({reasons or 'there is one alone'})",
                where="equalize",
                remedy="Fold batch norms into the layers before, or leave it out.",
            )
