"""Contractions: what is summed over is read, what remains is written.

Where a view has split channels into heads and their sizes, a product of activations settles that heads decide: what is
summed over within a head stays whole.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor.graph.labels import GroupedProduct
from tersor.graph.rules import Call, Labels, freeze_rest, meet, rule, unknown_vector

SUMMED = "is summed with the model's input or another tensor that no parameter controls"
ADDED = "is added to a tensor that no parameter controls"


def _read(call: Call, names: tuple[str, str], operands: tuple[Labels, Labels], dims: tuple[int, int]) -> None:
    """A sum over a dimension of two operands: their labels agree, and the one that is a weight reads them.

    Where neither is zero at what is masked, the sum would go on counting what a removed index still carries.
    """
    tensors = [call.arguments[name] for name in names]
    vectors = [labels.get(dim) for labels, dim in zip(operands, dims, strict=True)]
    meet(call, vectors, tensors[0].shape[dims[0]], SUMMED)
    weights = [call.is_weight(tensor) for tensor in tensors]
    is_exact = any(weights) or any(call.is_zero(tensor) for tensor in tensors)
    for is_weight, vector in zip(weights, vectors, strict=True):
        if vector is None:
            continue
        if is_weight:
            call.ledger.mark_read(vector)
        if not is_exact:
            call.ledger.bend(vector, "is summed over, and is not zero where it is masked")
        elif not any(weights):
            call.ledger.mark_silenced(vector)


def _write(call: Call, name: str, vector: Tensor | None) -> None:
    """What remains of an operand in the result; a weight writes it."""
    if vector is not None and call.is_weight(call.arguments[name]):
        call.ledger.mark_written(vector)


def _channels(call: Call, written: Tensor | None, out: Tensor | None) -> Labels:
    """The output channels of a convolution, at dimension 1, and the bias that is added to them."""
    _write(call, "weight", written)
    if call.arguments.get("bias") is not None:
        out = meet(call, [out, call.labels("bias").get(0)], call.result.shape[1], ADDED)
    return {} if out is None else {1: out}


@rule("convolution", "_convolution")
def convolution(call: Call) -> Labels:
    """``y[n, o] = sum_i w[o, i] * x[n, i] + b[o]``; transposed: ``w[i, o]``."""
    x, w = call.labels("input"), call.labels("weight")
    freeze_rest(call, x, (0, 1), "a convolution slides over it")
    freeze_rest(call, w, (0, 1), "is a kernel position")
    passed = {0: x[0]} if 0 in x else {}
    if call.arguments["groups"] > 1:
        return {**passed, **_grouped_convolution(call, x.get(1), w)}
    out_dim, in_dim = (1, 0) if call.arguments["transposed"] else (0, 1)
    _read(call, ("input", "weight"), (x, w), (1, in_dim))
    return {**passed, **_channels(call, w.get(out_dim), w.get(out_dim))}


def _grouped_convolution(call: Call, x: Tensor | None, w: Labels) -> Labels:
    """Whole groups leave, or the same positions of every group; depthwise is one channel a group.

    Groups may become heads, or be shuffled, so which of the two is decided when all else is known. Those of a
    transposed convolution leave whole.
    """
    groups, channels = call.arguments["groups"], call.arguments["input"].shape[1]
    entering = (unknown_vector(channels) if x is None else x).reshape(groups, -1)
    outer = w.get(0)
    if outer is None:
        call.freeze({} if x is None else {1: x}, "feeds a grouped convolution that no parameter controls")
        return {}
    rows = outer.reshape(groups, -1)
    if not call.arguments["transposed"] and 1 in w:
        call.ledger.must_agree_in_groups(GroupedProduct(entering, rows, w[1]))
        if call.is_weight(call.arguments["weight"]):
            call.ledger.mark_read(w[1])
        return _channels(call, outer, outer)
    if 1 in w:
        call.ledger.freeze(w[1], "stands within a convolution's groups, which live and die whole")
    call.ledger.tie(rows, [1])
    for column in entering.unbind(1):
        call.ledger.join(rows[:, 0], column, SUMMED)
    if not call.arguments["transposed"]:
        return _channels(call, outer, outer)
    width = call.result.shape[1] // groups
    return _channels(call, outer, rows[:, :1].expand(groups, width).reshape(-1))


@rule("mm", "bmm")
def matrix_product(call: Call) -> Labels:
    """``y[.., i, j] = sum_k a[.., i, k] * b[.., k, j]``; leading dimensions are one batch for both."""
    left, right = [argument.name for argument in call.operator._schema.arguments][:2]
    return _product(call, left, right)


def _product(call: Call, left: str, right: str) -> Labels:
    row, column = call.result.dim() - 2, call.result.dim() - 1
    a, b = call.labels(left, whole=(column,)), call.labels(right, whole=(row,))
    _read(call, (left, right), (a, b), (column, row))
    labels: Labels = {}
    for dim, name, source in ((row, left, a), (column, right, b)):
        if dim in source:
            labels[dim] = source[dim]
            _write(call, name, source[dim])
    for dim in range(row):
        vector = meet(call, [a.get(dim), b.get(dim)], call.result.shape[dim], SUMMED)
        if vector is not None:
            labels[dim] = vector
    return labels


@rule("addmm", "baddbmm")
def added_matrix_product(call: Call) -> Labels:
    """``y = c + a @ b``, where ``c`` broadcasts."""
    names = [argument.name for argument in call.operator._schema.arguments][:3]
    addend: Tensor = call.arguments[names[0]]
    c, rank = call.labels(names[0]), call.result.dim()
    labels = _product(call, names[1], names[2])
    for dim in range(rank):
        own = dim - rank + addend.dim()
        if own >= 0 and addend.shape[own] == call.result.shape[dim] > 1:
            vector = meet(call, [labels.get(dim), c.get(own)], addend.shape[own], ADDED)
            if vector is not None:
                labels[dim] = vector
    return labels


@rule("embedding", "_embedding_bag", "_embedding_bag_forward_only")
def embedding(call: Call) -> Any:
    """``y[..., :] = w[index, :]``, or sums or means of such rows: the vocabulary stays, the width is written."""
    w = call.labels("weight")
    freeze_rest(call, w, (1,), "is a row of an embedding table")
    call.freeze(call.labels("indices"), "decides which row of a table is looked up")
    _write(call, "weight", w.get(1))
    several = isinstance(call.result, (list, tuple))
    rows: Tensor = call.result[0] if several else call.result
    labels: Labels = {rows.dim() - 1: w[1]} if 1 in w else {}
    return [labels] + [{} for _ in call.result[1:]] if several else labels


@rule("_grouped_mm")
def grouped_product(call: Call) -> Labels:
    """``y[t, j] = sum_k x[t, k] * w[e(t), k, j]``: each run of tokens has its own expert."""
    x, w = call.labels("self", whole=(1,)), call.labels("mat2", whole=(0,))
    if call.arguments["mat2"].dim() != 3 or call.arguments["self"].dim() != 2:
        call.freeze({**x, **{dim + 2: vector for dim, vector in w.items()}}, "is multiplied in groups")
        return {}
    freeze_rest(call, w, (1, 2), "is an expert's number")
    _read(call, ("self", "mat2"), (x, w), (1, 1))
    labels = {0: x[0]} if 0 in x else {}
    if 2 in w:
        _write(call, "mat2", w[2])
        labels[1] = w[2]
    return labels


@rule("mv")
def matrix_vector_product(call: Call) -> Labels:
    """``y[i] = sum_k a[i, k] * x[k]``."""
    a, x = call.labels("self", whole=(1,)), call.labels("vec")
    _read(call, ("self", "vec"), (a, {1: x[0]} if x else {}), (1, 1))
    if 0 in a:
        _write(call, "self", a[0])
    return {0: a[0]} if 0 in a else {}


@rule("dot", "vdot")
def inner_product(call: Call) -> Labels:
    """``y = sum_k a[k] * b[k]``."""
    names = [argument.name for argument in call.operator._schema.arguments][:2]
    _read(call, (names[0], names[1]), (call.labels(names[0]), call.labels(names[1])), (0, 0))
    return {}


@rule("_weight_norm_interface", "_weight_norm")
def weight_norm(call: Call) -> Any:
    """``w = g * v / |v|``: masked rows of ``v`` have no norm to be divided by; what they read may leave."""
    v = call.labels("v")
    dim = call.arguments.get("dim", 0)
    reason = "is scaled to a norm of its own, and has none when it is masked"
    call.freeze(call.labels("g"), reason)
    if dim in v:
        call.ledger.freeze(v.pop(dim), reason)
    return [v] + [{} for _ in call.result[1:]] if isinstance(call.result, (list, tuple)) else v
