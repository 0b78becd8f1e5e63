"""Pruned and quantized at once: the model is made small, and its calibration is cut along.

What is cut out of a tensor is cut out of its scales. Where blocks of input channels share a scale, what is left of them
need not be whole blocks; then blocks are cut finer, so that every value keeps its scale, or, where little more than
single values would be left of a block, the rounded values are stored as floating-point numbers. Nothing is rounded
again, so the small model computes what the masked one did.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersor.analysis.batches import batch_size_of
from tersor.config.values import is_activation
from tersor.deploy.agreement import agreement
from tersor.deploy.lowering import Fallback, fused_names, place_of, round_activations
from tersor.deploy.plain import Plain
from tersor.errors import SpeedupError, TersorError, VerificationError
from tersor.graph import Coupling, fresh_inputs, groups
from tersor.graph.follow import follow
from tersor.graph.inputs import map_tensors, named_tensors
from tersor.quantization.base import CalibrationConfig
from tersor.speedup import ModelSpeedup
from tersor.speedup.slicing import bake
from tersor.speedup.verify import outputs_of, relative_error
from tersor.wrapping import Mask, ModelWrappers, Stage, Transform

LEAST_BLOCK = 8
"""Values that share a scale, at the least: with fewer, scales would take more room than the numbers save."""
MARGIN = 6.0
"""So many dB may be missing to what the simulation has against itself, where it does not run in double precision."""

Kept = Mapping[int, Tensor]
"""Which indices of a tensor's dimensions stayed: dimension to bool vector, True stayed."""
Place = tuple[str, str]


def make_small(
    plain: Plain, example_inputs: Any, *, round_to: int = 1, verify: bool = True, tolerance: float = 1e-4
) -> Plain:
    """Make a masked model physically smaller, and cut its calibration along.

    Modules keep their names, so the calibration holds for the small model as it is. Masks of inputs and outputs stay,
    cut alike.

    Args:
        plain: of :func:`tersor.deploy.plain.plain_copy`; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        round_to: leave this many channels, or heads, or a multiple; see :class:`tersor.speedup.ModelSpeedup`.
        verify: compare the simulations, rounding and all, of the masked and of the small model.
        tolerance: the largest accepted difference, relative to the largest output.

    Returns:
        The small model with its calibration, and in ``fallbacks`` what of it had to be given up. Its parameters hold
        no masked values any more, but for those that could not leave and are zero; ``masks`` has these.

    Raises:
        SpeedupError: sizes stand in the code of a module whose inputs or outputs are quantized as a whole.
        VerificationError: the small model computes something else.
        EmptyLayerError: the masks leave nothing of a layer.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> mask = torch.tensor([True, False, True, True])[:, None]
    >>> scale = {"scale": torch.full((4, 1), 0.01), "zero_point": torch.zeros(4, 1, dtype=torch.int64)}
    >>> form = {"quant_dtype": "int8", "quant_scheme": "symmetric", "quant_min": -127, "quant_max": 127}
    >>> plain = Plain(net, {"0": {"weight": {**scale, **form}}}, {"0": {"weight": mask}})
    >>> small = make_small(plain, torch.ones(2, 4))
    >>> small.model[0], small.calibration["0"]["weight"]["scale"].shape
    (Linear(in_features=4, out_features=3, bias=True), torch.Size([3, 1]))
    """
    if not plain.masks:
        return plain
    model = copy.deepcopy(plain.model).eval()
    coupling = groups(model, example_inputs)
    labels = _labels(plain, coupling)
    masked = replace(plain, model=_masked(plain, coupling)) if verify else plain
    graph = model if isinstance(model, fx.GraphModule) else None
    speedup = ModelSpeedup(model, coupling, plain.masks, round_to=round_to, graph_module=graph)
    small = speedup.speedup_model()
    assert speedup.report is not None
    kept = speedup.report.kept
    stayed = _stayed(coupling, kept)
    left = {place: {dim: stayed[own.numpy()] for dim, own in found.items()} for place, found in labels.items()}
    calibration, fallbacks = _cut_calibration(plain, kept, left)
    activation_masks = {
        module: {target: _cut_mask(mask, left.get((module, target), {})) for target, mask in own.items()}
        for module, own in plain.activation_masks.items()
    }
    found = Plain(small, calibration, _cut_masks(plain.masks, kept), activation_masks, (*plain.fallbacks, *fallbacks))
    if isinstance(small, fx.GraphModule) and small is not model:
        _check_called(small, found)
    if verify:
        _verify(masked, found, example_inputs, tolerance)
    return found


