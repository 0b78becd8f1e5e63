"""The base of quantizers that learn their scales, and what these do on one target."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import FloatDtype, values
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import CheckpointError, ConflictError, InvalidValueError, NumericalError
from tersor.quantization.base import FakeQuantize, spec_of
from tersor.quantization.cut import Cut
from tersor.quantization.format import Format
from tersor.quantization.learned_step import lsq, lsq_plus
from tersor.quantization.training import TrainingQuantizer
from tersor.quantization.uniform import check_form
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.learned import Learned, Learner
from tersor.training.ranks import mean_over_processes, processes

FEW_BITS = 4
"""Up to so many bits half of the levels is worth a warning."""
First = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows of values, one row a block, to the scale and the zero point (in levels, not yet rounded) to begin with."""


@final
class LearnedUniform(FakeQuantize):
    r"""Rounds to values of equal distance :math:`s = s_0 e^{\lambda}`: :math:`s_0` is seen, :math:`\lambda` learned.

    So scales stay positive, and a step of the optimizer changes each by the same share, whatever its size: with a
    learning rate of 0.001 by about a thousandth. (Jain, Gural, Wu, Dick: Trained Quantization Thresholds for Accurate
    and Efficient Fixed-Point Inference of Deep Neural Networks, MLSys 2020, learn logarithms for these reasons.) The
    zero point is :math:`z = z_0 + (q_{max} - q_{min})\, \omega`, where it is learned.

    Args:
        name: ``module.target``, for messages.
        form: what is stored.
        cut: the blocks that share a scale.
        first: finds what to begin with.
        learns_offset: whether there is a zero point other than 0.

    Attributes:
        enabled: False passes values untouched.
        enables: enabled as soon as a value is watched, and so before its own rounding.
        average: begin with the mean over all values watched (else with the last).
        seen: how many values were watched.
        least: the least of all their elements.
    """

    first_scale: Tensor
    first_zero_point: Tensor
    seen: Tensor
    least: Tensor

    def __init__(self, name: str, form: Format, cut: Cut, first: First, *, learns_offset: bool, average: bool) -> None:
        super().__init__()
        self.name = name
        self.form = form
        self.cut = cut
        self.first = first
        self.average = average
        self.enabled = False
        self.enables = False
        self.register_buffer("first_scale", torch.ones(()))
        self.register_buffer("first_zero_point", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("least", torch.tensor(torch.inf))
        self.log_scale = Learned(torch.zeros(()))
        self.offset = Learned(torch.zeros(())) if learns_offset else None

    def learned(self) -> dict[str, Learned]:
        """What is learned, by name."""
        offset = {} if self.offset is None else {f"{self.name} offset": self.offset}
        return {f"{self.name} scale": self.log_scale, **offset}

    def scale(self) -> Tensor:
        """The scale by now, of the grid's shape."""
        return self.first_scale * self.log_scale.value.exp()

    def zero_point(self) -> Tensor:
        """The zero point by now, not rounded."""
        if self.offset is None:
            return self.first_zero_point
        return self.first_zero_point + (self.form.high - self.form.low) * self.offset.value

    def forward(self, value: Tensor) -> Tensor:
        """The value on its grid, in its own type."""
        if not self.enabled or not value.is_floating_point() or not value.numel():
            return value
        self._follow(value)
        grid = self.cut.grid(value.shape)
        if grid != self.first_scale.shape:
            raise InvalidValueError(
                f"there are scales for {tuple(self.first_scale.shape)} blocks, and a value of shape "
                f"{tuple(value.shape)} has {grid}",
                where=self.name,
                remedy="Learned scales need a granularity whose blocks do not depend on the sizes of inputs.",
            )
        low, high = int(self.form.low), int(self.form.high)
        gradient_scale = (value.numel() // self.first_scale.numel() * high) ** -0.5
        scale = self.cut.spread(self.scale(), value.shape)
        if self.offset is None:
            return lsq(value, scale, low, high, gradient_scale)
        zero_point = self.cut.spread(self.zero_point(), value.shape)
        return lsq_plus(value, scale, zero_point, low, high, gradient_scale=gradient_scale)

    @torch.no_grad()
    def watch(self, value: Tensor) -> None:
        """Find what to begin with."""
        if not value.is_floating_point() or not value.numel() or (self.average and not self.training):
            return
        self._follow(value)
        scale, zero_point = self.first(self.cut.rows(value.to(torch.promote_types(value.dtype, torch.float32))))
        scale = above_zero(scale)
        if scale.shape != self.first_scale.shape:
            self.resize(scale.shape)
        self.seen.add_(1)
        self.least.copy_(torch.minimum(self.least, value.min()))
        share = 1 / self.seen if self.average else 1.0
        self.first_scale.lerp_(scale, share)  # to the bit where nothing of the old stays
        self.first_zero_point.lerp_(zero_point, share)
        if self.enables:
            self.enabled, self.enables = True, False

    def enable(self) -> None:
        """Round from now on; where nothing was seen yet, from the first value that is."""
        self.enabled = bool(self.seen > 0)
        self.enables = not self.enabled

    @torch.no_grad()
    def clamp_offset(self) -> None:
        """Keep the zero point between the lowest and the highest level, from where it would not come back."""
        if self.offset is not None:
            width = self.form.high - self.form.low
            low, high = ((edge - self.first_zero_point) / width for edge in (self.form.low, self.form.high))
            self.offset.value.clamp_(low, high)

    def calibration(self) -> dict[str, Any]:
        """Scale, zero point and format."""
        zero_point = self.zero_point().detach().round().clamp(self.form.low, self.form.high)
        scale = self.scale().detach().cpu()
        return {"scale": scale, "zero_point": zero_point.cpu().to(torch.int64), **self.form.as_calibration()}

    def check_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Refuse what does not fit.

        Raises:
            CheckpointError: another format, or a zero point other than 0 where none is learned.
        """
        check_form(self.name, self.form, calibration)
        if self.offset is None and bool((torch.as_tensor(calibration["zero_point"]) != 0).any()):
            raise CheckpointError("it has a zero point, and here only the scale is learned", where=self.name)

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Begin, and stay, with these."""
        scale, zero_point = (torch.as_tensor(calibration[key]).float() for key in ("scale", "zero_point"))
        self.resize(scale.shape)
        self.first_scale.copy_(scale)
        self.first_zero_point.copy_(zero_point)
        self.seen.fill_(1)
        self.enabled, self.enables, self.watching = True, False, False

    def flags(self) -> dict[str, bool]:
        """What is on."""
        return {"enabled": self.enabled, "enables": self.enables, **super().flags()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.resize(state["tensors"]["first_scale"].shape)
        super().load_state(state)

    @torch.no_grad()
    def resize(self, grid: torch.Size) -> None:
        """Begin anew with so many blocks; what is learned stays the same tensors."""
        device = self.first_scale.device
        self.first_scale, self.first_zero_point = torch.ones(grid, device=device), torch.zeros(grid, device=device)
        self.seen = torch.zeros((), device=device)
        for own in self.learned().values():
            own.value.data = torch.zeros(grid, device=device)

    def _follow(self, value: Tensor) -> None:
        """A hook's transforms do not move with the model."""
        if self.first_scale.device != value.device:
            self.to(value.device)


class LearnedScaleQuantizer(TrainingQuantizer):
    """Base of quantizers whose scales are learned together with the weights.

    The scales begin where the subclass's :meth:`first` puts them: those of parameters when the rounding starts, those
    of inputs and outputs at the mean over the batches of the steps before that, or of the first step. From then on they
    have an Adam of their own: your optimizer, its weight decay and the clipping of gradients do not see them.

    Args:
        model: the model; it is wrapped in place.
        config_list: what is quantized and how; an entry's ``quant_start_step`` stands for the argument.
        evaluator: how the model is trained; or use a loop of your own.
        quant_start_step: how many optimizer steps pass before values are rounded.
        learning_rate: of that Adam; about the share by which a scale can change in a step.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: a floating-point type, a dynamic range, or an observer.
        InvalidValueError: a number out of its range.
    """

    full_range = True

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        quant_start_step: int = 0,
        *,
        learning_rate: float = 1e-3,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("learning_rate"):
            self.learning_rate = values.number(learning_rate, "learning rate", low=0)
        super().__init__(
            model, config_list, evaluator, quant_start_step, example_inputs=example_inputs, previous=previous
        )

    @abstractmethod
    def first(self, target: PlannedTarget, form: Format) -> First:
        """What finds the scale and zero point to begin with."""

    def fake_quantize(self, target: PlannedTarget) -> LearnedUniform:
        """A learned scale, and with an affine scheme a learned zero point."""
        self._refuse_observer(target)
        form, cut = self.form(target), self.cut(target)
        if isinstance(form.dtype, FloatDtype) or spec_of(target).dynamic:
            raise ConflictError(
                "a step that is learned is that of an integer type, and the same for all inputs",
                where=f"{target.config.where} on {target.name}",
                remedy="Leave 'dynamic' out and use int or uint types, or take QATQuantizer for this target.",
            )
        return LearnedUniform(
            target.name,
            form,
            cut,
            self.first(target, form),
            learns_offset=form.scheme == "affine",
            average=is_activation(target.config.target_name),
        )

    def on_start(self) -> None:
        """Watch; round what does not wait."""
        super().on_start()
        for _, own in self._learned():
            own.watching, own.enabled = True, False
            own.seen.zero_()
            own.least.fill_(torch.inf)
            for value in own.learned().values():
                value.value.data.zero_()
        self.look_at_parameters()
        for target, own in self._learned():
            if self.due(target):
                own.enable()

    def on_gradients(self) -> None:
        """A step of the scales' Adam."""
        if self._learner.learning:
            self._learner.step()
            for _, own in self._learned():
                own.clamp_offset()

    def on_step(self) -> None:
        """Begin with the scales that have been watched for long enough."""
        super().on_step()
        due = [own for target, own in self._learned() if own.watching and self.due(target) and bool(own.seen > 0)]
        if due:
            agree(due)
            for own in due:
                own.watching, own.enabled, own.enables = False, True, False
            self._learner.start()
            _hint([own for own in due if own.average])

    def on_stop(self) -> None:
        """Watch and learn no longer."""
        self._learner.stop()
        for _, own in self._learned():
            own.watching = False

    def on_finish(self) -> None:
        """Fix all scales.

        Raises:
            NumericalError: values were seen that are not finite.
        """
        self.leave_out(target for target, own in self._learned() if not bool(own.seen > 0))
        for _, own in self._learned():
            if not bool((own.scale().isfinite() & own.zero_point().isfinite()).all()):
                raise NumericalError(
                    "the first values that were seen are infinite or not numbers, and so is the scale",
                    where=own.name,
                    remedy="Look for overflow in the model (float16?) or in the training data.",
                )
            own.enabled, own.enables = True, False

    def own_state(self) -> dict[str, Any]:
        """The state of each simulation, and of the Adam."""
        return {**super().own_state(), "learner": self._learner.state()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`own_state` was asked."""
        super().load_own_state(state)
        self._learner.load_state(state["learner"])

    def _wrap_targets(self) -> None:
        super()._wrap_targets()
        learned = {name: value for _, own in self._learned() for name, value in own.learned().items()}
        self._learner = Learner(learned, self.learning_rate)
        for target, own in self._learned():
            if not is_activation(target.config.target_name):
                latent = self.latent(target)
                own.to(latent.device)
                own.resize(torch.Size(own.cut.grid(latent.shape)))

    def _learned(self) -> list[tuple[PlannedTarget, LearnedUniform]]:
        return [(target, own) for target, own in self.transforms() if isinstance(own, LearnedUniform)]


def above_zero(scale: Tensor) -> Tensor:
    """Scales of blocks that hold nothing but zeros become 1."""
    return torch.where(scale < torch.finfo(torch.float32).tiny, 1, scale)


@torch.no_grad()
def agree(transforms: list[LearnedUniform]) -> None:
    """Begin with the means over all processes, by a single exchange."""
    if processes() == 1:
        return
    buffers = [buffer for own in transforms for buffer in (own.first_scale, own.first_zero_point)]
    mean = mean_over_processes(torch.cat([buffer.flatten().to(buffers[0].device) for buffer in buffers]))
    for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view(buffer.shape))


def _hint(transforms: list[LearnedUniform]) -> None:
    """Say where half of few levels goes to waste."""
    wasting = [
        own.name
        for own in transforms
        if own.offset is None and own.form.low < 0 and own.form.dtype.bits <= FEW_BITS and bool(own.least >= 0)
    ]
    if wasting:
        warnings.warn(
            f"no value below zero has been seen at {', '.join(wasting)}, so half of the levels are never used: an "
            "unsigned quant_dtype there gives twice as many.",
            stacklevel=2,
        )
