"""Run a model once and follow every parameter's labels through it, below Python, operator by operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.errors import TraceError
from tersor.graph import contractions, movement, reductions
from tersor.graph.inputs import (
    batch_size,
    copied,
    evaluating,
    first_samples,
    named_tensors,
    refuse_lazy,
    run,
    tensors_of,
)
from tersor.graph.labels import Ledger
from tersor.graph.rules import Call, Labels, base_name, find_rule, preserves_values

RULE_MODULES = (contractions, movement, reductions)
"""The modules whose import registers the rules."""

FIXED = (nn.MultiheadAttention,)
"""Modules whose code computes with their own sizes."""

ENOUGH = 2
"""Samples of a batch that a run needs; one would hide what broadcasts along the batch."""

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Propagation:
    """What one run of the model said.

    Attributes:
        ledger: all labels, joins and freezes.
        unknown: operators without a rule that touched labels, with the number of calls.
        unused: parameters that no operator touched in this run.
        outputs: where asked for: for each tensor that a module call returned, in order, the module's name and the
            labels of the tensor, which say what remains of it when labels leave.
    """

    ledger: Ledger
    unknown: Mapping[str, int]
    unused: tuple[str, ...]
    outputs: tuple[tuple[str, Labels], ...]


class _Fact(NamedTuple):
    """What is known of a tensor: its labels, and whether it is a parameter, as it is or reshaped."""

    labels: Labels
    is_weight: bool


NOTHING = _Fact({}, False)


class _Follower(TorchDispatchMode):
    """Sees every ATen call with real tensors and keeps the labels of each tensor.

    A tensor is known by where its values lie (storage, offset, shape, strides), not by its Python object: autograd
    makes new objects for views. A weak reference to each storage keeps its address from being used twice, but not its
    values alive: the run takes no more memory than the model's own forward pass.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.unknown: Counter[str] = Counter()
        self._facts: dict[Key, _Fact] = {}
        self._views: dict[int, set[Key]] = {}
        self._storages: dict[int, Any] = {}
        self.used: set[int] = set()

    def learn(self, tensor: Tensor, labels: Labels, *, is_weight: bool = False) -> None:
        """Remember what is known of a tensor."""
        key = _key(tensor)
        self._facts[key] = _Fact(labels, is_weight)
        self._views.setdefault(key[0], set()).add(key)
        if key[0] not in self._storages:
            # Without a storage (sparse tensors) the tensor itself is kept, and known by its identity.
            self._storages[key[0]] = StorageWeakRef(tensor.untyped_storage()) if _has_storage(tensor) else tensor

    def fact(self, tensor: Tensor) -> _Fact:
        """What is known of a tensor."""
        return self._facts.get(_key(tensor), NOTHING)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # An operator may change its operand's shape in place, so facts are looked up before it runs.
        operands = _operands((*args, *kwargs.values()))
        keys = [_key(tensor) for tensor in operands]
        facts = {id(tensor): self._facts.get(key, NOTHING) for tensor, key in zip(operands, keys, strict=True)}
        self.used.update(key[0] for key in keys)
        result = func(*args, **kwargs)
        outputs = _operands((result,))
        labels = self._apply(func, args, kwargs, result, facts) if any(f.labels for f in facts.values()) else {}
        each = labels if isinstance(labels, list) else [labels] * len(outputs)
        if func._schema.is_mutable and operands and not preserves_values(func):
            self._forget_weights(operands[0])
        is_weight = preserves_values(func) and all(fact.is_weight for fact in facts.values())
        for tensor, own in zip(outputs, each, strict=True):
            self.learn(tensor, own, is_weight=is_weight)
        return result

    def _apply(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, facts: dict[int, _Fact]
    ) -> Labels | list[Labels]:
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        call = Call(func, arguments, result, self.ledger, lambda tensor: facts.get(id(tensor), NOTHING))
        rule = find_rule(func)
        overwrites = func._schema.is_mutable and len(facts) > 1 and self._has_other_views(args[0])
        if rule is not None and not overwrites:
            return rule(call)
        name = base_name(func)
        self.unknown[name] += 1
        reason = f"'{name}' writes into a view" if overwrites else f"meets '{name}', which has no rule"
        for fact in facts.values():
            call.freeze(fact.labels, reason)
        return {}

    def _forget_weights(self, written: Tensor) -> None:
        """A parameter's copy that was changed in place is no parameter any more, in whatever shape it is seen."""
        for key in self._views.get(_key(written)[0], ()):
            self._facts[key] = _Fact(self._facts[key].labels, False)

    def _has_other_views(self, written: Tensor) -> bool:
        """Whether the tensor that is written in place is also seen in another shape."""
        key = _key(written)
        return len(self._views.get(key[0], set()) - {key}) > 0