def simulated(plain: Plain) -> nn.Module:
    """A copy of a plain model that rounds, and masks, its inputs and outputs; its parameters do so by themselves."""
    model = copy.deepcopy(plain.model).eval()
    round_activations(model, plain.calibration, plain.activation_masks)
    return model


def _masked(plain: Plain, coupling: Coupling) -> nn.Module:
    """The model at its old size, with its masks completed and burnt in."""
    model = copy.deepcopy(plain.model)
    bake(named_tensors(model), coupling.complete(plain.masks))
    return model


def _cut_along(plain: Plain) -> list[Place]:
    """The inputs and outputs that have something for each channel: scales, or a mask."""
    scaled = [
        (module, target)
        for module, targets in plain.calibration.items()
        for target, said in targets.items()
        if is_activation(target) and isinstance(scale := said.get("scale"), Tensor) and scale.numel() > 1
    ]
    masked = [(module, target) for module, own in plain.activation_masks.items() for target in own]
    return list(dict.fromkeys([*scaled, *masked]))


@final
class _Probe(Transform):
    """Shows a value to who follows labels, by the name of a module that does nothing."""

    stage: ClassVar[Stage] = Stage.QUANTIZE

    def __init__(self) -> None:
        super().__init__()
        self.named = nn.Identity()

    def forward(self, value: Tensor) -> Tensor:
        """The value."""
        return self.named(value)


def _labels(plain: Plain, coupling: Coupling) -> dict[Place, dict[int, Tensor]]:
    """For inputs and outputs with something for each channel, the labels along each of their dimensions."""
    places = _cut_along(plain)
    if not places:
        return {}
    probed, fused = copy.deepcopy(plain.model), fused_names(plain.calibration)
    wrappers = ModelWrappers(probed)
    names: dict[str, Place] = {}
    for number, (module, target) in enumerate(places):
        probe, name = _Probe(), f"tersor_probe_{number}"
        wrappers[place_of(module, target, fused)].stack(target).add(probe)
        probed.add_module(name, probe.named)
        names[name] = module, target
    outputs = follow(probed, coupling.example_inputs, record_outputs=True).outputs
    return {names[name]: coupling.settled(fields) for name, fields in outputs if name in names}


def _stayed(coupling: Coupling, kept: Mapping[str, Kept]) -> Tensor:
    """Which labels stayed, bool."""
    removed = np.zeros(len(coupling.classes), dtype=bool)
    for axis in coupling.axes:
        vector = kept.get(axis.name, {}).get(axis.dim)
        if vector is not None:
            removed[coupling.classes[axis.span][~vector.numpy()]] = True
    return torch.from_numpy(~removed[coupling.classes])


