"""Sizes that stand in ``forward`` as numbers, made right in the model's graph by running it after the cut.

The labels say what every node's result must look like when the removed indices are gone. So the graph is run on the
small parameters, node by node, and where an operator's sizes lead to something else, they are replaced before it runs:
a number by the right number, a computed size by a multiple of itself, so that the batch stays free.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, fx

from tersor.graph.coupling import Coupling
from tersor.speedup.size_rules import MODULES, find_rule
from tersor.speedup.small_graph import Repair, Sizes, SmallGraph, run_graph
from tersor.speedup.small_graph import record_sizes as record_sizes


def repair_graph(graph_module: fx.GraphModule, coupling: Coupling, removed: np.ndarray, sizes: Sizes) -> list[Repair]:
    """Make the sizes in a graph right for its small parameters.

    Args:
        graph_module: its parameters are cut already; changed in place. Where this raises, it is of no more use.
        coupling: of the graph module, with its nodes' labels.
        removed: the classes that left, boolean, indexed by class.
        sizes: what :func:`record_sizes` said before the cut.

    Returns:
        what was replaced, in the order of the graph.

    Raises:
        SpeedupError: naming the first node, and its module, whose result does not become what its labels say.
    """
    repairer = _Repairer(graph_module, coupling, removed, sizes)
    run_graph(repairer, graph_module, sizes.inputs)
    graph_module.recompile()
    return repairer.repairs


class _Repairer(SmallGraph):
    """Before each node, the rule for its operator may replace its sizes; after it, its shape is checked."""

    def run_node(self, n: fx.Node) -> Any:
        expected = self.expected(n)
        if n.op == "call_module" and expected != self.shape(n):
            self._open(n)
        rule = find_rule(n)
        wanted = "" if expected is None else f", its result must have shape {expected}"
        try:
            if rule is not None and (expected is None or 0 not in expected):
                rule(self, n)
            result = super().run_node(n)
        except Exception as error:
            raise self.stuck(n, f"{type(error).__name__}: {error}{wanted}") from error
        if isinstance(result, Tensor) and result.numel() and tuple(result.shape) != expected:
            kept = " and is kept outside the model's parameters and buffers" if n.op == "get_attr" else ""
            raise self.stuck(n, f"it has shape {tuple(result.shape)}{kept}{wanted}")
        return result

    def _open(self, node: fx.Node) -> None:
        """Call the operator in place of a module that keeps a size which will not do any more."""
        module = self.submodules[str(node.target)]
        kind = next((kind for kind in MODULES if isinstance(module, kind)), None)
        if kind is not None:
            target, attributes = MODULES[kind]
            node.meta["module"] = str(node.target)
            node.op = "call_method" if isinstance(target, str) else "call_function"
            node.target = target
            node.args = (node.args[0], *(getattr(module, name) for name in attributes))
