"""Sensitivity: how much harm each module's quantization does at each width, one module at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.config import IntDtype, QuantizationSpec, values
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import NumericalError, TrainingError, UnmatchedError
from tersor.graph.inputs import tensors_of
from tersor.quantization.base import FakeQuantize, spec_of
from tersor.quantization.calibrated import CalibratedQuantizer
from tersor.quantization.cut import Cut
from tersor.quantization.format import Format
from tersor.quantization.observers import MinMax
from tersor.targets.planned import PlannedTarget
from tersor.training.batches import batch_size, to_device
from tersor.training.loops import device_of
from tersor.training.ranks import sum_over_processes
from tersor.training.stages import inputs_of

Loss = Callable[[Any, nn.Module], Tensor]
"""``loss(batch, model)``, as the training step of an evaluator: the mean over the samples of a batch."""

TARGETS = ("weight", "_input_0")
"""Which targets of a module get its width."""


def sensitivities(
    model: nn.Module,
    config_list: ConfigList,
    calibration: Iterable[Any],
    choices: Sequence[int] = (2, 4, 8),
    *,
    targets: Sequence[str] = TARGETS,
    loss: Loss | None = None,
) -> dict[str, dict[int, float]]:
    r"""How much harm is done when one module alone is quantized at some width.

    Without a loss, it is the noise in the model's outputs relative to their power, over all calibration samples:

    .. math:: \Omega_m(b) = \sum \lVert y_{m,b} - y \rVert^2 / \sum \lVert y \rVert^2

    which takes a forward pass for each module, width and batch. With a loss, it is what the loss is expected to rise
    by, from one backward pass a batch:

    .. math:: \Omega_m(b) = \tfrac{1}{2} \sum_i F_i \, (Q_b(x_i) - x_i)^2, \qquad
        F_i = \mathrm{mean}_{batches} \left( N \, (\partial L / \partial x_i)^2 \right)

    over all values x of the module's targets: F estimates the diagonal of the Fisher matrix, N is the batch size.

    Ranges are those of the calibration data (of a weight: its own), rounding is to the nearest; types, schemes and
    granularity are those of the config list.

    Papers: Dong et al.: HAWQ-V2 (NeurIPS 2020), whose mean trace of the Hessian F takes the place of; Theis et al.:
    Faster Gaze Prediction with Dense Networks and Fisher Pruning (2018) for the estimate.

    Args:
        model: the model; it is left as it was.
        config_list: what is quantized and how; the widths in it do not matter.
        calibration: batches, which are gone through twice.
        choices: widths in bits.
        targets: which targets of a module get the width; nothing else is quantized.
        loss: see above.

    Returns:
        ``{module: {bits: harm}}``.

    Raises:
        InvalidValueError: a choice is no width, or there is no calibration batch.
        UnmatchedError: no module has any of these targets.
        NumericalError: a module that the calibration data never reaches.
    """
    with values.at("choices"):
        widths = [values.whole(bits, "number of bits", low=1) for bits in values.items(choices, "number of bits")]
    probing = _Probing(model, config_list, list(calibration), widths, targets, loss)
    try:
        probing.compress()
    finally:
        probing.unwrap_model()
    return probing.found


@final
class _Probing(CalibratedQuantizer):
    """Finds sensitivities on a wrapped model."""

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        calibration: Sequence[Any],
        choices: Sequence[int],
        targets: Sequence[str],
        loss: Loss | None,
    ) -> None:
        self._choices, self._targets, self._loss = choices, targets, loss
        self.found: dict[str, dict[int, float]] = {}
        super().__init__(model, config_list, calibration=calibration)

    def fake_quantize(self, target: PlannedTarget) -> _Probe:
        """A probe."""
        specs = {bits: at_width(spec_of(target), bits) for bits in self._choices}
        forms = {bits: self.form(replace(target, config=replace(target.config, spec=specs[bits]))) for bits in specs}
        follows = bool(spec_of(target).dynamic) or not is_activation(target.config.target_name)
        return _Probe(target.name, forms, self.cut(target), follows)

    def calibrate(self) -> None:
        """See the ranges, then measure."""
        by_module: dict[str, list[_Probe]] = {}
        for target, probe in self.transforms():
            assert isinstance(probe, _Probe)
            by_module.setdefault(target.config.module_name, []).append(probe)
        probes = [probe for own in by_module.values() for probe in own]
        for probe in probes:
            probe.watching = not probe.follows
        self.run_calibration()
        for probe in probes:
            probe.watching = False
            probe.observer.synchronize()
            probe.check()
        measure = self._noise if self._loss is None else partial(self._fisher, self._loss)
        totals = torch.tensor(measure(by_module), dtype=torch.float64)
        summed = sum_over_processes(totals)
        shares = (summed[:, :-1] / summed[:, -1:]).tolist()
        self.found = {n: dict(zip(self._choices, row, strict=True)) for n, row in zip(by_module, shares, strict=True)}

    def _noise(self, by_module: Mapping[str, list[_Probe]]) -> list[list[float]]:
        """Of each module, the energy of the noise at each width, and that of the outputs."""
        totals = [[0.0] * (len(self._choices) + 1) for _ in by_module]
        for args, kwargs in map(inputs_of, self._batches()):
            plain = _outputs(self.model(*args, **kwargs))
            power = sum(float(y.square().sum()) for y in plain)
            for row, probes in zip(totals, by_module.values(), strict=True):
                row[-1] += power
                for position, bits in enumerate(self._choices):
                    for probe in probes:
                        probe.width = bits
                    noisy = _outputs(self.model(*args, **kwargs))
                    row[position] += sum(float((a - b).square().sum()) for a, b in zip(noisy, plain, strict=True))
                    for probe in probes:
                        probe.width = None
        return totals

    def _fisher(self, loss: Loss, by_module: Mapping[str, list[_Probe]]) -> list[list[float]]:
        """Of each module, the expected rise of the loss at each width, summed over batches, and their number."""
        totals = [[0.0] * (len(self._choices) + 1) for _ in by_module]
        probes = [probe for own in by_module.values() for probe in own]
        for batch in self._batches():
            for probe in probes:
                probe.passed = []
            with torch.enable_grad():
                output = loss(batch, self.model)
            passed = [value for probe in probes for value in probe.passed or ()]
            if not passed or not output.requires_grad:
                raise TrainingError(
                    "the loss does not depend on what is to be quantized",
                    where="loss",
                    remedy="Run the model in it, with gradients: loss(batch, model).",
                )
            gradients = torch.autograd.grad(output, passed, allow_unused=True)
            known = dict(zip(map(id, passed), gradients, strict=True))
            for row, own in zip(totals, by_module.values(), strict=True):
                row[-1] += 1
                for position, bits in enumerate(self._choices):
                    row[position] += batch_size(batch) / 2 * sum(probe.rise(bits, known) for probe in own)
        for probe in probes:
            probe.passed = None
        return totals

    def _batches(self) -> Iterable[Any]:
        device = device_of(self.model)
        return (to_device(batch, device) for batch in self.batches())

    def _quantized(self) -> list[PlannedTarget]:
        return targets_named(super()._quantized(), self._targets)


@final
class _Probe(FakeQuantize):
    """Simulates a target at any width, or keeps what passes for its gradients.

    Attributes:
        follows: the range is that of each value itself, not of the calibration data.
        width: in bits; None passes values untouched.
        passed: what passed untouched, since the list was made.
    """

    def __init__(self, name: str, forms: Mapping[int, Format], cut: Cut, follows: bool) -> None:
        super().__init__()
        self.name, self.forms, self.cut, self.follows = name, forms, cut, follows
        self.observer = MinMax()
        self.width: int | None = None
        self.passed: list[Tensor] | None = None

    def forward(self, value: Tensor) -> Tensor:
        """The value, on the grid of the width."""
        if not value.is_floating_point():
            return value
        if self.width is not None:
            return self._at(value, self.width)
        if self.passed is not None:
            value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
            self.passed.append(value)
        return value

    @torch.no_grad()
    def watch(self, value: Tensor) -> None:
        """Widen the range."""
        if value.is_floating_point() and value.numel():
            self.observer.add(self.cut.rows(_wide(value)))

    def check(self) -> None:
        """Refuse a target that was never seen."""
        if not self.follows and not bool(torch.stack(self.observer.range()).isfinite().all()):
            raise NumericalError(
                "no finite value was ever seen here",
                where=self.name,
                remedy="Give calibration data that reaches this module, or leave it out.",
            )

    @torch.no_grad()
    def rise(self, bits: int, gradients: Mapping[int, Tensor | None]) -> float:
        """The sum of (gradient times error) squared; a parameter that is used several times has one gradient."""
        assert self.passed is not None
        known = [(value, gradients[id(value)]) for value in self.passed]
        used = [(value, gradient) for value, gradient in known if gradient is not None]
        if self.follows and len({value.data_ptr() for value, _ in used}) == 1:
            used = [(used[0][0], torch.stack([gradient for _, gradient in used]).sum(0))]
        return sum(float(((self._at(x, bits) - x).double() * g.double()).square().sum()) for x, g in used)

    def _at(self, value: Tensor, bits: int) -> Tensor:
        minimum, maximum = (
            self.cut.rows(_wide(value.detach())).aminmax(dim=-1) if self.follows else self.observer.range()
        )
        scale, zero_point = (
            self.cut.spread(x, value.shape) for x in self.forms[bits].scale_and_zero_point(minimum, maximum)
        )
        return self.forms[bits].simulate(value, scale.to(value.device), zero_point.to(value.device))

    def calibration(self) -> dict[str, Any]:
        """Nothing: it is for measuring."""
        return {}

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Nothing."""


def targets_named(targets: Iterable[PlannedTarget], names: Sequence[str]) -> list[PlannedTarget]:
    """The targets of these names.

    Raises:
        UnmatchedError: there are none.
    """
    quantized = [target for target in targets if spec_of(target).apply_method != "bypass"]
    found = [target for target in quantized if target.config.target_name in names]
    if not found:
        raise UnmatchedError(
            f"the config list has none of {list(names)}.",
            where="targets",
            legal=dict.fromkeys(target.config.target_name for target in quantized),
        )
    return found


def at_width(spec: QuantizationSpec, bits: int) -> QuantizationSpec:
    """A spec with another number of bits.

    >>> at_width(QuantizationSpec(quant_dtype="uint8"), 4).as_config()
    {'quant_dtype': 'uint4'}
    """
    signed = not isinstance(spec.quant_dtype, IntDtype) or spec.quant_dtype.signed
    return spec.model_copy(update={"quant_dtype": IntDtype(bits, signed)})


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _outputs(result: Any) -> list[Tensor]:
    """The floating tensors that a model returned."""
    return [tensor.detach().double() for tensor in tensors_of(result) if tensor.is_floating_point()]
