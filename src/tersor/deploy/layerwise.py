"""Each layer of an artefact against the simulation, from the inputs that the artefact itself gave to that layer.

End to end, a deep network of integers agrees with its simulation no further than the simulation with itself: where a
value lies between two numbers the last digit decides, and the next layers see another number, see
:func:`tersor.deploy.simulation.floor_of`. From the same inputs nothing adds up: an engine that computes a layer as
simulated gives the same numbers but for a few in a million, which are one step away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx

from tersor.config.dtypes import IntDtype, parse_dtype
from tersor.deploy.agreement import agreement, snr
from tersor.deploy.engine import Engine
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, module_of
from tersor.deploy.lowering import Program
from tersor.deploy.operators import dequantize, quantize
from tersor.graph.inputs import tensors_of
from tersor.graph.modes import Mode

PLAIN = (8, 16, 32)
"""Integers of so many bits an engine hands out as they are; of other types it hands out the real values."""


@dataclass(frozen=True)
class Layerwise:
    """How far the layers of an artefact are from those of the simulation, each from the artefact's own inputs.

    A layer is what lies between the values that are rounded.

    Attributes:
        snr: of the layer that agrees least, in dB.
        where: the module in which that one ends; empty where it ends in an output.
        top1: of the outputs, from the same inputs to the last layer: the share of samples with the same answer.
        unchanged: the agreement of the outputs with those of the artefact without the values that are looked at: where
            it is not infinite, looking at them made the engine compute in another order.
    """

    snr: float
    where: str
    top1: float
    unchanged: float


def layerwise(
    engine: Engine,
    program: Program,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    flat: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Layerwise:
    """Build an artefact once more, with each rounded value as a further output, and compare these.

    The program is run by torch, and at each value that it rounds it goes on with the number that the engine had there.

    Args:
        engine: what built the artefact.
        program: what it was built from.
        inputs: positional and keyword arguments.
        flat: the tensors among them, in the order of the program.
        outputs: of the artefact, for these.
        threads: of the engine.
        options: of the engine.

    Raises:
        TersorError: the engine refuses the program with more outputs.
    """
    graph = Graph(program)
    rounded = graph.calls(QUANTIZE)
    graph.add_outputs([_handed_out(node) for node in rounded])
    with TemporaryDirectory(prefix="tersor-") as name:
        folder = Path(name)
        engine.build(graph.close(), folder, options or {})
        results = engine.open(folder, threads=threads, options=options or {}).run(flat)
        own, numbers = results[: len(outputs)], results[len(outputs) :]
        follow = _Following(zip(rounded, numbers, strict=True))
        args, kwargs = inputs
        with torch.no_grad(), follow:
            expected = tensors_of(program.exported.module()(*args, **kwargs))
    last = agreement(own, expected)
    worst, where = min([*follow.found, (last.snr, "")])
    return Layerwise(worst, where, last.top1, agreement(own, outputs).snr)


class _Following(Mode):
    """Puts an engine's numbers in the place of those that a program rounds its values to, and compares them."""

    def __init__(self, theirs: Iterator[tuple[fx.Node, Tensor]]) -> None:
        super().__init__()
        self.found: list[tuple[float, str]] = []
        self._theirs = theirs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = func(*args, **(kwargs or {}))
        if func is not QUANTIZE:
            return own
        node, theirs = next(self._theirs)
        grid = args[1:]
        back = (*grid[:3], *grid[5:])
        number = theirs.to(own.dtype) if _handed_out(node) is node else quantize(theirs, *grid)
        self.found.append((snr(dequantize(number, *back), dequantize(own, *back)), module_of(node)))
        return number


def _handed_out(node: fx.Node) -> fx.Node:
    """What an engine is asked for in place of a rounded value: its numbers, or their real values."""
    dtype = parse_dtype(str(node.args[3]))
    if isinstance(dtype, IntDtype) and dtype.bits in PLAIN:
        return node
    return next((user for user in node.users if user.target is DEQUANTIZE), node)
