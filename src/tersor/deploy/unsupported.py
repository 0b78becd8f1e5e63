"""Types that an engine lacks: refused, stored as a wider type, or left in floating point, always of the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from tersor.config.dtypes import FloatDtype, IntDtype, QuantDtype, parse_dtype
from tersor.config.values import is_activation
from tersor.deploy.engine import Engine
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.operators import dequantize, spread, storage_type
from tersor.errors import InvalidValueError

Unsupported = Literal["error", "float", "widen"]
_ATEN = torch.ops.aten
_WIDER = (4, 8, 16, 32)


def fit_types(program: Program, engine: Engine, unsupported: Unsupported) -> tuple[Program, tuple[Fallback, ...]]:
    """A program without the types that an engine lacks.

    Args:
        program: it is left as it was.
        engine: says what it lacks.
        unsupported: what becomes of them; where there is no wider type, ``widen`` leaves them in floating point.

    Returns:
        The program, of the same values, and what does not run as asked.

    Raises:
        InvalidValueError: there are such types, and ``unsupported`` is ``error``.
    """
    reasons = {name: _lacks(engine, stored.dtype, name) for name, stored in program.targets.items()}
    lacking = {name: reason for name, reason in reasons.items() if reason}
    if not lacking:
        return program, ()
    if unsupported == "error":
        name, reason = next(iter(lacking.items()))
        others = f" (nor {len(lacking) - 1} others that are quantized)" if len(lacking) > 1 else ""
        raise InvalidValueError(
            f"{engine.title} {reason} for {_described(program, name)}{others}",
            where=name,
            remedy="unsupported='widen' stores the numbers as a wider type, 'float' the values in floating point.",
        )
    graph = Graph(program)
    wider: dict[tuple[str, bool], QuantDtype | None] = {}
    for weight in (False, True):
        for kind in {stored.kind for stored in program.targets.values()}:
            if engine.lacks(parse_dtype(kind), is_activation=not weight):
                wider[kind, weight] = _wider(kind, engine, weight) if unsupported == "widen" else None
    for node in graph.calls(DEQUANTIZE):
        is_weight = graph.constant(node.args[0]) is not None
        if (str(node.args[3]), is_weight) in wider:
            _fit(graph, node, wider[str(node.args[3]), is_weight])
    fallbacks, targets = [], dict(program.targets)
    for name, reason in lacking.items():
        to = wider[program.targets[name].kind, not _is_activation(name)]
        what = "its values stay in floating point" if to is None else f"stored as {to.as_config()}"
        fallbacks.append(Fallback(name, f"{engine.title} {reason}: {what}"))
        stored = targets.pop(name)
        if to is not None:
            targets[name] = replace(stored, dtype=to)
    return graph.close(targets=targets), tuple(fallbacks)


def _is_activation(name: str) -> bool:
    return is_activation(name.rpartition(".")[2])


def _described(program: Program, name: str) -> str:
    kind = program.modules.get(name.rpartition(".")[0])
    values = "activations" if _is_activation(name) else "weights"
    return f"{values} of {kind}" if kind else values


def _lacks(engine: Engine, dtype: QuantDtype, name: str) -> str:
    return engine.lacks(dtype, is_activation=_is_activation(name))


def _wider(kind: str, engine: Engine, weight: bool) -> QuantDtype | None:
    """The least wider type that the engine has."""
    dtype = parse_dtype(kind)
    if isinstance(dtype, FloatDtype):
        return None
    for bits in _WIDER:
        for signed in (dtype.signed, True):
            wider = IntDtype(bits, signed)
            holds = bits >= dtype.bits + (signed and not dtype.signed)
            if holds and not engine.lacks(wider, is_activation=not weight):
                return wider
    return None


def _fit(graph: Graph, node: fx.Node, wider: QuantDtype | None) -> None:
    """Widen what a dequantize node reads, or put its values in floating point in its place."""
    if wider is None:
        in_floating_point(graph, node)
        return
    numbers, scale, zero_point, kind, *place = node.args
    zero = _converted(graph, zero_point, wider)
    held = graph.constant(numbers)
    if held is not None:
        made = graph.new_constant(held.to(storage_type(wider)), f"{node.name}_numbers")
    else:
        assert isinstance(numbers, fx.Node)
        assert numbers.target is QUANTIZE
        x, _, _, _, low, high, *_ = numbers.args
        with graph.graph.inserting_before(node):
            if kind == "int1":
                x = _signs(graph, numbers, scale)
            value = numbers.meta["val"].to(storage_type(wider))
            made = graph.call(QUANTIZE, (x, scale, zero, wider.as_config(), low, high, *place), numbers, value)
    node.args = (made, scale, zero, wider.as_config(), *place)


def _converted(graph: Graph, zero_point: Any, wider: QuantDtype) -> Any:
    held = graph.constant(zero_point)
    if held is not None:
        return graph.new_constant(held.to(storage_type(wider)), f"{zero_point.name}_{wider.as_config()}")
    with graph.graph.inserting_after(zero_point):  # of a dynamic value
        return _call(graph, _ATEN._to_copy.default, (zero_point,), zero_point, dtype=storage_type(wider))


def in_floating_point(graph: Graph, node: fx.Node) -> None:
    """Compute in floating point what a dequantize node gives; what it reads goes where nothing else reads it.

    Args:
        graph: it is changed.
        node: one of its dequantize nodes.
    """
    numbers, scale, zero_point, kind, *place = node.args
    held, scales, zeros = (graph.constant(own) for own in (numbers, scale, zero_point))
    axis, block = (*place, None, None)[:2]
    if held is not None:
        assert scales is not None
        assert zeros is not None
        values = dequantize(held, scales, zeros, kind, axis, block)
        node.replace_all_uses_with(graph.new_constant(values, f"{node.name}_values"))
    else:
        assert isinstance(numbers, fx.Node)
        assert numbers.target is QUANTIZE
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(_rounded(graph, numbers, scales, zeros))
    graph.graph.erase_node(node)


def _rounded(graph: Graph, quantizing: fx.Node, scales: Tensor | None, zeros: Tensor | None) -> fx.Node:
    """Quantize and dequantize in the operators of torch: the arithmetic is that of the simulation."""
    arguments: Any = quantizing.args
    x, scale, zero_point, kind, low, high, *place = arguments
    axis, block = (*place, None, None)[:2]
    fake = x.meta["val"]
    if fake.dtype is not torch.float32:
        x = _call(graph, _ATEN._to_copy.default, (x,), quantizing, dtype=torch.float32)
    if kind == "int1":
        return _signs(graph, quantizing, scale)
    if scales is not None:
        assert zeros is not None
        spreads = [spread(own.float(), fake, axis, block).contiguous() for own in (1 / scales, zeros, scales)]
        names = ("inverse", "zero_point", "scale")
        inverse, zero, step = (
            graph.new_constant(own, f"{quantizing.name}_{name}") for own, name in zip(spreads, names, strict=True)
        )
    else:  # dynamic: of a shape that broadcasts, since a token's block is its whole row
        inverse = _call(graph, _ATEN.reciprocal.default, (scale,), quantizing)
        zero = _call(graph, _ATEN._to_copy.default, (zero_point,), quantizing, dtype=torch.float32)
        step = scale
    value = _call(graph, _ATEN.mul.Tensor, (x, inverse), quantizing)
    if isinstance(parse_dtype(kind), FloatDtype):
        held = storage_type(parse_dtype(kind))
        value = _call(graph, _ATEN.clamp.default, (value, low, high), quantizing)
        value = _call(graph, _ATEN._to_copy.default, (value,), quantizing, dtype=held)
        value = _call(graph, _ATEN._to_copy.default, (value,), quantizing, dtype=torch.float32)
    else:
        value = _call(graph, _ATEN.round.default, (value,), quantizing)
        value = _call(graph, _ATEN.add.Tensor, (value, zero), quantizing)
        value = _call(graph, _ATEN.clamp.default, (value, low, high), quantizing)
    value = _call(graph, _ATEN.sub.Tensor, (value, zero), quantizing)
    return _call(graph, _ATEN.mul.Tensor, (value, step), quantizing)


def _signs(graph: Graph, quantizing: fx.Node, scale: Any) -> fx.Node:
    """A scale below zero, as a negative number, and as a positive one elsewhere."""
    x, *_ = quantizing.args
    axis, block = (*quantizing.args[6:], None, None)[:2]
    like, held = quantizing, graph.constant(scale)
    if held is not None:
        assert isinstance(x, fx.Node)
        step = spread(held, x.meta["val"], axis, block).contiguous()  # pyright: ignore
        scale = graph.new_constant(step, f"{like.name}_step")
    minus, plus = (
        graph.new_constant(torch.tensor(sign), f"{like.name}_{name}") for sign, name in ((-1.0, "minus"), (1.0, "plus"))
    )
    below = _call(graph, _ATEN.lt.Scalar, (x, 0.0), like)
    signs = _call(graph, _ATEN.where.self, (below, minus, plus), like)
    return _call(graph, _ATEN.mul.Tensor, (signs, scale), like)


def _call(graph: Graph, target: Any, args: Sequence[Any], like: fx.Node, **kwargs: Any) -> fx.Node:
    """A call whose fake value is computed from those of its arguments."""
    fakes = [own.meta["val"] if isinstance(own, fx.Node) else own for own in args]
    node = graph.call(target, tuple(args), like, target(*fakes, **kwargs))
    node.kwargs = kwargs
    return node
