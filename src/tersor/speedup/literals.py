"""Sizes that stand in the model's code as numbers, rewritten in its graph to what is left of them."""

from __future__ import annotations

import numpy as np
from torch import fx

from tersor.graph.coupling import Coupling

RESHAPING = frozenset({"view", "reshape", "expand"})
"""Operators that take the sizes of their result as arguments."""


def rewrite_sizes(graph_module: fx.GraphModule, coupling: Coupling, removed: np.ndarray) -> int:
    """Replace the numbers in views and reshapes along whose dimension indices leave.

    Args:
        graph_module: changed in place.
        coupling: of the graph module, with its nodes' labels.
        removed: the classes that leave.

    Returns:
        how many numbers were replaced.
    """
    count = 0
    for node in graph_module.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or name not in RESHAPING:
            continue
        spread = not isinstance(node.args[1], (tuple, list))
        sizes = list(node.args[1:] if spread else node.args[1])
        for dim, vector in coupling.nodes.get(node.name, {}).items():
            kept = int((~removed[coupling.classes[vector.numpy()]]).sum())
            if dim < len(sizes) and type(sizes[dim]) is int and sizes[dim] == len(vector) != kept:
                sizes[dim] = kept
                count += 1
        node.args = (node.args[0], *sizes) if spread else (node.args[0], tuple(sizes), *node.args[2:])
    graph_module.recompile()
    return count
