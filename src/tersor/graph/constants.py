"""Constants that a model makes while it runs: they follow the size of whatever they meet."""

from __future__ import annotations

from tersor.graph.movement import EXPANDING
from tersor.graph.rules import Call, Fields, Labels, rule

ALIKE = frozenset({"zeros_like", "ones_like", "full_like", "empty_like"})
MADE = frozenset({"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"})
"""Operators whose result has the same value everywhere."""
MAKING = frozenset({*MADE, *EXPANDING})
"""Operators whose result has labels even where no operand has any."""


@rule(*MADE)
def made(call: Call) -> Labels:
    """A tensor of one value has nothing to lose: each of its dimensions is as long as what it meets."""
    labels = {dim: call.ledger.elastic(size) for dim, size in enumerate(call.result.shape) if size > 1}
    for vector in labels.values():
        call.ledger.mark_coded(vector)
    return labels


@rule(*ALIKE)
def made_alike(call: Call) -> Fields:
    """A tensor of one value in another one's shape; where that one has no labels, it has none."""
    return dict(call.fields_of(call.arguments["self"]))


@rule("fill", "zero")
def filled(call: Call) -> Labels:
    """What is overwritten by one value in place: by position, where it is a part of a tensor."""
    call.freeze(call.fields_of(call.arguments["self"]), "is overwritten in place")
    return {}
