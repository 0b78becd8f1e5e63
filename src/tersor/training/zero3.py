"""ZeRO stage 3: parameters of which each process keeps a slice, seen whole where compressors look at them.

All processes have to call these functions, on the same parameters in the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

_ON_MODULES = (
    "_external_params", "_original_parameters", "all_parameters", "applied_pre_backward_ref_cnt", "post_bwd_fn",
    "pre_bwd_fn",
)  # fmt: skip


def gathered(parameters: Iterable[Tensor], *, changed: bool = False) -> AbstractContextManager[Any]:
    """Let parameters be whole meanwhile; does nothing for those that are.

    Args:
        parameters: of a model.
        changed: whether what is written into them is kept: that of the first process, in all of them.
    """
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(parameters), modifier_rank=0 if changed else None)


def value_of(parameter: Tensor) -> Tensor:
    """The whole value: the master weight, in float32, where there is one."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    if whole is None:  # it is not trained
        with gathered([parameter]):
            whole = parameter.detach().clone()
    return whole


def write(parameter: Tensor, value: Tensor) -> None:
    """Put a whole value into the parameter and into its master weight."""
    from deepspeed.utils import safe_set_local_fp32_param

    with gathered([parameter], changed=True):
        parameter.detach().copy_(value)
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, own_slice(parameter, value.float()))


def own_slice(parameter: Any, value: Tensor) -> Tensor:
    """What this process keeps of a whole value, flat; zeros fill up the last slice."""
    size = parameter.ds_tensor.ds_numel
    flat = nn.functional.pad(value.flatten(), (0, size * parameter.ds_zero_partition_world_size - value.numel()))
    return flat.narrow(0, size * parameter.ds_zero_partition_rank, size)


def leave(module: nn.Module, own: Collection[str]) -> None:
    """Take away what the engine has put on a module, and give it its own table of parameters back.

    Args:
        module: any.
        own: the names of the attributes that it had before.
    """
    held: dict[str, Any] = vars(module)
    if "_original_parameters" in held:
        held["_parameters"] = held["_original_parameters"]
    for name in held.keys() - own:
        if name in _ON_MODULES or name.startswith("ds_"):
            del held[name]