def _cut_calibration(
    plain: Plain, kept: Mapping[str, Kept], left: Mapping[Place, Kept]
) -> tuple[CalibrationConfig, list[Fallback]]:
    """The calibration of what stayed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(plain.model).items()}
    calibration: CalibrationConfig = {}
    fallbacks: list[Fallback] = []
    for module, targets in plain.calibration.items():
        calibration[module] = {}
        for target, said in targets.items():
            name = f"{module}.{target}" if module else target
            if is_activation(target):
                found = _cut_activation(said, left.get((module, target), {}))
            else:
                found = _cut_parameter(said, shapes[name], kept.get(name, {}))
            if found is None:
                reason = "what is left of its blocks is too small to share scales; its rounded values are floats"
                fallbacks.append(Fallback(name, f"{reason} (prune whole blocks of input channels)"))
            else:
                calibration[module][target] = found
    return {module: targets for module, targets in calibration.items() if targets}, fallbacks


def _cut_activation(said: Mapping[str, Any], left: Kept) -> dict[str, Any]:
    """The calibration of an input or output: a scale for each channel that stayed."""
    return _each_grid(said, lambda grid: _select(_for_each(grid, left), left))


def _for_each(grid: Tensor, left: Kept) -> Tensor:
    """Scales of blocks of channels, as scales of the channels."""
    for dim, vector in left.items():
        if 1 < grid.shape[dim] < len(vector):
            grid = grid.repeat_interleave(len(vector) // grid.shape[dim], dim)
    return grid


def _cut_parameter(said: Mapping[str, Any], shape: Sequence[int], kept: Kept) -> dict[str, Any] | None:
    """The calibration of a parameter, its blocks cut finer where need be; None where they would be too small.

    Args:
        said: before.
        shape: of the parameter, before.
        kept: what of it stayed.
    """
    scale = said.get("scale")
    if not isinstance(scale, Tensor) or scale.dim() != len(shape):
        return dict(said)
    picks: dict[int, Tensor] = {}
    for dim, vector in kept.items():
        if scale.shape[dim] == 1:
            continue
        blocks = torch.arange(shape[dim])[vector] // (shape[dim] // scale.shape[dim])
        block = common_block(blocks)
        if block < min(LEAST_BLOCK, shape[dim] // scale.shape[dim]):
            return None
        picks[dim] = blocks[::block]
    return _each_grid(said, lambda grid: _pick(grid, picks))


def common_block(numbers: Tensor) -> int:
    """The longest block into which a row can be cut so that the numbers in each block are one and the same.

    >>> common_block(torch.tensor([0, 0, 0, 0, 1, 1])), common_block(torch.tensor([0, 0, 0, 1, 1]))
    (2, 1)
    """
    changes = (numbers.diff() != 0).nonzero().flatten() + 1
    return math.gcd(len(numbers), *changes.tolist())


def _each_grid(said: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """A calibration with every tensor changed that has as many values as there are scales."""
    scale = said.get("scale")
    if not isinstance(scale, Tensor) or scale.numel() == 1:
        return dict(said)
    return {
        key: change(value) if isinstance(value, Tensor) and value.shape == scale.shape else value
        for key, value in said.items()
    }


def _pick(grid: Tensor, picks: Mapping[int, Tensor]) -> Tensor:
    for dim, numbers in picks.items():
        grid = grid.index_select(dim, numbers.to(grid.device))
    return grid


def _select(value: Tensor, kept: Kept) -> Tensor:
    """What stayed of a tensor that broadcasts against another, whose dimensions are counted from its last."""
    return _pick(value, {
        dim: vector.nonzero().flatten() for dim, vector in kept.items() if value.shape[dim] == len(vector)
    })  # fmt: skip


def _cut_masks(masks: Mapping[str, Mapping[str, Tensor]], kept: Mapping[str, Kept]) -> dict[str, dict[str, Tensor]]:
    """Masks of parameters, cut like these, as far as they still remove something."""
    cut: dict[str, dict[str, Tensor]] = {}
    for module, targets in masks.items():
        for target, mask in targets.items():
            left = _select(mask, kept.get(f"{module}.{target}" if module else target, {}))
            if not bool(left.all()):
                cut.setdefault(module, {})[target] = left
    return cut


def _cut_mask(mask: Mask, left: Kept) -> Mask:
    """A mask of an input or output, cut like it."""
    mask = copy.deepcopy(mask)
    mask.set([_select(factor, left) for factor in mask.factors])
    return mask


def _check_called(graph: fx.GraphModule, plain: Plain) -> None:
    """Refuse a graph that has taken a module apart whose inputs or outputs are rounded or masked."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    fused = fused_names(plain.calibration)
    for module, target in _activations(plain):
        if place_of(module, target, fused) not in called:
            raise SpeedupError(
                f"sizes stand in the code as numbers, and in the graph that has them right there is no {module!r}, "
                f"whose {target} is quantized",
                where=module,
                remedy="Take sizes from tensors (x.flatten(1)), quantize the layers inside, or give small=False.",
            )


def _activations(plain: Plain) -> Iterator[Place]:
    for module, targets in (*plain.calibration.items(), *plain.activation_masks.items()):
        yield from ((module, target) for target in targets if is_activation(target))


def _verify(masked: Plain, small: Plain, example_inputs: Any, tolerance: float) -> None:
    """Refuse a small model whose simulation is another one.

    In double precision, since other sums of single precision may be rounded the other way, and differ by a whole step.
    """
    inputs = fresh_inputs(example_inputs, batch_size_of(example_inputs), seed=1)
    error = _error_in_double(masked, small, inputs)
    if error is None:
        reference = simulated(masked)
        expected, actual = outputs_of(reference, inputs), outputs_of(simulated(small), inputs)
        error = relative_error(actual, expected)
        if error > tolerance:
            shaken = map_tensors(inputs, lambda tensor: tensor * (1 + 1e-6) if tensor.is_floating_point() else tensor)
            floor = agreement(outputs_of(reference, shaken), expected).snr - MARGIN
            error = 0.0 if agreement(actual, expected).snr >= floor else error
    if not error <= tolerance:
        raise VerificationError(
            f"the small model's simulation differs from the masked one's by {error:.2g} relative, more than "
            f"{tolerance:g}",
            where="make_small",
            remedy="Report it with the model and the config list; small=False deploys the masked model.",
        )


def _error_in_double(masked: Plain, small: Plain, inputs: Any) -> float | None:
    """How far the simulations are from each other; None where the model insists on its own precision."""
    inputs = map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    try:
        expected, actual = (outputs_of(simulated(own).double(), inputs) for own in (masked, small))
    except TersorError:
        return None
    return relative_error(actual, expected)
