"""Weights as stored numbers, in the place of the parameters of a model that is about to be lowered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from tersor.config.values import is_activation
from tersor.deploy.operators import dequantize
from tersor.deploy.stored import Stored
from tersor.errors import CheckpointError, ConflictError
from tersor.graph.inputs import named_tensors
from tersor.quantization.base import CalibrationConfig
from tersor.targets.activations import INPUT, OUTPUT
from tersor.targets.channels import channel_dims
from tersor.targets.fused import is_head, over_outputs
from tersor.wrapping import Mask
from tersor.wrapping.wrapper import separate_class


@final
class StoredNumbers(nn.Module):
    """A parameter that is stored as numbers.

    Args:
        numbers: in the type that holds them.
        stored: what they mean.
        dtype: of the parameter.
    """

    def __init__(self, numbers: Tensor, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = stored, dtype
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero_point", stored.zero_point)

    def forward(self) -> Tensor:
        """The real values."""
        stored = self.stored
        values = dequantize(self.numbers, self.scale, self.zero_point, stored.kind, stored.axis, stored.block)
        return values if self.dtype is torch.float32 else values.to(self.dtype)


def store_parameters(
    model: nn.Module, calibration: CalibrationConfig
) -> tuple[dict[str, Stored], list[tuple[str, str]]]:
    """Put stored numbers in the place of all quantized parameters, under all names of those that are tied.

    Args:
        model: it is changed.
        calibration: of its inputs, outputs and parameters; the last count.

    Returns:
        How each is stored, by name; and the names of those that stay in floating point, each with the reason.

    Raises:
        CheckpointError: the calibration does not fit, or needs other weights than the latent ones.
    """
    stored: dict[str, Stored] = {}
    refused: list[tuple[str, str]] = []
    tensors = named_tensors(model)
    places: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        places.setdefault(id(tensor), []).append(name)
    for module, targets in calibration.items():
        for target in [target for target in targets if not is_activation(target)]:
            name = f"{module}.{target}" if module else target
            values = tensors[name].detach()
            own = Stored.of(targets[target], name, values.shape)
            numbers = own.numbers(values)
            if own.kind == "int1" or "magnitude" in targets[target]:
                check_rounded(values, own.values(numbers), name)
            if isinstance(model.get_submodule(module), nn.RNNBase):
                values.copy_(own.values(numbers))
                refused.append((name, "recurrent layers run in floating point, on the rounded values"))
                continue
            stored[name] = own
            held = StoredNumbers(numbers, own, values.dtype)
            for place in places[id(tensors[name])]:
                owner, _, own_name = place.rpartition(".")
                _put(model.get_submodule(owner), own_name, held)
    return stored, refused


def check_rounded(values: Tensor, rounded: Tensor, where: str) -> None:
    """Refuse latent weights of methods whose numbers do not follow from them by rounding.

    Raises:
        CheckpointError: the values are not those that the numbers stand for.
    """
    tolerance = 4 * torch.finfo(values.dtype).eps * float(rounded.abs().max())
    if float((values.double() - rounded.double()).abs().max()) > tolerance:
        raise CheckpointError(
            "the weights are latent, and the numbers of DoReFa and BNN do not follow from them by rounding",
            where=where,
            remedy="Give the compressor itself, or a model that was unwrapped with unwrap_model(bake=True).",
        )


def _put(module: nn.Module, name: str, numbers: StoredNumbers) -> None:
    """Let a module compute a parameter from stored numbers wherever it reads it.

    torch's parametrizations do the same by a property, and refuse an original of another type.
    """
    delattr(module, name)
    held = f"{name}_numbers"
    module.add_module(held, numbers)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: property(lambda self: getattr(self, held)())})


def compute_parametrized(model: nn.Module, calibration: CalibrationConfig) -> None:
    """Put what a user's own parametrization makes of a quantized parameter in its place: what is stored is that.

    Args:
        model: it is changed.
        calibration: says which parameters.
    """
    for module, targets in calibration.items():
        owner = model.get_submodule(module)
        for target in targets:
            if not is_activation(target) and parametrize.is_parametrized(owner, target):
                separate_class(owner)
                parametrize.remove_parametrizations(owner, target, leave_parametrized=True)


def burnt_into_heads(
    model: nn.Module, masks: Mapping[str, Mapping[str, Mask]], groups: Iterable[Sequence[str]]
) -> dict[str, dict[str, Mask]]:
    """Burn in the masks that lie between a layer and the norm that is about to be folded into it.

    There is no such place any more when it is folded. What removes a channel there makes its weights and its bias zero.

    Args:
        model: its weights are changed.
        masks: of inputs and outputs.
        groups: the names of modules that are fused.

    Returns:
        all other masks.

    Raises:
        ConflictError: such a mask is none of whole channels.
    """
    left = {module: dict(own) for module, own in masks.items()}
    for names in groups:
        head, norm = (model.get_submodule(name) for name in names[:2])
        if not is_head(head) or not isinstance(norm, _BatchNorm):
            continue
        for module, side in ((names[0], OUTPUT), (names[1], INPUT)):
            for target in [target for target in left.get(module, {}) if target.startswith(side)]:
                mask = left[module].pop(target)
                if mask.method != "bypass":
                    _silence(head, norm.num_features, mask, f"{module}.{target}")
    return left


def _silence(head: Any, channels: int, mask: Mask, where: str) -> None:
    out_dim, _ = channel_dims(head, "weight", head.weight.dim())
    for factor in mask.factors:
        if mask.method != "mul" or factor.numel() != channels or max(factor.shape) != channels:
            raise ConflictError(
                "lies between a layer and the norm that is folded into it, and is no mask of whole channels",
                where=where,
                remedy="Leave the norm out of fuse_names.",
            )
        kept = factor.flatten()
        head.weight.data *= over_outputs(kept, head.weight.shape, out_dim or 0)
        if head.bias is not None:
            head.bias.data *= kept
