"""Sums and wide numbers as OpenVINO takes them: what it rounds, and what it would leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from tersor.config.dtypes import IntDtype, parse_dtype
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, module_of
from tersor.deploy.movement import CONVOLUTIONS, LIMITS, POOLS, are_signs, is_whole_tensor

_ATEN = torch.ops.aten


def bytes_in_sums(graph: Graph) -> None:
    """Store the convolution's operand of a sum as int8, that is int16 in the simulation.

    OpenVINO adds to a convolution before it rounds: where a sum is rounded, what comes of the convolution is limited to
    its range, and not rounded to its grid. It needs that grid all the same to add in the convolution's kernel. So the
    simulation says 16 bits, which is as good as not rounded, and here the same range is said in 8 bits.
    """
    for node in graph.calls(QUANTIZE):
        x, scale, zero_point, kind, _, high, *_ = node.args
        held, shift = graph.constant(scale), graph.constant(zero_point)
        if kind != "int16" or not is_whole_tensor(node) or held is None or shift is None or bool(shift):
            continue
        if not is_added_unrounded(node) or not _meets_numbers(_sum_of(node)):
            continue
        wider = graph.new_constant(held * (float(high) / 127), f"{node.name}_scale")  # pyright: ignore
        byte = graph.new_constant(shift.to(torch.int8), f"{node.name}_zero_point")
        with graph.graph.inserting_before(node):
            made = graph.call(QUANTIZE, (x, wider, byte, "int8", -128.0, 127.0), node, node.meta["val"].to(torch.int8))
        for user in list(node.users):
            user.args = (made, wider, byte, "int8")
        graph.graph.erase_node(node)


def joins_sum(node: fx.Node) -> bool:
    """Whether a quantizer stands between a convolution, with what runs in its kernel, and a sum."""
    source, readers = node.args[0], list(node.users)
    while isinstance(source, fx.Node) and len(source.users) == 1 and _runs_in_kernel(source):
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.target not in CONVOLUTIONS or len(source.users) > 1:
        return False
    sums = [user for reader in readers for user in reader.users]
    return len(readers) == 1 and len(sums) == 1 and sums[0].target is _ATEN.add.Tensor


def is_added_unrounded(node: fx.Node) -> bool:
    """Whether OpenVINO leaves out what a quantizer does: it joins a sum, and one quantizer reads the sum."""
    if not joins_sum(node):
        return False
    total = _sum_of(node)
    if not is_wide(node) and any(_is_wide_value(operand) for operand in total.args):
        return False  # one operand is added unrounded, and that is the other one
    while len(total.users) == 1 and _runs_in_kernel(follower := next(iter(total.users))):
        total = follower
    return len(total.users) == 1 and all(user.target is QUANTIZE and not is_wide(user) for user in total.users)


def round_in_float(graph: Graph, wanted: Callable[[fx.Node], bool]) -> list[str]:
    """Round some values in floating-point operators, which give the same values; the modules where that was.

    Args:
        graph: changed in place.
        wanted: whether a quantizer is meant.
    """
    places: list[str] = []
    for node in graph.calls(QUANTIZE):
        x, scale, zero_point, kind, low, high, *_ = node.args
        held, shift = graph.constant(scale), graph.constant(zero_point)
        whole = isinstance(parse_dtype(str(kind)), IntDtype)
        if not whole or are_signs(node) or not is_whole_tensor(node) or held is None or shift is None:
            continue
        if not wanted(node):
            continue
        like: Any = x
        least, most = (float(end) - float(shift) for end in (low, high))  # pyright: ignore
        fake = like.meta["val"].float()
        with graph.graph.inserting_before(node):
            if fake is not like.meta["val"]:
                x = graph.call(_ATEN._to_copy.default, (x,), like, fake)
                x.kwargs = {"dtype": torch.float32}
            value = graph.call(_ATEN.mul.Tensor, (x, float(1 / held)), like, fake)
            value = graph.call(_ATEN.round.default, (value,), like, fake)
            value = graph.call(_ATEN.clamp.default, (value, least, most), like, fake)
            value = graph.call(_ATEN.mul.Tensor, (value, float(held)), like, fake)
        for user in list(node.users):
            user.replace_all_uses_with(value)
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
        places.append(module_of(like))
    return places


def is_wide(node: fx.Node) -> bool:
    """Whether a quantizer gives more than 8 bits."""
    dtype = parse_dtype(str(node.args[3]))
    return isinstance(dtype, IntDtype) and dtype.bits > 8


def _meets_numbers(total: fx.Node) -> bool:
    """Whether both operands of a sum are stored numbers, moved or limited maybe."""
    for operand in total.args:
        while isinstance(operand, fx.Node) and operand.target in LIMITS | POOLS:
            operand = operand.args[0]
        if not isinstance(operand, fx.Node) or operand.target is not DEQUANTIZE:
            return False
    return True


def _is_wide_value(node: Any) -> bool:
    """Whether a value comes from numbers of more than 8 bits that would be added unrounded."""
    source = node.args[0] if isinstance(node, fx.Node) and node.target is DEQUANTIZE else None
    return isinstance(source, fx.Node) and source.target is QUANTIZE and is_wide(source) and joins_sum(source)


def _sum_of(node: fx.Node) -> fx.Node:
    """The sum that a quantizer joins."""
    return next(iter(next(iter(node.users)).users))


def _runs_in_kernel(node: fx.Node) -> bool:
    """Whether a call goes value by value, so that a convolution's kernel takes it along."""
    operator: Any = node.target
    operands = [operand for operand in node.args if isinstance(operand, fx.Node)]
    pointwise = torch.Tag.pointwise in getattr(operator, "tags", ()) or operator is _ATEN.hardswish.default
    return pointwise and len(operands) == 1
