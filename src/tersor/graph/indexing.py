"""Reading and writing by index: the indexed dimension stays, the others pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tersor.graph.movement import support
from tersor.graph.rules import Call, Fields, Labels, meet, place, rule

INDEXED = "is looked up by position"


@rule("index_select", "unfold")
def along_one(call: Call) -> Labels:
    """Rows are picked along one dimension."""
    x: Tensor = call.arguments["self"]
    along = call.arguments.get("dim", call.arguments.get("dimension", 0)) % x.dim()
    return _beside(call, "self", along)


def _beside(call: Call, name: str, along: int) -> Labels:
    """Labels of an argument along all dimensions but the one where it is looked up; there they stay."""
    labels = call.labels(name, whole=(along,))
    if along in labels:
        call.ledger.freeze(labels.pop(along), INDEXED)
    return labels


@rule("index", "_unsafe_index")
def index(call: Call) -> Fields:
    """``x[:, i, j]`` with tensors as indices: the same look-up runs on the labels."""
    x: Tensor = call.arguments["self"]
    indices: list[Tensor | None] = list(call.arguments["indices"])
    used: set[int] = set()
    dim = 0
    for entry in indices:
        # A boolean index stands for as many dimensions as it has.
        width = entry.dim() if entry is not None and not entry.is_floating_point() and entry.element_size() == 1 else 1
        if entry is not None:
            used |= set(range(dim, dim + width))
        dim += width
    labels: Fields = {}
    for dims, vector in call.labels("self", whole=used).items():
        if dims in used:
            call.ledger.freeze(vector, INDEXED)
            continue
        shape = [1] * x.dim()
        shape[dims] = -1
        found = support(call.operator(vector.reshape(shape).expand(x.shape), call.arguments["indices"]))
        if found is None:
            call.ledger.freeze(vector, INDEXED)
        else:
            place(call, labels, *found)
    return labels


@rule("index_add", "index_copy", "scatter", "scatter_add", "scatter_reduce")
def write_rows(call: Call) -> Labels:
    """Rows are written along one dimension; along the others the operands agree."""
    x: Tensor = call.arguments["self"]
    along = call.arguments["dim"] % x.dim()
    sources = [name for name in ("source", "src") if isinstance(call.arguments.get(name), Tensor)]
    names = ["self", *sources, *(["index"] if call.arguments["index"].dim() == x.dim() else [])]
    return _agreed(call, names, along)


@rule("gather")
def gather(call: Call) -> Labels:
    """``y[i, j] = x[index[i, j], j]``: along all dimensions but one the index is as long as what it picks from."""
    return _agreed(call, ["self", "index"], call.arguments["dim"] % call.result.dim())


def _agreed(call: Call, names: list[str], along: int) -> Labels:
    """Along one dimension rows are looked up; along the others the operands of full size agree."""
    labels = {name: _beside(call, name, along) for name in names}
    agreed: Labels = {}
    for dim, size in enumerate(call.result.shape):
        full = [name for name in names if call.arguments[name].shape[dim] == size > 1]
        vector = meet(call, [labels[name].get(dim) for name in full], size, "meets rows that no parameter controls")
        if vector is not None and dim != along:
            agreed[dim] = vector
    return agreed


@rule("index_put", "_unsafe_index_put")
def index_put(call: Call) -> Fields:
    """Values written at positions: what is indexed stays, the rest agrees with the values."""
    x, values = call.arguments["self"], call.arguments["values"]
    first = next((place for place, entry in enumerate(call.arguments["indices"]) if entry is not None), 0)
    trailing = x.dim() - len(call.arguments["indices"])
    labels = call.labels("self")
    own = call.labels("values")
    result: Fields = {}
    for dim in list(labels):
        if first == 0 and dim >= x.dim() - trailing:
            continue
        call.ledger.freeze(labels.pop(dim), INDEXED)
    for back in range(1, trailing + 1):
        dim, source = x.dim() - back, values.dim() - back
        wide = source >= 0 and values.shape[source] == x.shape[dim] > 1
        vectors = [labels.get(dim), *([own.pop(source, None)] if wide else [])]
        vector = meet(call, vectors, x.shape[dim], "meets rows that no parameter controls")
        if vector is not None:
            result[dim] = vector
    call.freeze(own, INDEXED)
    return result


@rule("_pack_padded_sequence")
def pack(call: Call) -> Any:
    """``[time, batch, features]`` to ``[steps, features]``."""
    labels = call.labels("input", whole=(0, 1))
    call.freeze({dim: vector for dim, vector in labels.items() if dim < 2}, "is packed by sequence lengths")
    return [{dim - 1: vector for dim, vector in labels.items() if dim > 1}, {}]


@rule("_pad_packed_sequence")
def unpack(call: Call) -> Any:
    """``[steps, features]`` to ``[time, batch, features]``."""
    labels = call.labels("data", whole=(0,))
    call.freeze({dim: vector for dim, vector in labels.items() if dim < 1}, "is packed by sequence lengths")
    return [{dim + 1: vector for dim, vector in labels.items() if dim > 0}, {}]
