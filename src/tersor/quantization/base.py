"""The base of all quantizers: fake quantization on targets, calibration in and out."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import Granularity, QuantizationSpec
from tersor.config.values import is_activation
from tersor.errors import CheckpointError, ConflictError, TraceError, UnmatchedError, nearest
from tersor.graph.coupling import Coupling
from tersor.quantization.cut import Cut
from tersor.quantization.fake_quantize import FakeQuantize, never_seen
from tersor.quantization.format import Format
from tersor.quantization.module_fusion import check_calls
from tersor.quantization.norm_folding import Folded, NormFolded, NormFoldedBias
from tersor.targets.activations import OUTPUT, Place
from tersor.targets.channels import is_linear_or_convolution
from tersor.targets.planned import OUT_CHANNEL, PlannedTarget
from tersor.wrapping import Stage, TargetStack

CalibrationConfig = dict[str, dict[str, dict[str, Any]]]
"""``{module: {target: {key: number, string or tensor}}}``."""


class Quantizer(Compressor):
    """Base of all quantizers. A new one makes the fake quantization of a target, in one file.

    ``compress()`` returns ``(model, calibration_config)``; the model stays wrapped. A parameter that is tied is rounded
    under all of its names.

    What a config entry's ``fuse_names`` names is quantized as one module (``plan.fused``): the weight as it is with its
    batch norm folded in, the output behind the last member. An algorithm sees nothing of it: :meth:`fake_quantize`
    makes what rounds the folded weight, under the names of the group's head.

    Attributes:
        default_granularity: of the weights of linear layers and convolutions; anything else is one block by default.
        full_range: whether signed symmetric types use their lowest value, where the config list says nothing.
        folds_norms: whether it rounds a weight with its batch norm folded in, as ``fuse_names`` may ask for. It cannot
            where it works on the latent weights themselves, or on a grid that does not follow their magnitude.
        methods: the values of ``apply_method`` that it takes, besides ``bypass`` and the default ``clamp_round``.
        unreached: inputs and outputs that were left out, since no value to be rounded ever passed there.
    """

    mode = "quantization"
    default_granularity: Granularity = OUT_CHANNEL
    full_range: ClassVar[bool] = False
    folds_norms: ClassVar[bool] = True
    methods: ClassVar[frozenset[str]] = frozenset()
    unreached: frozenset[str] = frozenset()

    @abstractmethod
    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """The simulation of one target under its spec."""

    def types(self) -> str:
        """The types of its targets, in words."""
        return ", ".join(sorted({self.form(target).dtype.as_config() for target in self._quantized()}))

    def own_status(self) -> dict[str, float | Tensor]:
        """The mean number of bits of an element of its parameters."""
        sizes = [
            (self.latent(target).numel(), self.form(target).dtype.bits)
            for target in self._quantized()
            if not is_activation(target.config.target_name)
        ]
        total = sum(count for count, _ in sizes)
        return {"bits": sum(count * bits for count, bits in sizes) / total} if total else {}

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
        module, name = self.simulated_at(target)
        return self.wrappers[module].tensor(name)

    def get_calibration_config(self) -> CalibrationConfig:
        """What a deployed model needs of each target of this quantizer.

        Where modules are quantized as one, ``fuse_names`` says which.
        """
        config: CalibrationConfig = {}
        for target, transform in self.transforms():
            module, name = target.place
            fused = {"fuse_names": list(self.plan.fused[module].names)} if module in self.plan.fused else {}
            config.setdefault(module, {})[name] = {**transform.calibration(), **fused}
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
            for module, targets in _mapping(config, "calibration").items()
            for name, calibration in _mapping(targets, module).items()
        }
        for name, calibration in asked.items():
            _mapping(calibration, name)
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
        if not isinstance(cut, Cut) or scale is None:
            return
        shape = torch.as_tensor(scale).shape
        grid, is_input = shape, is_activation(target.config.target_name)
        if not is_input:
            grid = cut.grid(self.latent(target).shape)
        elif cut.granularity is None:
            grid = ()
        for what, own in (("scales", shape), ("zero points", torch.as_tensor(calibration["zero_point"]).shape)):
            if own != grid:
                raise CheckpointError(
                    f"there are {what} for {tuple(own)} blocks in the calibration, and it has {tuple(grid)}",
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
            if target.name in self.unreached:
                continue
            transform = self._stack(target).find(Stage.QUANTIZE)
            assert isinstance(transform, FakeQuantize)
            found.append((target, transform.inner if isinstance(transform, Folded) else transform))
        return found

    def leave_out(self, unseen: Iterable[PlannedTarget]) -> None:
        """Leave out inputs and outputs that no value to be rounded has passed through, with one warning for all.

        Attention reads the weight of its ``out_proj`` without calling it, and a look-up gets integers.

        Raises:
            NumericalError: that is all of them: the model was not run.
        """
        names = sorted(target.name for target in unseen)
        if not names:
            return
        if all(own.name in names for own in self._quantized() if is_activation(own.config.target_name)):
            raise never_seen("here, nor at any other input or output", names[0])
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        warnings.warn(
            f"{shown}: nothing that could be rounded passed there, so it is left out; a weight that another module "
            "reads has no inputs of its own",
            stacklevel=2,
        )
        self.unreached |= set(names)

    def own_state(self) -> dict[str, Any]:
        """The state of each simulation."""
        states = {target.name: transform.state() for target, transform in self.transforms()}
        return {"transforms": states, "unreached": sorted(self.unreached)}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`own_state` gave.

        Raises:
            CheckpointError: it is that of a quantizer of other targets, blocks or observers.
        """
        self.unreached = frozenset(state["unreached"])
        for target, transform in self.transforms():
            _load_state(target.name, transform, state["transforms"])

    def _quantized(self) -> list[PlannedTarget]:
        return [target for target in self.plan.targets if spec_of(target).apply_method != "bypass"]

    def folded_norms(self) -> list[nn.Module]:
        """The batch norms that are fused into the modules in front of them."""
        return [self.model.get_submodule(group.norm) for group in self.plan.fused.values() if group.norm is not None]

    def _make_plan(self, coupling: Coupling | None, example_inputs: Any) -> None:
        super()._make_plan(coupling, example_inputs)
        for group in self.plan.fused.values():
            if group.norm is None:
                continue
            weight = group.head, "weight"
            others = [".".join(place) for place in self.wrappers.tied(*weight) if place != weight]
            if others:
                raise ConflictError(
                    f"the weight of {group.head!r}, into which {group.norm!r} is to be folded, is {others[0]} as well",
                    where=f"fuse_names {group.names}",
                    remedy="Leave the norm out of the group.",
                )
            if not self.folds_norms:
                raise ConflictError(
                    f"{type(self).__name__} rounds weights as they are, without the norm behind them",
                    where=f"fuse_names {group.names}",
                    remedy="Leave the norm out of the group, or fold it for good first, with fuse_modules.",
                )
        if self.folded_norms():
            self.works_on_shards = False  # the fold reads the norm's parameters, wherever they are by then
        if self.plan.fused and self.example_inputs is not None:
            with self.wrappers.detached(), suppress(TraceError):  # without a graph the names are believed
                check_calls(self.model, self.plan.fused.values(), self.example_inputs)

    def _stack(self, target: PlannedTarget) -> TargetStack:
        module, name = self.simulated_at(target)
        return self.wrappers[module].stack(name)

    def simulated_at(self, target: PlannedTarget) -> Place:
        """Where the simulation of a target sits: that of a fused group's output, and of its bias, behind its head."""
        module, name = target.place
        group = self.plan.fused.get(module)
        if group is not None and name.startswith(OUTPUT):
            module = group.last
        elif group is not None and group.norm is not None and name == "bias":
            module = group.norm
        return module, name

    def _folding(self, target: PlannedTarget, inner: FakeQuantize) -> FakeQuantize:
        """The simulation of what is stored, which is another value than the target where a norm is folded into it."""
        group, name = self.plan.fused.get(target.config.module_name), target.config.target_name
        if group is None or group.norm is None or name not in ("weight", "bias"):
            return inner
        head, norm = target.config.module, self.model.get_submodule(group.norm)
        return (NormFolded if name == "weight" else NormFoldedBias)(inner, head, norm)

    def _wrap_targets(self) -> None:
        for target in self._quantized():
            self._check_method(target)
        self._check_ties()
        # Each of these may refuse: nothing is wrapped before all are there.
        transforms = [(target, self._folding(target, self.fake_quantize(target))) for target in self._quantized()]
        for target, transform in transforms:
            for module, name in self.wrappers.tied(*self.simulated_at(target)):
                self.wrappers[module].stack(name).add(transform)

    def _check_ties(self) -> None:
        """Refuse two targets that are one tensor.

        Raises:
            ConflictError: naming both.
        """
        fused = [other for other in self._chain if isinstance(other, Quantizer) and other is not self]
        others = [target for other in fused for target in other._quantized()]
        owners = {place: target.name for target in others for place in self.wrappers.tied(*target.place)}
        for target in self._quantized():
            if target.place in owners:
                raise ConflictError(
                    f"is the tensor of {owners[target.place]} as well",
                    where=f"{target.config.where} on {target.name}",
                    remedy="Give one of its names to the quantizer; it holds for all.",
                )
            owners |= dict.fromkeys(self.wrappers.tied(*target.place), target.name)

    def _check_method(self, target: PlannedTarget) -> None:
        method = spec_of(target).apply_method
        if method not in (None, "clamp_round", *self.methods):
            raise ConflictError(
                f"{type(self).__name__} does not quantize by {method!r}",
                where=f"{target.config.where}['apply_method'] on {target.name}",
                legal=("clamp_round", "bypass", *sorted(self.methods)),
                remedy="Leave it out: each quantizer sets its own.",
            )


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"a {type(value).__name__} is no part of a calibration, which is made of dicts", where=where
        )
    return value


def spec_of(target: PlannedTarget) -> QuantizationSpec:
    """How a target is quantized."""
    spec = target.config.spec
    assert isinstance(spec, QuantizationSpec)
    return spec


def _load_state(name: str, transform: FakeQuantize, states: Mapping[str, Any]) -> None:
    try:
        transform.load_state(states[name])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"the state is that of another quantizer: {error}",
            where=name,
            remedy="Make the quantizer with the config list and the arguments of the run that was saved.",
        ) from error


def _is_layer_weight(target: PlannedTarget) -> bool:
    return target.config.target_name == "weight" and is_linear_or_convolution(target.config.module)


def straight_through(value: Tensor, simulated: Tensor) -> Tensor:
    """``simulated``, to the bit, in the forward pass, the gradient of ``value`` in the backward pass.

    Paper: Bengio, Leonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons (2013).

    >>> import torch
    >>> straight_through(torch.tensor(-0.3), torch.tensor(1e-9))  # where -0.3 + (1e-9 + 0.3) would be 0
    tensor(1.0000e-09)
    """
    return simulated.detach() + (value - value.detach())
