"""What XNNPACK's partitioner takes into its int8 kernels, made of what a program says; no value changes.

It looks for ``dequantize -> operator -> (activation) -> quantize``, all of int8 with one scale for a value: an operator
whose output is not rounded has no int8 kernel. What it takes it does not always check. A dequantize node tells all of
its readers at once that the value stays in int8; ranges that are less than their type's, zero points of weights and, in
what only moves values, a second grid are left out without a word. Here it is made so, or kept away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tersor.config.dtypes import IntDtype, parse_dtype
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, module_of
from tersor.deploy.lowering import Fallback
from tersor.deploy.movement import are_signs, is_whole_tensor, limits_of
from tersor.deploy.packing import channels_of, unfit_input, unfit_weight
from tersor.deploy.placement import room_for_bias
from tersor.deploy.unsupported import in_floating_point

_ATEN = torch.ops.aten
KERNELS = frozenset(
    {
        _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv_transpose2d.input, _ATEN.linear.default,
    }
)  # fmt: skip
"""What there is in int8."""
FUSED = frozenset({_ATEN.relu.default, _ATEN.hardtanh.default})
"""The activations that a kernel does at its end."""
SUMS = frozenset({_ATEN.add.Tensor, _ATEN.sub.Tensor})
RATIOS = (2.0**-10, 2.0**8)
"""Of the larger scale of a sum's operands to that of the sum: beyond, XNNPACK's multipliers have no room."""
GROUPS = 6
"""Where the arguments of a transposed convolution say its groups."""


def bytes_alone(graph: Graph) -> tuple[Fallback, ...]:
    """Round in floating point what XNNPACK cannot hold: values with several scales, or with one that is dynamic.

    Returns:
        where that was.
    """
    found: dict[str, Fallback] = {}
    for node in graph.calls(DEQUANTIZE):
        numbers: Any = node.args[0]
        if numbers.op != "call_function" or numbers.target is not QUANTIZE:
            continue
        dtype, where = parse_dtype(str(node.args[3])), module_of(node)
        if graph.constant(node.args[1]) is None:
            why = "its scale is dynamic"
        elif not is_whole_tensor(node):
            why = "it has more than one scale"
        elif not isinstance(dtype, IntDtype) or dtype.bits > 8 or are_signs(node):
            why = f"it is {node.args[3]}"
        else:
            continue
        found.setdefault(where, Fallback(where, f"a value is rounded in floating point: {why}"))
        in_floating_point(graph, node)
    return tuple(found.values())


def explicit_padding(graph: Graph) -> None:
    """Say the padding ``same`` in numbers, and by an operator of its own where it differs from one side to the other.

    Where XNNPACK's partitioner finds such a padding itself, in front of a convolution in floating point, it takes its
    result for int8, and the file cannot be loaded.
    """
    for node in graph.calls(_ATEN.conv1d.padding, _ATEN.conv2d.padding):
        rest: list[Any] = [None, 1, "valid", 1, 1]
        given: list[Any] = [*node.args, *rest[len(node.args) - 2 :]]
        x, weight, bias, stride, padding, dilation, groups = given
        kernel = weight.meta["val"].shape[2:]
        stride, dilation = _for_each(stride, len(kernel)), _for_each(dilation, len(kernel))
        total = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        total = total if padding == "same" else [0] * len(kernel)
        with graph.graph.inserting_before(node):
            if any(size % 2 for size in total):
                sides = [side for size in reversed(total) for side in (size // 2, size - size // 2)]
                shape = x.meta["val"].shape  # computed here: the operator would take a free size for the example's
                spatial = [size + more for size, more in zip(shape[2:], total, strict=True)]
                padded = x.meta["val"].new_empty([*shape[:2], *spatial])
                x, total = graph.call(_ATEN.constant_pad_nd.default, (x, sides), node, padded), [0] * len(kernel)
            plain = _ATEN.conv1d.default if len(kernel) == 1 else _ATEN.conv2d.default
            args = (x, weight, bias, stride, [size // 2 for size in total], dilation, groups)
            node.replace_all_uses_with(graph.call(plain, args, node))
        graph.graph.erase_node(node)


def _for_each(value: int | Sequence[int], count: int) -> list[int]:
    """What is said for all dimensions at once, or for each."""
    values = [value] if isinstance(value, int) else list(value)
    return values if len(values) == count else values * count


def own_biases(graph: Graph) -> None:
    """Give each layer a bias in floating point that nothing else reads.

    XNNPACK stores it once for all its readers, in the steps of the first one's scales.
    """
    for node in graph.calls(*KERNELS):
        bias = (*node.args[:3], None)[2]
        if isinstance(bias, fx.Node) and bias.target is DEQUANTIZE and graph.constant(bias.args[0]) is not None:
            in_floating_point(graph, bias)
            bias = node.args[2]
        held = graph.constant(bias)
        if isinstance(bias, fx.Node) and held is not None and len(bias.users) > 1:
            node.update_arg(2, graph.new_constant(held.clone(), f"{bias.name}_own"))


def limit_in_kernels(graph: Graph) -> None:
    """Say limits as the activation that a kernel does at its end; a limit on one side has the other one far away."""
    for node in graph.calls(_ATEN.clamp.default):
        least, most = limits_of(node)
        if all(isinstance(limit, (int, float)) for limit in (least, most)) and least < most:
            node.target, node.args, node.kwargs = _ATEN.hardtanh.default, (node.args[0], least, most), {}


def far_sums(graph: Graph) -> tuple[Fallback, ...]:
    """Round in floating point the sums whose scales are so far apart that XNNPACK's fixed-point numbers end.

    Returns:
        where that was.
    """
    found: list[Fallback] = []
    for node in graph.calls(*SUMS):
        operands = [own for own in node.args if isinstance(own, fx.Node)]
        quantizing = _rounding_of(node)
        if quantizing is None or any(own.target is not DEQUANTIZE for own in operands):
            continue
        scales = [graph.constant(own.args[1]) for own in (*operands, quantizing)]
        if any(scale is None for scale in scales):
            continue
        *parts, total = (float(scale) for scale in scales if scale is not None)
        if not RATIOS[0] <= max(parts) / total < RATIOS[1]:
            where = module_of(node)
            found.append(Fallback(where, "added in floating point: its operands' scales are too far from its own"))
            for reader in list(quantizing.users):
                in_floating_point(graph, reader)
    return tuple(found)


def dequantize_for_each(graph: Graph) -> None:
    """Give each reader of stored numbers its own dequantize node: XNNPACK decides by that whether they stay int8."""
    for node in graph.calls(DEQUANTIZE):
        for reader in list(node.users)[1:]:
            with graph.graph.inserting_before(node):
                own = graph.call(DEQUANTIZE, node.args, node)
            reader.replace_input_with(node, own)


def misfit(graph: Graph, node: fx.Node, user: fx.Node) -> str:
    """Why no int8 kernel of XNNPACK reads a parameter in a call; empty where one does."""
    if user.target not in KERNELS or user.args[1] is not node:
        return f"XNNPACK has no int8 kernel for {user.target}"
    x, _, bias = (*user.args[:3], None)[:3]
    if reason := unfit_input(graph, x) or unfit_weight(graph, node, channels_of(user)):
        return reason
    if user.target is _ATEN.conv_transpose2d.input and len(user.args) > GROUPS and user.args[GROUPS] != 1:
        return "XNNPACK has no int8 kernel for transposed convolutions in groups"
    if _rounding_of(user) is None:
        return "its output is not rounded, or is read before it is, and XNNPACK's int8 kernels give int8"
    if bias is not None and graph.constant(bias) is None:
        return "its bias is no constant"
    if not room_for_bias(graph, user):
        return "its bias is too large for the steps of its weight"
    return ""


def _rounding_of(node: fx.Node) -> fx.Node | None:
    """The quantize node that alone reads a value, behind an activation that a kernel does as well."""
    readers = list(node.users)
    if len(readers) == 1 and readers[0].target in FUSED:
        readers = list(readers[0].users)
    return readers[0] if len(readers) == 1 and readers[0].target is QUANTIZE else None
