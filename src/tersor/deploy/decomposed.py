"""A program in the words of torch's own compilers: ``quantized_decomposed``, which Inductor and ExecuTorch look for."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from tersor.config.dtypes import FloatDtype, parse_dtype
from tersor.deploy.graph import CHOOSE, DEQUANTIZE, QUANTIZE, Graph
from tersor.deploy.lowering import Program
from tersor.deploy.operators import choose, dequantize, quantize, storage_type

NAMED = (torch.int8, torch.uint8, torch.int16, torch.int32)


def decompose(program: Program, *, named: Sequence[torch.dtype] = NAMED) -> Program:
    """Put ``torch.ops.quantized_decomposed`` in the place of the program's own operators; the values stay the same.

    A scale for the whole tensor becomes a number in the graph where it is constant, which is what patterns match, and
    one for each channel stays a tensor. Parameters in blocks that divide their rows become
    ``dequantize_per_channel_group``. What these operators do not have (fp8, blocks of activations, and the choice of a
    dynamic scale, for which they have another formula) is written in ATen's arithmetic.

    Args:
        program: of :func:`tersor.deploy.lowering.lower`, prepared for an engine or not.
        named: stored numbers of other types are written in arithmetic.
    """
    _register()
    graph = Graph(program)
    for node in graph.calls(QUANTIZE):
        _say_quantize(graph, node, named)
    for node in graph.calls(DEQUANTIZE):
        _say_dequantize(graph, node, named)
    for node in graph.calls(CHOOSE):
        _inline(graph, node, choose)
    return graph.close()


def _register() -> None:
    """The operators exist once their module is imported."""
    import torch.ao.quantization.fx._decomposed  # noqa: F401  # pyright: ignore[reportUnusedImport]


def _say_quantize(graph: Graph, node: fx.Node, named: Sequence[torch.dtype]) -> None:
    x, scale, zero_point, kind, low, high, axis, block = _arguments(node)
    dtype = parse_dtype(kind)
    held = storage_type(dtype)
    if isinstance(dtype, FloatDtype) or held not in named or block is not None:
        _inline(graph, node, quantize)
        return
    grid = _grid(graph, node, scale, zero_point, axis)
    _replace(graph, node, grid, "quantize", (x, *grid, int(low), int(high), held))


def _say_dequantize(graph: Graph, node: fx.Node, named: Sequence[torch.dtype]) -> None:
    q, scale, zero_point, kind, axis, block = _arguments(node)
    dtype = parse_dtype(kind)
    held = storage_type(dtype)
    plain = isinstance(dtype, FloatDtype) or held not in named
    if plain or (block is not None and not _in_groups(graph, q, axis, block)):
        _inline(graph, node, dequantize)
        return
    low, high = _range_of(q, held)
    if block is not None:
        scales, zeros = _grid(graph, node, scale, zero_point, axis)[:2]
        target = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
        _put(graph, node, target, (q, scales, zeros, low, high, held, block, torch.float32))
        return
    grid = _grid(graph, node, scale, zero_point, axis)
    _replace(graph, node, grid, "dequantize", (q, *grid, low, high, held))


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of a call, with those that it leaves to their defaults."""
    schema = node.target._schema.arguments  # pyright: ignore
    given = (*node.args, *(None for _ in schema[len(node.args) :]))
    return tuple(node.kwargs.get(own.name, value) for own, value in zip(schema, given, strict=True))


def _grid(graph: Graph, node: fx.Node, scale: Any, zero_point: Any, axis: int | None) -> tuple[Any, ...]:
    """Scale and zero point as numbers; as tensors where they are none; and the axis, where there is one.

    Zero points become wide integers, since these operators subtract them in the type that they come in.
    """
    scales, zeros = graph.constant(scale), graph.constant(zero_point)
    if axis is None and scales is not None and zeros is not None:
        return float(scales), int(zeros)
    if zeros is not None:
        zero_point = graph.new_constant(zeros.long(), f"{node.name}_zero_point")
    return (scale, zero_point) if axis is None else (scale, zero_point, axis)


def _replace(graph: Graph, node: fx.Node, grid: tuple[Any, ...], verb: str, args: tuple[Any, ...]) -> None:
    """The operator for a whole tensor (numbers or tensors) or for channels."""
    whole = getattr(torch.ops.quantized_decomposed, f"{verb}_per_tensor")
    if len(grid) == 3:
        target = getattr(torch.ops.quantized_decomposed, f"{verb}_per_channel").default
    else:
        target = whole.tensor if isinstance(grid[0], fx.Node) else whole.default
    _put(graph, node, target, args)


def _put(graph: Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.graph.inserting_before(node):
        made = graph.call(target, args, node)
    node.replace_all_uses_with(made)
    graph.graph.erase_node(node)


def _in_groups(graph: Graph, q: Any, axis: int | None, block: int) -> bool:
    """Whether stored numbers are a matrix with blocks that divide its rows."""
    numbers = graph.constant(q)
    return numbers is not None and numbers.dim() == 2 and axis == 1 and block > 1 and numbers.shape[1] % block == 0


def _range_of(q: Any, held: torch.dtype) -> tuple[int, int]:
    """The range of stored numbers: that of the call which made them, else all of their type."""
    if isinstance(q, fx.Node) and q.op == "call_function" and q.target in _quantizing():
        low, high = q.args[-3:-1]
        return low, high  # pyright: ignore
    limits = torch.iinfo(held)
    return limits.min, limits.max


def _quantizing() -> tuple[Any, ...]:
    named = torch.ops.quantized_decomposed
    return named.quantize_per_tensor.default, named.quantize_per_tensor.tensor, named.quantize_per_channel.default


def _inline(graph: Graph, node: fx.Node, own: Any) -> None:
    """Write what an operator of ours computes in ATen's operators."""
    values: list[Any] = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in node.args]
    tensors = [index for index, value in enumerate(values) if isinstance(value, Tensor)]

    def compute(*given: Tensor) -> Any:
        arguments = list(values)
        for index, tensor in zip(tensors, given, strict=True):
            arguments[index] = tensor
        return own._init_fn(*arguments)  # the Python function that was registered

    given = [values[index] for index in tensors]
    with given[0].fake_mode:  # new constants are fake as well
        traced = make_fx(compute)(*given)
    placeholders = [inner for inner in traced.graph.nodes if inner.op == "placeholder"]
    copied = {inner: node.args[index] for inner, index in zip(placeholders, tensors, strict=True)}
    with graph.graph.inserting_before(node):
        result: Any = graph.graph.graph_copy(traced.graph, copied)  # pyright: ignore
    for inner in copied.values():
        if isinstance(inner, fx.Node) and inner.op == "call_function" and "nn_module_stack" not in inner.meta:
            inner.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            assert user.target is operator.getitem, f"{user} takes several values at once"
            user.replace_all_uses_with(result[user.args[1]])
            graph.graph.erase_node(user)
    graph.graph.erase_node(node)
