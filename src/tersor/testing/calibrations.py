"""What the suite of quantizers does with calibrations: look into them, compare them, spoil them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tersor.errors import TersorError
from tersor.quantization import CalibrationConfig, Quantizer
from tersor.targets.activations import Place


def named(places: list[Place]) -> str:
    """Places as one text."""
    return ", ".join(f"{module}.{target}" for module, target in places)


def places_of(calibration: Mapping[str, Mapping[str, Any]]) -> list[Place]:
    """The targets of a calibration, sorted."""
    return sorted((module, target) for module, targets in calibration.items() for target in targets)


def numbers_of(calibration: CalibrationConfig) -> dict[str, Tensor]:
    """Copies of all tensors and numbers in it, by name."""
    return {
        f"{key} of {module}.{target}": torch.as_tensor(value).clone()
        for module, target in places_of(calibration)
        for key, value in calibration[module][target].items()
        if isinstance(value, Tensor | int | float)
    }


def plain_of(calibration: CalibrationConfig) -> dict[str, object]:
    """What a calibration holds besides tensors, by name."""
    return {
        f"{key} of {module}.{target}": value
        for module, target in places_of(calibration)
        for key, value in calibration[module][target].items()
        if not isinstance(value, Tensor)
    }


def unfit(calibration: CalibrationConfig) -> Iterator[tuple[str, CalibrationConfig]]:
    """Calibrations that fit nowhere: one thing in them is wrong, behind much that is right and has other scales."""
    for module, target in places_of(calibration):
        calibration[module][target]["scale"] = 2 * calibration[module][target]["scale"]
    module, target = list(calibration)[-1], list(list(calibration.values())[-1])[-1]
    last = calibration[module][target]
    yield "an unknown module", {**calibration, "nowhere": {target: last}}
    yield "an unknown target", {**calibration, module: {**calibration[module], "nothing": last}}
    for what, changed in {
        "another type": {**last, "quant_dtype": "int7"},
        "scales of another shape": {**last, "scale": torch.ones(7)},
        "no scale": {key: value for key, value in last.items() if key != "scale"},
    }.items():
        yield what, {**calibration, module: {**calibration[module], target: changed}}


def refuses(quantizer: Quantizer, calibration: CalibrationConfig) -> bool:
    """Whether a quantizer raises an error of Tersor's in place of taking a calibration."""
    try:
        quantizer.update_calibration_config(calibration)
    except TersorError:
        return True
    return False
