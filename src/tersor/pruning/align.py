"""Masks that follow another target's mask: a bias its weight, a batch norm or an output its convolution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tersor.config import Align, PruningSpec
from tersor.errors import ConflictError, MaskError
from tersor.targets.channels import activation_channel_dim
from tersor.targets.planned import PlannedTarget
from tersor.wrapping.stack import check_shape

ShapeOf = Callable[[str, str], torch.Size | None]


def align(targets: Sequence[PlannedTarget], masks: dict[str, dict[str, Tensor]], shape_of: ShapeOf) -> None:
    """Add the masks of all aligned targets, in whatever order they depend on each other.

    Channels of an input or output stand where its own module's type, or else the source's, has them; where neither
    tells, second, or last if only that fits.

    Args:
        targets: of the plan; those without ``align`` are passed over.
        masks: ``{module: {target: mask}}``, extended in place. A target whose source has no mask gets none.
        shape_of: the shape of ``(module, target)``; None where it is not known.

    Raises:
        ConflictError: targets align with each other in a circle.
        MaskError: the source's dimensions do not fit the target's.
    """
    modules = {target.config.module_name: target.config.module for target in targets}
    waiting = {target.name: (target, spec) for target in targets if (spec := _align_spec(target)) is not None}
    while waiting:
        ready = {name: item for name, item in waiting.items() if ".".join(_source(*item)).lstrip(".") not in waiting}
        if not ready:
            raise ConflictError("masks align with each other in a circle", where=", ".join(waiting))
        for name, (target, spec) in ready.items():
            del waiting[name]
            module, source = _source(target, spec)
            mask = masks.get(module, {}).get(source)
            if mask is not None:
                lives = reduce_to(mask, spec.dims, shape_of(module, source) or mask.shape, name)
                shape = shape_of(target.config.module_name, target.config.target_name)
                mine = _fit(lives, shape, target, modules.get(module))
                masks.setdefault(target.config.module_name, {})[target.config.target_name] = mine


def _align_spec(target: PlannedTarget) -> Align | None:
    return target.config.spec.align if isinstance(target.config.spec, PruningSpec) else None


def _source(target: PlannedTarget, spec: Align) -> tuple[str, str]:
    return (target.config.module_name if spec.module_name is None else spec.module_name), spec.target_name


def reduce_to(mask: Tensor, dims: Sequence[int], shape: Sequence[int], where: str = "") -> Tensor:
    """What lives along some dimensions of a mask: an index dies when everything at it is masked.

    Args:
        mask: bool, broadcastable to ``shape``.
        dims: the dimensions to keep.
        shape: of the target that the mask belongs to.
        where: what errors name.

    Returns:
        bool, one dimension for each of ``dims``, in their order.

    Raises:
        MaskError: the mask has no such dimension.

    >>> reduce_to(torch.tensor([[True, False], [False, False]]), [0], (2, 2))
    tensor([ True, False])
    """
    if any(dim >= mask.dim() for dim in dims):
        raise MaskError(f"a mask of shape {tuple(shape)} has no dimensions {tuple(dims)}", where=where)
    others = [dim for dim in range(mask.dim()) if dim not in dims]
    lives = mask.any(dim=others) if others else mask
    ordered = sorted(dims)
    return lives.expand([shape[dim] for dim in ordered]).permute([ordered.index(dim) for dim in dims])


def _fit(lives: Tensor, shape: torch.Size | None, target: PlannedTarget, source: nn.Module | None) -> Tensor:
    """The mask in a shape that broadcasts to the target's."""
    if shape is None:
        raise MaskError(
            "the shape of this input or output is not known",
            where=target.name,
            remedy="Give example_inputs, or call track_forward(...) before compress().",
        )
    first = 0
    if target.config.target_name.startswith("_"):
        known = (activation_channel_dim(module, len(shape)) for module in (target.config.module, source) if module)
        guess = 1 if len(shape) > 1 and shape[1] == lives.shape[0] else len(shape) - lives.dim()
        first = next((dim for dim in known if dim is not None), guess)
    if first < 0 or first + lives.dim() > len(shape):
        first = 0  # it cannot fit, which is said below
    aligned = lives.reshape([1] * first + list(lives.shape) + [1] * (len(shape) - first - lives.dim()))
    if any(own not in (1, size) for own, size in zip(aligned.shape, shape, strict=True)):
        raise MaskError(
            f"a mask of shape {tuple(lives.shape)} does not fit a target of shape {tuple(shape)}",
            where=target.name,
            remedy="Check align['dims'].",
        )
    return aligned


def expanded(masks: Mapping[str, Mapping[str, Tensor]], shape_of: ShapeOf) -> dict[str, dict[str, Tensor]]:
    """Compact masks of parameters as views of the parameters' shapes; those of inputs and outputs as they are.

    Raises:
        MaskError: a parameter has another shape by now.
    """
    return {
        module: {target: _expanded(mask, target, module, shape_of) for target, mask in targets.items()}
        for module, targets in masks.items()
    }


def _expanded(mask: Tensor, target: str, module: str, shape_of: ShapeOf) -> Tensor:
    shape = None if target.startswith("_") else shape_of(module, target)
    if shape is None:
        return mask
    check_shape(mask, shape, f"{module}.{target}" if module else target)
    return mask.expand(shape)
