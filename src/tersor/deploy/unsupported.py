"""Types that an engine lacks: refused, stored as a wider type, or left as rounded values in floating point."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from tersor.config.dtypes import WIDEST, FloatDtype, IntDtype, QuantDtype, parse_dtype
from tersor.config.values import is_activation
from tersor.deploy.engine import Engine
from tersor.deploy.graph import CHOOSE, DEQUANTIZE, QUANTIZE, Graph
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.operators import dequantize, storage_type
from tersor.deploy.stored import Stored
from tersor.errors import InvalidValueError

Unsupported = Literal["error", "float", "widen"]
_ATEN = torch.ops.aten


def without_lacking_types(
    program: Program, engine: Engine, unsupported: Unsupported
) -> tuple[Program, tuple[Fallback, ...]]:
    """The program without the types that an engine lacks.

    Args:
        program: of :func:`tersor.deploy.lowering.lower`.
        engine: whose :meth:`~tersor.deploy.engine.Engine.lacks` decides.
        unsupported: ``error`` refuses; ``widen`` stores the same numbers, and so the same values, in the next wider
            type that the engine has; ``float`` computes the same rounded values in floating point.

    Returns:
        The program, and what became of each target concerned.

    Raises:
        InvalidValueError: a type is lacking, and is to be an error, or there is no wider one.
    """
    lacking = {name: reason for name, stored in program.targets.items() if (reason := _lacks(engine, name, stored))}
    if not lacking:
        return program, ()
    fallbacks: list[Fallback] = []
    targets = dict(program.targets)
    for name, reason in lacking.items():
        stored = targets[name]
        if unsupported == "error":
            raise _error(engine, program, name, reason, "Pass unsupported='widen' (same values) or 'float'.")
        if unsupported == "widen":
            wide = _wider(engine, stored.dtype, is_activation=_is_activation(name))
            if wide is None:
                raise _error(engine, program, name, f"{reason} and nothing wider", "Pass unsupported='float'.")
            targets[name] = replace(stored, dtype=wide)
            fallbacks.append(Fallback(name, f"{engine.title} {reason}: stored as {wide.as_config()}"))
        else:
            del targets[name]
            if isinstance(stored.dtype, FloatDtype) and _is_activation(name):
                raise _error(engine, program, name, reason, "Quantize it to an integer type.")
            fallbacks.append(Fallback(name, f"{engine.title} {reason}: rounded values in floating point"))
    graph = Graph(program)
    for node in graph.calls(QUANTIZE, DEQUANTIZE, CHOOSE):
        place = 1 if node.target is CHOOSE else 3
        dtype = parse_dtype(node.args[place])
        activation = node.target is not DEQUANTIZE or graph.constant(node.args[0]) is None
        if not engine.lacks(dtype, is_activation=activation):
            continue
        if unsupported == "widen":
            wide = _wider(engine, dtype, is_activation=activation)
            assert wide is not None
            _widen(graph, node, place, wide)
        elif node.target is not CHOOSE:
            in_floating_point(graph, node)
    return graph.close(targets=targets), tuple(fallbacks)


def _is_activation(name: str) -> bool:
    return is_activation(name.rpartition(".")[2])


def _lacks(engine: Engine, name: str, stored: Stored) -> str:
    return engine.lacks(stored.dtype, is_activation=_is_activation(name))


def _wider(engine: Engine, dtype: QuantDtype, *, is_activation: bool) -> QuantDtype | None:
    """The next wider type of the same kind that an engine has."""
    if isinstance(dtype, FloatDtype):
        return None
    wider = (IntDtype(bits, dtype.signed) for bits in range(dtype.bits + 1, WIDEST + 1))
    return next((own for own in wider if not engine.lacks(own, is_activation=is_activation)), None)


def _error(engine: Engine, program: Program, name: str, reason: str, remedy: str) -> InvalidValueError:
    module = name.rpartition(".")[0]
    kind = program.modules.get(module)
    values = "activations" if _is_activation(name) else "weights"
    return InvalidValueError(
        f"{engine.title} {reason} for {values}{f' of {kind}' if kind else ''}", where=name, remedy=remedy
    )


def _widen(graph: Graph, node: fx.Node, place: int, wide: QuantDtype) -> None:
    """Name the wider type, and hold the numbers in what torch holds it in."""
    args: list[Any] = list(node.args)
    args[place] = wide.as_config()
    held = storage_type(wide)
    for position in (2,) if node.target is QUANTIZE else (0, 2) if node.target is DEQUANTIZE else ():
        numbers = graph.constant(args[position])
        if numbers is not None and numbers.dtype is not held:
            args[position] = graph.new_constant(numbers.to(held), f"{args[position].name}_wider")
    node.args = tuple(args)
    if node.target is QUANTIZE:
        node.meta["val"] = node.meta["val"].to(held)
    elif node.target is CHOOSE:
        node.meta["val"] = (node.meta["val"][0], node.meta["val"][1].to(held))


def in_floating_point(graph: Graph, node: fx.Node) -> None:
    """Say a quantizer or a dequantizer in operators of floating point: of a constant, by its values."""
    if node.target is DEQUANTIZE:
        held = [graph.constant(argument) for argument in node.args[:3]]
        if all(tensor is not None for tensor in held):
            values = graph.new_constant(dequantize(*held, *node.args[3:]), f"{node.name}_values")
            node.replace_all_uses_with(values)
            graph.graph.erase_node(node)
            return
    example = node.args[0].meta["val"]  # pyright: ignore
    with graph.graph.inserting_before(node):
        scale, zero_point = (_spread(graph, argument, example, node) for argument in node.args[1:3])
        if node.target is DEQUANTIZE:
            value = _call(graph, _ATEN.sub.Tensor, (node.args[0], zero_point), node)
            value = _call(graph, _ATEN.mul.Tensor, (value, scale), node)
        else:
            inverse = _call(graph, _ATEN.reciprocal.default, (scale,), node)
            value = _call(graph, _ATEN.mul.Tensor, (node.args[0], inverse), node)
            value = _call(graph, _ATEN.round.default, (value,), node)
            value = _call(graph, _ATEN.add.Tensor, (value, zero_point), node)
            value = _call(graph, _ATEN.clamp.default, (value, *node.args[4:6]), node)
    node.replace_all_uses_with(value)
    graph.graph.erase_node(node)


def _call(graph: Graph, target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """A call of floating point, whose value has the type of float32."""
    values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in args]
    return graph.call(target, args, like, target(*values))


def _spread(graph: Graph, node: Any, example: Tensor, like: fx.Node) -> fx.Node:
    """Scales or zero points as float32, in a shape that goes with a value's."""
    axis, block = (*like.args[6 if like.target is QUANTIZE else 4 :], None, None)[:2]
    held = graph.constant(node)
    if held is None:
        return node  # what is chosen while the model runs has the value's rank
    values = held.float()
    if axis is not None and block is None:
        values = values.view([-1 if dim == axis else 1 for dim in range(example.dim())])
    elif axis is not None:
        values = values.repeat_interleave(block, axis).narrow(axis, 0, int(example.shape[axis]))  # pyright: ignore
    return graph.new_constant(values, f"{node.name}_spread")
