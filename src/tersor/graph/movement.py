"""Data movement: no rule for each operator, the operator itself runs on the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.graph.labels import UNKNOWN
from tersor.graph.rules import MOVEMENT, Call, Labels, meet, rule, unknown_vector

MOVEMENT.update(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "squeeze", "unsqueeze",
     "flatten", "unflatten", "flip", "movedim", "numpy_T", "slice", "select", "narrow", "split", "split_with_sizes",
     "chunk", "unbind", "repeat", "diagonal", "roll", "index_select"}
)  # fmt: skip


@rule(*MOVEMENT, "constant_pad_nd")
def move(call: Call) -> Any:
    """Run the operator itself on the labels, one dimension's labels at a time.

    Labels that come out along two dimensions, or not all of them, were taken apart by sizes that stand in the model's
    code: they stay.
    """
    names = [argument.name for argument in call.operator._schema.arguments]
    tensor: Tensor = call.arguments[names[0]]
    several = isinstance(call.result, (list, tuple))
    labels: list[Labels] = [{} for _ in call.result] if several else [{}]
    for dim, vector in call.labels_of(tensor).items():
        if _reorders(call, tensor, dim):
            call.ledger.freeze(vector, f"'{call.name}' reorders it by positions that stand in the code")
            continue
        shape = [1] * tensor.dim()
        shape[dim] = -1
        moved = _run_on(call, names, vector.reshape(shape).expand(tensor.shape))
        lines = [_line(field) for field in (moved if several else [moved])]
        if any(line is None or not _is_whole(call, line[1], vector) for line in lines):
            call.ledger.freeze(vector, f"'{call.name}' takes it apart by sizes that stand in the code")
            continue
        for own, line in zip(labels, lines, strict=True):
            if line is not None:
                _place(call, own, *line)
    return labels if several else labels[0]


def _reorders(call: Call, tensor: Tensor, dim: int) -> bool:
    """Whether an operator moves indices along a dimension to positions that depend on how many there are."""
    if call.name == "roll":
        dims = call.arguments.get("dims") or range(tensor.dim())
        return any(d % tensor.dim() == dim for d in dims)
    if call.name == "diagonal":
        given = (call.arguments.get("dim1", 0), call.arguments.get("dim2", 1))
        return dim in [d % tensor.dim() for d in given]
    return call.name == "index_select" and call.arguments["dim"] % tensor.dim() == dim


def _run_on(call: Call, names: list[str], field: Tensor) -> Any:
    """The same call on a field of labels. A view of labels may need a copy where a view of the tensor did not."""
    if call.name in ("view", "_unsafe_view", "_reshape_alias"):
        return field.reshape(call.result.shape)
    arguments = {name: call.arguments[name] for name in names if name in call.arguments}
    arguments[names[0]] = field
    if call.name == "constant_pad_nd":
        arguments["value"] = UNKNOWN
    return call.operator(**arguments)


def _line(field: Tensor) -> tuple[int, Tensor] | None:
    """The one dimension along which a field of labels varies, and its labels; None where there is not one."""
    for dim in range(field.dim()):
        if field.stride(dim) == 0:
            field = field.narrow(dim, 0, 1)
    varying = [
        dim for dim in range(field.dim()) if field.shape[dim] > 1 and bool((field != field.narrow(dim, 0, 1)).any())
    ]
    if len(varying) != 1:
        return None
    for dim in range(field.dim()):
        if dim != varying[0]:
            field = field.narrow(dim, 0, 1)
    return varying[0], field.reshape(-1)


def _is_whole(call: Call, line: Tensor, vector: Tensor) -> bool:
    """Whether every label of a vector is still in a line; a slice may not even drop copies of one."""
    if call.name in ("slice", "narrow"):
        return len(line) == len(vector)
    return bool(torch.isin(vector, line).all())


def _place(call: Call, labels: Labels, dim: int, line: Tensor) -> None:
    """Put labels at a dimension. Where two labelled dimensions are merged into one, neither can leave."""
    if dim in labels:
        for vector in (line, labels.pop(dim)):
            call.ledger.freeze(vector, f"'{call.name}' merges it with another dimension that carries labels")
    else:
        labels[dim] = line


@rule("cat", "concatenate", "concat")
def cat(call: Call) -> Labels:
    """Labels stand one after the other along the joined dimension and agree along all others."""
    tensors: list[Tensor] = [tensor for tensor in call.arguments["tensors"] if tensor.dim() == call.result.dim()]
    joined = call.arguments.get("dim", 0) % call.result.dim()
    labels: Labels = {}
    for dim, size in enumerate(call.result.shape):
        vectors = [call.labels_of(tensor).get(dim) for tensor in tensors]
        if dim != joined:
            vector = meet(call, vectors, size, "is joined end to end with a tensor that no parameter controls")
        elif any(vector is not None for vector in vectors):
            parts = zip(vectors, tensors, strict=True)
            vector = torch.cat([unknown_vector(tensor.shape[dim]) if v is None else v for v, tensor in parts])
        else:
            vector = None
        if vector is not None:
            labels[dim] = vector
    return labels
