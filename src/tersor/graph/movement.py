"""Data movement: no rule for each operator, the operator itself runs on the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.graph.labels import UNKNOWN
from tersor.graph.rules import (
    MOVEMENT,
    Call,
    Dims,
    Fields,
    Labels,
    as_dims,
    as_tuple,
    meet,
    place,
    rule,
    unknown_vector,
)

RESHAPING = ("view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "flatten")
EXPANDING = ("expand", "repeat")
PARTS = ("split", "split_with_sizes", "chunk", "unbind", "select", "slice", "narrow", "tensor_split",
         "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes")  # fmt: skip
MOVEMENT.update({*RESHAPING, *EXPANDING, *PARTS, "permute", "transpose", "t", "squeeze", "unsqueeze", "flip", "movedim",
                 "numpy_T", "diagonal", "roll", "as_strided"})  # fmt: skip


@rule(*RESHAPING, *EXPANDING, "permute", "transpose", "t", "squeeze", "unsqueeze", "flip", "movedim", "numpy_T",
      "diagonal", "roll", "as_strided")  # fmt: skip
def move(call: Call) -> Fields:
    """Run the operator itself on the labels.

    A view that splits a labelled dimension leaves a field over several; what remains of it must be a product of index
    sets, and what is computed with it decides which of its dimensions that is.
    """
    names = [argument.name for argument in call.operator._schema.arguments]
    tensor: Tensor = call.arguments[names[0]]
    labels: Fields = {}
    for dims, array in sorted(call.fields_of(tensor).items(), key=lambda item: as_tuple(item[0])):
        if _reorders(call, tensor, as_tuple(dims)):
            call.ledger.freeze(array, f"'{call.name}' reorders it by positions that stand in the code")
            continue
        moved = _run_on(call, names, _spread(array, dims, tensor))
        found = support(moved)
        if found is None:
            call.ledger.freeze(array, f"'{call.name}' takes it apart by sizes that stand in the code")
            continue
        if len(as_tuple(found[0])) > 1 and call.name in RESHAPING:
            call.ledger.must_be_product(found[1])
        place(call, labels, *found)
    if call.name in EXPANDING:
        _add_elastic(call, tensor, labels)
    return labels


def _spread(array: Tensor, dims: Dims, tensor: Tensor) -> Tensor:
    """Labels in the shape of their tensor; what they do not vary along takes no memory."""
    shape = [size if dim in as_tuple(dims) else 1 for dim, size in enumerate(tensor.shape)]
    return array.reshape(shape).expand(tensor.shape)


def _reorders(call: Call, tensor: Tensor, dims: tuple[int, ...]) -> bool:
    """Whether an operator moves indices along a dimension to positions that depend on how many there are."""
    if call.name == "roll":
        rolled = call.arguments.get("dims") or range(tensor.dim())
        return any(d % tensor.dim() in dims for d in rolled)
    if call.name == "diagonal":
        given = (call.arguments.get("dim1", 0), call.arguments.get("dim2", 1))
        return any(d % tensor.dim() in dims for d in given)
    return False


def _run_on(call: Call, names: list[str], field: Tensor) -> Tensor:
    """The same call on a field of labels. A view of labels may need a copy where a view of the tensor did not."""
    if call.name in ("view", "_unsafe_view", "_reshape_alias"):
        return field.reshape(call.result.shape)
    arguments = {name: call.arguments[name] for name in names if name in call.arguments}
    if call.name == "as_strided":
        tensor: Tensor = call.arguments[names[0]]
        start = tensor.storage_offset()
        offset = arguments.get("storage_offset")
        arguments["storage_offset"] = start if offset is None else offset
        memory = torch.full((tensor.untyped_storage().nbytes() // tensor.element_size(),), UNKNOWN, device="cpu")
        memory.as_strided(tensor.shape, tensor.stride(), start).copy_(field)
        field = memory
    arguments[names[0]] = field
    return call.operator(**arguments)


def support(field: Tensor) -> tuple[Dims, Tensor] | None:
    """The dimensions along which labels vary, and the labels along them; None where they are all the same."""
    for dim in range(field.dim()):
        if field.stride(dim) == 0:
            field = field.narrow(dim, 0, 1)
    varying = []
    for dim in range(field.dim()):
        if field.shape[dim] > 1:
            first = field.narrow(dim, 0, 1)
            if bool((field != first).any()):
                varying.append(dim)
            else:
                field = first
    if not varying:
        return None
    return as_dims(varying), field.reshape([field.shape[dim] for dim in varying]).clone()


def _add_elastic(call: Call, tensor: Tensor, labels: Fields) -> None:
    """What was expanded from size 1 is constant along that dimension: it follows whatever it meets."""
    shift = call.result.dim() - tensor.dim()
    taken = {dim for dims in labels for dim in as_tuple(dims)}
    for dim, size in enumerate(call.result.shape):
        if size > 1 and dim not in taken and (dim < shift or tensor.shape[dim - shift] == 1):
            labels[dim] = call.ledger.elastic(size)


@rule("constant_pad_nd")
def pad(call: Call) -> Labels:
    """What is added at a labelled dimension's ends belongs to no parameter."""
    x: Tensor = call.arguments["self"]
    pads = list(call.arguments["pad"])
    ends = {x.dim() - 1 - number: pads[2 * number : 2 * number + 2] for number in range(len(pads) // 2)}
    labels = call.labels("self", whole=[dim for dim, (before, after) in ends.items() if before or after])
    for dim, (before, after) in ends.items():
        if dim in labels:
            labels[dim] = torch.constant_pad_nd(labels[dim], (before, after), UNKNOWN)
    return labels


@rule(*PARTS)
def take_parts(call: Call) -> Any:
    """Along the dimension that is taken apart each part has its own labels; along the others all parts agree.

    Equal parts lose the same positions, so that code which asks for a number of parts stays right. Unequal parts are
    told apart by sizes in the code, which the speedup rewrites.
    """
    names = [argument.name for argument in call.operator._schema.arguments]
    tensor: Tensor = call.arguments[names[0]]
    dim = int(call.arguments.get("dim", 0)) % tensor.dim()
    several = isinstance(call.result, (list, tuple))
    results: list[Fields] = [{} for _ in (call.result if several else [call.result])]
    dropped = call.name in ("select", "unbind")
    for dims, array in call.fields_of(tensor).items():
        if dim not in as_tuple(dims):
            moved = as_dims([d - (dropped and d > dim) for d in as_tuple(dims)])
            for own in results:
                place(call, own, moved, array)
            continue
        parts = _parts(call, names, tensor.shape[dim])
        axis = as_tuple(dims).index(dim)
        kept = [d - (dropped and d > dim) for d in as_tuple(dims) if not (dropped and d == dim)]
        for own, part in zip(results, _cut(call, array, axis, parts), strict=True):
            if part is not None and kept:
                shape = part.shape if not dropped else [s for d, s in enumerate(part.shape) if d != axis]
                place(call, own, *_without_constant(kept, part.reshape(shape)))
    return results if several else results[0]


def _without_constant(dims: list[int], array: Tensor) -> tuple[Dims, Tensor]:
    """A field without the dimensions along which its labels are the same."""
    found = support(array) if len(dims) > 1 else None
    if found is None:
        return as_dims(dims), array
    return as_dims([dims[place] for place in as_tuple(found[0])]), found[1]


def _parts(call: Call, names: list[str], size: int) -> list[tuple[int, int, int]]:
    """Start, stop and step of each part along the dimension that is taken apart."""
    arguments = {name: call.arguments[name] for name in names if name in call.arguments}
    arguments.update({names[0]: torch.arange(size, device="cpu"), "dim": 0})
    taken = call.operator(**arguments)
    parts = []
    for part in taken if isinstance(taken, (list, tuple)) else [taken]:
        places = part.reshape(-1).tolist()
        step = places[1] - places[0] if len(places) > 1 else 1
        parts.append((places[0], places[-1] + 1, step) if places else (0, 0, 1))
    return parts


def _cut(call: Call, array: Tensor, axis: int, parts: list[tuple[int, int, int]]) -> list[Tensor | None]:
    """The labels of each part, after what the parts demand of each other; None where nothing is known of one."""
    size = array.shape[axis]
    lengths = {stop - start for start, stop, _ in parts}
    length = next(iter(lengths))
    if parts == [(0, size, 1)]:
        return [array]
    strided = any(step != 1 for _, _, step in parts) or 0 in lengths
    if array.dim() > 1 and (strided or len(lengths) > 1 or size % length):
        # Positions within a block: along them nothing may leave, the other dimensions decide.
        array = call.ledger.tie(array, [axis]).expand(array.shape)
        return [array.narrow(axis, 0, len(range(*part))) if len(range(*part)) else None for part in parts]
    if strided:
        call.ledger.freeze(array, f"'{call.name}' takes every second index or none")
        return [None] * len(parts)
    equal = len(lengths) == 1 and size % length == 0 and all(start % length == 0 for start, _, _ in parts)
    if equal and (length > 1 or array.dim() > 1):
        blocks = array.unflatten(axis, (size // length, length))
        array = call.ledger.tie(blocks, [axis]).expand(blocks.shape).flatten(axis, axis + 1)
    elif 1 in lengths:
        call.ledger.freeze(array, f"'{call.name}' takes it apart by positions that stand in the code")
        return [None] * len(parts)
    else:
        call.ledger.mark_coded(array)
    return [array.narrow(axis, start, stop - start) for start, stop, _ in parts]


@rule("cat", "concatenate", "concat")
def cat(call: Call) -> Fields:
    """Labels stand one after the other along the joined dimension and agree along all others."""
    tensors: list[Tensor] = [tensor for tensor in call.arguments["tensors"] if tensor.numel()]
    return _joined(call, tensors, [call.fields_of(tensor) for tensor in tensors], call.arguments.get("dim", 0))


@rule("stack")
def stack(call: Call) -> Fields:
    """As ``cat`` of tensors that got a dimension of size 1."""
    tensors: list[Tensor] = list(call.arguments["tensors"])
    dim = call.arguments.get("dim", 0) % call.result.dim()
    shifted = [
        {as_dims([d + (d >= dim) for d in as_tuple(dims)]): array for dims, array in call.fields_of(tensor).items()}
        for tensor in tensors
    ]
    return _joined(call, [tensor.unsqueeze(dim) for tensor in tensors], shifted, dim)


def _joined(call: Call, tensors: list[Tensor], own: list[Fields], dim: int) -> Fields:
    joined = dim % call.result.dim()
    keys = {dims for fields in own for dims in fields}
    fields: Fields = {}
    if any(not isinstance(dims, int) for dims in keys):
        if all(set(labels) == keys for labels in own):
            for dims in [key for key in keys if not isinstance(key, int)]:
                fields[dims] = _joined_field(call, [labels[dims] for labels in own], as_tuple(dims), joined)
        else:
            own = [{**call.settled(labels)} for labels in own]
    for d, size in enumerate(call.result.shape):
        vectors = [labels.get(d) for labels in own]
        if d != joined:
            vector = meet(call, vectors, size, "is joined end to end with a tensor that no parameter controls")
        elif any(vector is not None for vector in vectors):
            parts = zip(vectors, tensors, strict=True)
            vector = torch.cat([unknown_vector(tensor.shape[d]) if v is None else v for v, tensor in parts])
        else:
            vector = None
        if vector is not None:
            fields[d] = vector
    return fields


def _joined_field(call: Call, arrays: list[Tensor], dims: tuple[int, ...], joined: int) -> Tensor:
    if joined in dims:
        whole = torch.cat(arrays, dims.index(joined))
        call.ledger.must_be_product(whole)
        return whole
    for array in arrays[1:]:
        call.ledger.join(arrays[0].reshape(-1), array.reshape(-1), "")
    return arrays[0]


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle_channels(call: Call) -> Labels:
    """Channels and blocks of pixels change places: the channels that make one output channel share a fate."""
    x: Tensor = call.arguments["self"]
    channel, labels = (1 if "channel" in call.name else x.dim() - 3), call.labels("self")
    passed = {dim: vector for dim, vector in labels.items() if dim <= channel}
    call.freeze({dim: vector for dim, vector in labels.items() if dim > channel}, f"'{call.name}' mixes it")
    vector = passed.pop(channel, None)
    if vector is None:
        return passed
    if call.name == "pixel_shuffle":
        passed[channel] = call.ledger.tie(vector.reshape(call.result.shape[channel], -1), [1]).reshape(-1)
    elif call.name == "pixel_unshuffle":
        passed[channel] = vector.repeat_interleave(call.arguments["downscale_factor"] ** 2)
    else:
        groups = vector.reshape(call.arguments["groups"], -1)
        call.ledger.must_be_product(groups)
        passed[channel] = groups.t().reshape(-1)
    return passed
