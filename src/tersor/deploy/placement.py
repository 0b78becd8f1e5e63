"""Where a program quantizes, made fit for an engine without changing a value: passes over its graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tersor.config.dtypes import FloatDtype, IntDtype, parse_dtype
from tersor.deploy.graph import CHOOSE, DEQUANTIZE, QUANTIZE, Graph, parameters_of, same_grid
from tersor.deploy.movement import are_signs, pads_convolutions, readers_of
from tersor.deploy.operators import spread, storage_type
from tersor.deploy.packing import channels_of

UINT8 = IntDtype(8, signed=False)
INT8 = IntDtype(8)
LARGEST_BIAS = 2.0**30
"""The largest number of a bias, half of what int32 holds: what is added to it needs room too."""
_ATEN = torch.ops.aten


def join_twins(graph: Graph) -> None:
    """Quantize a value once where several readers have it on one grid, and not again where it lies on it already.

    ``dequantize(quantize(dequantize(q)))`` on one grid is ``dequantize(q)``, exactly; a narrower range goes to the
    first quantizer, where nothing else reads what that gives.
    """
    for node in graph.calls(QUANTIZE):
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.target is not DEQUANTIZE or not _on_one_grid(graph, node, source):
            continue
        inner: Any = source.args[0]
        low, high = max(node.args[4], inner.args[4]), min(node.args[5], inner.args[5])
        if (low, high) != tuple(inner.args[4:6]):
            if low > high or readers_of(inner) != [source] or readers_of(source) != [node]:
                continue
            inner.args = (*inner.args[:4], low, high, *inner.args[6:])
        node.replace_all_uses_with(inner)
        graph.graph.erase_node(node)
    for target in (QUANTIZE, DEQUANTIZE):
        first: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.calls(target):
            twins = first.setdefault(node.args[0], [])  # pyright: ignore
            twin = next((other for other in twins if same_grid(graph, parameters_of(other), parameters_of(node))), None)
            if twin is None:
                twins.append(node)
            else:
                node.replace_all_uses_with(twin)
                graph.graph.erase_node(node)


def unsigned_activations(graph: Graph) -> None:
    """Store values as uint8 whose numbers fit: each number of a signed type is larger by 128, and means the same.

    Types below eight bits come along, with the range that they have: as values between layers they save nothing, and
    engines compute with bytes. Weights stay as they are.
    """
    _store_activations(graph, UINT8)


def signed_activations(graph: Graph) -> None:
    """Store values as int8 whose numbers fit: each number of an unsigned type is smaller by 128, and means the same."""
    _store_activations(graph, INT8)


def _store_activations(graph: Graph, wanted: IntDtype) -> None:
    for node in graph.calls(QUANTIZE):
        x, scale, zero_point, kind, low, high, *place = node.args
        shift, dtype = graph.constant(zero_point), parse_dtype(kind)
        if shift is None or not isinstance(dtype, IntDtype) or dtype.bits > wanted.bits or dtype == wanted:
            continue
        if are_signs(node):
            continue
        by, held = 128 * (dtype.signed - wanted.signed), storage_type(wanted)
        shifted = graph.new_constant((shift.int() + by).to(held), f"{node.name}_zero_point")
        with graph.graph.inserting_before(node):
            args = (x, scale, shifted, wanted.as_config(), low + by, high + by, *place)  # pyright: ignore
            made = graph.call(QUANTIZE, args, node, node.meta["val"].to(held))
        for user in list(node.users):
            _change_reader(user, made, shifted, wanted)
        if not node.users:
            graph.graph.erase_node(node)


def fixed_zero_points(graph: Graph) -> None:
    """Take the zero point of a symmetric type, which no range changes, for the constant that it is."""
    for choice in graph.calls(CHOOSE):
        arguments: tuple[Any, ...] = choice.args
        _, kind, scheme, low, high, *_ = arguments
        if scheme != "symmetric":
            continue
        dtype = parse_dtype(kind)
        middle = 0 if isinstance(dtype, FloatDtype) else (high - low + 1) // 2 + low
        for user in list(choice.users):
            if user.target is operator.getitem and user.args[1] == 1 and user.meta["val"].dim() == 0:
                value = torch.tensor(float(middle)).to(storage_type(dtype))
                user.replace_all_uses_with(graph.new_constant(value, f"{choice.name}_zero_point"))
                graph.graph.erase_node(user)


def integer_biases(graph: Graph) -> None:
    """Store the biases of convolutions as the integer kernels add them: in steps of both scales' product.

    The one pass that changes values, by half a step of a sum of products at most: a thousandth of what the rounding of
    one input does. A kernel would do it anyway, and engines that are told nothing leave the layer in floating point.
    """
    for node in graph.calls(_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default):
        if (scale := _scale_of_bias(graph, node)) is None:
            continue
        bias: Any = node.args[2]
        held: Any = graph.constant(bias)
        numbers = (held.double() / scale.double()).round()
        constants = [
            graph.new_constant(value, f"{bias.name}_{hint}")
            for value, hint in (
                (numbers.to(torch.int32), "numbers"), (scale, "scale"), (torch.zeros_like(numbers).int(), "zero_point"),
            )
        ]  # fmt: skip
        with graph.graph.inserting_before(node):
            value = graph.call(DEQUANTIZE, (*constants, "int32", 0), node, bias.meta["val"])
        node.replace_input_with(bias, value)


def room_for_bias(graph: Graph, node: fx.Node) -> bool:
    """Store the weight of a layer so that the kernel's int32 holds its bias; whether it does.

    Args:
        graph: it is changed where the weight needs coarser steps.
        node: a convolution or linear layer with an input and a weight of stored numbers.
    """
    bias = (*node.args[:3], None)[2]
    return bias is None or _scale_of_bias(graph, node) is not None


def _scale_of_bias(graph: Graph, node: fx.Node) -> torch.Tensor | None:
    """The steps in which an integer kernel adds the bias of a layer; None where it has none, or no room for it."""
    x, weight, bias = (*node.args[:3], None)[:3]
    held = graph.constant(bias)
    if isinstance(x, fx.Node) and pads_convolutions(x):
        x = x.args[0]
    operands = [each for each in (x, weight) if isinstance(each, fx.Node) and each.target is DEQUANTIZE]
    if held is None or len(operands) < 2 or any(part is not None for part in operands[0].args[4:]):
        return None
    channels, (axis, block) = channels_of(node), (*operands[1].args[4:], None, None)[:2]
    if axis not in (None, channels) or block is not None:
        return None
    scales = [graph.constant(each.args[1]) for each in operands]
    if scales[0] is None or scales[1] is None or scales[0].dim() or not _are_bytes(operands):
        return None
    step = scales[1].expand(held.shape).double()
    coarse = torch.maximum(step, held.abs().double() / (scales[0].double() * LARGEST_BIAS))
    if not torch.equal(step, coarse) and not _coarsen(graph, operands[1], coarse, channels):
        return None
    return (scales[0] * coarse.float()).contiguous()


def _coarsen(graph: Graph, weight: fx.Node, scale: torch.Tensor, axis: int) -> bool:
    """Store a weight in coarser steps, where nothing else reads it, and say whether that was done.

    The weights of a channel that is as good as dead are so small beside its bias that this has no number in their
    steps. In steps that do they are off by a billionth of the bias.
    """
    numbers, own = graph.constant(weight.args[0]), graph.constant(weight.args[1])
    shift = graph.constant(weight.args[2])
    if numbers is None or own is None or shift is None or len(weight.users) > 1 or bool(shift.any()):
        return False
    factor = spread(own.expand(scale.shape).double() / scale, numbers, axis, None)
    made = [
        graph.new_constant((numbers.double() * factor).round().to(numbers.dtype), f"{weight.name}_numbers"),
        graph.new_constant(scale.float(), f"{weight.name}_scale"),
        graph.new_constant(torch.zeros_like(scale).to(shift.dtype), f"{weight.name}_zero_point"),
    ]
    weight.args = (*made, weight.args[3], axis)
    return True


def _are_bytes(operands: list[fx.Node]) -> bool:
    """Whether stored numbers are integers that kernels multiply."""
    dtypes = [parse_dtype(operand.args[3]) for operand in operands]
    return all(isinstance(dtype, IntDtype) and dtype.bits <= UINT8.bits for dtype in dtypes)


def gather_numbers(graph: Graph) -> None:
    """Look up the stored numbers of a table, and dequantize what was found: not the whole table on each run."""
    for node in graph.calls(_ATEN.embedding.default):
        table, indices, *_ = node.args
        if not isinstance(table, fx.Node) or table.target is not DEQUANTIZE or graph.constant(table.args[0]) is None:
            continue
        numbers, scale, zero_point, kind, axis, block = (*table.args, None, None)[:6]
        if axis == 0 and block is not None:
            continue  # a row of scales serves several rows of numbers
        rank, width = node.meta["val"].dim(), int(node.meta["val"].shape[-1])
        with graph.graph.inserting_before(node):
            found = _look_up(graph, numbers, indices, node)
            if axis == 1 and block is None:
                place = (rank - 1, None)
            elif axis is not None:
                scale, zero_point = (_look_up(graph, each, indices, node) for each in (scale, zero_point))
                place = (rank - 1, block if axis == 1 else width)
            else:
                place = (None, None)
            value = graph.call(DEQUANTIZE, (found, scale, zero_point, kind, *place), node)
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)


def products(graph: Graph) -> None:
    """Say a linear layer with stored weights as a product and a sum, its weights stored as the product reads them.

    What reads three or more dimensions is a product in any engine. A bias then has as many dimensions as the output,
    so that no engine takes product and bias for the product of two matrices that it computes in floating point.
    """
    for node in graph.calls(_ATEN.linear.default, _ATEN.addmm.default):
        transposed = node.target is _ATEN.linear.default
        x, weight, bias = (*node.args, None)[:3] if transposed else (*node.args[1:3], node.args[0])
        if not isinstance(weight, fx.Node) or weight.target is not DEQUANTIZE or node.kwargs:
            continue
        fake = node.meta["val"]
        with graph.graph.inserting_before(node):
            if transposed:
                weight = _transposed(graph, weight)
            value = graph.call(_ATEN.matmul.default, (x, weight), node)
            if isinstance(bias, fx.Node):
                held = graph.constant(bias)
                if held is not None and held.dim() == 1 and fake.dim() > 2:
                    bias = graph.new_constant(held.view(*(1,) * (fake.dim() - 1), -1), f"{bias.name}_row")
                value = graph.call(_ATEN.add.Tensor, (value, bias), node)
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)


def whole_ranges(graph: Graph) -> None:
    """Store integers of less than 8 bits, and ranges that are less than their type's, in all of int8 or uint8.

    What lies outside the range is limited before it is rounded, which gives the same numbers.
    """
    for node in graph.calls(QUANTIZE):
        x, scale, zero_point, kind, low, high, *place = node.args
        dtype = parse_dtype(str(kind))
        own, shift = graph.constant(scale), graph.constant(zero_point)
        if not isinstance(dtype, IntDtype) or dtype.bits > 8 or own is None or shift is None or are_signs(node):
            continue
        whole = (-128, 127) if dtype.signed else (0, 255)
        byte = IntDtype(8, dtype.signed).as_config()
        if (low, high) != whole:
            assert isinstance(x, fx.Node)
            with graph.graph.inserting_before(node):
                x = _limited(graph, x, own, shift, (low, high), place)
        for user in list(node.users):
            assert user.target is DEQUANTIZE, f"{user} reads stored numbers"
            user.update_arg(3, byte)
        node.args = (x, scale, zero_point, byte, *map(float, whole), *place)


def _transposed(graph: Graph, weight: fx.Node) -> fx.Node:
    """A matrix of stored numbers the other way round; where others read it too, it is turned while the model runs."""
    numbers, scale, zero_point, kind, axis, block = (*weight.args, None, None)[:6]
    held = graph.constant(numbers)
    fake = weight.meta["val"].t()
    if held is None or not isinstance(numbers, fx.Node) or set(numbers.users) != {weight}:
        return graph.call(_ATEN.t.default, (weight,), weight, fake)
    turned = graph.new_constant(held.t().contiguous(), f"{numbers.name}_turned")
    if block is not None:
        scale, zero_point = (_turned(graph, each) for each in (scale, zero_point))
    place = (None if axis is None else 1 - axis, block)  # pyright: ignore
    return graph.call(DEQUANTIZE, (turned, scale, zero_point, kind, *place), weight, fake)


def _turned(graph: Graph, node: Any) -> fx.Node:
    held = graph.constant(node)
    assert held is not None
    return graph.new_constant(held.t().contiguous(), f"{node.name}_turned")


def _look_up(graph: Graph, table: Any, indices: Any, like: fx.Node) -> fx.Node:
    """The rows of a constant of two dimensions; one of one dimension has rows of one element."""
    held = graph.constant(table)
    assert held is not None
    if held.dim() == 1:
        table = graph.new_constant(held[:, None].contiguous(), f"{table.name}_rows")
        held = held[:, None]
    value = like.meta["val"].new_empty((*like.meta["val"].shape[:-1], held.shape[1]), dtype=held.dtype)
    return graph.call(_ATEN.embedding.default, (table, indices), like, value)


def _change_reader(user: fx.Node, made: fx.Node, zero_point: fx.Node, dtype: IntDtype) -> None:
    assert user.target is DEQUANTIZE, f"{user} reads stored numbers"
    _, scale, _, _, *place = user.args
    user.args = (made, scale, zero_point, dtype.as_config(), *place)


def _on_one_grid(graph: Graph, quantize: fx.Node, dequantize: fx.Node) -> bool:
    """Whether a value is quantized again to the numbers that it comes from, apart from the range."""
    scale, zero_point, kind, _, _, *place = (*parameters_of(quantize), None, None)[:7]
    own: tuple[Any, ...] = (*parameters_of(dequantize), None, None)[:5]
    source = dequantize.args[0]
    if not isinstance(source, fx.Node) or source.target is not QUANTIZE:
        return False
    return same_grid(graph, (scale, zero_point, kind, *place), own)


def _limited(
    graph: Graph, x: fx.Node, scale: torch.Tensor, zero_point: torch.Tensor, limits: tuple[Any, Any], place: list[Any]
) -> fx.Node:
    ends = [(limit - zero_point.float()) * scale for limit in limits]
    if not place or place[0] is None:
        return graph.call(torch.ops.aten.clamp.default, (x, *(float(end) for end in ends)), x)
    axis, block = (*place, None)[:2]
    like = torch.empty(tuple(1 if not isinstance(size, int) else size for size in x.meta["val"].shape))
    held = [graph.new_constant(spread(end, like, axis, block), f"{x.name}_limit") for end in ends]
    return graph.call(torch.ops.aten.clamp.Tensor, (x, *held), x)
