"""Numbers that know their node: sizes of tensors while a model is traced, and what its code computes from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx


class Record(Protocol):
    """What numbers are recorded in while a trace lasts."""

    is_open: bool
    """Whether calls are recorded now; else, inside a recorded call or after the trace, numbers are ordinary ones."""

    def compute(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> fx.Node:
        """The node of a number computed from others."""
        ...

    def decide(self, what: str, node: fx.Node, value: Any = None) -> None:
        """Note that the code decides on what this node has as its value, which a graph cannot follow."""
        ...


class Traced:
    """A number of the model's code that stands for a node: a size, an item of a tensor, or arithmetic on them."""

    node: fx.Node
    record: Record

    def __copy__(self) -> Traced:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        return self

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(plain(self)), (plain(self),)


class TracedInt(Traced, int):
    """An int that knows its node: ``x.shape[0] // 2`` is recorded, so the batch size stays free.

    Arithmetic is recorded. A comparison or a conversion takes a decision: it is answered as the example has it, and
    noted. Python gives no chance to notice some uses, which freeze it: ``range(size)``, the index of a list, a float
    on its left (``1.0 / size``; ``size ** -1`` is noticed), ``math.log(size)``, numpy.
    """

    __hash__ = int.__hash__


class TracedFloat(Traced, float):
    """A float that knows its node, such as ``x.shape[-1] ** -0.5`` or ``x.max().item()``."""

    __hash__ = float.__hash__


def traced(value: float, node: fx.Node, record: Record) -> Any:
    """A number of this value that stands for a node; a bool stays a bool, as Python has only two."""
    if isinstance(value, bool):
        return value
    number: Any = (TracedInt if isinstance(value, int) else TracedFloat)(value)
    number.node, number.record = node, record
    return number


def plain(value: Any) -> Any:
    """The number without its node; everything else as it is."""
    if isinstance(value, Traced):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)  # pyright: ignore
    return value


def _open_record(operands: tuple[Any, ...]) -> Record | None:
    return next((n.record for n in operands if isinstance(n, Traced) and n.record.is_open), None)


def _apply(function: Callable[..., Any], *operands: Any) -> Any:
    """Compute and record; what is not a number (a tensor, a list to repeat) is left to the other operand."""
    record = _open_record(operands)
    if not all(isinstance(operand, (int, float)) for operand in operands):
        if record is not None and any(isinstance(operand, Sequence) for operand in operands):
            for number in (operand for operand in operands if isinstance(operand, Traced)):
                record.decide("a size in the length of a list", number.node, plain(number))
        return NotImplemented
    value = function(*map(plain, operands))
    if record is None or not isinstance(value, (int, float)):
        return value
    return traced(value, record.compute(function, operands), record)


def _recorded(function: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def method(self: Traced, *others: Any) -> Any:
        return _apply(function, *others, self) if reflected else _apply(function, self, *others)

    return method


def _compared(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Traced, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        value, record = function(plain(self), plain(other)), _open_record((self, other))
        if record is not None and not (isinstance(other, Traced) and other.node is self.node):
            record.decide(f"a size in '{function.__name__}'", record.compute(function, (self, other)), value)
        return value

    return method


def _converted(name: str) -> Callable[[Traced], Any]:
    def method(self: Traced) -> Any:
        if self.record.is_open:
            self.record.decide(f"a size in '{name.strip('_')}'", self.node, plain(self))
        return getattr(plain(self), name)()

    return method


def _divmod(self: Traced, other: Any) -> Any:
    return _apply(operator.floordiv, self, other), _apply(operator.mod, self, other)


def _define(kind: type[Traced]) -> None:
    """The operators of Python's number types: recorded where the result is a number, else noted as a decision."""
    binary = ["add", "sub", "mul", "floordiv", "mod", "truediv", "pow"]
    unary = {"neg": operator.neg, "pos": operator.pos, "abs": operator.abs, "round": round}
    unary |= {"floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}
    if issubclass(kind, int):
        binary += ["lshift", "rshift", "and_", "or_", "xor"]
        unary["invert"] = operator.invert
    for name in binary:
        function = getattr(operator, name)
        setattr(kind, f"__{name.strip('_')}__", _recorded(function))
        setattr(kind, f"__r{name.strip('_')}__", _recorded(function, reflected=True))
    for name, function in unary.items():
        setattr(kind, f"__{name}__", _recorded(function))
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(kind, f"__{name}__", _compared(getattr(operator, name)))
    for name in ("__bool__", "__int__", "__float__", "bit_length" if issubclass(kind, int) else "is_integer"):
        setattr(kind, name, _converted(name))
    setattr(kind, "__divmod__", _divmod)  # noqa: B010


_define(TracedInt)
_define(TracedFloat)


class Shape(tuple[int, ...]):
    """What ``tensor.shape`` is while tracing: a tuple of traced sizes, with the methods of ``torch.Size``."""

    def numel(self) -> int:
        """The product of the sizes."""
        return math.prod(self)

    def __getitem__(self, index: Any) -> Any:
        item = tuple.__getitem__(self, index)
        return Shape(item) if isinstance(index, slice) else item

    def __add__(self, other: Any) -> Any:
        return Shape(tuple.__add__(self, tuple(other)))


def settled(value: Any) -> Any:
    """A value that the code keeps, with ordinary numbers in place of traced ones, in tuples and lists too."""
    if isinstance(value, Shape):
        return torch.Size(map(plain, value))
    if type(value) in (tuple, list):
        return type(value)(map(settled, value))
    return plain(value)
