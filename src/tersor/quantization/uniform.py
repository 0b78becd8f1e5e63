"""The simulation that most quantizers use: evenly spaced values, with scales that are fixed or follow what passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from tersor.errors import CheckpointError, InvalidValueError, NumericalError
from tersor.quantization.cut import Cut
from tersor.quantization.fake_quantize import FakeQuantize, never_seen
from tersor.quantization.format import Format
from tersor.quantization.observers import Extremes, RangeObserver


@final
class UniformQuantize(FakeQuantize):
    """Rounds to values of equal distance, with one scale and zero point a block.

    It starts as doing nothing. While ``watching``, its observer sees what passes; :meth:`settle` turns the range seen
    into scale and zero point; once ``enabled``, values are rounded.

    Args:
        name: ``module.target``, for messages.
        form: what is stored.
        cut: the blocks that share a scale.
        observer: what finds the range.
        live: settle whenever something was seen; for training.
        only_in_training: watch in training mode alone.

    Attributes:
        enabled: False passes values untouched.
        enables: enabled as soon as a value is watched, and so before its own rounding.
        scale: of the grid's shape, () for a whole tensor; float32.
        zero_point: of the same shape; whole numbers in float32.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        name: str,
        form: Format,
        cut: Cut,
        observer: RangeObserver,
        *,
        live: bool = False,
        only_in_training: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.form = form
        self.cut = cut
        self.observer = observer
        self.live = live
        self.only_in_training = only_in_training
        self.enabled = False
        self.enables = False
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros(()))

    def forward(self, value: Tensor) -> Tensor:
        """The value on its grid, in its own type."""
        if not self.enabled or not value.is_floating_point():
            return value
        scale, zero_point = self._spread(value)
        return self.form.simulate(value, scale, zero_point)

    def _spread(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.scale.device != value.device:  # a hook's transforms do not move with the model
            self.to(value.device)
        self.cut.check(
            value.shape,
            self.scale.shape,
            self.name,
            "Fixed scales need a granularity whose blocks do not depend on the sizes of inputs; for one scale a token "
            "set dynamic: True.",
        )
        return self.cut.spread(self.scale, value.shape), self.cut.spread(self.zero_point, value.shape)

    @torch.no_grad()
    def watch(self, value: Tensor) -> None:
        """Show a value to the observer.

        Raises:
            InvalidValueError: it has other blocks than the values before it.
        """
        if (self.only_in_training and not self.training) or not value.is_floating_point() or not value.numel():
            return
        if self.scale.device != value.device:
            self.to(value.device)
        try:
            if isinstance(self.observer, Extremes):
                self.observer.include(*self.cut.extremes(value))
            else:
                self.observer.add(self.cut.rows(value.to(torch.promote_types(value.dtype, torch.float32))))
        except InvalidValueError as error:
            raise InvalidValueError(error.what, where=self.name, legal=error.legal, remedy=error.remedy) from None
        if self.live:
            self.follow()
        if self.enables:
            self.enabled, self.enables = True, False

    @property
    def unseen(self) -> bool:
        """Whether no value was ever shown."""
        minimum, maximum = self.observer.range()
        return bool((minimum > maximum).all())

    def settle(self) -> None:
        """Take scale and zero point from what was seen.

        Raises:
            NumericalError: nothing was seen, or values that are infinite or not numbers.
        """
        if self.unseen:
            raise never_seen("here", self.name)
        if not all(bool(own.isfinite().all()) for own in self.observer.range()):
            raise NumericalError(
                "values are infinite or not numbers",
                where=self.name,
                remedy="Look for overflow in the model (float16?) or in the calibration data.",
            )
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """As :meth:`settle`, without a look at what was seen: it costs no waiting for a device."""
        scale, zero_point = self.form.scale_and_zero_point(*self.observer.range())
        self.put("scale", scale)
        self.put("zero_point", zero_point)

    def recall(self) -> None:
        """Let an observer that has seen nothing begin with the range that scale and zero point stand for."""
        if self.unseen and isinstance(self.observer, Extremes):
            self.observer.include(*((edge - self.zero_point) * self.scale for edge in (self.form.low, self.form.high)))

    def enable(self) -> None:
        """Round from now on; where nothing was seen yet, from the first value that is."""
        minimum, maximum = self.observer.range()
        self.enabled = bool((minimum <= maximum).all())
        self.enables = not self.enabled

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Give scale and zero point, of the grid's shape."""
        self.put("scale", scale)
        self.put("zero_point", zero_point)

    def calibration(self) -> dict[str, Any]:
        """Scale, zero point and format."""
        zero_point = self.zero_point.detach().cpu().to(torch.int64)
        return {"scale": self.scale.detach().cpu().clone(), "zero_point": zero_point, **self.form.as_calibration()}

    def check_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Refuse what does not fit.

        Raises:
            CheckpointError: another format, or a key is missing.
        """
        check_form(self.name, self.form, calibration)

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Fixed from now on."""
        self.set(*(torch.as_tensor(calibration[key]).to(self.scale) for key in ("scale", "zero_point")))
        self.enabled, self.watching, self.live = True, False, False

    def flags(self) -> dict[str, bool]:
        """What is on."""
        return {"enabled": self.enabled, "enables": self.enables, "live": self.live, **super().flags()}


def check_form(name: str, form: Format, calibration: Mapping[str, Any]) -> None:
    """Refuse a calibration of a target that is stored as something else, or that no kernel could use.

    Raises:
        CheckpointError: another format; a key is missing, or holds what is no scale or no zero point.
    """
    for key, own in form.as_calibration().items():
        if calibration.get(key) != own:
            raise CheckpointError(
                f"{key} is {calibration.get(key)!r} in the calibration, and {own!r} in the config list",
                where=name,
                remedy="Make the quantizer from the config list that the calibration was made with.",
            )
    found: list[Tensor] = []
    for key in ("scale", "zero_point"):
        if key not in calibration:
            raise CheckpointError(f"the calibration has no {key!r}", where=name)
        value = calibration[key]
        if not isinstance(value, (Tensor, int, float)):
            raise CheckpointError(f"{key} is a {type(value).__name__} in the calibration, and no tensor", where=name)
        found.append(torch.as_tensor(value).double())
    scale, zero_point = found
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise CheckpointError("scale is not finite and above 0 everywhere in the calibration", where=name)
    if not bool(((zero_point == zero_point.round()) & (zero_point >= form.low) & (zero_point <= form.high)).all()):
        raise CheckpointError(
            "zero_point is not a whole number that can be stored everywhere in the calibration",
            where=name,
            legal=[f"{form.low} to {form.high}"],
        )
