"""Operators that only move values, and where a program may round instead: in front of them, or behind."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from tersor.config.dtypes import IntDtype, parse_dtype
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, parameters_of, same_grid
from tersor.deploy.operators import quantize

_ATEN = torch.ops.aten
CONVOLUTIONS = frozenset({_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.convolution.default})
POOLS = frozenset({_ATEN.max_pool1d.default, _ATEN.max_pool2d.default, _ATEN.max_pool3d.default})
MOVEMENT = frozenset(
    {
        _ATEN.view.default, _ATEN.reshape.default, _ATEN._unsafe_view.default, _ATEN.permute.default,
        _ATEN.transpose.int, _ATEN.t.default, _ATEN.flatten.using_ints, _ATEN.unflatten.int, _ATEN.squeeze.default,
        _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.unsqueeze.default, _ATEN.expand.default, _ATEN.slice.Tensor,
        _ATEN.select.int, _ATEN.contiguous.default, _ATEN.clone.default, _ATEN.alias.default, _ATEN.detach.default,
        _ATEN.flip.default,
        _ATEN.pixel_shuffle.default, _ATEN.pixel_unshuffle.default, _ATEN.channel_shuffle.default, _ATEN.roll.default,
        _ATEN.reflection_pad1d.default, _ATEN.reflection_pad2d.default, _ATEN.replication_pad1d.default,
        _ATEN.replication_pad2d.default, _ATEN.upsample_nearest2d.vec,
    }
) | POOLS  # fmt: skip
"""What gives values of its first argument and no others. A maximum is one of them, whatever the grid."""
PADS = frozenset({_ATEN.constant_pad_nd.default, _ATEN.pad.default})
SPLITS = frozenset({_ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default, _ATEN.unbind.int})
DROPOUTS = frozenset({_ATEN.dropout.default})
LIMITS = frozenset({_ATEN.relu.default, _ATEN.clamp.default, _ATEN.hardtanh.default, _ATEN.relu6.default})


def quantize_early(graph: Graph) -> None:
    r"""Quantize in front of what only moves values or limits them, so that it stands right behind what made them.

    An engine runs a convolution in integers where a quantizer reads its output. Rounding is monotone and goes value by
    value, so it commutes with movement, with maxima and with limits:

    - ``quantize(move(x))`` is ``quantize(move(dequantize(quantize(x))))``, since rounding twice on one grid is rounding
      once;
    - ``quantize(clamp(x, a, b))`` is ``quantize(x)`` whose range is cut to that between the numbers of a and of b. A
      ReLU is the case a = 0, and is gone.

    Both only where nothing else reads what would change: other readers see values that are not rounded.
    """
    work = [node for node in graph.calls(QUANTIZE) if is_whole_tensor(node)]
    while work:
        node = work.pop()
        source = node.args[0]
        if not isinstance(source, fx.Node) or readers_of(source) != [node] or are_signs(node):
            continue
        if source.target in LIMITS:
            if _take_limits(graph, node, source):
                work.append(node)
            continue
        values = [value for value in _moved(source) if not _lies_on(graph, value, node)]
        if all(value.op == "call_function" and _only_feeds(graph, value, source, node) for value in values):
            for value in dict.fromkeys(values):
                quantized, rounded = _round_behind(graph, value, parameters_of(node))
                source.replace_input_with(value, rounded)
                work.append(quantized)


def dequantize_late(graph: Graph, stays: Callable[[fx.Node], bool] = lambda node: False) -> None:
    """Round again behind what only moves values that lie on a grid, so that what reads them reads stored numbers.

    Values that are moved, and the positive ones that a ReLU keeps, lie on the grid on which they were; to round them
    changes nothing, and engines then move the stored numbers themselves.

    Args:
        graph: changed in place.
        stays: which movements stay in floating point.
    """
    for node in graph.calls():
        if stays(node):
            continue
        limited = node.target is _ATEN.relu.default
        sources = [node.args[0]] if limited else list(_moved(node, through_parts=True))
        if not sources or not all(_is_rounded_value(graph, source) for source in sources):
            continue
        first = sources[0]
        assert isinstance(first, fx.Node)
        if not all(same_grid(graph, parameters_of(first), parameters_of(other)) for other in sources[1:]):  # pyright: ignore
            continue
        readers = readers_of(node)
        if all(user.op == "output" or user.target is QUANTIZE for user in readers):
            continue
        if node.target in SPLITS:
            continue  # its parts are rounded, each by itself
        ranges = [_range_of(source) for source in sources]  # pyright: ignore
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        scale, zero_point, kind, *place = parameters_of(first)
        if node.target in PADS and not _holds_zero(graph, zero_point, low, high):
            continue
        _, rounded = _round_behind(graph, node, (scale, zero_point, kind, low, high, *place))
        for reader in readers:
            reader.replace_input_with(node, rounded)


def pad_behind_rounding(graph: Graph) -> None:
    """Round in front of the zeros that are added for convolutions: zero is on the grid, so they may come after."""
    for node in graph.calls(QUANTIZE):
        pad, readers = node.args[0], list(node.users)
        if not isinstance(pad, fx.Node) or not _adds_zeros(pad) or not is_whole_tensor(node) or are_signs(node):
            continue
        _, zero_point, _, low, high, *_ = parameters_of(node)
        if not _holds_zero(graph, zero_point, low, high) or any(user.target is not DEQUANTIZE for user in readers):
            continue
        if not all(_feeds_convolutions(user) for user in readers):
            continue
        value = pad.args[0].meta["val"]  # pyright: ignore
        node.replace_input_with(pad, pad.args[0])  # pyright: ignore
        node.meta["val"] = value.to(node.meta["val"].dtype)
        for rounded in readers:
            rounded.meta["val"] = value
            convolutions = readers_of(rounded)
            with graph.graph.inserting_after(rounded):
                padded = graph.call(pad.target, (rounded, *pad.args[1:]), pad)
            for convolution in convolutions:
                convolution.replace_input_with(rounded, padded)


def pads_convolutions(node: fx.Node) -> bool:
    """Whether a node adds zeros around what convolutions alone read, which then do it themselves."""
    return _adds_zeros(node) and _feeds_convolutions(node)


def _adds_zeros(node: fx.Node) -> bool:
    constant = node.target is _ATEN.constant_pad_nd.default or (
        node.target is _ATEN.pad.default and node.args[2:3] in ((), ("constant",))
    )
    return constant and _pads_with_zero(node)


def _feeds_convolutions(node: fx.Node) -> bool:
    return all(user.target in CONVOLUTIONS and user.args[0] is node for user in readers_of(node))


def on_one_grid(graph: Graph) -> None:
    """Round in front of what only moves or limits values too, where these come from another grid than they go to.

    ``quantize(move(x))`` is ``quantize(move(dequantize(quantize(x))))``. An engine that moves stored numbers then does
    not take those of one grid for those of another.
    """
    for node in graph.calls(QUANTIZE):
        source: Any = node.args[0]
        if set(source.users) != {node} or not is_whole_tensor(node) or are_signs(node):
            continue
        values = [source.args[0]] if source.target in LIMITS else list(_moved(source))
        for value in dict.fromkeys(values):
            if value.target is DEQUANTIZE and not _lies_on(graph, value, node):
                _, rounded = _round_behind(graph, value, parameters_of(node))
                source.replace_input_with(value, rounded)


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
        if not readers or not is_whole_tensor(readers[0]):
            continue
        scale, zero_point, kind, low, high, *_ = parameters_of(readers[0])
        ways = (scale, zero_point, kind, low, high)
        if not all(same_grid(graph, parameters_of(readers[0]), parameters_of(user)) for user in readers):
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


def readers_of(node: fx.Node) -> list[fx.Node]:
    """What reads a node's values, and not only its size."""
    return [user for user in node.users if user.target is not _ATEN.sym_size.int]


