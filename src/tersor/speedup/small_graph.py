"""A graph that runs on small parameters, beside what was known of it when they were whole."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from tersor.errors import SpeedupError, TraceError
from tersor.graph.coupling import Coupling
from tersor.graph.inputs import as_call, batch_size, copied, evaluating, first_samples
from tersor.graph.rules import Labels
from tersor.speedup.arguments import Path, argument_at, path_text, replace_argument

Size = int | tuple[int, ...]

SAMPLES = 2
"""Samples of a batch that show what depends on it."""


@dataclass(frozen=True)
class Repair:
    """A size in the code that was made right.

    Attributes:
        node: the graph's node.
        module: the module in whose ``forward`` it stands.
        argument: which of the node's arguments.
        old: its value before, on the example inputs.
        new: its value now, on the example inputs.
        literals: the numbers in the code that it is made of, each with what it would have to be instead.
    """

    node: str
    module: str
    argument: str
    old: Size
    new: Size
    literals: tuple[tuple[Size, Size], ...]

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.argument} of '{self.node}' {self.old} -> {self.new}"


@dataclass(frozen=True)
class Sizes:
    """What a graph computes with in one run.

    Attributes:
        inputs: what it was run on.
        shapes: the shape of each node's result where that is a tensor.
        numbers: each node's result where that is a number.
    """

    inputs: Any
    shapes: Mapping[str, tuple[int, ...]]
    numbers: Mapping[str, float]


def record_sizes(graph_module: fx.GraphModule, coupling: Coupling) -> Sizes:
    """Run a graph of the whole model and note its sizes; to be called before the cut.

    Args:
        graph_module: as :func:`tersor.graph.concrete_trace` made it.
        coupling: of the graph module, with its nodes' labels.

    Returns:
        the sizes on the example inputs, or on the first samples of them where the labels were found on these.

    Raises:
        TraceError: it does not run on the inputs on which its labels were found.
    """
    example = coupling.example_inputs
    cause: TraceError | None = None
    for inputs in [first_samples(example, SAMPLES), example] if batch_size(example) > SAMPLES else [example]:
        try:
            sizes = sizes_of(graph_module, inputs)
        except TraceError as error:
            cause = error
            continue
        if all(_fits(sizes.shapes.get(name, ()), labels) for name, labels in coupling.nodes.items()):
            return sizes
    raise cause or TraceError("the labels belong to another graph, or to inputs of another size", where="coupling")


def _fits(shape: tuple[int, ...], labels: Labels) -> bool:
    return all(dim < len(shape) and len(vector) == shape[dim] for dim, vector in labels.items())


def sizes_of(graph_module: fx.GraphModule, inputs: Any) -> Sizes:
    """Run a graph and note the sizes of what each node returns.

    Raises:
        TraceError: it does not run on the inputs.
    """
    recorder = _Recorder(graph_module)
    try:
        run_graph(recorder, graph_module, inputs)
    except Exception as error:
        raise TraceError(f"{type(error).__name__}: {error}", where="the graph") from error
    return Sizes(inputs, recorder.shapes, recorder.numbers)


def run_graph(interpreter: fx.Interpreter, graph_module: fx.GraphModule, inputs: Any) -> None:
    """Run a graph node by node on inputs as a model takes them."""
    args, kwargs = as_call(copied(inputs))
    bound = inspect.signature(graph_module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    interpreter.extra_traceback = False
    with evaluating(graph_module):
        interpreter.run(*bound.args)


class _Recorder(fx.Interpreter):
    """Notes the shape of what each node returns, or its value where that is a number."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.numbers: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        elif isinstance(result, (int, float)):
            self.numbers[n.name] = result
        return result


class SmallGraph(fx.Interpreter):
    """Runs a graph whose parameters are cut, and says what each argument was, is and must be.

    Attributes:
        sizes: before the cut.
        repairs: what was replaced so far.
    """

    def __init__(self, graph_module: fx.GraphModule, coupling: Coupling, removed: np.ndarray, sizes: Sizes) -> None:
        super().__init__(graph_module)
        self.sizes = sizes
        self.repairs: list[Repair] = []
        self._nodes = coupling.nodes
        self._stays = ~removed[coupling.classes]

    def old(self, argument: Any) -> Any:
        """What an argument was before the cut: numbers in place of their nodes."""
        return fx.map_arg(argument, lambda node: self.sizes.numbers.get(node.name, node))

    def value(self, argument: Any) -> Any:
        """What an argument is now: results in place of their nodes."""
        return fx.map_arg(argument, lambda node: self.env[node])

    def shape(self, tensor: Any) -> tuple[int, ...] | None:
        """The shape of a node's result before the cut; None where it is no tensor."""
        return self.sizes.shapes.get(getattr(tensor, "name", ""))

    def left(self, tensor: Any) -> dict[int, np.ndarray]:
        """For each labelled dimension of a node's result, which of its indices are left, boolean."""
        labels = self._nodes.get(getattr(tensor, "name", ""), {})
        return {dim: self._stays[vector.numpy()] for dim, vector in labels.items()}

    def expected(self, node: fx.Node) -> tuple[int, ...] | None:
        """The shape that a node's result must have now; None where it is no tensor."""
        shape, left = self.shape(node), self.left(node)
        if shape is None:
            return None
        return tuple(int(left[dim].sum()) if dim in left else size for dim, size in enumerate(shape))

    def set(self, node: fx.Node, path: Path, new: Size, *, infer: bool = False) -> None:
        """Make an argument right where it is not.

        Args:
            node: whose argument it is.
            path: where it stands.
            new: what it must be, on these inputs.
            infer: -1 may stand in place of a computed size.
        """
        given = argument_at(node, path)
        now = _plain(self.value(given))
        if now == new:
            return
        if isinstance(given, fx.Node) and isinstance(now, int) and isinstance(new, int):
            replace_argument(node, path, -1 if infer else self._scaled(node, given, now, new))
            literals = tuple((f, f * new // now) for f in _factors(given) if now and f * new % now == 0)
        else:
            replace_argument(node, path, new)
            literals = ((_plain(self.old(given)), new),)
        self.repairs.append(Repair(node.name, module_of(node), path_text(path), _plain(self.old(given)), new, literals))

    def _scaled(self, node: fx.Node, given: fx.Node, now: int, new: int) -> fx.Node | int:
        """A computed size times new over now: what it owes to the batch stays."""
        if not now:
            return new
        common = int(np.gcd(now, new))
        with node.graph.inserting_before(node):
            product = node.graph.call_function(operator.mul, (given, new // common))
            scaled = node.graph.call_function(operator.floordiv, (product, now // common))
        for made, result in ((product, now * new // common), (scaled, new)):
            made.meta.update(node.meta)
            self.env[made] = result
        return scaled

    def stuck(self, node: fx.Node, why: str) -> SpeedupError:
        """The error that names a node whose result cannot become what it must be."""
        return SpeedupError(
            f"node '{node.name}' ({node.target}) cannot be made small: {why}",
            where=module_of(node) or "the model",
            remedy="Take the sizes in this module's forward from tensors (x.shape[1]), or exclude its layers.",
        )


def module_of(node: fx.Node) -> str:
    """The name of the module in whose ``forward`` a node was recorded."""
    return str(node.target) if node.op == "call_module" else str(node.meta.get("module", ""))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (tuple, list)) else value


def _factors(size: fx.Node) -> Iterator[int]:
    """The numbers that a size is a product of, as far as they stand in the code."""
    if size.target is operator.mul:
        for factor in size.args:
            if isinstance(factor, fx.Node):
                yield from _factors(factor)
            elif isinstance(factor, int):
                yield factor
