"""Contractions: what is summed over is read, what remains is written."""

from __future__ import annotations

from torch import Tensor

from tersor.graph.rules import Call, Labels, freeze_rest, meet, rule, unknown_vector

SUMMED = "is summed with the model's input or another tensor that no parameter controls"
ADDED = "is added to a tensor that no parameter controls"


def _read(call: Call, names: tuple[str, str], dims: tuple[int, int]) -> None:
    """A sum over a dimension of two operands: their labels agree, and the one that is a weight reads them.

    Without a weight the sum would go on counting what a removed index still carries, so nothing may leave.
    """
    tensors = [call.arguments[name] for name in names]
    vectors = [call.labels_of(tensor).get(dim) for tensor, dim in zip(tensors, dims, strict=True)]
    meet(call, vectors, tensors[0].shape[dims[0]], SUMMED)
    weights = [call.is_weight(tensor) for tensor in tensors]
    for is_weight, vector in zip(weights, vectors, strict=True):
        if vector is not None and not any(weights):
            call.ledger.freeze(vector, "is summed over without a parameter")
        elif vector is not None and is_weight:
            call.ledger.mark_read(vector)


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
    """``y[n, o] = sum_i w[o, i] * x[n, i] + b[o]``; transposed: ``w[i, o]``. Groups live and die whole."""
    x, w = call.labels("input"), call.labels("weight")
    freeze_rest(call, x, (1,), "a convolution slides over it")
    freeze_rest(call, w, (0, 1), "is a kernel position")
    if call.arguments["groups"] > 1:
        return _grouped_convolution(call, x.get(1), w)
    out_dim, in_dim = (1, 0) if call.arguments["transposed"] else (0, 1)
    _read(call, ("input", "weight"), (1, in_dim))
    return _channels(call, w.get(out_dim), w.get(out_dim))


def _grouped_convolution(call: Call, x: Tensor | None, w: Labels) -> Labels:
    """Each group's input channels, weight rows and output channels share one fate; depthwise is one channel a group."""
    groups, channels = call.arguments["groups"], call.arguments["input"].shape[1]
    if 1 in w:
        call.ledger.freeze(w[1], "stands within a convolution's groups, which live and die whole")
    outer = w.get(0)
    if outer is None:
        call.freeze({} if x is None else {1: x}, "feeds a grouped convolution that no parameter controls")
        return {}
    rows = outer.reshape(groups, -1)
    entering = (unknown_vector(channels) if x is None else x).reshape(groups, -1)
    call.ledger.tie_rows(rows)
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
    a, b = call.labels(left), call.labels(right)
    row, column = call.result.dim() - 2, call.result.dim() - 1
    _read(call, (left, right), (column, row))
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


@rule("embedding")
def embedding(call: Call) -> Labels:
    """``y[..., :] = w[index, :]``: the vocabulary stays, the width is written."""
    w = call.labels("weight")
    freeze_rest(call, w, (1,), "is a row of an embedding table")
    _write(call, "weight", w.get(1))
    return {call.result.dim() - 1: w[1]} if 1 in w else {}
