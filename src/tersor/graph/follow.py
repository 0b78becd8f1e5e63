"""Run a model once and follow every parameter's labels through it, below Python, operator by operator."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from tersor.errors import TraceError
from tersor.graph import constants, contractions, indexing, movement, recurrent, reductions
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
from tersor.graph.rules import (
    COPIES,
    MOVEMENT,
    Call,
    Fields,
    Rule,
    base_name,
    find_module_rule,
    find_rule,
    preserves_values,
)
from tersor.graph.zeros import stays_zero

RULE_MODULES = (constants, contractions, indexing, movement, recurrent, reductions)
"""The modules whose import registers the rules."""

ENOUGH = 2
"""Samples of a batch that a run needs; one would hide what broadcasts along the batch."""

ONE_HEAD = (
    ("in_proj_weight", 0),
    ("q_proj_weight", 0),
    ("k_proj_weight", 0),
    ("v_proj_weight", 0),
    ("out_proj.weight", 1),
)
"""Tensors of torch's attention and the dimension along which they hold heads; its code knows heads only as a whole."""

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Propagation:
    """What one run of the model said.

    Attributes:
        ledger: all labels, joins and freezes.
        live: for each tick of the ledger's clock, whether that operator's result reaches an output of the model.
        unknown: operators without a rule that touched labels, with the number of calls.
        unused: parameters that no operator touched in this run.
        steps: operators that compute, in order, with the shape and labels of each of their results; None where a module
            was followed as one step.
        inputs: what the model was run on.
        outputs: where asked for: for each tensor that a module call returned, in order, the module's name and the
            labels of the tensor, which say what remains of it when labels leave.
    """

    ledger: Ledger
    live: np.ndarray
    unknown: Mapping[str, int]
    unused: tuple[str, ...]
    steps: list[Step] | None
    inputs: Any
    outputs: tuple[tuple[str, Fields], ...]


Step = tuple[str, list[tuple[tuple[int, ...], Fields]]]
UNSTEADY = frozenset({*MOVEMENT, *COPIES, *constants.MAKING, *constants.ALIKE, "copy"})
"""Operators that may or may not run, as the memory layout has it."""


class _Fact(NamedTuple):
    """What is known of a tensor.

    Attributes:
        labels: of its dimensions.
        is_weight: it is a parameter, as it is or reshaped.
        is_zero: it is zero at every index that leaves, once everything that leaves with it is masked.
    """

    labels: Fields
    is_weight: bool
    is_zero: bool


NOTHING = _Fact({}, False, False)


class _Mode(TorchDispatchMode):
    """A mode that torch's compiler, which is slow to import, has no part in."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _Follower(_Mode):
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
        self.steps: list[Step] = []
        self.inside = 0  # how many modules that are followed as one step are running
        self._writer: dict[int, int] = {}
        self._sources: list[tuple[int, ...]] = [()]
        self._sinks: list[int] = []

    def learn(self, tensor: Tensor, labels: Fields, *, is_weight: bool = False, is_zero: bool = False) -> None:
        """Remember what is known of a tensor."""
        key = _key(tensor)
        self._facts[key] = _Fact(labels, is_weight, is_zero)
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
        self._tick({key[0] for key in keys}, outputs)
        if self.inside:
            return result
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        call = Call(func, arguments, result, self.ledger, lambda tensor: facts.get(id(tensor), NOTHING))
        touched = base_name(func) in constants.MAKING or any(f.labels for f in facts.values())
        touched = touched and any(tensor.numel() for tensor in outputs)
        if func._schema.is_mutable and base_name(func) in MOVEMENT and _same_layout(keys[0], _key(operands[0])):
            labels: Any = facts[id(operands[0])].labels
        else:
            labels = self._apply(call, operands, facts) if touched else {}
        each = labels if isinstance(labels, list) else [labels] * len(outputs)
        writes = func._schema.is_mutable and operands and not preserves_values(func)
        if writes:
            self._forget_values(operands[0])
        if base_name(func) not in UNSTEADY:
            sized = zip(outputs, each, strict=True)
            self.steps.append((base_name(func), [(tuple(tensor.shape), own) for tensor, own in sized]))
        is_weight = preserves_values(func) and all(fact.is_weight for fact in facts.values())
        for tensor, own in zip(outputs, each, strict=True):
            self.learn(tensor, own, is_weight=is_weight, is_zero=bool(own) and stays_zero(call, own))
        return result

    def _tick(self, read: set[int], outputs: list[Tensor]) -> None:
        """Note which earlier operators this one's result rests on. A tensor rests on all that wrote its storage."""
        self.ledger.clock += 1
        written = {_key(tensor)[0] for tensor in outputs}
        self._sources.append(tuple({self._writer[key] for key in read | written if key in self._writer}))
        if not outputs:
            self._sinks.append(self.ledger.clock)  # its result is a Python value, on which the model may decide
        for key in written:
            self._writer[key] = self.ledger.clock

    def live(self, results: Sequence[Tensor]) -> np.ndarray:
        """For each operator, whether its result reaches one of these tensors, or a decision of the model's code."""
        live = np.zeros(len(self._sources), dtype=bool)
        live[self._sinks] = True
        live[[self._writer[_key(tensor)[0]] for tensor in results if _key(tensor)[0] in self._writer]] = True
        for clock in range(len(live) - 1, 0, -1):
            if live[clock]:
                live[list(self._sources[clock])] = True
        return live

    def _apply(self, call: Call, operands: list[Tensor], facts: dict[int, _Fact]) -> Fields | list[Fields]:
        rule = find_rule(call.operator)
        name = call.name
        if rule is not None:
            labels = rule(call)
            writes = call.operator._schema.is_mutable and len(facts) > 1
            if not writes or set(labels) <= set(facts[id(operands[0])].labels) or not self._is_shared(operands[0]):
                return labels
            call.freeze(labels, f"'{name}' writes it into a view")
            return {}
        self.unknown[name] += 1
        for fact in facts.values():
            call.freeze(fact.labels, f"meets '{name}', which has no rule")
        return {}

    def _forget_values(self, written: Tensor) -> None:
        """A parameter's copy that was changed in place is no parameter any more, in whatever shape it is seen."""
        for key in self._views.get(_key(written)[0], ()):
            self._facts[key] = _Fact(self._facts[key].labels, False, False)

    def _is_shared(self, written: Tensor) -> bool:
        """Whether the tensor that is written in place is also seen in another shape."""
        key = _key(written)
        return len(self._views.get(key[0], set()) - {key}) > 0

    def step_through(self, module: nn.Module, rule: Rule) -> list[RemovableHandle]:
        """Follow a module as one step, by the rule that the user gave for its type."""
        names = list(inspect.signature(module.forward).parameters)
        own = {**module._parameters, **module._buffers}
        given: list[dict[str, Any]] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.inside += 1
            given.append({**own, **dict(zip(names, args, strict=False)), **kwargs})

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self.inside -= 1
            arguments = given.pop()
            if self.inside:
                return
            outputs = tensors_of(output)
            self._tick({_key(tensor)[0] for tensor in tensors_of(arguments)}, outputs)
            labels = rule(Call(type(module), arguments, output, self.ledger, self.fact))
            each = labels if isinstance(labels, list) else [labels] * len(outputs)
            for tensor, fields in zip(outputs, each, strict=True):
                self.learn(tensor, fields)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]


