"""Models whose parameters are shared out over processes by ``torch.distributed.fsdp.fully_shard`` (FSDP2).

In forward and backward such a model has its whole parameters, and simulation is what it always is. In between each
process holds a slice of each; what looks at parameters then asks for :func:`whole`, and all processes ask together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import WrapError

GATHER = "Call tersor.gather_model(model) first, on all processes."
_FSDP = "torch.distributed.fsdp"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks")
_KINDS_OF_HOOKS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_MANAGED = "_is_fsdp_managed_module"
_MARKS = ("__composable_api", _MANAGED, "_fsdp_use_orig_params")


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process holds a slice, gathered from all; any other as it is. Gradients pass through.

    Every process has to call it, on the same tensors in the same order.

    >>> ours = torch.ones(2)
    >>> whole(ours) is ours
    True
    """
    if torch.compiler.is_compiling():  # in forward, where it is whole
        return tensor
    gather = getattr(tensor, "full_tensor", None)  # a DTensor has it, whose class takes half a second to import
    return tensor if gather is None else gather()


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or to a part of it.

    >>> is_sharded(nn.Linear(2, 2))
    False
    """
    return next(_sharded_modules(model), None) is not None


def is_sliced(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO stage 3 has this parameter in its hands.

    >>> is_sliced(torch.ones(2))
    False
    """
    return hasattr(tensor, "ds_id")


def is_managed(module: nn.Module) -> bool:
    """Whether ``fully_shard`` moves the parameters of this module in and out.

    >>> is_managed(nn.Linear(2, 2))
    False
    """
    return hasattr(module, _MANAGED)


def refuse_sharded(model: nn.Module, *, remedy: str = GATHER) -> None:
    """Refuse a sharded model where whole parameters are needed.

    Args:
        model: any.
        remedy: what to do about it.

    Raises:
        WrapError: the model is sharded.
    """
    if is_sharded(model):
        raise WrapError(
            "its parameters are shared out over processes (fully_shard)", where=type(model).__name__, remedy=remedy
        )
    if any(is_sliced(parameter) for parameter in model.parameters()):
        raise WrapError(
            "its parameters are shared out over processes (DeepSpeed's ZeRO stage 3)",
            where=type(model).__name__,
            remedy="Make it outside of deepspeed.zero.Init; DeepspeedTorchEvaluator shares it out for a training.",
        )


@torch.no_grad()
def gather_model(model: nn.Module) -> nn.Module:
    """Undo ``fully_shard`` in place: each process has the whole model afterwards, in its own classes.

    Every process has to call it, between a backward pass and the next forward. An optimizer that was made for the
    slices is of no more use. A model that is not sharded stays as it is.

    Args:
        model: the root that ``fully_shard`` was called on last.

    Returns:
        The model.
    """
    sharded = list(_sharded_modules(model))
    for module in sharded:
        module.reshard()  # what the last forward left whole is no more than a copy
    gathered: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not hasattr(parameter, "full_tensor"):
                continue
            if id(parameter) not in gathered:  # tied parameters stay tied
                gathered[id(parameter)] = nn.Parameter(whole(parameter.detach()), parameter.requires_grad)
            module._parameters[name] = gathered[id(parameter)]
    for module in sharded:
        module.__class__ = next(base for base in type(module).__bases__ if not base.__module__.startswith(_FSDP))
    for module in model.modules():
        _remove_traces(module)
    return model


def _sharded_modules(model: nn.Module) -> Iterator[Any]:
    fsdp = sys.modules.get(_FSDP)  # whoever has sharded a model has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    return (module for module in model.modules() if kind is not None and isinstance(module, kind))


def _remove_traces(module: nn.Module) -> None:
    """What ``fully_shard`` hangs on a module: torch has no call that takes it away again."""
    for registry in _HOOKS:
        hooks: dict[int, Any] = getattr(module, registry)
        for key in [key for key, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith(_FSDP)]:
            del hooks[key]
            for kind in _KINDS_OF_HOOKS:
                getattr(module, kind).pop(key, None)
    for mark in [name for name in vars(module) if name.startswith(_MARKS)]:
        delattr(module, mark)
    states: Any = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    states.pop(module, None)
