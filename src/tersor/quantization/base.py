"""The base of all quantizers: fake quantization on targets, calibration in and out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.errors import UnmatchedError, nearest
from tersor.targets.planned import PlannedTarget
from tersor.wrapping import Stage, Transform

CalibrationConfig = dict[str, dict[str, dict[str, Any]]]
"""``{module: {target: {key: number, string or tensor}}}``."""


class FakeQuantize(Transform):
    """Simulates the quantization of one target: rounds to the grid of its type and back."""

    stage = Stage.QUANTIZE

    @abstractmethod
    def calibration(self) -> dict[str, Any]:
        """What a deployed kernel needs: scale, zero point, type."""

    @abstractmethod
    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Take over what :meth:`calibration` of another one returned."""


class Quantizer(Compressor):
    """Base of all quantizers. A new one makes the fake quantization of a target, in one file.

    ``compress()`` returns ``(model, calibration_config)``; the model stays wrapped.
    """

    mode = "quantization"

    @abstractmethod
    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """The simulation of one target under its spec."""

    def get_calibration_config(self) -> CalibrationConfig:
        """What a deployed model needs of each target of this quantizer."""
        config: CalibrationConfig = {}
        for module, target, transform in self._transforms():
            config.setdefault(module, {})[target] = transform.calibration()
        return config

    def update_calibration_config(self, config: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Take over a calibration from elsewhere.

        Raises:
            UnmatchedError: it names a target that this quantizer does not have; nothing is changed then.
        """
        known = {(module, target): transform for module, target, transform in self._transforms()}
        names = [f"{module}.{target}" for module, target in known]
        for module, targets in config.items():
            for target in targets:
                if (module, target) not in known:
                    name = f"{module}.{target}"
                    raise UnmatchedError("this quantizer has no such target", where=name, remedy=nearest(name, names))
        for module, targets in config.items():
            for target, calibration in targets.items():
                known[module, target].load_calibration(calibration)

    def result(self) -> tuple[nn.Module, CalibrationConfig]:
        """The wrapped model and its calibration."""
        return self.model, self.get_calibration_config()

    def _wrap_targets(self) -> None:
        transforms = [self.fake_quantize(target) for target in self.plan.targets]  # it may refuse: wrap nothing then
        for target, transform in zip(self.plan.targets, transforms, strict=True):
            self.wrappers[target.config.module_name].stack(target.config.target_name).add(transform)

    def _transforms(self) -> list[tuple[str, str, FakeQuantize]]:
        found: list[tuple[str, str, FakeQuantize]] = []
        for planned in self.plan.targets:
            module, target = planned.config.module_name, planned.config.target_name
            transform = self.wrappers[module].stack(target).find(Stage.QUANTIZE)
            assert isinstance(transform, FakeQuantize)
            found.append((module, target, transform))
        return found


def straight_through(value: Tensor, simulated: Tensor) -> Tensor:
    """``simulated`` in the forward pass, the gradient of ``value`` in the backward pass.

    Paper: Bengio, Leonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons (2013).
    """
    return value + (simulated - value).detach()
