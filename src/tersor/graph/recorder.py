"""What a model calls while it runs: functions of torch's Python API, operators below it, sizes and items."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from tersor.graph.modes import Mode
from tersor.graph.nodes import Nodes
from tersor.graph.sizes import Shape, traced

METHODS = {getattr(Tensor, name): name for name in dir(Tensor) if callable(getattr(Tensor, name))}
"""Under which name a tensor has each of its methods."""

SIZES = frozenset({"size", "stride", "numel", "nelement", "storage_offset"})

DECISIONS = frozenset(
    {"__bool__", "__int__", "__float__", "__complex__", "__index__", "__len__", "__contains__", "__format__"}
    | {"is_nonzero", "equal", "allclose", "numpy", "__array__", "__dlpack__", "tolist", "_local_scalar_dense.default"}
)
"""Functions that turn the values of a tensor into what a graph does not see, on which code can decide."""

BLANK = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

SHAPED = ("_like", "_as", "new_")
"""Parts of the names of functions that take no more than the shape and type of a tensor."""

LONGEST_LIST = 256
"""Up to how many numbers of ``tensor.tolist()`` stay free."""


class Call(NamedTuple):
    """A call of a leaf module that has begun: its arguments, as values and as nodes, and what they were before."""

    values: tuple[Any, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fingerprint: tuple[Any, ...]


class Recorder(TorchFunctionMode):
    """Records every call outside leaf modules as a node, with real results.

    Args:
        nodes: where to.
        draws: also mark the nodes that draw random numbers.
    """

    def __init__(self, nodes: Nodes, *, draws: bool = False) -> None:
        super().__init__()
        self.nodes = nodes
        self._draws = draws
        self._sizes: dict[tuple[Any, ...], fx.Node] = {}
        self._blank: dict[int, weakref.ref[Tensor]] = {}

    def is_recording(self) -> bool:
        """Not inside a recorded call, nor under ``torch.vmap``, whose tensors are not those that operators see."""
        return self.nodes.is_open and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing is recorded in this block."""
        before, self.nodes.is_open = self.nodes.is_open, False
        try:
            yield
        finally:
            self.nodes.is_open = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_recording():
            return func(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call a function and record it; sizes and items come back as numbers that know their node."""
        if func is torch.ops.higher_order.cond:
            return self._branch(*args)
        if isinstance(func, torch._ops.HigherOrderOperator):
            raise self.nodes.error(f"the higher-order operator {func} cannot be recorded")
        if func is torch._C._set_grad_enabled:
            self.nodes.gradients.switch(args[0])
        with self.aside():
            for generator in (value for value in kwargs.values() if isinstance(value, torch.Generator)):
                self.nodes.generator(generator)
            before = self._fingerprint(args, kwargs)
            result = func(*args, **kwargs)
            return self._record(func, args, kwargs, result, before != self._fingerprint(args, kwargs))

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator that the dispatcher calls: a node of its own, unless it is part of a recorded call."""
        if self.nodes.is_open and isinstance(func, torch._ops.OpOverload):
            with self.aside():
                args = [self._freed(func, *pair, args[0]) for pair in zip(func._schema.arguments, args, strict=False)]
            return self.call(func, args, kwargs)
        result = func(*args, **kwargs)
        self.nodes.hide(result)
        return result

    def _freed(self, func: Any, argument: Any, value: Any, tensor: Any) -> Any:
        """Sizes come as numbers here; where they are the tensor's own, apart from ones, they are taken from it."""
        sizes = value if isinstance(value, (tuple, list)) else [value]
        if not (_takes_sizes(argument.real_type) and any(isinstance(n, int) and 1 < n < 2**62 for n in sizes)):
            return value
        own = [(dim, size) for dim, size in enumerate(tensor.shape) if size != 1] if sizes is value else []
        if [size for _, size in own] != [size for size in sizes if size != 1]:
            self.nodes.decisions.append(f"sizes in code that is not Python's ({func})")
            return value
        free = iter([self._measured("size", tensor, size, dim) for dim, size in own])
        return [size if size == 1 else next(free) for size in sizes]

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A leaf module is called; what happens until its end is its own business."""
        with self.aside():
            values, nodes = (*args, *kwargs.values()), self.nodes
            call = Call(values, nodes.argument(args), nodes.argument(kwargs), self._fingerprint(args, kwargs))
        self.nodes.is_open = False
        return call

    def end(self, call: Call, name: str, output: Any, *, is_pure: bool) -> None:
        """The leaf module has returned; what it changed in the objects it was given is read back."""
        args, kwargs = call.args, call.kwargs
        node = self.nodes.add("call_module", name, args, kwargs)
        if not is_pure or call.fingerprint != self._fingerprint(call.values, {}):
            node.meta["impure"] = True
        self.nodes.remember(output, node)
        for value, argument in zip(call.values, (*args, *kwargs.values()), strict=True):
            if isinstance(argument, fx.Node):
                self.nodes.remember(value, argument, unknown_only=True)
        self.nodes.is_open = True

    def drop(self, call: Call | None) -> None:
        """The call has failed, and the model may go on without it."""
        if call is not None:
            self.nodes.is_open = True

    def _fingerprint(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """What changes when tensors are written or random numbers drawn."""
        found: list[Any] = [tensor._version for tensor in _tensors(args, kwargs) if not tensor.is_inference()]
        if self._draws:
            generators = [torch.default_generator, *(v for v in kwargs.values() if isinstance(v, torch.Generator))]
            generators += torch.cuda.default_generators if torch.cuda.is_initialized() else ()
            found += [generator.get_state().numpy().tobytes() for generator in generators]
        return tuple(found)

    def _branch(self, condition: Any, if_true: Any, if_false: Any, operands: Any) -> Any:
        """``torch.cond``: the branch that the example takes."""
        with self.aside():
            self.nodes.decide("a tensor in torch.cond", self.nodes.argument(condition))
            branch = if_true if condition else if_false
        with self:
            return branch(*operands)

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, is_impure: bool) -> Any:
        nodes, name = self.nodes, getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            owner = func.__self__
            return self._accessed(name, getattr(owner, "__name__", "") or owner.fget.__name__, args, result)
        if name in SIZES and args:
            return self._measured(name, args[0], result, *args[1:], *kwargs.values())
        if name == "item" or (name == "tolist" and args[0].numel() <= LONGEST_LIST):
            return self._number(result, nodes.add("call_method", name, (nodes.argument(args[0]),), spare=True))
        if name in DECISIONS:
            nodes.decide(f"a tensor's {name}", nodes.argument(next(_tensors(args, kwargs))))
        if not is_impure and next(_tensors(result), None) is None:
            return result
        if name == "__deepcopy__":
            func, args = Tensor.clone, args[:1]
        method = METHODS.get(func, "")
        arguments = tuple(nodes.whole(arg) if type(arg) in (list, tuple) else nodes.argument(arg) for arg in args)
        keywords = nodes.argument(kwargs)
        node = nodes.add("call_method" if method else "call_function", method or func, arguments, keywords)
        if is_impure or (method.endswith("_") and not method.endswith("__")):
            node.meta["impure"] = True
        nodes.remember(result, node)
        self._check_blank(name.split(".")[0], _tensors(args, kwargs), result)
        return result

    def _check_blank(self, name: str, arguments: Iterator[Tensor], result: Any) -> None:
        """What reads memory that nothing was seen to write reads what a kernel has written, unseen."""
        if name in BLANK and result.numel():
            self._blank[id(result)] = weakref.ref(result)
        if not self._blank or any(part in name for part in SHAPED):
            return
        for tensor in arguments:
            blank = self._blank.get(id(tensor))
            if blank is None or blank() is not tensor or tensor._version:
                continue
            if all(tensor.untyped_storage()._cdata != made.untyped_storage()._cdata for made in _tensors(result)):
                raise self.nodes.error(f"'{name}' reads a tensor that is written by code which torch does not see")

    def _accessed(self, access: str, name: str, args: Any, result: Any) -> Any:
        """An attribute of a tensor, read or written."""
        if access == "__set__":
            node = self.nodes.add("call_function", setattr, self.nodes.argument((args[0], name, args[1])))
            node.meta["impure"] = True
            self._sizes.clear()
        elif name == "shape":
            return self._measured("size", args[0], result)
        elif isinstance(result, Tensor):
            self.nodes.remember(result, self.nodes.add("call_function", getattr, (self.nodes.argument(args[0]), name)))
        return result

    def _measured(self, name: str, tensor: Tensor, result: Any, *dims: Any) -> Any:
        """A size, or all sizes: one node each, however often they are asked for."""
        if not isinstance(result, int):
            return Shape(self._measured(name, tensor, size, dim) for dim, size in enumerate(result))
        node = self.nodes.argument(tensor)
        key = node, name, *dims
        if key not in self._sizes:
            self._sizes[key] = self.nodes.add("call_method", name, (node, *dims), spare=True)
        return traced(result, self._sizes[key], self.nodes)

    def _number(self, value: Any, node: fx.Node) -> Any:
        """What ``item`` or ``tolist`` returned: ints and floats stay free, a bool or a complex number is a decision."""
        if isinstance(value, list):
            add, item = self.nodes.add, operator.getitem
            return [self._number(v, add("call_function", item, (node, i), spare=True)) for i, v in enumerate(value)]
        if type(value) in (int, float):
            return traced(value, node, self.nodes)
        self.nodes.decide("a tensor's item", node)
        return value


class Below(Mode):
    """Shows the recorder each operator, so that it learns of those that torch's Python API does not show."""

    supports_higher_order_operators = True

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.operator(func, args, kwargs or {})


def _tensors(*values: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples, lists and dicts, in which functions of torch take and give them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(*value)
        elif isinstance(value, dict):
            yield from _tensors(*value.values())


def _takes_sizes(kind: Any) -> bool:
    """Whether an operator's argument is a size, or a list of them, rather than any other number."""
    while hasattr(kind, "getElementType"):
        kind = kind.getElementType()
    return isinstance(kind, torch._C.SymIntType)