class _Nodes(nn.Module):
    """Runs a graph node by node and notes the labels of what each returns."""

    def __init__(self, graph_module: fx.GraphModule, follower: _Follower, outputs: list[tuple[str, Labels]]) -> None:
        super().__init__()
        self._placeholders = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._interpreter = _Interpreter(graph_module, follower, outputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's result."""
        return self._interpreter.run(*args, *(kwargs[name] for name in self._placeholders[len(args) :]))


class _Interpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, follower: _Follower, outputs: list[tuple[str, Labels]]) -> None:
        super().__init__(graph_module)
        self._follower = follower
        self._outputs = outputs

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._outputs.append((n.name, dict(self._follower.fact(result).labels)))
        return result


def _operands(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among an ATen operator's arguments or results, which nest no deeper than a list."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _key(tensor: Tensor) -> Key:
    if not _has_storage(tensor):
        return id(tensor), 0, tuple(tensor.shape), ()
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def propagate(
    model: nn.Module, example_inputs: Any, *, record_outputs: bool = False, record_nodes: bool = False
) -> Propagation:
    """Run ``model`` once, in eval mode and without gradients, and follow the labels of all its parameters and buffers.

    A few samples of a batch say as much as all; where the model does not run on them, all are taken.
    The model is left as it was: no parameter, buffer, hook or train/eval flag changes.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        record_outputs: also record the labels of what each module returns.
        record_nodes: the same for each node of a ``torch.fx.GraphModule``, under the node's name.

    Raises:
        TraceError: the model does not run on these inputs.
    """
    refuse_lazy(model)
    if batch_size(example_inputs) > ENOUGH:
        try:
            few = first_samples(example_inputs, ENOUGH)
            return _propagate(model, few, record_outputs=record_outputs, record_nodes=record_nodes)
        except TraceError:  # the first dimension is no batch, or its size stands in the code: all of it, then
            pass
    return _propagate(model, example_inputs, record_outputs=record_outputs, record_nodes=record_nodes)


def _propagate(model: nn.Module, example_inputs: Any, *, record_outputs: bool, record_nodes: bool) -> Propagation:
    ledger = Ledger()
    follower = _Follower(ledger)
    # Two parameters over the same values are one, as two names of one parameter are.
    owners: dict[Key, tuple[Tensor, list[str]]] = {}
    for name, tensor in named_tensors(model).items():
        owners.setdefault(_key(tensor), (tensor, []))[1].append(name)
    for tensor, names in owners.values():
        labels = {
            dim: ledger.add_axis(tuple(names), tensor, dim) for dim in range(tensor.dim()) if tensor.shape[dim] > 1
        }
        follower.learn(tensor, labels, is_weight=isinstance(tensor, nn.Parameter))
    outputs: list[tuple[str, Labels]] = []
    graph = model if record_nodes and isinstance(model, fx.GraphModule) else None
    called = model if graph is None else _Nodes(graph, follower, outputs)
    with ExitStack() as stack:
        if record_outputs:
            module_names = {module: name for name, module in model.named_modules()}

            def record(module: nn.Module, args: Any, output: Any) -> None:
                name = module_names.get(module, "")
                outputs.extend((name, dict(follower.fact(tensor).labels)) for tensor in tensors_of(output))

            stack.callback(register_module_forward_hook(record).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(follower)
        result = run(called, copied(example_inputs))
    for tensor in tensors_of(result):
        for vector in follower.fact(tensor).labels.values():
            ledger.freeze(vector, "is the model's own output")
    fixed = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, FIXED)}
    for axis in ledger.axes:
        kind = fixed.get(axis.name.rpartition(".")[0])
        if kind:
            ledger.freeze(axis.labels, f"belongs to a {kind}, which computes with its sizes")
    unused = tuple(names[0] for key, (_, names) in owners.items() if key[0] not in follower.used)
    return Propagation(ledger, dict(follower.unknown), unused, tuple(outputs))
