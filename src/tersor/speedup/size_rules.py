"""Which arguments of which operators are sizes, and what they must be when indices have left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersor.speedup.arguments import Path, argument_at, argument_path
from tersor.speedup.small_graph import SmallGraph

Rule = Callable[[SmallGraph, fx.Node], None]

RULES: dict[str, Rule] = {}
"""Operator name to what makes its sizes right."""
MODULES: dict[type[nn.Module], tuple[Any, tuple[str, ...]]] = {
    nn.Unflatten: ("unflatten", ("dim", "unflattened_size")),
    nn.ChannelShuffle: (torch.channel_shuffle, ("groups",)),
}
"""Modules that keep a size and no tensor: the operator that they call, and their attributes that are its arguments."""
RESULT_SIZES = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to"), 1),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), 1),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "rand", "randn"), 0),
}
"""Operators that take the sizes of their result as arguments, and the position of the first one."""
INFERRING = frozenset({"view", "reshape", "unflatten"})
"""Operators that find out a size of -1 themselves."""
GROUPED = {
    **dict.fromkeys(("group_norm", "channel_shuffle", "native_channel_shuffle"), (1, 1)),
    **{f"conv{kind}{n}d": (6, -1 - n) for n in (1, 2, 3) for kind in ("", "_transpose")},
}
"""Operators on groups of channels: the position of the number of groups, and the dimension of the channels."""
SPLITTING = (
    "split",
    "chunk",
    "split_with_sizes",
    "tensor_split",
    "unsafe_split",
    "unsafe_chunk",
    "unsafe_split_with_sizes",
)


def find_rule(node: fx.Node) -> Rule | None:
    """The rule for a node's operator; None for one that takes no sizes."""
    return RULES.get(_name(node)) if node.op in ("call_method", "call_function") else None


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _sequence(node: fx.Node, position: int, *names: str) -> list[Path]:
    """Where each of several sizes stands: in a tuple, or one argument after the other."""
    whole = argument_path(node, position, *names)
    if whole is None:
        return []
    given = argument_at(node, whole)
    if isinstance(given, (tuple, list)):
        return [(*whole, place) for place in range(len(given))]
    return [("args", place) for place in range(position, len(node.args))]


@_rule(*RESULT_SIZES)
def result_sizes(run: SmallGraph, node: fx.Node) -> None:
    """Each size is that of the result."""
    paths = _sequence(node, RESULT_SIZES[_name(node)], "size", "shape")
    _set_each(run, node, paths, run.expected(node) or ())


@_rule("unflatten")
def unflattened_sizes(run: SmallGraph, node: fx.Node) -> None:
    """The sizes are those of the result from the unflattened dimension on."""
    dim, paths = argument_path(node, 1, "dim"), _sequence(node, 2, "sizes", "unflattened_size")
    shape, expected = run.shape(node.args[0]), run.expected(node)
    if dim is not None and shape is not None and expected is not None:
        first = run.value(argument_at(node, dim)) % len(shape)
        _set_each(run, node, paths, expected[first : first + len(paths)])


def _set_each(run: SmallGraph, node: fx.Node, paths: list[Path], expected: tuple[int, ...]) -> None:
    if len(paths) != len(expected):  # x.view(torch.int32)
        return
    now = [run.value(argument_at(node, path)) for path in paths]
    infer = _name(node) in INFERRING and -1 not in now
    for path, value, new in zip(paths, now, expected, strict=True):
        if value not in (-1, new):
            run.set(node, path, new, infer=infer)
            infer = infer and argument_at(node, path) != -1


