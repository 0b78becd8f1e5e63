"""Quantized parameters as the int8 kernels of an engine read them: packed, or as real values where none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tersor.config.dtypes import FloatDtype, parse_dtype
from tersor.deploy.graph import DEQUANTIZE, Graph, module_of
from tersor.deploy.lowering import Fallback
from tersor.deploy.operators import dequantize, storage_type

_ATEN = torch.ops.aten
TRANSPOSED = frozenset({_ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input})
CONTRACTIONS = TRANSPOSED | {
    _ATEN.conv1d.default, _ATEN.conv1d.padding, _ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.conv3d.default,
    _ATEN.convolution.default, _ATEN.linear.default, _ATEN.addmm.default, _ATEN.mm.default, _ATEN.matmul.default,
    _ATEN.bmm.default,
}  # fmt: skip
BYTES = (torch.int8, torch.uint8)
Misfit = Callable[[Graph, fx.Node, fx.Node], str]
"""Says why no int8 kernel of an engine reads a parameter (the first node) in a call (the second); empty where one
does."""


def fit_parameters(graph: Graph, misfit: Misfit) -> tuple[Fallback, ...]:
    """Each quantized parameter for each of its readers: packed for a kernel, or as real values.

    Args:
        graph: changed in place.
        misfit: of the engine.

    Returns:
        The layers whose weight and input are quantized, and which run in floating point nevertheless.
    """
    fallbacks: dict[str, Fallback] = {}
    for node in graph.calls(DEQUANTIZE):
        if graph.constant(node.args[0]) is not None:
            for fallback in _fit_parameter(graph, node, misfit):
                fallbacks.setdefault(fallback.where, fallback)
    return tuple(fallbacks.values())


def unfit_input(graph: Graph, x: object) -> str:
    """Why no kernel of bytes reads an input: it needs one scale; empty where it has it."""
    if not isinstance(x, fx.Node) or x.target is not DEQUANTIZE:
        return "its input is not quantized"
    _, _, _, kind, *place = x.args
    if any(each is not None for each in place):
        return "its input has more than one scale"
    return f"its input is {kind}" if not _are_bytes(str(kind)) else ""


def unfit_weight(graph: Graph, node: fx.Node, axis: int = 0) -> str:
    """Why no kernel of bytes reads a weight: it needs a scale for each output channel; empty where it has it.

    Args:
        graph: of both.
        node: dequantizes the weight.
        axis: of its output channels.
    """
    _, _, _, kind, own, block = (*node.args, None, None)[:6]
    if not _are_bytes(str(kind)):
        return f"its weight is {kind}"
    if block is not None or own not in (None, axis):
        return "its weight has other scales than one for each output channel"
    numbers, shift = _shifted(graph, node)
    limits = torch.iinfo(torch.int8)
    if bool(shift.any()) or numbers.min() < limits.min or numbers.max() > limits.max:
        return "its weight has zero points"
    return ""


def channels_of(call: fx.Node) -> int:
    """The dimension of a layer's weight in which its output channels lie."""
    return 1 if call.target in TRANSPOSED else 0


def _are_bytes(kind: str) -> bool:
    dtype = parse_dtype(kind)
    return not isinstance(dtype, FloatDtype) and storage_type(dtype) in BYTES


def _fit_parameter(graph: Graph, node: fx.Node, misfit: Misfit) -> list[Fallback]:
    fallbacks: list[Fallback] = []
    packed: dict[int, fx.Node] = {}
    floating: fx.Node | None = None
    for user in list(node.users):
        why = misfit(graph, node, user)
        if not why:
            axis = channels_of(user)
            packed[axis] = packed.get(axis) or _packed(graph, node, axis)
            user.replace_input_with(node, packed[axis])
            continue
        if _weighs(user, node) and _is_quantized(user, node):
            fallbacks.append(Fallback(module_of(user), f"runs in floating point, on the rounded values: {why}"))
        floating = floating or graph.new_constant(_values(graph, node), f"{node.name}_values")
        user.replace_input_with(node, floating)
    if not node.users:
        graph.graph.erase_node(node)
    return fallbacks


def _shifted(graph: Graph, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Stored numbers and zero points of a weight, both smaller by the zero point where all channels have the same."""
    numbers, zeros = graph.constant(node.args[0]), graph.constant(node.args[2])
    assert numbers is not None
    assert zeros is not None
    common = int(zeros.flatten()[0])
    return numbers.int() - common, zeros.int() - common


def _packed(graph: Graph, node: fx.Node, axis: int) -> fx.Node:
    """The weight as the patterns want it: int8, without zero points, a scale for each output channel."""
    numbers, shift = _shifted(graph, node)
    scales = graph.constant(node.args[1])
    assert scales is not None
    count = numbers.shape[axis]
    whole = scales.dim() == 0
    q, scale, zero_point = node.args[:3]
    if bool((graph.constant(zero_point) != 0).any()) or node.args[3] != "int8":
        q = graph.new_constant(numbers.to(torch.int8), f"{node.name}_numbers")
        zero_point = graph.new_constant(shift.to(torch.int8), f"{node.name}_zero_point")
    if whole:
        scale = graph.new_constant(scales.expand(count).contiguous(), f"{node.name}_scale")
        zero_point = graph.new_constant(torch.zeros(count, dtype=torch.int8), f"{node.name}_zero_points")
    with graph.graph.inserting_before(node):
        return graph.call(DEQUANTIZE, (q, scale, zero_point, "int8", axis), node)


def _values(graph: Graph, node: fx.Node) -> Tensor:
    """The real values of a parameter."""
    q, scale, zero_point, *rest = (
        graph.constant(argument) if isinstance(argument, fx.Node) else argument for argument in node.args
    )
    result: Any = dequantize(q, scale, zero_point, *rest)
    return result


def _weighs(user: fx.Node, node: fx.Node) -> bool:
    """Whether a call takes a value as its weight, and not as its bias."""
    return (
        user.target in CONTRACTIONS
        and node in user.args[1:]
        and (user.args[1] is node or user.target is _ATEN.addmm.default)
    )


def _is_quantized(user: fx.Node, weight: fx.Node) -> bool:
    return any(own.target is DEQUANTIZE for own in user.all_input_nodes if own is not weight)
