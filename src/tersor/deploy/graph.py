"""A program's graph, opened for changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind, OutputSpec, TensorArgument
from torch.utils import _pytree as pytree

from tersor.deploy.lowering import Program

QUANTIZE = torch.ops.tersor.quantize.default
DEQUANTIZE = torch.ops.tersor.dequantize.default
CHOOSE = torch.ops.tersor.choose.default


class Graph:
    """A copy of a program's graph, to be changed by passes; :meth:`close` gives the changed program.

    Args:
        program: it is left as it was.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        own = program.exported
        self.module = copy.deepcopy(own.graph_module)
        self._signature = copy.deepcopy(own.graph_signature)
        inputs = (node for node in self.module.graph.nodes if node.op == "placeholder")
        for spec, node in zip(self._signature.input_specs, inputs, strict=True):
            spec.arg = replace(spec.arg, name=node.name)  # a copy calls "input" otherwise, as a word of Python
        self._state: dict[str, Any] = {**own.state_dict}
        self._constants: dict[str, Any] = {**own.constants}
        self._calls = list(own.module_call_graph)

    @property
    def graph(self) -> fx.Graph:
        """The graph itself."""
        return self.module.graph

    def calls(self, *targets: Any) -> list[fx.Node]:
        """The nodes that call one of some operators (all calls where none is named), in order."""
        return [
            node for node in self.graph.nodes if node.op == "call_function" and (not targets or node.target in targets)
        ]

    def constant(self, node: Any) -> Tensor | None:
        """The tensor behind a parameter, buffer or constant of the program; None for anything else."""
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return None
        for spec in self._signature.input_specs:
            if spec.arg.name == node.name and spec.target is not None:
                return self._state.get(spec.target, self._constants.get(spec.target))
        return None

    def new_constant(self, value: Tensor, hint: str) -> fx.Node:
        """A node for a tensor that the program did not have.

        Args:
            value: the tensor.
            hint: what it is called, as far as the name is free.
        """
        first = next(node for node in self.graph.nodes)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(hint)
            node.target = node.name  # which is free, as the hint need not be
        example = next((other.meta["val"] for other in self.graph.nodes if "val" in other.meta), None)
        mode = getattr(example, "fake_mode", None)
        node.meta["val"] = mode.from_tensor(value, static_shapes=True) if mode is not None else value
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), node.name)
        self._signature.input_specs.insert(0, spec)
        self._constants[node.name] = value
        return node

    def call(self, target: Any, args: tuple[Any, ...], like: fx.Node, value: Any = None) -> fx.Node:
        """A new call where the graph inserts; it belongs to the module of another node.

        Args:
            target: the operator.
            args: its arguments.
            like: whose place in the model it takes over, and whose value's shape, where ``value`` is None.
            value: its value, as a fake tensor.
        """
        node = self.graph.call_function(target, args)
        node.meta = {key: value for key, value in like.meta.items() if key in ("nn_module_stack", "stack_trace", "val")}
        if value is not None:
            node.meta["val"] = value
        return node

    def add_outputs(self, nodes: Iterable[fx.Node]) -> None:
        """Make values outputs, behind those that the program has; all are given as one flat tuple then."""
        output = self.graph.output_node()
        values = [*output.args[0], *nodes]  # pyright: ignore
        specs = self._signature.output_specs
        specs += [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in values[len(specs) :]]
        output.args = (tuple(values),)
        whole: Any = self._calls[0]
        flat = pytree.tree_structure((0,) * len(values))
        self._calls[0] = replace(whole, signature=replace(whole.signature, out_spec=flat))

    def close(self, **changes: Any) -> Program:
        """The changed program; what nothing uses any more has gone.

        Args:
            changes: other attributes of the program.
        """
        self.graph.eliminate_dead_code()
        self._forget_unused()
        self._rename_outputs()
        self.graph.lint()
        self.module.recompile()
        own = self._program.exported
        exported = ExportedProgram(
            self.module,
            self.module.graph,
            self._signature,
            self._state,
            own.range_constraints,
            self._calls,
            own.example_inputs,
            self._constants,
        )
        return replace(self._program, exported=exported, **changes)

    def _rename_outputs(self) -> None:
        """Say in the signature what the outputs are called now."""
        values = self.graph.output_node().args[0]
        for spec, value in zip(self._signature.output_specs, values, strict=True):  # pyright: ignore
            if isinstance(value, fx.Node) and isinstance(spec.arg, TensorArgument):
                spec.arg = TensorArgument(value.name)

    def _forget_unused(self) -> None:
        kept: list[InputSpec] = []
        by_name = {node.name: node for node in self.graph.nodes if node.op == "placeholder"}
        for spec in self._signature.input_specs:
            node = by_name[spec.arg.name]
            if spec.kind is not InputKind.USER_INPUT and not node.users:
                self.graph.erase_node(node)
                for held in (self._state, self._constants):
                    held.pop(str(spec.target), None)
            else:
                kept.append(spec)
        self._signature.input_specs[:] = kept


def module_of(node: fx.Node) -> str:
    """The name of the innermost module that a node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [name for name, _ in stack.values()]
    return names[-1] if names else ""


def parameters_of(node: fx.Node) -> tuple[Any, ...]:
    """How a quantize or dequantize node rounds: scale, zero point, type, range, axis and block."""
    return tuple(node.args[1:])


def same_grid(graph: Graph, first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Whether two tuples of :func:`parameters_of` say the same."""
    pairs = list(zip(first, second, strict=False))
    return all(one is other or one == other or _equal(graph, one, other) for one, other in pairs)


def _equal(graph: Graph, one: Any, other: Any) -> bool:
    first, second = graph.constant(one), graph.constant(other)
    return first is not None and second is not None and first.dtype == second.dtype and torch.equal(first, second)
