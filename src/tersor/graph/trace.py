"""Trace a model by running it: real values, every call of torch's API, sizes that remember where they came from."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tersor.graph.inputs import as_call, copied, evaluating, named_tensors, run, tensors_of


class TracedInt(int):
    """A size of a tensor, or what was computed from one: an int that knows its node in the graph.

    Arithmetic is recorded. What a graph cannot follow (a comparison, a conversion to float) is noted as a decision.
    """

    node: fx.Node
    decisions: list[str]

    @staticmethod
    def make(value: int, node: fx.Node, decisions: list[str]) -> TracedInt:
        """An int of this value that stands for a node."""
        traced = TracedInt(value)
        traced.node = node
        traced.decisions = decisions
        return traced

    __hash__ = int.__hash__


def _recorded(name: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    function: Callable[[Any, Any], Any] = getattr(operator, name)

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            self.decisions.append(f"a size in '{name}'")
            return getattr(int(self), f"__{'r' if reflected else ''}{name}__")(other)
        left, right = (other, self) if reflected else (self, other)
        value = function(int(left), int(right))
        arguments = tuple(side.node if isinstance(side, TracedInt) else side for side in (left, right))
        return TracedInt.make(value, self.node.graph.call_function(function, arguments), self.decisions)

    return method


def _decided(name: str) -> Callable[..., Any]:
    def method(self: TracedInt, *args: Any) -> Any:
        self.decisions.append(f"a size in '{name.strip('_')}'")
        return getattr(int(self), name)(*args)

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    setattr(TracedInt, f"__{_name}__", _recorded(_name, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _recorded(_name, reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "bool", "float", "truediv", "rtruediv", "pow", "rpow", "neg", "abs"):
    setattr(TracedInt, f"__{_name}__", _decided(f"__{_name}__"))


class _Shape(tuple[int, ...]):
    """What ``tensor.shape`` is while tracing: a tuple of traced sizes."""

    def numel(self) -> int:
        """The product of the sizes."""
        product: int = 1
        for size in self:
            product = size * product
        return product


DECISIONS = frozenset(
    {"__bool__", "__int__", "__float__", "__index__", "__len__", "item", "tolist", "numpy", "__array__"}
)
"""Methods that turn a tensor into a Python value, on which code can decide."""


class _Tracer(TorchFunctionMode):
    """Records every call of torch's API outside leaf modules as a node, with real results.

    Which node made a tensor is known by the tensor's identity; everything seen is kept until the end.
    """

    def __init__(self, model: nn.Module, leaf_types: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._leaf_types = leaf_types
        self._names = {module: name for name, module in model.named_modules() if name}
        self._attributes = {id(tensor): name for name, tensor in named_tensors(model).items()}
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []
        self._entered: list[nn.Module] = []
        self.decisions: list[str] = []

    def remember(self, value: Any, node: fx.Node) -> None:
        """A result and the node that made it; tensors inside containers are reached by item."""
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
            self._alive.append(value)
        elif isinstance(value, (tuple, list, Mapping)):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                if tensors_of(item):
                    self.remember(item, self.graph.call_function(operator.getitem, (node, key)))

    def argument(self, value: Any) -> Any:
        """A value as it stands in the graph: nodes in place of tensors and traced sizes."""
        if isinstance(value, TracedInt):
            return value.node
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, (_Shape, torch.Size)):
            return tuple(self.argument(item) for item in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.graph.call_function(type(value), tuple(self.argument(item) for item in value))
        if isinstance(value, (tuple, list)):
            return type(value)(self.argument(item) for item in value)
        if type(value) is dict:
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(item) for item in (value.start, value.stop, value.step)))
        if isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
            items = value.items() if isinstance(value, Mapping) else vars(value).items()
            return self.graph.call_function(type(value), (), {key: self.argument(item) for key, item in items})
        return value

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            name = self._attributes.get(id(tensor))
            if name is None:
                name = f"_constant_{len(self.constants)}"
                self.constants[name] = tensor
            self.remember(tensor, self.graph.get_attr(name))
        return self._nodes[id(tensor)]

    def watch_leaves(self) -> list[RemovableHandle]:
        """Hooks on the leaf modules, whose own hooks run inside them."""
        handles = []
        for module in self._names:
            if isinstance(module, self._leaf_types):
                handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        return handles

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._entered.append(module)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._entered.pop()
        if not self._entered:
            node = self.graph.call_module(self._names[module], self.argument(args), self.argument(kwargs))
            self.remember(output, node)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        if self._entered:
            return result
        name = getattr(func, "__name__", "")
        getter = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if getter == "shape" or func is Tensor.size:
            return self._sizes(args[0], result, *args[1:], **kwargs)
        if name in DECISIONS:
            self.decisions.append(f"a tensor's {name}")
        if not tensors_of(result) and func is not Tensor.__setitem__:
            return result
        arguments, keywords = self.argument(tuple(args)), self.argument(kwargs)
        if getter:
            node = self.graph.call_function(getattr, (arguments[0], getter))
        elif getattr(Tensor, name, None) is func:
            node = self.graph.call_method(name, arguments, keywords)
        else:
            node = self.graph.call_function(func, arguments, keywords)
        self.remember(result, node)
        return result

    def _sizes(self, tensor: Tensor, result: Any, dim: int | None = None) -> Any:
        node = self.argument(tensor)
        if isinstance(result, int):
            return TracedInt.make(result, self.graph.call_method("size", (node, dim)), self.decisions)
        nodes = [self.graph.call_method("size", (node, d)) for d in range(len(result))]
        return _Shape(TracedInt.make(*pair, self.decisions) for pair in zip(result, nodes, strict=True))


OPEN = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
LEAVES = tuple(
    kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module) and kind not in OPEN
)
"""Module types of torch.nn that stay whole: all but its containers."""


def concrete_trace(
    model: nn.Module, example_inputs: Any, *, leaf_types: tuple[type[nn.Module], ...] = ()
) -> fx.GraphModule:
    """Trace a model by running it once on real values.

    Control flow on values and shapes follows the example. Sizes that the code takes from tensors stay free, so the
    graph runs at another batch size; sizes that stand in the code as numbers stay numbers. The graph's modules and
    parameters are the model's own objects, under the same names. What the code decides on (a comparison of sizes, a
    tensor as a condition) is frozen as the example has it, in eval mode, and listed in ``meta["decisions"]``.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        leaf_types: module types to keep whole, besides those of ``torch.nn``.

    Raises:
        TraceError: the model does not run on these inputs.

    >>> traced = concrete_trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.zeros(3, 4))
    >>> [node.target for node in traced.graph.nodes if node.op == "call_module"]
    ['0', '1']
    """
    example_inputs = copied(example_inputs)
    args, kwargs = as_call(example_inputs)
    tracer = _Tracer(model, (*leaf_types, *LEAVES))
    names = list(inspect.signature(model.forward).parameters)
    positional = {(names[i] if i < len(names) else f"input_{i}"): value for i, value in enumerate(args)}
    for name, value in {**positional, **kwargs}.items():
        tracer.remember(value, tracer.graph.placeholder(name))
    with ExitStack() as stack:
        for handle in tracer.watch_leaves():
            stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(tracer)
        result = run(model, example_inputs)
    tracer.graph.output(tracer.argument(result))
    traced = _graph_module(model, tracer)
    traced.meta["decisions"] = tuple(dict.fromkeys(tracer.decisions))
    return traced


def _graph_module(model: nn.Module, tracer: _Tracer) -> fx.GraphModule:
    root: dict[str, Any] = dict(tracer.constants)
    modules, tensors = dict(model.named_modules()), named_tensors(model)
    for node in tracer.graph.nodes:
        if node.op == "call_module":
            root[node.target] = modules[node.target]
        elif node.op == "get_attr" and node.target not in root:
            root[node.target] = tensors[node.target]
    traced = fx.GraphModule(root, tracer.graph, type(model).__name__)
    for name, module in traced.named_modules():
        if name not in modules or module is not modules[name]:
            module.training = modules[name].training if name in modules else model.training
    return traced
