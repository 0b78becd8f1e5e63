"""What each ATen operator does to labels.

A tensor's labels are ``{dimension: vector}``: one label for each index along that dimension; a dimension without an
entry is controlled by no parameter. Three kinds of operators:

- data movement (``movement.py``): the same operator runs on the labels;
- pointwise operators, known by PyTorch's own tag, join the labels of their operands where these have full size;
- contractions (``contractions.py``), normalizations, pooling and reductions (``reductions.py``) have a rule each.

Whatever is not known here freezes the labels that touch it, and is reported: nothing is guessed. A new operator is one
function under :func:`rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.graph.inputs import tensors_of
from tersor.graph.labels import UNKNOWN, Ledger

Labels = dict[int, Tensor]


@dataclass(frozen=True)
class Call:
    """One call of an operator: its arguments by name, its result, and what is known so far about its operands."""

    operator: Any
    arguments: dict[str, Any]
    result: Any
    ledger: Ledger
    fact: Callable[[Tensor], Any]

    def labels(self, argument: str) -> Labels:
        """Labels of a tensor argument; empty for None."""
        value = self.arguments.get(argument)
        return self.labels_of(value) if isinstance(value, Tensor) else {}

    def labels_of(self, tensor: Tensor) -> Labels:
        """Labels of an operand."""
        return self.fact(tensor).labels

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether an operand is a parameter, as it is or reshaped: then its masked values are zero."""
        return self.fact(tensor).is_weight

    def freeze(self, labels: Labels, reason: str) -> None:
        """Nothing in these labels may leave."""
        for vector in labels.values():
            self.ledger.freeze(vector, reason)

    @property
    def name(self) -> str:
        """The operator's name without namespace and without the in-place underscore."""
        return base_name(self.operator)


Rule = Callable[[Call], Any]
RULES: dict[str, Rule] = {}


def base_name(operator: Any) -> str:
    """``relu`` for ``aten.relu_.default``."""
    return operator._schema.name.split("::")[-1].rstrip("_")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the named operators.

    It takes a :class:`Call` and returns the labels of the result: one mapping, or a list of mappings where the
    operator returns several tensors.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


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


def pointwise(call: Call) -> Labels:
    """Operands of full size along a dimension agree there; a size of 1 broadcasts and says nothing."""
    operands = tensors_of(list(call.arguments.values()))
    out = call.result if isinstance(call.result, Tensor) else operands[0]
    reason = f"meets an operand of '{call.name}' that no parameter controls"
    labels: Labels = {}
    for dim, size in enumerate(out.shape):
        own = [(operand, dim - out.dim() + operand.dim()) for operand in operands]
        full = [(operand, d) for operand, d in own if d >= 0 and operand.shape[d] == size > 1]
        vector = meet(call, [call.labels_of(operand).get(d) for operand, d in full], size, reason)
        if vector is not None:
            labels[dim] = vector
    return labels


POINTWISE_UNTAGGED = frozenset(
    {"hardswish", "_prelu_kernel", "dropout", "native_dropout", "copy", "celu", "feature_dropout", "alpha_dropout"}
)
"""Pointwise operators that PyTorch has not tagged."""
COPIES = frozenset({"clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh"})
"""Pointwise operators that leave every value as it is."""
MOVEMENT: set[str] = set()
"""Operators that only move values; filled by ``movement.py``."""


def find_rule(operator: Any) -> Rule | None:
    """The rule for an operator, or None where its effect is unknown."""
    name = base_name(operator)
    if operator.namespace == "aten":
        if name in MOVEMENT and operator._schema.is_mutable:
            return None  # unsqueeze_ and the like: the operand has lost the shape that its labels belong to
        if name in RULES:
            return RULES[name]
        if name in POINTWISE_UNTAGGED | COPIES:
            return pointwise
    return pointwise if torch.Tag.pointwise in operator.tags else None


def preserves_values(operator: Any) -> bool:
    """Whether what is zero in the operand is zero in the result, and nothing else is changed."""
    return operator.namespace == "aten" and base_name(operator) in MOVEMENT | COPIES


def freeze_rest(call: Call, labels: Labels, used: Iterable[int], reason: str) -> None:
    """Freeze the labels of every dimension that a rule does not carry on."""
    call.freeze({dim: vector for dim, vector in labels.items() if dim not in tuple(used)}, reason)