class _ShapeRecorder(_Mode):
    """Notes the operators that compute, and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if base_name(func) not in UNSTEADY:
            self.steps.append((base_name(func), [tuple(tensor.shape) for tensor in _operands((result,))]))
        return result


def shapes_in(model: nn.Module, inputs: Any) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The operators that compute in one run of a model, in order, with the shapes of their results.

    Raises:
        TraceError: the model does not run on the inputs.
    """
    recorder = _ShapeRecorder()
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), recorder:
        run(model, copied(inputs))
    return recorder.steps


class _Nodes(nn.Module):
    """Runs a graph node by node and notes the labels of what each returns."""

    def __init__(self, graph_module: fx.GraphModule, follower: _Follower, outputs: list[tuple[str, Fields]]) -> None:
        super().__init__()
        self._placeholders = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._interpreter = _Interpreter(graph_module, follower, outputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's result."""
        return self._interpreter.run(*args, *(kwargs[name] for name in self._placeholders[len(args) :]))


class _Interpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, follower: _Follower, outputs: list[tuple[str, Fields]]) -> None:
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


def _same_layout(before: Key, after: Key) -> bool:
    """Whether the strides of the same tensor differ only where its size is 1."""
    strides = zip(before[2], before[3], after[3], strict=False)
    return before[:3] == after[:3] and all(size == 1 or a == b for size, a, b in strides)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided


def follow(
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
            return _follow(model, few, record_outputs=record_outputs, record_nodes=record_nodes)
        except TraceError:  # the first dimension is no batch, or its size stands in the code: all of it, then
            pass
    return _follow(model, example_inputs, record_outputs=record_outputs, record_nodes=record_nodes)


def _follow(model: nn.Module, example_inputs: Any, *, record_outputs: bool, record_nodes: bool) -> Propagation:
    ledger = Ledger()
    follower = _Follower(ledger)
    # Two parameters over the same values are one, as two names of one parameter are.
    owners: dict[Key, tuple[Tensor, list[str]]] = {}
    for name, tensor in named_tensors(model).items():
        owners.setdefault(_key(tensor), (tensor, []))[1].append(name)
    for tensor, names in owners.values():
        labels: Fields = {
            dim: ledger.add_axis(tuple(names), tensor, dim) for dim in range(tensor.dim()) if tensor.shape[dim] > 1
        }
        is_parameter = isinstance(tensor, nn.Parameter)
        follower.learn(tensor, labels, is_weight=is_parameter, is_zero=is_parameter)
    outputs: list[tuple[str, Fields]] = []
    graph = model if record_nodes and isinstance(model, fx.GraphModule) else None
    called = model if graph is None else _Nodes(graph, follower, outputs)
    with ExitStack() as stack:
        if record_outputs:
            module_names = {module: name for name, module in model.named_modules()}

            def record(module: nn.Module, args: Any, output: Any) -> None:
                name = module_names.get(module, "")
                outputs.extend((name, dict(follower.fact(tensor).labels)) for tensor in tensors_of(output))

            stack.callback(register_module_forward_hook(record).remove)
        customized = {module: rule for module in model.modules() if (rule := find_module_rule(module)) is not None}
        for module, rule in customized.items():
            for handle in follower.step_through(module, rule):
                stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # its steps are operators that have rules
        stack.enter_context(follower)
        results = tensors_of(run(called, copied(example_inputs)))
    for tensor in results:
        for vector in follower.fact(tensor).labels.values():
            ledger.freeze(vector, "is the model's own output")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.num_heads == 1:
            for axis in ledger.axes:
                if (axis.name.removeprefix(f"{name}." if name else ""), axis.dim) in ONE_HEAD:
                    ledger.freeze(axis.labels, "stands within the only head of a MultiheadAttention")
    unused = tuple(names[0] for key, (_, names) in owners.items() if key[0] not in follower.used)
    steps = None if customized else follower.steps
    live = follower.live(results)
    return Propagation(ledger, live, dict(follower.unknown), unused, steps, example_inputs, tuple(outputs))
