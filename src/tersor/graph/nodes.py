"""Which node stands for which value while a model is traced."""

from __future__ import annotations

import operator
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, ItemsView, Iterator, Set, ValuesView
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tersor.errors import TraceError
from tersor.graph.inputs import named_tensors
from tersor.graph.regions import Autocast, Gradients
from tersor.graph.sizes import Shape, Traced, plain
from tersor.graph.values import LITERALS, attributes, leaves, parts, rebuilt


class Nodes:
    """A graph under construction, and the node of every value in it.

    Which node made a tensor is known by the tensor's identity, through weak references: a trace takes the memory of a
    forward pass. A tensor that no node made is a constant, unless it was made unseen, inside a call.

    Attributes:
        graph: the nodes so far.
        scopes: names of the modules whose forward runs, innermost last.
        constants: tensors and objects that are not the model's parameters or buffers, by the target of their node.
        decisions: what the code decided on.
        is_open: whether what the code does now is recorded.
        gradients: where the code stops them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.graph = fx.Graph()
        self.scopes: list[str] = []
        self.constants: dict[str, Any] = {}
        self.decisions: list[str] = []
        self.is_open = False
        self._tensors = named_tensors(model)
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._known: dict[int, tuple[weakref.ref[Tensor], fx.Node, bool]] = {}
        self._hidden: dict[int, tuple[weakref.ref[Tensor], str]] = {}
        self._stored: dict[tuple[Any, ...], tuple[StorageWeakRef, fx.Node]] = {}
        self._objects: dict[int, fx.Node] = {}
        self._states: list[tuple[Any, list[Any], str]] = []
        self._entered: set[int] = set()
        self._spare: set[fx.Node] = set()
        self.gradients = Gradients(self)
        self._autocast = Autocast(self, {tensor.device.type for tensor in self._tensors.values()} or {"cpu"})

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None, *, spare: bool = False) -> fx.Node:
        """A node, marked with the module that runs; a spare one goes if nobody uses it."""
        self._autocast.follow()
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["module"] = self.scope
        if spare:
            self._spare.add(node)
        return node

    def compute(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> fx.Node:
        """The node of a number computed from sizes."""
        return self.add("call_function", function, self.argument(operands), spare=True)

    def decide(self, what: str, node: fx.Node, value: Any = None) -> None:
        """Note that the code decides on this node, which stays in the graph; ``value`` is what a number was."""
        self.decisions.append(f"{what} in '{self.scope}'" if self.scope else what)
        node.meta["decided"] = value

    # From values to nodes

    def argument(self, value: Any) -> Any:
        """A value as it stands in the graph: nodes in place of tensors, traced sizes and objects that hold some.

        Raises:
            TraceError: it cannot stand in a graph.
        """
        kind = type(value)
        if kind in LITERALS:
            return value
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if isinstance(value, Traced):
            return value.node if value.record is self else plain(value)  # one of another trace comes from a cache
        if kind in (tuple, Shape, torch.Size):
            return tuple(self.argument(item) for item in value)
        if kind is list:
            return [self.argument(item) for item in value]
        if kind is dict and all(type(key) in LITERALS for key in value):
            return {key: self.argument(item) for key, item in value.items()}
        if kind is slice:
            return slice(*(self.argument(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, (np.integer, np.floating)):
            return value.item()
        if isinstance(value, (ValuesView, ItemsView)):
            return self.argument(list(value))
        if isinstance(value, (Iterator, torch.UntypedStorage, torch.TypedStorage)):
            raise self.error(f"a value of type {kind.__name__} has no place in a graph")
        if any(isinstance(leaf, (Tensor, Traced)) for leaf in leaves(value)):
            return self._rebuilt(value)
        return self.constant(value)

    def whole(self, value: Any) -> Any:
        """As :meth:`argument`; tensors that are all that one node returned are that node, however many there are."""
        known = [self._known[id(part)] if isinstance(part, Tensor) and self.knows(part) else None for part in value]
        taken = [entry[1].args for entry in known if entry and entry[1].target is operator.getitem and not entry[2]]
        source = taken[0][0] if taken and len(taken) == len(known) else None
        if isinstance(source, fx.Node) and taken == [(source, index) for index in range(source.meta.get("length", 0))]:
            return source
        return self.argument(value)

    def _rebuilt(self, value: Any) -> fx.Node:
        """The node that makes an object like this one from the nodes of its parts."""
        kind = type(value)
        if id(value) in self._entered:
            raise self.error(f"an object of type {kind.__name__} holds itself")
        self._entered.add(id(value))
        try:
            if isinstance(value, tuple) and hasattr(value, "_fields"):
                return self.add("call_function", kind, tuple(self.argument(item) for item in value), spare=True)
            if isinstance(value, (tuple, list, deque, Set)):
                return self.add("call_function", kind, ([self.argument(item) for item in value],), spare=True)
            state = {name: self.argument(part) for name, part in attributes(value).items()}
            if isinstance(value, defaultdict):
                state["default_factory"] = self.argument(value.default_factory)
            arguments: list[Any] = [self.constant(kind), state]
            if isinstance(value, dict):
                arguments.append([self.argument(pair) for pair in value.items()])
            return self.add("call_function", rebuilt, tuple(arguments), spare=True)
        finally:
            self._entered.remove(id(value))

    def _of_tensor(self, tensor: Tensor) -> fx.Node:
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor:
            node = self._of_unknown(tensor)
            self.remember(tensor, node)
            return node
        _, node, is_stopped = known
        if is_stopped and not self.gradients.are_stopped():
            node = self.add("call_method", "detach", (node,), spare=True)
            node.meta["shape"] = tuple(tensor.shape)
            self._known[id(tensor)] = known[0], node, False
        return node

    def _of_unknown(self, tensor: Tensor) -> fx.Node:
        name = self._names.get(id(tensor))
        if name is not None:
            return self.add("get_attr", name, spare=True)
        hidden = self._hidden.get(id(tensor))
        if hidden is not None and hidden[0]() is tensor:
            raise self.error(
                f"a tensor made inside '{hidden[1]}', of which only the outputs are known, is read here by other ways",
                remedy="Leave the module that makes it out of leaf_types, or put both into one module of leaf_types.",
            )
        stored = self._stored.get(_memory(tensor))
        if stored is not None:  # nn.Parameter(x), say, which is x to the eye of everyone but Python
            return self.add("call_method", "detach", (stored[1],), spare=True)
        return self.constant(tensor, "constant")

    def generator(self, value: torch.Generator) -> None:
        """A generator that the code has made: the graph makes one in the same state."""
        if id(value) not in self._objects:
            arguments = self.constant(value.get_state(), "constant"), value.device
            self._objects[id(value)] = self.add("call_function", generator_at, arguments)
            self._states.append((value, [value], self.scope))

    def constant(self, value: Any, kind: str = "object") -> fx.Node:
        """The node of an object, or of a tensor that no node made, which is the same in every run."""
        if id(value) not in self._objects:
            name = f"_{kind}_{len(self.constants)}"
            while name in self._tensors:
                name = f"_{name}"
            self.constants[name] = value
            self._states.append((value, list(leaves(value)), self.scope))
            self._objects[id(value)] = self.add("get_attr", name, spare=True)
        return self._objects[id(value)]

    def error(self, what: str, *, scope: str | None = None, remedy: str = "") -> TraceError:
        """The error that says in which module tracing stopped, by default the one that runs."""
        where = place(self.scope if scope is None else scope)
        return TraceError(what, where=where, remedy=remedy or "Keep the module whole: name its type in leaf_types.")

    @property
    def scope(self) -> str:
        """The name of the innermost module whose forward runs; empty for the model itself."""
        return self.scopes[-1] if self.scopes else ""

    # From nodes to values

    def remember(self, value: Any, node: fx.Node, *, unknown_only: bool = False) -> None:
        """A value and the node that made it; tensors inside containers and objects are reached step by step."""
        if isinstance(value, Tensor):
            if not value.is_nested:
                node.meta["shape"] = tuple(value.shape)
            before = self._known.get(id(value))
            was_known = before is not None and before[0]() is value
            stopped = before[2] if before is not None and was_known else self.gradients.are_stopped()
            self._known[id(value)] = weakref.ref(value), node, stopped and value.is_floating_point()
            if node.op != "get_attr" and _memory(value):
                self._stored[_memory(value)] = StorageWeakRef(value.untyped_storage()), node
            return
        if isinstance(value, (tuple, list)):
            node.meta["length"] = len(value)
        for take, key, part in parts(value):
            if any(isinstance(leaf, Tensor) and not (unknown_only and self.knows(leaf)) for leaf in leaves(part)):
                taken = self.add("call_function", take, (node, self.argument(key)))
                self.remember(part, taken, unknown_only=unknown_only)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a node made this tensor."""
        known = self._known.get(id(tensor))
        return known is not None and known[0]() is tensor

    def hide(self, value: Any) -> None:
        """Tensors made inside a call: should they turn up outside, they are no constants."""
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor):
                self._hidden[id(tensor)] = weakref.ref(tensor), self.scope

    def owns(self, module: nn.Module) -> bool:
        """Whether a module computes with the model's own tensors, not with others put in their place for this call."""
        for part in module.modules():
            if any(tensor is not None and id(tensor) not in self._names for tensor in part._parameters.values()):
                return False
            for value in (*part._buffers.values(), *vars(part).values()):
                if isinstance(value, Tensor) and id(value) not in self._names and self.knows(value):
                    return False
        return True

    def finish(self, result: Any) -> None:
        """End the graph with what the model returned."""
        self._autocast.follow()
        self.graph.output(self.argument(result))
        for value, state, scope in self._states:
            if list(map(id, leaves(value))) != list(map(id, state)):
                what = f"an object of type {type(value).__name__} is changed after it was given to a module kept whole"
                raise self.error(what, scope=scope, remedy="Leave the module out of leaf_types.")

    def sweep(self, *, everything: bool) -> None:
        """Take out nodes that nobody uses: the spare ones, or all without an effect."""
        for node in reversed(self.graph.nodes):
            is_spare = node in self._spare and "decided" not in node.meta
            is_idle = node.op not in ("placeholder", "output") and "impure" not in node.meta
            if not node.users and (is_spare or (everything and is_idle)):
                self.graph.erase_node(node)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Where the values of a tensor lie; the reference to a storage sees to it that no other takes its place."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return ()
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def generator_at(state: Tensor, device: torch.device) -> torch.Generator:
    """A generator in this state."""
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator


def place(scope: str) -> str:
    """Where in the model, for messages."""
    return f"module '{scope}'" if scope else "the model's own forward"
