"""Where a program quantizes, made fit for an engine without changing a value: passes over its graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tersor.config.dtypes import IntDtype
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, parameters_of, same_grid
from tersor.deploy.operators import storage_type

UINT8 = IntDtype(8, signed=False)


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
