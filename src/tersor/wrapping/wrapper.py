"""What attaches target stacks to one module: parametrizations for its parameters, hooks for its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from tersor.errors import UnmatchedError, WrapError, nearest
from tersor.targets.activations import INPUT, OUTPUT, replace_input, replace_output
from tersor.wrapping.sharding import GATHER, is_managed
from tersor.wrapping.stack import TargetStack

WEIGHTS = "weights"


class Wrapper:
    """The target stacks of one module, shared by all compressors.

    ``forward`` is never replaced. A parameter is simulated by ``torch.nn.utils.parametrize`` and stays the same object,
    so that an optimizer made before goes on working; an input or output is simulated by a forward hook.

    Attributes:
        own_tensors: names of the parameters and buffers that the module itself holds, in its order; what another
            parametrization computes is not among them.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.stacks: dict[str, TargetStack] = {}
        self.attached = True
        self._handles: dict[str, RemovableHandle] = {}
        self.own_tensors = [*module._parameters, *module._buffers]
        self._not_persistent = set(module._non_persistent_buffers_set)

    def stack(self, target: str) -> TargetStack:
        """The stack of a target; made, and attached, when first asked for.

        Raises:
            UnmatchedError: the module has no such parameter or buffer.
            WrapError: another parametrization computes it from several tensors.
        """
        if target not in self.stacks:
            if not target.startswith((INPUT, OUTPUT)):
                self.tensor(target)
            self.stacks[target] = TargetStack(f"{self.name}.{target}" if self.name else target)
            if self.attached:
                self._attach(target)
        return self.stacks[target]

    def tensor(self, target: str) -> Tensor:
        """The latent parameter or buffer behind a target, without any simulation."""
        tensor = self.module._parameters.get(target)
        tensor = self.module._buffers.get(target) if tensor is None else tensor
        if tensor is not None:
            return tensor
        if parametrize.is_parametrized(self.module, target):
            original = getattr(self.module.parametrizations[target], "original", None)  # pyright: ignore
            if original is None:
                raise WrapError(
                    "is computed from several tensors by another parametrization, so it has no latent value",
                    where=f"{self.name}.{target}",
                    remedy="Remove that parametrization first (torch.nn.utils.parametrize.remove_parametrizations).",
                )
            return original
        own = {**self.module._parameters, **self.module._buffers, **getattr(self.module, "parametrizations", {})}
        raise UnmatchedError(
            f"{parametrize.type_before_parametrizations(self.module).__name__} has no tensor {target!r}",
            where=self.name,
            legal=[name for name, value in own.items() if value is not None],
            remedy=nearest(target, own),
        )

    def attach(self) -> None:
        """Put all stacks in place."""
        if not self.attached:
            self.attached = True
            self._attach_all()

    def detach(self, *, bake: bool = False, baked: set[int] | None = None) -> None:
        """Take all stacks out and give the module back as it was, or with the simulated values written into it.

        Args:
            bake: write masked or quantized values into the parameters first.
            baked: the ids of tensors that are written by now, to which this one's are added: one that is tied is
                written once, since simulating what was simulated may give something else.
        """
        if self.attached:
            self._fold()  # first: what is baked is what the folded parameters come to
        if bake:
            self._bake(set() if baked is None else baked)
        if self.attached:
            self._detach_all()
            self.attached = False

    @torch.no_grad()
    def _fold(self) -> None:
        for target, stack in self._parameter_stacks():
            stack.fold(self.tensor(target))

    def _bake(self, baked: set[int]) -> None:
        for target, stack in self._parameter_stacks():
            tensor = self.tensor(target)
            if id(tensor) in baked:
                continue
            baked.add(id(tensor))
            if any(not isinstance(item, TargetStack) for item in _parametrizations(self.module, target)):
                raise WrapError(
                    "has another parametrization, through which masked values cannot be written",
                    where=stack.target,
                    remedy="Remove that parametrization first (torch.nn.utils.parametrize.remove_parametrizations).",
                )
            with torch.no_grad():
                tensor.copy_(stack(tensor))

    def _parameter_stacks(self) -> Iterable[tuple[str, TargetStack]]:
        return [(name, stack) for name, stack in self.stacks.items() if not name.startswith((INPUT, OUTPUT))]

    def _attach_all(self) -> None:
        for target in self.stacks:
            self._attach(target)

    def _attach(self, target: str) -> None:
        """Put one stack in place. Hooks are made anew for all inputs or outputs together."""
        stack = self.stacks[target]
        if not target.startswith((INPUT, OUTPUT)):
            if next(stack.buffers(), None) is not None:
                stack.to(self.tensor(target).device)
            _register(self.module, target, stack)
            if isinstance(self.module, nn.RNNBase):
                self._hook(WEIGHTS, self.module.register_forward_pre_hook(refresh_flat_weights))
        elif target.startswith(INPUT):
            hook = _InputHook(self._activation_stacks(INPUT))
            self._hook(INPUT, self.module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            self._hook(OUTPUT, self.module.register_forward_hook(_OutputHook(self._activation_stacks(OUTPUT))))

    def _hook(self, kind: str, handle: RemovableHandle) -> None:
        """Keep one hook of a kind."""
        if kind in self._handles:
            self._handles[kind].remove()
        self._handles[kind] = handle

    def _activation_stacks(self, kind: str) -> dict[str, TargetStack]:
        return {name.removeprefix(kind): stack for name, stack in self.stacks.items() if name.startswith(kind)}

    def _detach_all(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        separate_class(self.module)
        for target, stack in self._parameter_stacks():
            applied = _parametrizations(self.module, target)
            if applied == [stack]:
                parametrize.remove_parametrizations(self.module, target, leave_parametrized=False)
            elif stack in applied:
                parametrizations: Any = self.module.parametrizations
                del parametrizations[target][applied.index(stack)]
        self._restore_order()
        if isinstance(self.module, nn.RNNBase):
            refresh_flat_weights(self.module)

    def _restore_order(self) -> None:
        """Removing a parametrization puts a tensor last and makes a buffer persistent; both are put right."""
        self.module._non_persistent_buffers_set.update(self._not_persistent)
        for registry in (self.module._parameters, self.module._buffers):
            for name in [name for name in self.own_tensors if name in registry]:
                registry[name] = registry.pop(name)  # pyright: ignore


def _register(module: nn.Module, target: str, stack: TargetStack) -> None:
    """Register a parametrization without touching the tensor.

    torch sets it anew, and what hangs on its gradient (the hooks of ``DistributedDataParallel``) is lost. So a stand-in
    takes its place meanwhile.

    Raises:
        WrapError: ``fully_shard`` puts the parameter where it was when it was called.
    """
    if target in module._parameters and is_managed(module):
        raise WrapError(
            "its parameters are shared out over processes (fully_shard), and it was no target before that",
            where=stack.target,
            remedy=f"Make it a target of a compressor before fully_shard is called; or: {GATHER}",
        )
    registry: Any = module._parameters if target in module._parameters else module._buffers
    tensor = registry.get(target)
    if tensor is not None:
        stand_in = tensor.detach()
        registry[target] = (
            nn.Parameter(stand_in, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else stand_in
        )
    separate_class(module)
    parametrize.register_parametrization(module, target, stack, unsafe=True)
    if tensor is not None:
        own: Any = module.parametrizations[target]  # pyright: ignore
        (own._parameters if "original" in own._parameters else own._buffers)["original"] = tensor


def separate_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch makes one for each, with a property for each tensor, but a deep copy shares that of its original: it would
    lose its parameters where those of the original are given back.
    """
    if parametrize.is_parametrized(module):
        shared: Any = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _parametrizations(module: nn.Module, target: str) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, target):
        return []
    return list(module.parametrizations[target])  # pyright: ignore


def refresh_flat_weights(module: nn.Module, *_: Any) -> None:
    """Recurrent layers keep their weights a second time, in a list that parametrizations do not reach."""
    layer: Any = module
    layer._flat_weights = [getattr(layer, name) if hasattr(layer, name) else None for name in layer._flat_weights_names]


class _InputHook:
    """Applies stacks to inputs, addressed by position (``0``) or by the name of forward's argument (``x``)."""

    def __init__(self, stacks: Mapping[str, TargetStack]) -> None:
        self.stacks = dict(stacks)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for key, stack in self.stacks.items():
            args, kwargs = replace_input(module, args, kwargs, key, _simulation(stack, module))
        return args, kwargs


class _OutputHook:
    """Applies stacks to outputs, addressed by position or key; None outputs and other types pass untouched."""

    def __init__(self, stacks: Mapping[str, TargetStack]) -> None:
        self.stacks = dict(stacks)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for key, stack in self.stacks.items():
            output = replace_output(output, key, _simulation(stack, module))
        return output


SIMULATION_HOOKS = (_InputHook, _OutputHook)
"""What a wrapper hangs into a module's hooks, besides the refresher of recurrent weights."""


def _simulation(stack: TargetStack, module: nn.Module) -> Callable[[Any], Any]:
    """What a hook of a module does to one of its inputs or outputs."""

    def simulated(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if stack.training != module.training:  # the stack is no part of the module, whose mode does not reach it
            stack.train(module.training)
        stack.shape = value.shape
        return stack(value)

    return simulated
