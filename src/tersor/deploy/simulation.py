"""What an artefact is compared with: the simulation, and how far that is from itself where sums end differently."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tersor.analysis.batches import batch_size_of, with_batch_size
from tersor.deploy.agreement import agreement
from tersor.deploy.graph import QUANTIZE
from tersor.deploy.lowering import Program
from tersor.graph.inputs import evaluating, tensors_of
from tersor.graph.modes import Mode

SHAKEN = 1e-7
"""What float32 is off by where values are rounded, of the largest: 0.2 to 1.2e-7, ``benchmarks/rounding_noise.py``."""
DRAWS = 4
"""The simulation is shaken so many times: in a small network it takes luck to hit a value that tips over."""


class _Shaken(Mode):
    """Changes values a little before a program rounds them, as other sums change them.

    What a sum of single precision is off by goes by its largest terms, so values next to zero are shaken as all others.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._draws = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is QUANTIZE:
            value, *rest = args
            noise = SHAKEN * torch.randn(value.shape, generator=self._draws).to(value)
            args = (value + noise * value.abs().amax(), *rest)
        return func(*args, **(kwargs or {}))


def floor_of(program: Program, simulation: Simulation) -> float:
    """What a simulation has against itself where sums end in another last digit, in dB: the least of some draws.

    Where a value lies between two numbers, the last digit decides; what comes of it differs by a whole step, and the
    next layers see other values. So two right ways to compute a deep network of integers do not agree to the bit. In a
    small one it takes luck: one value that is rounded the other way, or none.
    """
    model = program.exported.module()
    floors: list[float] = []
    for seed in range(DRAWS):
        with torch.no_grad(), _Shaken(seed):
            shaken = called(model, simulation.inputs)
        floors.append(agreement(tensors_of(shaken), simulation.outputs).snr)
    return min(floors)


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