def _moved(node: fx.Node, *, through_parts: bool = False) -> Iterator[fx.Node]:
    """The values that a node moves; none where it does something else."""
    target, first = node.target, node.args[0] if node.args else None
    if target is _ATEN.cat.default and isinstance(first, (list, tuple)):
        yield from (value for value in first if isinstance(value, fx.Node))
    elif not isinstance(first, fx.Node):
        return
    elif through_parts and target is operator.getitem and first.target in SPLITS:
        yield from _moved(first)
    elif (
        target in MOVEMENT
        or target in SPLITS
        or (target in PADS and _pads_with_zero(node))
        or (target in DROPOUTS and node.args[2] is False)
    ):
        yield first


def _pads_with_zero(node: fx.Node) -> bool:
    """Whether what a pad adds lies on every grid: zero, or values that are there."""
    given = node.args[2:]
    if node.target is _ATEN.pad.default and given:
        mode, *given = given
        if mode != "constant":
            return True
    return not given or given[0] is None or given[0] in (0, 0.0)


def _take_limits(graph: Graph, node: fx.Node, source: fx.Node) -> bool:
    """Cut a quantizer's range to the limits in front of it, and let it read what is limited."""
    least, most = limits_of(source)
    scale, zero_point, kind, low, high, *_ = parameters_of(node)
    values = graph.constant(scale), graph.constant(zero_point)
    if values[0] is None or values[1] is None or not isinstance(parse_dtype(kind), IntDtype):
        return False
    if any(not isinstance(limit, (int, float, type(None))) for limit in (least, most)):
        return False
    # In the precision in which the values are rounded: a limit may lie halfway between two numbers.
    dtype = source.meta["val"].dtype
    low, high = (
        end if limit is None else float(quantize(torch.tensor(float(limit), dtype=dtype), *values, kind, low, high))
        for limit, end in ((least, low), (most, high))
    )
    node.args = (source.args[0], scale, zero_point, kind, low, high, *node.args[6:])
    if not source.users:
        graph.graph.erase_node(source)
    return True


