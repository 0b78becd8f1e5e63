"""Run a model once and follow every parameter's labels through it, below Python, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook

from tersor.errors import TraceError
from tersor.graph.follower import UNSTEADY, Follower, Key, Step, key_of, operands_in
from tersor.graph.inputs import (
    batch_size,
    copied,
    evaluating,
    first_samples,
    named_tensors,
    refuse_lazy,
    run,
    tensors_of,
)
from tersor.graph.labels import Ledger
from tersor.graph.modes import Mode
from tersor.graph.rules import Fields, base_name, find_module_rule

ENOUGH = 2
"""Samples of a batch that a run needs; one would hide what broadcasts along the batch."""

ONE_HEAD = (
    ("in_proj_weight", 0),
    ("q_proj_weight", 0),
    ("k_proj_weight", 0),
    ("v_proj_weight", 0),
    ("out_proj.weight", 1),
)
"""Tensors of torch's attention and the dimension along which they hold heads; its code knows heads only as a whole."""


@dataclass(frozen=True)
class Propagation:
    """What one run of the model said.

    Attributes:
        ledger: all labels, joins and freezes.
        live: for each tick of the ledger's clock, whether that operator's result reaches an output of the model.
        unknown: operators without a rule that touched labels, with the number of calls.
        unused: parameters that no operator touched in this run.
        steps: operators that compute, in order, with the shape and labels of each of their results; None where a module
            was followed as one step.
        inputs: what the model was run on.
        outputs: where asked for: for each tensor that a module call returned, in order, the module's name and the
            labels of the tensor, which say what remains of it when labels leave.
    """

    ledger: Ledger
    live: np.ndarray
    unknown: Mapping[str, int]
    unused: tuple[str, ...]
    steps: list[Step] | None
    inputs: Any
    outputs: tuple[tuple[str, Fields], ...]


class _ShapeRecorder(Mode):
    """Notes the operators that compute, and the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if base_name(func) not in UNSTEADY:
            self.steps.append((base_name(func), [tuple(tensor.shape) for tensor in operands_in((result,))]))
        return result


def shapes_in(model: nn.Module, inputs: Any) -> list[tuple[str, list[tuple[int, ...]]]]:
    """The operators that compute in one run of a model, in order, with the shapes of their results.

    Raises:
        TraceError: the model does not run on the inputs.
    """
    recorder = _ShapeRecorder()
    with evaluating(model), sdpa_kernel(SDPBackend.MATH), recorder:
        run(model, copied(inputs))
    return recorder.steps


class _Nodes(nn.Module):
    """Runs a graph node by node and notes the labels of what each returns."""

    def __init__(self, graph_module: fx.GraphModule, follower: Follower, outputs: list[tuple[str, Fields]]) -> None:
        super().__init__()
        self._placeholders = [node.target for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._interpreter = _Interpreter(graph_module, follower, outputs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The graph's result."""
        return self._interpreter.run(*args, *(kwargs[name] for name in self._placeholders[len(args) :]))


class _Interpreter(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, follower: Follower, outputs: list[tuple[str, Fields]]) -> None:
        super().__init__(graph_module)
        self._follower = follower
        self._outputs = outputs

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self._outputs.append((n.name, dict(self._follower.fact(result).labels)))
        return result


def follow(
    model: nn.Module, example_inputs: Any, *, record_outputs: bool = False, record_nodes: bool = False
) -> Propagation:
    """Run ``model`` once, in eval mode and without gradients, and follow the labels of all its parameters and buffers.

    A few samples of a batch say as much as all; where the model does not run on them, all are taken.
    The model is left as it was: no parameter, buffer, hook or train/eval flag changes.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        record_outputs: also record the labels of what each module returns.
        record_nodes: the same for each node of a ``torch.fx.GraphModule``, under the node's name.

    Raises:
        TraceError: the model does not run on these inputs.
    """
    refuse_lazy(model)
    if batch_size(example_inputs) > ENOUGH:
        try:
            few = first_samples(example_inputs, ENOUGH)
            return _follow(model, few, record_outputs=record_outputs, record_nodes=record_nodes)
        except TraceError:  # the first dimension is no batch, or its size stands in the code: all of it, then
            pass
    return _follow(model, example_inputs, record_outputs=record_outputs, record_nodes=record_nodes)


def _follow(model: nn.Module, example_inputs: Any, *, record_outputs: bool, record_nodes: bool) -> Propagation:
    ledger = Ledger()
    follower = Follower(ledger)
    # Two parameters over the same values are one, as two names of one parameter are.
    owners: dict[Key, tuple[Tensor, list[str]]] = {}
    for name, tensor in named_tensors(model).items():
        owners.setdefault(key_of(tensor), (tensor, []))[1].append(name)
    for tensor, names in owners.values():
        labels: Fields = {
            dim: ledger.add_axis(tuple(names), tensor, dim) for dim in range(tensor.dim()) if tensor.shape[dim] > 1
        }
        is_parameter = isinstance(tensor, nn.Parameter)
        follower.learn(tensor, labels, is_weight=is_parameter, is_zero=is_parameter)
    outputs: list[tuple[str, Fields]] = []
    graph = model if record_nodes and isinstance(model, fx.GraphModule) else None
    called = model if graph is None else _Nodes(graph, follower, outputs)
    with ExitStack() as stack:
        if record_outputs:
            module_names = {module: name for name, module in model.named_modules()}

            def record(module: nn.Module, args: Any, output: Any) -> None:
                name = module_names.get(module, "")
                outputs.extend((name, dict(follower.fact(tensor).labels)) for tensor in tensors_of(output))

            stack.callback(register_module_forward_hook(record).remove)
        customized = {module: rule for module in model.modules() if (rule := find_module_rule(module)) is not None}
        for module, rule in customized.items():
            for handle in follower.step_through(module, rule):
                stack.callback(handle.remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # its steps are operators that have rules
        stack.enter_context(follower)
        results = tensors_of(run(called, copied(example_inputs)))
    for tensor in results:
        for vector in follower.fact(tensor).labels.values():
            ledger.freeze(vector, "is the model's own output")
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.num_heads == 1:
            for axis in ledger.axes:
                if (axis.name.removeprefix(f"{name}." if name else ""), axis.dim) in ONE_HEAD:
                    ledger.freeze(axis.labels, "stands within the only head of a MultiheadAttention")
    unused = tuple(names[0] for key, (_, names) in owners.items() if key[0] not in follower.used)
    steps = None if customized else follower.steps
    live = follower.live(results)
    return Propagation(ledger, live, dict(follower.unknown), unused, steps, example_inputs, tuple(outputs))
