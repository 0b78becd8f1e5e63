"""From a trained model to one that is quantized as an engine wants it, in one call and without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from tersor.deploy.engine_targets import engine_config
from tersor.deploy.smoothing import NORMS, smooth_inputs
from tersor.quantization import PtqQuantizer


def post_training(
    model: nn.Module, example_inputs: Any, calibration: Iterable[Any], engine: str = "auto"
) -> PtqQuantizer:
    """Quantize a copy of a model as an engine wants it: :func:`engine_config`, then :class:`PtqQuantizer`.

    Ranges of inputs and outputs are those of least squared error. In networks with layer norms (transformers) some
    channels are a hundred times larger than the others, in every sample: to clip them is no noise, so ranges are whole
    there, and what is large moves into the weights first (:mod:`tersor.deploy.smoothing`).

    Args:
        model: trained; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        calibration: batches like those of training, whose targets are not looked at; some hundred samples.
        engine: see :func:`tersor.deploy.engines`.

    Returns:
        The finished quantizer, to be given to :class:`tersor.deploy.QuantizationSpeedup`.

    Raises:
        TraceError: the model cannot be traced.
        InvalidValueError: an unknown engine, or no batch.
        MissingExtraError: the engine is not installed.
    """
    network, config_list = engine_config(model, example_inputs, engine)
    batches = [*calibration]
    transforms = any(isinstance(module, NORMS) for module in network.modules())
    if transforms:
        rounded = [name for entry in config_list if "_input_0" in entry["target_names"] for name in entry["op_names"]]
        smooth_inputs(network, rounded, batches)
    observer = "minmax" if transforms else "mse"
    quantizer = PtqQuantizer(
        network, config_list, calibration=batches, example_inputs=example_inputs, observer=observer
    )
    quantizer.compress()
    return quantizer
