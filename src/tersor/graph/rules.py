"""What each ATen operator does to labels.

A tensor's labels are ``{dimensions: array}``. Most often one dimension, ``{1: vector}``: one label for each index
along it. A view that splits a labelled dimension (heads and their sizes, a channel shuffle) gives a *field* over
several dimensions, ``{(2, 3): matrix}``, as long as nothing says which of them decides. A dimension in no entry is
controlled by no parameter. Kinds of operators:

- data movement (``movement.py``, ``indexing.py``): the same operator runs on the labels;
- pointwise operators, known by PyTorch's own tag, join the labels of their operands where these have full size;
- contractions (``contractions.py``), recurrent layers (``recurrent.py``), normalizations, pooling and reductions
  (``reductions.py``) and constants (``constants.py``) have a rule each.

Whatever is not known here freezes the labels that touch it, and is reported: nothing is guessed. A new operator is one
function under :func:`rule`; a user's own operator or module is one under :func:`propagate`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.errors import InvalidValueError
from tersor.graph.labels import UNKNOWN, Ledger

Labels = dict[int, Tensor]
"""One vector of labels for each labelled dimension."""
Dims = int | tuple[int, ...]
Fields = dict[Dims, Tensor]
"""The same, with arrays over several dimensions among them."""


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by name, its result, and what is known so far about its operands."""

    operator: Any
    arguments: dict[str, Any]
    result: Any
    ledger: Ledger
    fact: Callable[[Tensor], Any]

    def labels(self, argument: str, whole: Iterable[int] = ()) -> Labels:
        """Labels of a tensor argument, one vector a dimension; empty for None.

        Args:
            argument: its name.
            whole: dimensions that the operator mixes. Of a field over several dimensions these are tied, so that the
                others decide (scores over a head's size: whole heads live and die).
        """
        value = self.arguments.get(argument)
        return self.labels_of(value, whole) if isinstance(value, Tensor) else {}

    def labels_of(self, tensor: Tensor, whole: Iterable[int] = ()) -> Labels:
        """Labels of an operand, as :meth:`labels` has them."""
        return self.settled(self.fields_of(tensor), {dim % max(tensor.dim(), 1) for dim in whole})

    def settled(self, fields: Fields, whole: Collection[int] = ()) -> Labels:
        """Fields with one dimension left that decides: the first that need not stay whole."""
        labels: Labels = {}
        for dims, field in fields.items():
            if isinstance(dims, int):
                labels[dims] = field
                continue
            free = [place for place, dim in enumerate(dims) if dim not in whole]
            tied = [place for place in range(len(dims)) if place not in free[:1]]
            vector = self.ledger.tie(field, tied).reshape(-1)
            if free:
                labels[dims[free[0]]] = vector
            else:
                self.ledger.freeze(vector, f"'{self.name}' mixes all of it")
        return labels

    def fields_of(self, tensor: Tensor) -> Fields:
        """Labels of an operand as they are, fields among them."""
        return self.fact(tensor).labels

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether an operand is a parameter, as it is or reshaped: then its masked values are zero."""
        return self.fact(tensor).is_weight

    def is_zero(self, tensor: Tensor) -> bool:
        """Whether an operand is zero at every index that leaves, once everything that leaves with it is masked."""
        return self.fact(tensor).is_zero

    def join(self, a: Tensor | None, b: Tensor | None, reason: str) -> None:
        """Two vectors of labels live and die together, one by one; one side may be uncontrolled (None)."""
        if a is not None or b is not None:
            size = len(a if a is not None else b)  # type: ignore[arg-type]
            meet(self, [a, b], size, reason)

    def freeze(self, labels: Mapping[Any, Tensor], reason: str) -> None:
        """Nothing in these labels may leave."""
        for vector in labels.values():
            self.ledger.freeze(vector, reason)

    def reads(self, vector: Tensor | None) -> None:
        """These indices of a parameter are summed over."""
        if vector is not None:
            self.ledger.mark_read(vector)

    def writes(self, vector: Tensor | None) -> None:
        """These indices of the result are computed from a parameter's rows."""
        if vector is not None:
            self.ledger.mark_written(vector)

    @property
    def name(self) -> str:
        """The operator's name without namespace and without the in-place underscore."""
        return self.operator.__name__ if isinstance(self.operator, type) else base_name(self.operator)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}
CUSTOM_OPERATORS: dict[str, Rule] = {}
CUSTOM_MODULES: dict[type[nn.Module], Rule] = {}


