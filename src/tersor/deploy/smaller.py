"""Layers that were made smaller and are no faster for it: what an engine's profile says of each."""

from __future__ import annotations

from typing import Any

from torch import nn

from tersor.analysis.layers import layers_of
from tersor.deploy.audit import audit
from tersor.deploy.engines import engine_of
from tersor.deploy.quantization_speedup import QuantizationSpeedup
from tersor.graph.inputs import as_call, tensors_of

PROFILES = 3
WORTH = 0.01
"""The share of a model's time from which on a layer is worth a word."""


def slower_layers(
    before: nn.Module, after: nn.Module, example_inputs: Any, engine: str = "auto", *, threads: int | None = None
) -> tuple[str, ...]:
    """Find layers that have a smaller weight than before and take as long or longer, on an engine in fp32.

    Kernels work on blocks of channels, so 33 channels may cost as much as 48, and more than 64. Prune to widths that
    an engine likes (``round_to`` of :class:`tersor.speedup.ModelSpeedup`) where this finds something.

    Args:
        before: the model at its old size. Its values do not matter.
        after: the same with smaller layers, under the same names.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        engine: see :func:`tersor.deploy.engines`.
        threads: of the engine.

    Returns:
        A sentence each.
    """
    sizes = {layer.name: layer for layer in layers_of(before)}
    smaller = [
        (sizes[layer.name], layer)
        for layer in layers_of(after)
        if layer.name in sizes and 0 < layer.parameters < sizes[layer.name].parameters
    ]
    if not smaller:
        return ()
    old, new = (_milliseconds(model, example_inputs, engine, threads) for model in (before, after))
    least = WORTH * sum(old.values())
    return tuple(
        f"{layer.name} has shape {layer.shape} in place of {was.shape} and takes {new[layer.name]:.3f} ms "
        f"in place of {old[layer.name]:.3f}: widths in multiples of 16 or 32 may be faster (round_to)."
        for was, layer in smaller
        if new.get(layer.name, 0.0) >= old.get(layer.name, 0.0) >= least and layer.name in new
    )


def _milliseconds(model: nn.Module, example_inputs: Any, engine: str, threads: int | None) -> dict[str, float]:
    """The time of each module that computes, the least of some profiles."""
    timed = engine_of(engine).timed
    speedup = QuantizationSpeedup(model, example_inputs, engine=engine, threads=threads, options=timed)
    compiled = speedup.compile()
    assert speedup.program is not None
    least: dict[str, float] = {}
    for _ in range(PROFILES):
        compiled.with_report(operators=tuple(compiled.session.profile(tensors_of(as_call(example_inputs)))))
        spent: dict[str, float] = {}
        for line in audit(compiled, speedup.program):
            if line.milliseconds is not None:
                spent[line.module] = spent.get(line.module, 0.0) + line.milliseconds
        least = {name: min(own, least.get(name, own)) for name, own in spent.items()}
    return least
