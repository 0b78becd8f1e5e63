"""ZeRO stage 3: parameters of which each process keeps a slice, seen whole where compressors look at them.

All processes have to call these functions, on the same parameters in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_ON_MODULES = (
    "_external_params", "_original_parameters", "all_parameters", "applied_pre_backward_ref_cnt", "post_bwd_fn",
    "pre_bwd_fn",
)  # fmt: skip


def is_stage_3(optimizer: Any) -> bool:
    """Whether this is the optimizer of an engine under stage 3."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


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


@torch.no_grad()
def give_states(zero: Any, optimizer: Optimizer, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Hand an optimizer's states by parameter over to the flat slices that it steps instead."""
    from deepspeed.utils import safe_set_local_optimizer_state

    for master, parameters in _groups(zero):
        state = optimizer.state[master]
        for parameter in parameters:
            for key, value in states.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.dim() == 0:
                    state[key] = copy.deepcopy(value)
                else:
                    state.setdefault(key, torch.zeros_like(master))
                    safe_set_local_optimizer_state(parameter, own_slice(parameter, value), key)


def learnt_states(zero: Any, optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The optimizer's states by parameter, whole."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states: dict[Tensor, dict[str, Any]] = {}
    for master, parameters in _groups(zero):
        flat = optimizer.state.get(master, {})
        for parameter in parameters if flat else ():
            states[parameter] = {
                key: safe_get_full_optimizer_state(parameter, key)
                if isinstance(value, Tensor) and value.shape == master.shape
                else copy.deepcopy(value)
                for key, value in flat.items()
            }
    return states


def _groups(zero: Any) -> Iterator[tuple[Tensor, list[Any]]]:
    return zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)


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
