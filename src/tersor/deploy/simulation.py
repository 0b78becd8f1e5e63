"""What an artefact is compared with: the simulation, and how far that is from itself where sums end differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tersor.analysis.batches import batch_size_of, with_batch_size
from tersor.deploy.agreement import agreement
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph
from tersor.deploy.lowering import Program
from tersor.graph.inputs import evaluating, tensors_of
from tersor.graph.modes import Mode

SHAKEN = 1e-7
"""What float32 is off by where values are rounded, of the largest: 0.2 to 1.2e-7, ``benchmarks/rounding_noise.py``."""
DRAWS = 4
"""The simulation is shaken so many times: in a small network it takes luck to hit a value that tips over."""

_ATEN = torch.ops.aten
_SPACE: Mapping[Any, int] = {_ATEN.conv1d.default: 1, _ATEN.conv2d.default: 2, _ATEN.conv3d.default: 3}
"""Convolutions, and how many dimensions lie behind their channels."""


class _Shaken(Mode):
    """Changes values a little before a program rounds them, as other sums change them.

    What a sum of single precision is off by goes by its largest terms, so values next to zero are shaken as all others.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draws = torch.Generator().manual_seed(seed)

    def uniform(self, like: Tensor) -> Tensor:
        """Half a unit to either side at most."""
        return torch.rand(like.shape, generator=self._draws).to(like) - 0.5

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is QUANTIZE:
            value, *rest = args
            noise = SHAKEN * torch.randn(value.shape, generator=self._draws).to(value)
            args = (value + noise * value.abs().amax(), *rest)
        return func(*args, **(kwargs or {}))


def floor_of(program: Program, prepared: Program, simulation: Simulation) -> float:
    """What a simulation has against itself where sums end in another last digit, in dB: the least of some draws.

    Where a value lies between two numbers, the last digit decides; what comes of it differs by a whole step, and the
    next layers see other values. So two right ways to compute a deep network of integers do not agree to the bit. In a
    small one it takes luck: one value that is rounded the other way, or none.

    Args:
        program: what is simulated.
        prepared: the same for an engine; where it has biases in int32, the last digit of a sum is that of an integer.
        simulation: of the program.
    """
    model = program.exported.module()
    noises = _loosen(model, _steps_of_biases(prepared))
    floors: list[float] = []
    for seed in range(DRAWS):
        shaken = _Shaken(seed)
        for noise, step in noises:
            noise.copy_((shaken.uniform(step) * step).view_as(noise))
        with torch.no_grad(), shaken:
            results = called(model, simulation.inputs)
        floors.append(agreement(tensors_of(results), simulation.outputs).snr)
    return min(floors)


def _steps_of_biases(prepared: Program) -> dict[str, Tensor]:
    """By the name of a convolution, for each channel the step in which its bias is stored as an integer."""
    graph, found = Graph(prepared), dict[str, Tensor]()
    for node in graph.calls(*_SPACE):
        bias: Any = (*node.args, None, None)[2]
        if isinstance(bias, fx.Node) and bias.target is DEQUANTIZE and bias.args[3] == "int32":
            step = graph.constant(bias.args[1])
            found |= {} if step is None else {node.name: step}
    return found


def _loosen(model: fx.GraphModule, steps: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Add a buffer to what each of these convolutions gives, and return the buffers, which are zero, with the steps."""
    found: list[tuple[Tensor, Tensor]] = []
    for node in list(model.graph.nodes):
        if node.name not in steps:
            continue
        step = steps[node.name]
        noise = torch.zeros_like(step).reshape(-1, *[1] * _SPACE[node.target])
        model.register_buffer(name := f"noise_of_{node.name}", noise)
        with model.graph.inserting_after(node):
            held = model.graph.get_attr(name)
        with model.graph.inserting_after(held):
            loose = model.graph.call_function(torch.ops.aten.add.Tensor, (node, held))
        node.replace_all_uses_with(loose, delete_user_cb=lambda user, own=loose: user is not own)
        found.append((noise, step))
    model.recompile()
    return found


class Simulation:
    """Runs what the artefact is compared with, at another batch size than the example's where that is free.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        dynamic_batch: whether the size of the batch is free.

    Attributes:
        inputs: positional and keyword arguments.
        output: nested as the model's.
        outputs: the tensors in it.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, dynamic_batch: bool) -> None:
        self.model = model
        batch = batch_size_of(example_inputs)
        self.inputs: Any = with_batch_size(example_inputs, batch + 1 if dynamic_batch else batch)
        self.output = self._run(self.inputs)
        self.outputs = tensors_of(self.output)

    def _run(self, inputs: Any) -> Any:
        with evaluating(self.model), torch.no_grad():
            return called(self.model, inputs)


def called(model: Any, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The outputs of a model, or of an artefact, for positional and keyword arguments."""
    args, kwargs = inputs
    return model(*args, **kwargs)
