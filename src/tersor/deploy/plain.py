"""What a compressor leaves behind: a plain model, its calibration and its masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.compressor import Compressor
from tersor.config.values import is_activation
from tersor.errors import InvalidValueError
from tersor.graph.inputs import evaluating
from tersor.quantization.base import CalibrationConfig, Quantizer
from tersor.wrapping import Mask, Stage


@dataclass(frozen=True)
class Plain:
    """A compressed model without its compressors.

    Attributes:
        model: a copy whose parameters hold the simulated values: masked, and rounded.
        calibration: of all quantizers.
        masks: of parameters.
        activation_masks: what masks inputs and outputs.
    """

    model: nn.Module
    calibration: CalibrationConfig
    masks: Mapping[str, Mapping[str, Tensor]]
    activation_masks: Mapping[str, Mapping[str, Mask]]


def plain_copy(compressor: Compressor) -> Plain:
    """Take a copy of what a compressor, and all that are fused with it, made of its model; that goes on as it was.

    Raises:
        InvalidValueError: a quantizer among them has found no scales yet.
    """
    model, wrappers = compressor.model, compressor.wrappers
    calibration: CalibrationConfig = {}
    for quantizer in compressor.chain:
        if isinstance(quantizer, Quantizer):
            for module, targets in quantizer.get_calibration_config().items():
                calibration.setdefault(module, {}).update(targets)
    attached = [wrapper for wrapper in wrappers.by_module.values() if wrapper.attached]
    if wrappers.by_module and not attached:
        raise InvalidValueError(
            "the compressor's model is unwrapped, so what it simulates is not there any more",
            where="compressor",
            remedy="Call its wrap_model() first, or give the model and its calibration.",
        )
    _check_scales(compressor)
    # A copy of everything, so that nothing of the model's own is taken out and put back in the midst of training.
    plain, wrappers = copy.deepcopy((model, wrappers))
    values: dict[tuple[str, str], Tensor] = {}
    activation_masks: dict[str, dict[str, Mask]] = {}
    with torch.no_grad(), evaluating(plain):
        for name, wrapper in wrappers.by_module.items():
            for target, stack in wrapper.stacks.items():
                if not is_activation(target):
                    values[name, target] = getattr(wrapper.module, target).detach().clone()
                elif isinstance(mask := stack.find(Stage.MASK), Mask) and mask.factors:
                    activation_masks.setdefault(name, {})[target] = mask
        masks = wrappers.masks()
        wrappers.detach()
        for (name, target), value in values.items():
            owner = plain.get_submodule(name)
            if parametrize.is_parametrized(owner, target):  # by the user, and it is in the value
                parametrize.remove_parametrizations(owner, target, leave_parametrized=True)
            getattr(owner, target).data.copy_(value)
    parameters = {
        module: {target: mask for target, mask in own.items() if not is_activation(target)}
        for module, own in masks.items()
    }
    kept = {module: own for module, own in parameters.items() if own}
    return Plain(plain.eval(), calibration, kept, activation_masks)


def _check_scales(compressor: Compressor) -> None:
    """Refuse what is not quantized yet.

    Raises:
        InvalidValueError: naming the first target.
    """
    for quantizer in compressor.chain:
        for target, transform in quantizer.transforms() if isinstance(quantizer, Quantizer) else ():
            if not getattr(transform, "enabled", True):
                raise InvalidValueError(
                    "has no scales yet, and passes as it is",
                    where=target.name,
                    remedy=f"Finish {type(quantizer).__name__}.compress(), or its training, first.",
                )
