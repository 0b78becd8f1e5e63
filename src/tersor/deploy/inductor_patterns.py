"""What the patterns of Inductor's x86 back end take, made of what a program says; no value changes but where noted.

They look for ``dequantize -> convolution or linear -> (activation, sum) -> quantize`` with one scale for the input and
one for each output channel of the weight. What they do not look at they take for granted: that a convolution is not
transposed, that a range is all of its type. Here it is made so, or kept away from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tersor.config.dtypes import FloatDtype, parse_dtype
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, module_of, parameters_of
from tersor.deploy.lowering import Fallback
from tersor.deploy.movement import LIMITS, POOLS, limits_of
from tersor.deploy.operators import dequantize, storage_type

_ATEN = torch.ops.aten
KERNELS = frozenset(
    {
        _ATEN.conv1d.default, _ATEN.conv1d.padding, _ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.linear.default,
    }
)  # fmt: skip
"""What there is in int8."""
CONTRACTIONS = KERNELS | {
    _ATEN.conv3d.default, _ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input,
    _ATEN.convolution.default, _ATEN.addmm.default, _ATEN.mm.default, _ATEN.matmul.default, _ATEN.bmm.default,
}  # fmt: skip
BYTES = (torch.int8, torch.uint8)


def round_before_pools(graph: Graph) -> None:
    """Round in front of a maximum as well as behind it, so that the pattern of a pool of bytes fits.

    A maximum gives a value that it was given, so the rounding behind it changes nothing any more.
    """
    for node in graph.calls(QUANTIZE):
        pool = node.args[0]
        if not isinstance(pool, fx.Node) or pool.target not in POOLS or len(pool.users) > 1:
            continue
        x, grid = pool.args[0], parameters_of(node)
        if not isinstance(x, fx.Node) or x.target is DEQUANTIZE or any(each is not None for each in grid[5:]):
            continue
        with graph.graph.inserting_before(pool):
            value = x.meta["val"]
            made = graph.call(QUANTIZE, (x, *grid), node, value.to(node.meta["val"].dtype))
            back = graph.call(DEQUANTIZE, (made, *grid[:3]), node, value.float())
        pool.replace_input_with(x, back)


def merge_limits(graph: Graph) -> None:
    """One limit in place of an activation that is a limit and another behind it: a kernel has one at its end."""
    for node in graph.calls(_ATEN.clamp.default):
        x = node.args[0]
        if not isinstance(x, fx.Node) or x.target not in LIMITS or len(x.users) > 1:
            continue
        ends = [*limits_of(x), *limits_of(node)]
        if any(isinstance(end, fx.Node) for end in ends):
            continue
        lows, highs = ([end for end in own if end is not None] for own in (ends[::2], ends[1::2]))
        low, high = max(lows, default=None), min(highs, default=None)
        if low is not None and high is not None and low > high:
            continue  # what is left is one number, and which depends on the order
        node.args, node.kwargs = (x.args[0], low, high), {}
        graph.graph.erase_node(x)


def fit_parameters(graph: Graph) -> tuple[Fallback, ...]:
    """Each quantized parameter for each of its readers: packed for a kernel, or as real values.

    Returns:
        The layers whose weight and input are quantized, and which run in floating point nevertheless.
    """
    fallbacks: dict[str, Fallback] = {}
    for node in graph.calls(DEQUANTIZE):
        if graph.constant(node.args[0]) is not None:
            for fallback in _fit_parameter(graph, node):
                fallbacks.setdefault(fallback.where, fallback)
    return tuple(fallbacks.values())


def contraction_behind(node: fx.Node) -> fx.Node | None:
    """The convolution or product whose result a call takes, as far as one kernel may do both."""
    while node.op == "call_function":
        if node.target in CONTRACTIONS:
            return node
        if node.target is DEQUANTIZE or "dequantize" in str(node.target):
            return None
        inputs = [own for own in node.all_input_nodes if own.op == "call_function"]
        if len(inputs) == 2:  # a sum: the operand that comes from stored numbers is not the one
            inputs = [own for own in inputs if contraction_behind(own) is not None]
        if len(inputs) != 1:
            return None
        node = inputs[0]
    return None


def _fit_parameter(graph: Graph, node: fx.Node) -> list[Fallback]:
    fallbacks: list[Fallback] = []
    packed: fx.Node | None = None
    floating: fx.Node | None = None
    for user in list(node.users):
        why = _misfit(graph, node, user)
        if not why:
            packed = packed or _packed(graph, node)
            user.replace_input_with(node, packed)
            continue
        if _weighs(user, node) and _is_quantized(user, node):
            fallbacks.append(Fallback(module_of(user), f"runs in floating point, on the rounded values: {why}"))
        floating = floating or graph.new_constant(_values(graph, node), f"{node.name}_values")
        user.replace_input_with(node, floating)
    if not node.users:
        graph.graph.erase_node(node)
    return fallbacks


def _misfit(graph: Graph, node: fx.Node, user: fx.Node) -> str:
    """Why no int8 kernel reads a parameter; empty where one does."""
    if user.target not in KERNELS or user.args[1] is not node:
        return f"Inductor has no int8 kernel for {user.target}"
    x = user.args[0]
    if not isinstance(x, fx.Node) or x.target is not DEQUANTIZE:
        return "its input is not quantized"
    _, scale, _, kind, *place = x.args
    if any(each is not None for each in place):
        return "its input has more than one scale"
    dynamic = graph.constant(scale) is None
    if dynamic and user.target is not _ATEN.linear.default:
        return "the scale of its input is dynamic, which Inductor takes for linear layers alone"
    if storage_type(parse_dtype(kind)) not in BYTES or isinstance(parse_dtype(kind), FloatDtype):
        return f"its input is {kind}"
    if user.target is not _ATEN.linear.default and x.meta["val"].shape[1] == 1:
        # Seen with torch 2.13: contiguous and channels-last are the same for one channel, and it takes the wrong one.
        return "Inductor mistakes the layout of what a convolution of one channel gives"
    return _unfit_weight(graph, node)


def _unfit_weight(graph: Graph, node: fx.Node) -> str:
    _, _, _, kind, axis, block = (*node.args, None, None)[:6]
    if isinstance(parse_dtype(kind), FloatDtype) or storage_type(parse_dtype(kind)) not in BYTES:
        return f"its weight is {kind}"
    if block is not None or axis not in (None, 0):
        return "its weight has other scales than one for each output channel"
    numbers, shift = _shifted(graph, node)
    limits = torch.iinfo(torch.int8)
    if bool(shift.any()) or numbers.min() < limits.min or numbers.max() > limits.max:
        return "its weight has zero points"
    return ""


def _shifted(graph: Graph, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Stored numbers and zero points of a weight, both smaller by the zero point where all channels have the same."""
    numbers, zeros = graph.constant(node.args[0]), graph.constant(node.args[2])
    assert numbers is not None
    assert zeros is not None
    common = int(zeros.flatten()[0])
    return numbers.int() - common, zeros.int() - common


def _packed(graph: Graph, node: fx.Node) -> fx.Node:
    """The weight as the patterns want it: int8, without zero points, a scale for each output channel."""
    numbers, shift = _shifted(graph, node)
    scales = graph.constant(node.args[1])
    assert scales is not None
    count = numbers.shape[0]
    whole = scales.dim() == 0
    q, scale, zero_point = node.args[:3]
    if bool((graph.constant(zero_point) != 0).any()) or node.args[3] != "int8":
        q = graph.new_constant(numbers.to(torch.int8), f"{node.name}_numbers")
        zero_point = graph.new_constant(shift.to(torch.int8), f"{node.name}_zero_point")
    if whole:
        scale = graph.new_constant(scales.expand(count).contiguous(), f"{node.name}_scale")
        zero_point = graph.new_constant(torch.zeros(count, dtype=torch.int8), f"{node.name}_zero_points")
    with graph.graph.inserting_before(node):
        return graph.call(DEQUANTIZE, (q, scale, zero_point, "int8", 0), node)


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
