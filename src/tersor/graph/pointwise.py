"""Pointwise operators, and which rule an operator has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.graph.inputs import tensors_of
from tersor.graph.rules import (
    COPIES,
    CUSTOM_OPERATORS,
    MOVEMENT,
    RULES,
    Call,
    Dims,
    Fields,
    Rule,
    as_dims,
    as_tuple,
    base_name,
    meet,
)

POINTWISE_UNTAGGED = frozenset(
    {
        "hardswish",
        "_prelu_kernel",
        "dropout",
        "native_dropout",
        "copy",
        "celu",
        "feature_dropout",
        "alpha_dropout",
        "masked_fill",
        "log_sigmoid_forward",
    }
)
"""Pointwise operators that PyTorch has not tagged."""


def find_rule(operator: Any) -> Rule | None:
    """The rule for an operator, or None where its effect is unknown."""
    if operator._schema.name in CUSTOM_OPERATORS:
        return CUSTOM_OPERATORS[operator._schema.name]
    name = base_name(operator)
    if operator.namespace == "aten":
        if name in MOVEMENT and operator._schema.is_mutable:
            return None  # unsqueeze_ and the like: the operand has lost the shape that its labels belong to
        if name in RULES:
            return RULES[name]
        if name in POINTWISE_UNTAGGED | COPIES:
            return pointwise
    return pointwise if torch.Tag.pointwise in operator.tags else None


def pointwise(call: Call) -> Fields:
    """Operands of full size along a dimension agree there; a size of 1 broadcasts and says nothing."""
    operands = tensors_of(list(call.arguments.values()))
    out = call.result if isinstance(call.result, Tensor) else operands[0]
    reason = f"meets an operand of '{call.name}' that no parameter controls"
    own = [_aligned(call.fields_of(operand), out.dim() - operand.dim()) for operand in operands]
    labels: Fields = {}
    for dims in _components(own):
        array = _meet_fields(call, out, dims, list(zip(operands, own, strict=True)), reason)
        if array is not None:
            labels[array[0]] = array[1]
    fielded = {dim for fields in own for key in fields if not isinstance(key, int) for dim in key}
    for dim, size in enumerate(out.shape):
        if dim in fielded or size == 1:
            continue
        full = [
            fields.get(dim)
            for operand, fields in zip(operands, own, strict=True)
            if dim >= out.dim() - operand.dim() and operand.shape[dim - out.dim() + operand.dim()] == size
        ]
        vector = meet(call, full, size, reason)
        if vector is not None:
            labels[dim] = vector
    return labels


def _aligned(fields: Fields, shift: int) -> Fields:
    """Labels with their dimensions counted in the broadcast result."""
    if not shift:
        return fields
    return {as_dims([dim + shift for dim in as_tuple(dims)]): array for dims, array in fields.items()}


def _components(own: list[Fields]) -> list[tuple[int, ...]]:
    """Sets of dimensions that fields of several dimensions connect."""
    components: list[set[int]] = []
    for fields in own:
        for key in fields:
            if not isinstance(key, int):
                touching = [component for component in components if component & set(key)]
                components = [component for component in components if component not in touching]
                components.append(set(key).union(*touching))
    return [tuple(sorted(component)) for component in components]


def _meet_fields(
    call: Call, out: Tensor, dims: tuple[int, ...], operands: list[tuple[Tensor, Fields]], reason: str
) -> tuple[Dims, Tensor] | None:
    """Operands agree over several dimensions at once, where each may broadcast along some of them.

    Returns:
        the dimensions that still decide, and the common labels along them.
    """
    shape = [out.shape[dim] for dim in dims]
    arrays: list[Tensor] = []
    whole: set[int] = set()
    for operand, fields in operands:
        shift = out.dim() - operand.dim()
        full = {p for p, dim in enumerate(dims) if dim >= shift and operand.shape[dim - shift] == shape[p] > 1}
        for key, array in fields.items():
            places = [dims.index(dim) for dim in as_tuple(key) if dim in dims]
            if places:
                sizes = [shape[p] if p in places else 1 for p in range(len(dims))]
                arrays.append(array.reshape(sizes))
                full -= set(places)
        whole |= full  # full size there, and no labels: nothing may leave along it
    widest = max(arrays, key=Tensor.numel)
    outermost = next((p for p in range(len(dims)) if p not in whole and widest.shape[p] > 1), None)
    within = [array for array in arrays if outermost is not None and array.shape[outermost] == 1]
    for array in within:  # rotations, factors for each position within a head: whole heads decide, so these stay
        call.ledger.freeze(array, "stands within a head or block that lives and dies whole")
        whole |= {p for p, size in enumerate(array.shape) if size > 1}
    arrays = [array for array in arrays if outermost is None or array.shape[outermost] > 1]
    widest = call.ledger.tie(widest.expand(shape), whole)
    for array in arrays:
        whole |= {p for p, size in enumerate(array.shape) if size < shape[p]}
        call.ledger.join(widest.expand(shape).reshape(-1), array.expand(shape).reshape(-1), "")
    left = [p for p in range(len(dims)) if p not in whole]
    if not left:
        call.ledger.freeze(widest, reason)
        return None
    for p in whole:
        widest = widest.narrow(p, 0, 1)
    return as_dims([dims[p] for p in left]), widest.reshape([shape[p] for p in left])
