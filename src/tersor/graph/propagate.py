"""Run a model once and follow every parameter's labels through it, below Python, operator by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.graph import contractions, movement, reductions
from tersor.graph.inputs import evaluating, named_tensors, run, tensors_of
from tersor.graph.labels import Ledger
from tersor.graph.rules import Call, Labels, base_name, find_rule

RULE_MODULES = (contractions, movement, reductions)
"""The modules whose import registers the rules."""

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class ModuleOutput:
    """The labels of one tensor that a module returned: what remains of it when labels leave.

    Attributes:
        module: the module's name.
        labels: dimension to label vector.
    """

    module: str
    labels: Labels


@dataclass(frozen=True)
class Propagation:
    """What one run of the model said.

    Attributes:
        ledger: all labels, joins and freezes.
        outputs: for each module call in order, the labels of what it returned.
        unknown: operators without a rule that touched labels, with the number of calls.
    """

    ledger: Ledger
    outputs: tuple[ModuleOutput, ...]
    unknown: Mapping[str, int]


class _Follower(TorchDispatchMode):
    """Sees every ATen call with real tensors and keeps the labels of each tensor.

    A tensor is known by where its values lie (storage, offset, shape, strides), not by its Python object: autograd
    makes new objects for views. Everything seen is kept alive until the end, so that no address is used twice.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.unknown: Counter[str] = Counter()
        self._labels: dict[Key, Labels] = {}
        self._activations: set[Key] = set()
        self._views: dict[int, set[Key]] = {}
        self._alive: list[Tensor] = []

    def set(self, tensor: Tensor, labels: Labels, *, is_activation: bool) -> None:
        """Remember a tensor's labels, and whether it depends on the model's input."""
        key = _key(tensor)
        self._labels[key] = labels
        (self._activations.add if is_activation else self._activations.discard)(key)
        self._views.setdefault(key[0], set()).add(key)
        self._alive.append(tensor)

    def get(self, tensor: Any) -> Labels:
        """A tensor's labels; empty where nothing is known."""
        return self._labels.get(_key(tensor), {}) if isinstance(tensor, Tensor) and self._labels else {}

    def is_activation(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the model's input; what does not is a weight, however it was reshaped."""
        return _key(tensor) in self._activations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        operands = tensors_of([args, kwargs])
        is_activation = any(self.is_activation(tensor) for tensor in operands)
        result = func(*args, **kwargs)
        outputs = tensors_of(result)
        touched = [tensor for tensor in operands if self.get(tensor)]
        labels = self._apply(func, args, kwargs, result, touched) if touched else {}
        each = labels if isinstance(labels, list) else [labels] * len(outputs)
        for tensor, own in zip(outputs, each, strict=True):
            self.set(tensor, own, is_activation=is_activation)
        return result

    def _apply(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, touched: list[Tensor]
    ) -> Labels | list[Labels]:
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        call = Call(func, arguments, result, self.ledger, self.get, self.is_activation)
        rule = find_rule(func)
        overwrites = func._schema.is_mutable and self._has_other_views(args) and len(tensors_of(arguments)) > 1
        if rule is not None and not overwrites:
            return rule(call)
        name = base_name(func)
        self.unknown[name] += 1
        for tensor in touched:
            call.freeze(
                self.get(tensor), f"'{name}' writes into a view" if overwrites else f"meets '{name}', which has no rule"
            )
        return {}

    def _has_other_views(self, args: Sequence[Any]) -> bool:
        """Whether the tensor that is written in place is also seen in another shape."""
        key = _key(args[0])
        return len(self._views.get(key[0], set()) - {key}) > 0


def _key(tensor: Tensor) -> Key:
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def propagate(model: nn.Module, example_inputs: Any) -> Propagation:
    """Run ``model`` once, in eval mode and without gradients, and follow the labels of all its parameters and buffers.

    The model is left as it was: no parameter, buffer, hook or train/eval flag changes.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        TraceError: the model does not run on these inputs.
    """
    ledger = Ledger()
    follower = _Follower(ledger)
    owners: dict[Tensor, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        owners.setdefault(tensor, []).append(name)
    for tensor, names in owners.items():
        labels = {
            dim: ledger.add_axis(tuple(names), tensor, dim) for dim in range(tensor.dim()) if tensor.shape[dim] > 1
        }
        follower.set(tensor, labels, is_activation=False)
    for tensor in tensors_of(example_inputs):
        follower.set(tensor, {}, is_activation=True)
    outputs: list[ModuleOutput] = []
    module_names = {module: name for name, module in model.named_modules()}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        name = module_names.get(module, "")
        outputs.extend(ModuleOutput(name, dict(follower.get(tensor))) for tensor in tensors_of(output))

    hook = register_module_forward_hook(record)
    try:
        with evaluating(model), follower:
            result = run(model, example_inputs)
    finally:
        hook.remove()
    for tensor in tensors_of(result):
        for vector in follower.get(tensor).values():
            ledger.freeze(vector, "is the model's own output")
    return Propagation(ledger, tuple(outputs), dict(follower.unknown))