@_rule("repeat_interleave")
def repeated(run: SmallGraph, node: fx.Node) -> None:
    """As often as the result is longer than what is repeated."""
    path, expected = argument_path(node, 1, "repeats"), run.expected(node)
    dims = argument_path(node, 2, "dim")
    dim = argument_at(node, dims) if dims is not None else None
    if path is None or expected is None or not isinstance(dim, int) or not isinstance(argument_at(node, path), int):
        return
    size = run.value(node.args[0]).shape[dim]
    if size and expected[dim] % size == 0:
        run.set(node, path, expected[dim] // size)


@_rule("repeat", "tile")
def repetitions(run: SmallGraph, node: fx.Node) -> None:
    """The result has a multiple of the operand's sizes, aligned at the last dimension."""
    paths, expected = _sequence(node, 1, "repeats", "dims"), run.expected(node) or ()
    own = tuple(run.value(node.args[0]).shape)
    own = (1,) * (len(expected) - len(own)) + own
    if len(paths) == len(expected):
        for path, size, new in zip(paths, own, expected, strict=True):
            run.set(node, path, new // max(size, 1))


@_rule(*GROUPED)
def number_of_groups(run: SmallGraph, node: fx.Node) -> None:
    """Groups of channels of which something is left."""
    position, dim = GROUPED[_name(node)]
    path, shape = argument_path(node, position, "num_groups", "groups"), run.shape(node.args[0])
    if path is not None and shape is not None:
        channels = run.left(node.args[0]).get(dim % len(shape))
        if channels is not None:
            groups = channels.reshape(run.old(argument_at(node, path)), -1)
            run.set(node, path, int(groups.any(axis=1).sum()))


@_rule("layer_norm", "rms_norm")
def normalized_shape(run: SmallGraph, node: fx.Node) -> None:
    """The last sizes of the operand."""
    path = argument_path(node, 1, "normalized_shape")
    if path is not None:
        rank = len(run.value(argument_at(node, path)))
        run.set(node, path, tuple(run.value(node.args[0]).shape[-rank:]))


@_rule(*SPLITTING)
def parts(run: SmallGraph, node: fx.Node) -> None:
    """What is left of each part; where the operator cannot cut it so, the sizes of all parts are written down."""
    names = ("split_size", "split_size_or_sections", "split_sizes", "chunks", "indices_or_sections", "sections")
    path, dim, shape = argument_path(node, 1, *names), _dim(run, node, 2), run.shape(node.args[0])
    if path is None or shape is None:
        return
    given = argument_at(node, path)
    left = run.left(node.args[0]).get(dim, np.ones(shape[dim], bool))
    before = _lengths(node, shape[dim], run.old(given))
    if before is None:
        return
    ends = np.cumsum([0, *before])
    after = tuple(int(left[start:end].sum()) for start, end in pairwise(ends))
    now = run.value(given)
    if _lengths(node, int(left.sum()), now) == after:
        return
    takes_sizes = _name(node) in ("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes")
    if takes_sizes and isinstance(now, int) and _lengths(node, int(left.sum()), after[0]) == after:
        run.set(node, path, after[0])
    elif takes_sizes and isinstance(given, (tuple, list)) and any(isinstance(part, fx.Node) for part in given):
        for place, part in enumerate(after):
            run.set(node, (*path, place), part)
    else:
        node.target = "split" if node.op == "call_method" else torch.split
        node.args, node.kwargs = (node.args[0], given, dim), {}
        run.set(node, ("args", 1), after)


def _lengths(node: fx.Node, size: int, given: Any) -> tuple[int, ...] | None:
    """The sizes of the parts into which the operator takes a dimension; None where it refuses."""
    try:
        return tuple(len(part) for part in getattr(torch, _name(node))(torch.empty(size, device="cpu"), given))
    except (RuntimeError, ValueError, TypeError):
        return None


def _dim(run: SmallGraph, node: fx.Node, position: int) -> int:
    """The dimension on which an operator works, counted from the front."""
    path, shape = argument_path(node, position, "dim"), run.shape(node.args[0])
    return (0 if path is None else run.value(argument_at(node, path))) % len(shape or (0,))


@_rule("narrow")
def narrowed(run: SmallGraph, node: fx.Node) -> None:
    """As much as is left before the start, and behind it."""
    start, length = argument_path(node, 2, "start"), argument_path(node, 3, "length")
    left = run.left(node.args[0]).get(_dim(run, node, 1))
    if start is not None and length is not None and left is not None:
        first, count = run.old(argument_at(node, start)), run.old(argument_at(node, length))
        first += len(left) if first < 0 else 0
        run.set(node, start, int(left[:first].sum()))
        run.set(node, length, int(left[first : first + count].sum()))


@_rule("select")
def selected(run: SmallGraph, node: fx.Node) -> None:
    """As much as is left before the index."""
    index = argument_path(node, 2, "index")
    if index is not None:
        _set_bound(run, node, index, _dim(run, node, 1))


@_rule("__getitem__", "getitem", "__setitem__", "setitem")
def items(run: SmallGraph, node: fx.Node) -> None:
    """Bounds of slices become what is left before them, and so do indices."""
    if run.shape(node.args[0]) is not None:
        for path, dim in _indexed(run, node):
            if isinstance(argument_at(node, path), slice):
                if run.value(argument_at(node, (*path, 2))) in (None, 1):
                    _set_bound(run, node, (*path, 0), dim)
                    _set_bound(run, node, (*path, 1), dim)
            else:
                _set_bound(run, node, path, dim)


def _indexed(run: SmallGraph, node: fx.Node) -> Iterator[tuple[Path, int]]:
    """The slices and numbers of an index, with the dimension on which each works."""
    key = node.args[1]
    entries = list(key) if isinstance(key, tuple) else [key]
    values = [run.value(entry) for entry in entries]
    takes = [0 if v is None or v is ... else v.dim() if _is_mask(v) else 1 for v in values]
    dim = 0
    for place, (entry, taken) in enumerate(zip(values, takes, strict=True)):
        if entry is ...:
            dim = len(run.shape(node.args[0]) or ()) - sum(takes[place:])
        elif isinstance(entry, slice) or (isinstance(entry, int) and not isinstance(entry, bool)):
            yield ("args", 1, place) if isinstance(key, tuple) else ("args", 1), dim
        dim += taken


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bool


def _set_bound(run: SmallGraph, node: fx.Node, path: Path, dim: int) -> None:
    """Move a position along a labelled dimension to as many as are left before it; negative ones count from the end."""
    left, old = run.left(node.args[0]).get(dim), run.old(argument_at(node, path))
    if left is None or not isinstance(old, int) or old >= len(left) or left.all():
        return
    count = int(left.sum())
    new = int(left[: max(old + len(left), 0) if old < 0 else old].sum())
    run.set(node, path, new - count if old < 0 and new < count else new)
