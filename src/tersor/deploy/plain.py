"""What a compressor leaves behind: a plain model, its calibration and its masks."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.compressor import Compressor
from tersor.config.values import is_activation
from tersor.deploy.lowering import Fallback, fold_norms, fused_names
from tersor.deploy.stored import Stored
from tersor.errors import InvalidValueError, MaskError, WrapError, nearest
from tersor.graph import Masks
from tersor.graph.inputs import evaluating, named_tensors
from tersor.quantization.base import CalibrationConfig, Quantizer
from tersor.speedup.slicing import bake
from tersor.storage import load_masks
from tersor.targets.channels import channel_dims
from tersor.targets.fused import over_outputs
from tersor.wrapping import Mask, Stage, is_wrapped
from tersor.wrapping.stack import as_bool, check_shape, compact


@dataclass(frozen=True)
class Plain:
    """A compressed model without its compressors.

    Attributes:
        model: a copy whose parameters hold the simulated values: masked, and rounded.
        calibration: of all quantizers.
        masks: of parameters.
        activation_masks: what masks inputs and outputs.
        fallbacks: what of the calibration does not hold any more, and why.
    """

    model: nn.Module
    calibration: CalibrationConfig
    masks: Mapping[str, Mapping[str, Tensor]]
    activation_masks: Mapping[str, Mapping[str, Mask]] = field(default_factory=dict)
    fallbacks: tuple[Fallback, ...] = ()


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


def plain_of(
    model: nn.Module, calibration: CalibrationConfig | None = None, masks: Masks | str | os.PathLike[str] | None = None
) -> Plain:
    """What a compressor left behind that is not there any more: an unwrapped model, its calibration and its masks.

    Args:
        model: its parameters may be latent or simulated; it is left as it was, a copy is taken. Batch norms that are
            quantized with the layer in front of them are folded in.
        calibration: as ``get_calibration_config()`` or ``load_calibration()`` give it.
        masks: ``{module: {target: mask}}``, or the path of a masks file.

    Raises:
        WrapError: a compressor has wrapped the model.
        MaskError: the masks belong to another model.
        UnmatchedError: the calibration does.
    """
    if is_wrapped(model):
        raise WrapError("the model is still wrapped", remedy="Give the compressor itself, or call its unwrap_model().")
    model = copy.deepcopy(model).eval()
    given = load_masks(masks) if isinstance(masks, (str, os.PathLike)) else masks or {}
    calibration = dict(calibration or {})
    activation_masks: dict[str, dict[str, Mask]] = {}
    parameters: dict[str, dict[str, Tensor]] = {}
    for module, targets in given.items():
        for target, mask in targets.items():
            if is_activation(target):
                own = activation_masks.setdefault(module, {})[target] = Mask(target)
                own.set([mask])
            else:
                parameters.setdefault(module, {})[target] = _checked(model, module, target, mask)
    _burn(model, parameters)
    activations = fold_norms(model, calibration, activation_masks)
    _move_masks_of_norms(model, fused_names(calibration).values(), parameters)
    _round_parameters(model, calibration)
    _burn(model, parameters)  # not every grid has a zero
    return Plain(model, calibration, parameters, activations)


def _checked(model: nn.Module, module: str, target: str, mask: Tensor) -> Tensor:
    """The mask of a parameter as bools, if the model has that."""
    name, tensors = f"{module}.{target}" if module else target, named_tensors(model)
    if name not in tensors:
        raise MaskError("the model has no such parameter or buffer", where=name, remedy=nearest(name, tensors))
    check_shape(mask, tensors[name].shape, name)
    return compact(as_bool(mask, name))


def _burn(model: nn.Module, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    bake(named_tensors(model), {module: {name: (mask,) for name, mask in own.items()} for module, own in masks.items()})


def _move_masks_of_norms(
    model: nn.Module, groups: Iterable[Sequence[str]], masks: dict[str, dict[str, Tensor]]
) -> None:
    """Where a norm was folded, what its masks removed is removed by those of the layer in front of it."""
    for head, *others in groups:
        for name in others:
            gone = masks.pop(name, {}) if isinstance(model.get_submodule(name), nn.Identity) else {}
            module, own = model.get_submodule(head), masks.setdefault(head, {})
            if "weight" in gone:
                weight = module.get_parameter("weight")
                out_dim, _ = channel_dims(module, "weight", weight.dim())
                moved = over_outputs(gone["weight"], weight.shape, out_dim or 0)
                own["weight"] = own["weight"] & moved if "weight" in own else moved
            if "bias" in gone:
                own["bias"] = own["bias"] & gone["bias"] if "bias" in own else gone["bias"]
            if not own:
                del masks[head]


def _round_parameters(model: nn.Module, calibration: CalibrationConfig) -> None:
    """Write the rounded values into the parameters, in place."""
    tensors = named_tensors(model)
    for module, targets in calibration.items():
        for target, said in targets.items():
            name = f"{module}.{target}" if module else target
            if is_activation(target) or name not in tensors:
                continue
            values = tensors[name].data
            stored = Stored.of(said, name, values.shape)
            if stored.kind != "int1" and "magnitude" not in said:  # of which latent values do not tell the numbers
                values.copy_(stored.values(stored.numbers(values)))
