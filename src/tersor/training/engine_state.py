"""What a DeepSpeed engine does to a model and an optimizer, taken back when it is destroyed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from tersor.training import zero3
from tersor.wrapping.sharding import is_sliced

_FLAT = (("single_partition_of_fp32_groups", "bit16_groups"), ("fp32_partitioned_groups_flat", "fp16_groups"))
"""Where ZeRO's optimizers of stages 1 and 2, and of stage 3, keep flat master weights, and their parameters."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class WholeAgain:
    """A model and an optimizer as they are before an engine is made of them.

    ZeRO makes views of one flat tensor of the parameters, or slices, hangs its own on them and on modules, and puts
    flat master weights into the optimizer's groups. The optimizer's state is handed over to these in parts and taken
    back in parts.

    Attributes:
        engine: the engine, as soon as there is one.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.engine: Any = None
        self._model = model
        self._optimizer = optimizer if isinstance(optimizer, Optimizer) else None
        self._tensors = [*model.parameters(), *model.buffers()]
        self._kinds = [tensor.dtype for tensor in self._tensors]
        self._own = [dict(vars(tensor)) for tensor in self._tensors]
        self._hooks = [
            (registry, set(registry)) for module in model.modules() for registry in (vars(module)[of] for of in _HOOKS)
        ]
        self._modules = [(module, set(vars(module))) for module in model.modules()]
        self._linear = functional.linear  # stage 3 puts its own in its place, for the whole process
        self._groups: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._states: dict[Tensor, dict[str, Any]] = {}
        if self._optimizer is not None:
            self._groups = [(group, {**group, "params": [*group["params"]]}) for group in self._optimizer.param_groups]
            self._states = dict(self._optimizer.state)

    @torch.no_grad()
    def give_state(self) -> None:
        """Hand the optimizer's state over to the engine's flat master weights, where there are such."""
        if self._optimizer is None or not self._states:
            return
        flat = {id(of) for group in self._optimizer.param_groups for of in group["params"]}
        if all(id(parameter) in flat for parameter in self._states):
            return  # they are the parameters themselves
        self._optimizer.state.clear()
        for master, parameters in flat_groups(self.engine.optimizer):
            state = self._optimizer.state[master]
            for parameter in parameters:
                for key, value in self._states.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.dim():
                        _put(parameter, value, key, state, master)
                    else:
                        state[key] = copy.deepcopy(value)

    @torch.no_grad()
    def take_back(self) -> None:
        """Destroy the engine; model and optimizer are whole again, with what they have learnt."""
        zero = getattr(self.engine, "optimizer", None)
        flat = bool(flat_groups(zero))
        values = [self._master(tensor) if flat else tensor.detach() for tensor in self._tensors]
        states = self._learnt_states(zero) if flat else {} if self._optimizer is None else dict(self._optimizer.state)
        if self.engine is not None:
            self.engine.destroy()
            self.engine.optimizer = None  # an engine destroys again when it is collected, then maybe under the next one
        for tensor, kind, own, value in zip(self._tensors, self._kinds, self._own, values, strict=True):
            tensor.grad = None
            tensor.data = value.to(kind, copy=True)
            vars(tensor).clear()
            vars(tensor).update(own)
        functional.linear = self._linear
        for module, names in self._modules:
            zero3.leave(module, names)
        for registry, names in self._hooks:
            for name in [name for name in registry if name not in names]:
                del registry[name]
        if self._optimizer is not None:
            for group, own in self._groups:
                group.update({"params": own["params"]})
            self._optimizer.param_groups[:] = [group for group, _ in self._groups]
            self._optimizer.state.clear()
            self._optimizer.state.update(states)

    def _master(self, tensor: Tensor) -> Tensor:
        """The float32 value of a parameter that the engine trains; else its own."""
        from deepspeed.utils import safe_get_full_fp32_param

        if is_sliced(tensor):
            return zero3.value_of(tensor)
        whole = safe_get_full_fp32_param(tensor) if hasattr(tensor, "_hp_mapping") else None
        return tensor.detach() if whole is None else whole

    def _learnt_states(self, zero: Any) -> dict[Tensor, dict[str, Any]]:
        """The state of the optimizer by parameter, as it is now."""
        from deepspeed.utils import safe_get_full_optimizer_state

        states: dict[Tensor, dict[str, Any]] = {}
        if self._optimizer is None:
            return states
        for master, parameters in flat_groups(zero):
            flat = self._optimizer.state.get(master, {})
            for parameter in parameters if flat else ():
                states[parameter] = {
                    key: safe_get_full_optimizer_state(parameter, key)
                    if isinstance(value, Tensor) and value.shape == master.shape
                    else copy.deepcopy(value)
                    for key, value in flat.items()
                }
        return states


def flat_groups(zero: Any) -> list[tuple[Tensor, list[Any]]]:
    """The flat master weights that an engine's optimizer steps, each with its parameters; none where there are none."""
    for masters, groups in _FLAT:
        if hasattr(zero, masters):
            return list(zip(getattr(zero, masters), getattr(zero, groups), strict=True))
    return []


def _put(parameter: Any, value: Tensor, key: str, state: dict[str, Any], master: Tensor) -> None:
    """Put what this process keeps of a parameter's state into the flat one."""
    from deepspeed.utils import safe_set_local_optimizer_state

    mapping = getattr(parameter, "_hp_mapping", None)  # None where another process has this parameter
    if is_sliced(parameter):
        state.setdefault(key, torch.zeros_like(master))
        safe_set_local_optimizer_state(parameter, zero3.own_slice(parameter, value), key)
    elif mapping is not None:
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        part = state.setdefault(key, torch.zeros_like(master)).narrow(0, here.start, here.numel)
        part.copy_(value.flatten().narrow(0, there.start, there.numel))


@contextmanager
def left_whole(model: nn.Module, optimizer: Any) -> Iterator[WholeAgain]:
    """Take back what an engine does to a model and an optimizer, when its training is over or has failed."""
    kept = WholeAgain(model, optimizer)
    try:
        yield kept
    finally:
        kept.take_back()
