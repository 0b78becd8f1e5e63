"""The simulation whose scales are learned: evenly spaced values, with a distance that takes gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from tersor.errors import CheckpointError
from tersor.quantization.base import FakeQuantize
from tersor.quantization.cut import Cut
from tersor.quantization.format import Format
from tersor.quantization.learned_step import lsq, lsq_plus
from tersor.quantization.uniform import check_form
from tersor.training.learned import Learned
from tersor.training.ranks import mean_over_processes, processes

Initializer = Callable[[Tensor], tuple[Tensor, Tensor]]
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

    def __init__(
        self, name: str, form: Format, cut: Cut, first: Initializer, *, learns_offset: bool, average: bool
    ) -> None:
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
        self.cut.check(
            value.shape,
            self.first_scale.shape,
            self.name,
            "Learned scales need a granularity whose blocks do not depend on the sizes of inputs.",
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