def limits_of(node: fx.Node) -> tuple[Any, Any]:
    """The least and the greatest value of one of ``LIMITS``; None where there is none."""
    if node.target is _ATEN.relu.default:
        return 0.0, None
    if node.target is _ATEN.relu6.default:
        return 0.0, 6.0
    given = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
    default = (-1.0, 1.0) if node.target is _ATEN.hardtanh.default else (None, None)
    return (
        given.get("min", given.get("min_val", default[0])),
        given.get("max", given.get("max_val", default[1])),
    )


def are_signs(node: fx.Node) -> bool:
    """Whether a quantizer or dequantizer is one of int1: none of its numbers is zero, and a limit is no range."""
    return node.args[3] == "int1"


def _holds_zero(graph: Graph, zero_point: object, low: float, high: float) -> bool:
    """Whether zero lies in a range. One that was chosen while the model runs always has it."""
    held = graph.constant(zero_point)
    return held is None or low <= float(held) <= high


def _round_behind(graph: Graph, value: fx.Node, parameters: tuple[object, ...]) -> tuple[fx.Node, fx.Node]:
    """New nodes behind a value: its stored numbers, and what they mean."""
    scale, zero_point, kind, low, high, *place = parameters
    with graph.graph.inserting_after(value):
        fake = value.meta["val"]
        args = (value, scale, zero_point, kind, low, high, *place)
        quantized = graph.call(QUANTIZE, args, value, torch.ops.tersor.quantize(fake, fake, fake, kind, low, high))
    with graph.graph.inserting_after(quantized):
        rounded = graph.call(DEQUANTIZE, (quantized, scale, zero_point, kind, *place), value, fake)
    return quantized, rounded


def is_whole_tensor(node: fx.Node) -> bool:
    """Whether one scale serves all values, so that it does not matter where they stand."""
    place = node.args[6:] if node.target is QUANTIZE else node.args[4:]
    return all(part is None for part in place)


def _is_rounded_value(graph: Graph, node: object) -> bool:
    """Whether a node's values come from stored numbers that are no constant of the program, on one scale."""
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE or not is_whole_tensor(node):
        return False
    return isinstance(node.args[0], fx.Node) and node.args[0].target is QUANTIZE and not are_signs(node)


def _lies_on(graph: Graph, value: fx.Node, node: fx.Node) -> bool:
    """Whether a value lies on a quantizer's grid already."""
    if not _is_rounded_value(graph, value):
        return False
    scale, zero_point, kind, *_ = parameters_of(node)
    return same_grid(graph, (scale, zero_point, kind), parameters_of(value)[:3])


def _only_feeds(graph: Graph, value: fx.Node, source: fx.Node, node: fx.Node) -> bool:
    """Whether nothing reads a value but one node, and quantizers on the grid of another."""
    return value.target is not DEQUANTIZE and all(
        user is source or (user.target is QUANTIZE and same_grid(graph, parameters_of(user), parameters_of(node)))
        for user in readers_of(value)
    )


def _range_of(node: fx.Node) -> tuple[float, float]:
    """The range of the numbers that a dequantizer reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source.args[4], source.args[5]  # pyright: ignore
