"""What the patterns of Inductor's x86 back end take, made of what a program says; no value changes but where noted.

They look for ``dequantize -> convolution or linear -> (activation, sum) -> quantize`` with one scale for the input and
one for each output channel of the weight. What they do not look at they take for granted: that a convolution is not
transposed, that a range is all of its type. Here it is made so, or kept away from them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, parameters_of
from tersor.deploy.movement import POOLS
from tersor.deploy.packing import CONTRACTIONS, unfit_input, unfit_weight

_ATEN = torch.ops.aten
KERNELS = frozenset(
    {
        _ATEN.conv1d.default, _ATEN.conv1d.padding, _ATEN.conv2d.default, _ATEN.conv2d.padding, _ATEN.linear.default,
    }
)  # fmt: skip
"""What there is in int8."""


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


def misfit(graph: Graph, node: fx.Node, user: fx.Node) -> str:
    """Why no int8 kernel of Inductor reads a parameter in a call; empty where one does."""
    if user.target not in KERNELS or user.args[1] is not node:
        return f"Inductor has no int8 kernel for {user.target}"
    x: Any = user.args[0]
    if reason := unfit_input(graph, x):
        return reason
    if graph.constant(x.args[1]) is None and user.target is not _ATEN.linear.default:
        return "the scale of its input is dynamic, which Inductor takes for linear layers alone"
    if user.target is not _ATEN.linear.default and x.meta["val"].shape[1] == 1:
        # Seen with torch 2.13: contiguous and channels-last are the same for one channel, and it takes the wrong one.
        return "Inductor mistakes the layout of what a convolution of one channel gives"
    return unfit_weight(graph, node)
