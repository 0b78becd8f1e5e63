"""Where a program quantizes, made fit for an engine without changing a value: passes over its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tersor.config.dtypes import IntDtype, parse_dtype
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, parameters_of, same_grid
from tersor.deploy.operators import spread, storage_type

UINT8 = IntDtype(8, signed=False)
POOLS = frozenset(
    {torch.ops.aten.max_pool1d.default, torch.ops.aten.max_pool2d.default, torch.ops.aten.max_pool3d.default}
)


def join_twins(graph: Graph) -> None:
    """Quantize a value once where several readers have it on one grid, and not again where it lies on it already.

    ``dequantize(quantize(dequantize(q)))`` on one grid is ``dequantize(q)``, exactly.
    """
    for node in graph.calls(QUANTIZE):
        source = node.args[0]
        if isinstance(source, fx.Node) and source.target is DEQUANTIZE and _on_one_grid(graph, node, source):
            node.replace_all_uses_with(source.args[0])  # pyright: ignore
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
    """Store values as uint8 that are stored as int8: each number is larger by 128, and means the same."""
    for node in graph.calls(QUANTIZE):
        x, scale, zero_point, kind, low, high, *place = node.args
        shift = graph.constant(zero_point)
        if kind != "int8" or shift is None:
            continue
        shifted = graph.new_constant((shift.int() + 128).to(storage_type(UINT8)), f"{node.name}_zero_point")
        with graph.graph.inserting_before(node):
            value = node.meta["val"].to(torch.uint8)
            args = (x, scale, shifted, "uint8", low + 128, high + 128, *place)  # pyright: ignore
            made = graph.call(QUANTIZE, args, node, value)
        for user in list(node.users):
            _change_reader(user, made, shifted)
        if not node.users:
            graph.graph.erase_node(node)


def _change_reader(user: fx.Node, made: fx.Node, zero_point: fx.Node) -> None:
    assert user.target is DEQUANTIZE, f"{user} reads stored numbers"
    _, scale, _, _, *place = user.args
    user.args = (made, scale, zero_point, "uint8", *place)


def _on_one_grid(graph: Graph, quantize: fx.Node, dequantize: fx.Node) -> bool:
    """Whether a value is quantized again to the numbers that it comes from, whose range is no wider."""
    scale, zero_point, kind, low, high, *place = (*parameters_of(quantize), None, None)[:7]
    own: tuple[Any, ...] = (*parameters_of(dequantize), None, None)[:5]
    source = dequantize.args[0]
    if not isinstance(source, fx.Node) or source.target is not QUANTIZE:
        return False
    inner = source.args[4:6]
    return same_grid(graph, (scale, zero_point, kind, *place), own) and low <= inner[0] and inner[1] <= high  # pyright: ignore


def before_pools(graph: Graph) -> None:
    """Quantize in front of a maximum pool and not behind it, so that it runs on small numbers.

    Rounding keeps the order of values, so the greatest of them is the same before and after. Where the pool's value or
    its input is also read as it is, nothing is gained, and they stay.
    """
    for pool in reversed(graph.calls(*POOLS)):
        readers, source = list(pool.users), pool.args[0]
        if not isinstance(source, fx.Node) or len(source.users) > 1 or source.meta["val"].dtype is not torch.float32:
            continue
        if any(reader.target is not QUANTIZE for reader in readers):
            continue
        scale, zero_point, kind, low, high, *place = parameters_of(readers[0])
        ways = (scale, zero_point, kind, low, high)
        if any(place) or not all(same_grid(graph, parameters_of(readers[0]), parameters_of(user)) for user in readers):
            continue
        with graph.graph.inserting_before(pool):
            stored = source.meta["val"].to(readers[0].meta["val"].dtype)
            made = graph.call(QUANTIZE, (source, *ways), source, stored)
            value = graph.call(DEQUANTIZE, (made, scale, zero_point, kind), source)
        pool.replace_input_with(source, value)
        for reader in readers:
            for user in list(reader.users):
                assert user.target is DEQUANTIZE, f"{user} reads stored numbers"
                user.replace_all_uses_with(pool)
                graph.graph.erase_node(user)
            graph.graph.erase_node(reader)


def whole_ranges(graph: Graph) -> None:
    """Store integers of less than 8 bits, and ranges that are less than their type's, in all of int8 or uint8.

    What lies outside the range is limited before it is rounded, which gives the same numbers.
    """
    for node in graph.calls(QUANTIZE):
        x, scale, zero_point, kind, low, high, *place = node.args
        dtype = parse_dtype(str(kind))
        own, shift = graph.constant(scale), graph.constant(zero_point)
        if not isinstance(dtype, IntDtype) or dtype.bits > 8 or own is None or shift is None:
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
