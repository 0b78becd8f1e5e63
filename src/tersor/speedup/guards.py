"""Decisions that a traced graph holds as the example had them: checked each time the graph runs.

Code such as ``if x.shape[1] > 512`` takes one path, and a graph knows no other. Where the decision is the same at every
batch size, the graph is handed out with a check in its place, so that inputs that would decide otherwise raise an error
and are not computed wrongly. What depends on the batch size or on values stays the code's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from tersor.errors import TraceError
from tersor.speedup.small_graph import module_of, sizes_of


def guard_decisions(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> str | None:
    """Check in the graph what the traced code decided on, as far as that is sizes and the batch size changes nothing.

    A decision on a size that the cut itself has changed is held as it was: the masked model takes it so.

    Args:
        graph_module: of :func:`tersor.graph.concrete_trace`, in its final form; changed in place.
        inputs: as the graph takes them, at different batch sizes.

    Returns:
        a decision that no check can stand for, in words; None where there is none.

    Raises:
        TraceError: the graph does not run on the inputs.
    """
    decided = [node for node in graph_module.graph.nodes if "decided" in node.meta]
    if not decided:
        return None
    runs = [sizes_of(graph_module, each) for each in inputs]
    for node in decided:
        if node.meta["decided"] is None or any(node.name in run.shapes for run in runs):
            return f"a tensor's values in {_place(node)}"
        seen = [run.numbers.get(node.name) for run in runs]
        if any(value != seen[0] for value in seen):
            return f"the batch size in {_place(node)}"
        if seen[0] == node.meta["decided"]:
            with graph_module.graph.inserting_after(node):
                graph_module.graph.call_function(hold, (node, node.meta["decided"], _place(node)))
    graph_module.recompile()
    return None


def hold(value: Any, expected: Any, place: str) -> None:
    """Raise where the code would decide otherwise than it did for the example.

    Raises:
        TraceError: it would.
    """
    if value != expected:
        raise TraceError(
            f"this graph was made for inputs with which {place} gives {expected}, and here it gives {value}",
            where=place,
            remedy="Make the model small on example inputs of this kind (the same length, the same resolution).",
        )


def _place(node: fx.Node) -> str:
    return f"'{node.name}' of {module_of(node) or 'the model'}"
