"""The base of quantizers that learn their scales."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from tersor.compressor import Compressor
from tersor.config import FloatDtype, values
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import ConflictError, NumericalError
from tersor.quantization.base import spec_of
from tersor.quantization.format import Format
from tersor.quantization.learned_uniform import Initializer, LearnedUniform, agree
from tersor.quantization.training import TrainingQuantizer
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.learned import Learner

FEW_BITS = 4
"""Up to so many bits half of the levels is worth a warning."""


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
    def first(self, target: PlannedTarget, form: Format) -> Initializer:
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
        if self.keeps_scales:
            self._learner.start()
            return
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
