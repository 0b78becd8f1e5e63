"""The base of all quantizers: fake quantization on targets, calibration in and out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.compressor import Compressor
from tersor.config import Granularity, QuantizationSpec
from tersor.config.values import is_activation
from tersor.errors import CheckpointError, ConflictError, UnmatchedError, nearest
from tersor.quantization.cut import Cut
from tersor.quantization.format import Format
from tersor.quantization.observers import Sized
from tersor.targets.channels import is_conv1d
from tersor.targets.planned import OUT_CHANNEL, PlannedTarget
from tersor.wrapping import Stage, TargetStack, Transform

CalibrationConfig = dict[str, dict[str, dict[str, Any]]]
"""``{module: {target: {key: number, string or tensor}}}``."""


class FakeQuantize(Sized, Transform):
    """Simulates the quantization of one target: rounds to the grid of its type and back."""

    stage = Stage.QUANTIZE

    @abstractmethod
    def calibration(self) -> dict[str, Any]:
        """What a deployed kernel needs: scale, zero point, type."""

    @abstractmethod
    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Take over what :meth:`calibration` of another one returned."""

    def check_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Raise a ``CheckpointError`` where :meth:`load_calibration` could not take it."""

    def flags(self) -> dict[str, bool]:
        """The attributes that say what it does by now; part of :meth:`state`."""
        return {"watching": self.watching}

    def state(self) -> dict[str, Any]:
        """All that has to be kept to go on after a crash."""
        return {
            "flags": self.flags(),
            "tensors": {name: tensor.detach().clone() for name, tensor in self.state_dict().items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        for name, value in state["flags"].items():
            setattr(self, name, value)
        self.load_state_dict(state["tensors"])


class Quantizer(Compressor):
    """Base of all quantizers. A new one makes the fake quantization of a target, in one file.

    ``compress()`` returns ``(model, calibration_config)``; the model stays wrapped.

    Attributes:
        default_granularity: of the weights of linear layers and convolutions; anything else is one block by default.
        full_range: whether signed symmetric types use their lowest value, where the config list says nothing.
        methods: the values of ``apply_method`` that it takes, besides ``bypass`` and the default ``clamp_round``.
    """

    mode = "quantization"
    default_granularity: Granularity = OUT_CHANNEL
    full_range: ClassVar[bool] = False
    methods: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """The simulation of one target under its spec."""

    def form(self, target: PlannedTarget) -> Format:
        """What a target is stored as."""
        return Format.of(spec_of(target), where=f"{target.config.where} on {target.name}", full=self.full_range)

    def cut(self, target: PlannedTarget) -> Cut:
        """The blocks of a target that share a scale.

        Raises:
            ConfigError: the granularity does not fit a parameter.
        """
        granularity, config = spec_of(target).granularity, target.config
        if granularity is None or granularity.name == "default":
            granularity = self.default_granularity if _is_layer_weight(target) else None
        cut = Cut.of(config, granularity)
        if not is_activation(config.target_name):
            cut.grid(self.latent(target).shape)
        return cut

    def latent(self, target: PlannedTarget) -> Tensor:
        """The parameter behind a target, without any simulation."""
        return self.wrappers[target.config.module_name].tensor(target.config.target_name)

    def get_calibration_config(self) -> CalibrationConfig:
        """What a deployed model needs of each target of this quantizer."""
        config: CalibrationConfig = {}
        for target, transform in self.transforms():
            module, name = target.place
            config.setdefault(module, {})[name] = transform.calibration()
        return config

    def update_calibration_config(self, config: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
        """Take over a calibration from elsewhere.

        Raises:
            UnmatchedError: it names a target that this quantizer does not have; nothing is changed then.
            CheckpointError: it was made for other types or blocks; nothing is changed either.
        """
        known = {target.name: (target, transform) for target, transform in self.transforms()}
        asked = {
            f"{module}.{name}" if module else name: calibration
            for module, targets in config.items()
            for name, calibration in targets.items()
        }
        for name, calibration in asked.items():
            if name not in known:
                raise UnmatchedError("this quantizer has no such target", where=name, remedy=nearest(name, known))
            target, transform = known[name]
            transform.check_calibration(calibration)
            self._check_blocks(target, transform, calibration)
        for name, calibration in asked.items():
            known[name][1].load_calibration(calibration)

    def _check_blocks(self, target: PlannedTarget, transform: FakeQuantize, calibration: Mapping[str, Any]) -> None:
        """Refuse scales for other blocks; those of an input or output cut in blocks are known at run time alone."""
        cut, scale = getattr(transform, "cut", None), calibration.get("scale")
        is_input = is_activation(target.config.target_name)
        if not isinstance(cut, Cut) or not isinstance(scale, Tensor) or (is_input and cut.granularity is not None):
            return
        grid = () if is_input else cut.grid(self.latent(target).shape)
        if scale.shape != grid:
            raise CheckpointError(
                f"there are scales for {tuple(scale.shape)} blocks in the calibration, and it has {grid}",
                where=target.name,
                remedy="Make the quantizer from the config list that the calibration was made with.",
            )

    def result(self) -> tuple[nn.Module, CalibrationConfig]:
        """The wrapped model and its calibration."""
        return self.model, self.get_calibration_config()

    def transforms(self) -> list[tuple[PlannedTarget, FakeQuantize]]:
        """Each target of this quantizer and its simulation; those that are bypassed have none."""
        found: list[tuple[PlannedTarget, FakeQuantize]] = []
        for target in self._quantized():
            transform = self._stack(target).find(Stage.QUANTIZE)
            assert isinstance(transform, FakeQuantize)
            found.append((target, transform))
        return found

    def own_state(self) -> dict[str, Any]:
        """The state of each simulation."""
        return {"transforms": {target.name: transform.state() for target, transform in self.transforms()}}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`own_state` gave."""
        for target, transform in self.transforms():
            transform.load_state(state["transforms"][target.name])

    def _quantized(self) -> list[PlannedTarget]:
        return [target for target in self.plan.targets if spec_of(target).apply_method != "bypass"]

    def _stack(self, target: PlannedTarget) -> TargetStack:
        return self.wrappers[target.config.module_name].stack(target.config.target_name)

    def _wrap_targets(self) -> None:
        for target in self._quantized():
            self._check_method(target)
        transforms = [(target, self.fake_quantize(target)) for target in self._quantized()]  # it may refuse
        for target, transform in transforms:
            self._stack(target).add(transform)

    def _check_method(self, target: PlannedTarget) -> None:
        method = spec_of(target).apply_method
        if method not in (None, "clamp_round", *self.methods):
            raise ConflictError(
                f"{type(self).__name__} does not quantize by {method!r}",
                where=f"{target.config.where}['apply_method'] on {target.name}",
                legal=("clamp_round", "bypass", *sorted(self.methods)),
                remedy="Leave it out: each quantizer sets its own.",
            )


def spec_of(target: PlannedTarget) -> QuantizationSpec:
    """How a target is quantized."""
    spec = target.config.spec
    assert isinstance(spec, QuantizationSpec)
    return spec


def _is_layer_weight(target: PlannedTarget) -> bool:
    module = target.config.module
    return target.config.target_name == "weight" and (isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module))


def straight_through(value: Tensor, simulated: Tensor) -> Tensor:
    """``simulated``, to the bit, in the forward pass, the gradient of ``value`` in the backward pass.

    Paper: Bengio, Leonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons (2013).

    >>> import torch
    >>> straight_through(torch.tensor(-0.3), torch.tensor(1e-9))  # where -0.3 + (1e-9 + 0.3) would be 0
    tensor(1.0000e-09)
    """
    return simulated.detach() + (value - value.detach())
