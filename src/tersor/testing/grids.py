"""What the suite of quantizers looks at: values behind the simulation, and the grids that a calibration states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tersor.config import IntDtype, parse_dtype
from tersor.config.values import is_activation
from tersor.graph.inputs import evaluating
from tersor.quantization import CalibrationConfig
from tersor.targets.activations import INPUT, OUTPUT, Place, replace_input, replace_output
from tersor.testing.calibrations import places_of
from tersor.wrapping import Stage, TargetStack
from tersor.wrapping.wrapper import SIMULATION_HOOKS


def simulated_values(model: nn.Module, inputs: Tensor, places: Iterable[Place]) -> dict[Place, Tensor]:
    """Parameters, inputs and outputs as the model computes with them: quantized, masked.

    Args:
        model: a wrapped model; it is run in eval mode.
        inputs: what it is run on.
        places: module and target names.
    """
    found: dict[Place, Tensor] = {}

    def keep(place: Place, value: Any) -> Any:
        found[place] = value.detach().clone()
        return value

    with ExitStack() as hooks, torch.no_grad(), evaluating(model):
        for place in places:
            module, target = model.get_submodule(place[0]), place[1]
            if is_activation(target):
                hooks.callback(_listen(module, target, partial(keep, place)).remove)
            else:
                keep(place, getattr(module, target))
        model(inputs)
    return found


def _listen(module: nn.Module, target: str, look: Callable[[Any], Any]) -> torch.utils.hooks.RemovableHandle:
    """Behind all other hooks."""
    if target.startswith(INPUT):
        key = target.removeprefix(INPUT)
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: replace_input(module, args, kwargs, key, look), with_kwargs=True
        )
    key = target.removeprefix(OUTPUT)
    return module.register_forward_hook(lambda module, args, output: replace_output(output, key, look))


def simulated_places(model: nn.Module) -> list[Place]:
    """Where quantization is simulated, as the model itself shows it."""
    found: list[Place] = []
    for name, module in model.named_modules():
        parametrized: dict[str, Any] = getattr(module, "parametrizations", {})
        stacks = {target: of for target, applied in parametrized.items() for of in applied}
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(hook, SIMULATION_HOOKS):
                kind = INPUT if hook in module._forward_pre_hooks.values() else OUTPUT
                stacks.update({f"{kind}{key}": stack for key, stack in hook.stacks.items()})
        for target, stack in stacks.items():
            if isinstance(stack, TargetStack) and stack.find(Stage.QUANTIZE) is not None:
                found.append((name, target))
    return sorted(found)


def assert_on_grids(model: nn.Module, inputs: Tensor, calibration: CalibrationConfig) -> None:
    """What passes each target of a calibration lies on the grid that is stated for it, to the bit."""
    for (module, target), value in simulated_values(model, inputs, places_of(calibration)).items():
        assert_on_grid(f"{module}.{target}", value, calibration[module][target])


def assert_on_grid(name: str, value: Tensor, calibration: Mapping[str, Any]) -> None:
    """Each value is a number of the stated type, less the zero point, times the scale.

    Args:
        name: of the target.
        value: behind the simulation; zeros are masked, or on the grid.
        calibration: what is stated for it.

    >>> grid = {"scale": torch.tensor(0.5), "zero_point": torch.tensor(0), "quant_dtype": "int2"}
    >>> assert_on_grid("fc.weight", torch.tensor([-1.0, -0.5, 0.0, 0.5]), grid)
    >>> assert_on_grid("fc.weight", torch.tensor([0.5, 0.7]), grid)
    Traceback (most recent call last):
        ...
    AssertionError: 1 of 2 values of fc.weight are not on the grid of its calibration, 0.7 for one
    """
    for key in ("scale", "zero_point", "quant_dtype"):
        assert key in calibration, f"the calibration of {name} has no {key!r}"
    scale, zero_point = (spread(calibration[key].float(), value.shape, name) for key in ("scale", "zero_point"))
    assert bool((scale.isfinite() & (scale > 0)).all()), f"the scales of {name} are not all positive and finite"
    dtype = parse_dtype(calibration["quant_dtype"])
    levels = value.double() / scale.double() + zero_point.double()
    stored = levels.round() if isinstance(dtype, IntDtype) else levels.to(dtype.torch_dtype).double()
    off = value[((stored.float() - zero_point) * scale).to(value.dtype) != value]
    of_all = f"{off.numel()} of {value.numel()} values of {name}"
    assert not off.numel(), f"{of_all} are not on the grid of its calibration, {float(off[0]):.6g} for one"
    if isinstance(dtype, IntDtype):
        _assert_held(name, stored, dtype)


def _assert_held(name: str, stored: Tensor, dtype: IntDtype) -> None:
    """A type holds what is stored."""
    lowest = -(2 ** (dtype.bits - 1)) if dtype.signed else 0
    low, high = (-1, 1) if dtype == IntDtype(1) else (lowest, lowest + 2**dtype.bits - 1)
    least, greatest = int(stored.min()), int(stored.max())
    within = low <= least and greatest <= high
    assert within, f"{name} is stored as {least} to {greatest}, and {dtype.as_config()} holds {low} to {high}"


def spread(per_block: Tensor, shape: torch.Size, name: str) -> Tensor:
    """One value for each block, at the shape of the target.

    >>> spread(torch.tensor([[1.0, 2.0]]), torch.Size((1, 4)), "fc.weight")
    tensor([[1., 1., 2., 2.]])
    """
    if not per_block.dim():
        return per_block.expand(shape)
    counts, sizes = tuple(per_block.shape), tuple(shape)
    fits = len(counts) == len(sizes) and all(size % count == 0 for size, count in zip(sizes, counts, strict=True))
    assert fits, f"scales of shape {counts} do not cut {name}, of shape {sizes}, into equal blocks"
    for dim, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        per_block = per_block.repeat_interleave(size // count, dim)
    return per_block
