"""Masked channels of an input or output, as masks of the weights that compute or read them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor.graph.coupling import Masks
from tersor.targets.channels import activation_channel_dim, channel_dims, is_linear_or_convolution
from tersor.targets.planned import PlannedTarget


def masks_of_weights(target: PlannedTarget, masks: Masks) -> dict[str, dict[str, Tensor]]:
    """Masks of a module's parameters that compute the same as a mask on its input or output.

    An output channel of a linear layer or a convolution is zero where its row of the weight and its bias are; an input
    channel that is zero is as good as one that no weight reads. So channels that are masked there can be cut.

    Args:
        target: an input or output; for any other nothing follows.
        masks: of which that of the target is looked at.

    Returns:
        ``{module: {parameter: mask}}``; nothing where the mask is not one of whole channels, or where it does not make
        them zero.
    """
    module: Any = target.config.module
    name, target_name = target.place
    mask = masks.get(name, {}).get(target_name)
    multiplied = (getattr(target.config.spec, "apply_method", None) or "mul") == "mul"
    if mask is None or not multiplied or not is_linear_or_convolution(module):
        return {}
    dim = activation_channel_dim(module, mask.dim())
    if dim is None or any(size > 1 for other, size in enumerate(mask.shape) if other != dim):
        return {}
    out_dim, in_dim = channel_dims(module, "weight", module.weight.dim())
    if target_name == "_output_0":
        found = {"weight": _along(mask, out_dim, module)}
        return {name: found if module.bias is None else {**found, "bias": mask.flatten()}}
    return {name: {"weight": _along(mask, in_dim, module)}} if target_name == "_input_0" else {}


def _along(mask: Tensor, dim: int | None, module: Any) -> Tensor:
    """A mask of channels along a dimension of the weight, whose second dimension holds those of one group."""
    groups, rows, kernel = getattr(module, "groups", 1), len(module.weight), (1,) * (module.weight.dim() - 2)
    if dim == 0:
        return mask.reshape(-1, 1, *kernel)
    lives = mask.reshape(groups, -1, *kernel)
    return lives if groups == 1 else lives.repeat_interleave(rows // groups, 0)