def base_name(operator: Any) -> str:
    """``relu`` for ``aten.relu_.default``."""
    return operator._schema.name.split("::")[-1].rstrip("_")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named ATen operators.

    It takes a :class:`Call` and returns the labels of the result: one mapping, or a list of mappings where the
    operator returns several tensors.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def propagate(target: Any) -> Callable[[Rule], Rule]:
    """Register how labels pass through a user's own operator or module; this rule comes before any other.

    The function takes a :class:`Call`. For an operator (``torch.ops.mine.scale``) ``call.arguments`` has the schema's
    names; for a module type the names of ``forward``'s arguments and, beside them, the module's own parameters and
    buffers, and the module is followed as one step, whatever it computes inside. It returns the labels of the result,
    ``{dimension: vector}``, or a list of them where there are several tensors. Subclasses follow their base class.

    Args:
        target: a subclass of ``torch.nn.Module``, or an operator of ``torch.ops``.

    Raises:
        InvalidValueError: it is neither.

    >>> class Gain(nn.Module):
    ...     def __init__(self, channels):
    ...         super().__init__()
    ...         self.gain = nn.Parameter(torch.ones(channels))
    ...
    ...     def forward(self, x):
    ...         return x * self.gain[:, None, None]
    >>> @propagate(Gain)
    ... def gain(call):
    ...     x, own = call.labels("x"), call.labels("gain")
    ...     call.join(x.get(1), own.get(0), "meets a gain")
    ...     return x
    """

    def register(function: Rule) -> Rule:
        _customize(target, function)
        return function

    return register


def _customize(target: Any, function: Rule) -> None:
    if isinstance(target, type) and issubclass(target, nn.Module):
        CUSTOM_MODULES[target] = function
    else:
        CUSTOM_OPERATORS[schema_name(target)] = function


@contextmanager
def customized_rules(rules: Mapping[Any, Rule]) -> Iterator[None]:
    """Rules for operators or module types that hold for what runs inside, before those that are registered."""
    before = dict(CUSTOM_MODULES), dict(CUSTOM_OPERATORS)
    try:
        for target, function in rules.items():
            _customize(target, function)
        yield
    finally:
        for registry, content in zip((CUSTOM_MODULES, CUSTOM_OPERATORS), before, strict=True):
            registry.clear()
            registry.update(content)  # type: ignore[arg-type]


def schema_name(operator: Any) -> str:
    """``mylib::scale`` for ``torch.ops.mylib.scale`` and each of its overloads."""
    if isinstance(operator, torch._ops.OpOverload):
        return operator._schema.name
    if isinstance(operator, torch._ops.OpOverloadPacket):
        return operator._qualified_op_name
    raise InvalidValueError(
        f"{operator!r} is neither an operator nor a module type",
        where="propagate",
        legal=("a subclass of torch.nn.Module", "an operator of torch.ops"),
        remedy="Write @propagate(MyModule) or @propagate(torch.ops.mylib.my_op).",
    )


def unknown_vector(size: int) -> Tensor:
    """Labels for ``size`` indices that no parameter controls."""
    return torch.full((size,), UNKNOWN, dtype=torch.int64, device="cpu")


def meet(call: Call, vectors: Sequence[Tensor | None], size: int, reason: str) -> Tensor | None:
    """Operands that all have full size along a dimension agree there.

    Args:
        call: the call that brings them together.
        vectors: each operand's labels along the dimension, None where no parameter controls it.
        size: of the dimension.
        reason: why a label that meets an uncontrolled operand cannot leave.

    Returns:
        The common labels, or None where no operand has any.
    """
    known = next((vector for vector in vectors if vector is not None), None)
    if known is None:
        return None
    for vector in vectors:
        if vector is not known:
            call.ledger.join(known, unknown_vector(size) if vector is None else vector, reason)
    return known


def place(call: Call, labels: Fields, dims: Dims, array: Tensor) -> None:
    """Put labels at dimensions. What was placed first stands: where another wants the same dimension, that one stays.

    A merged dimension keeps a product of index sets, and classes can only say one factor of it. What was only expanded
    has no index of its own and gives way.
    """
    own = as_tuple(dims)
    reason = f"'{call.name}' merges it with another dimension that carries labels"
    for other in [key for key in labels if set(as_tuple(key)) & set(own)]:
        if not call.ledger.is_elastic(labels[other]):
            call.ledger.freeze(array, reason)
            return
        call.ledger.freeze(labels.pop(other), reason)
    labels[dims] = array


def as_tuple(dims: Dims) -> tuple[int, ...]:
    """``(1,)`` for ``1``."""
    return (dims,) if isinstance(dims, int) else dims


def as_dims(dims: Sequence[int]) -> Dims:
    """``1`` for ``(1,)``."""
    return dims[0] if len(dims) == 1 else tuple(dims)


COPIES = frozenset({"clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh"})
"""Pointwise operators that leave every value as it is."""
MOVEMENT: set[str] = set()
"""Operators that only move values; filled by ``movement.py``."""


def find_module_rule(module: nn.Module) -> Rule | None:
    """The user's rule for a module's type or its nearest base class."""
    return next((CUSTOM_MODULES[base] for base in type(module).__mro__ if base in CUSTOM_MODULES), None)


def preserves_values(operator: Any) -> bool:
    """Whether what is zero in the operand is zero in the result, and nothing else is changed."""
    return operator.namespace == "aten" and base_name(operator) in MOVEMENT | COPIES


def freeze_rest(call: Call, labels: Labels, used: Iterable[int], reason: str) -> None:
    """Freeze the labels of every dimension that a rule does not carry on."""
    call.freeze({dim: vector for dim, vector in labels.items() if dim not in tuple(used)}, reason)
