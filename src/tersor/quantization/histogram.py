"""Histograms of the values that pass a target: small, and the same whatever the order in which values come.

Whoever chooses a range by more than the least and the largest value has to know how values are distributed, and cannot
keep them all. A histogram can be kept; but its bins have to be chosen before all values are known. Here they can grow
without a rounding error: the bins of one block cover :math:`(-R, R)` with :math:`R = 2^e`, and where a larger value
comes, :math:`R` doubles and each two neighbouring bins become one. All edges are powers of two times whole numbers, so
counts are exact, and they depend neither on the order of batches nor on which process saw which.

Values that are exactly zero (behind a ReLU, of a mask) are counted for themselves, in a bin of no width: every format
represents them without an error, so that they must not be mistaken for small numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tersor.errors import InvalidValueError, NumericalError
from tersor.training.ranks import of_each_process

SMALLEST_EXPONENT = -100
"""Values below 2**-100 are in the bins next to zero; so bins that are a part of this stay far from underflow."""
CHUNK = 1 << 20
"""Elements that are worked on at once: temporary tensors stay small, and in the cache."""


@dataclass(frozen=True)
class Histogram:
    r"""How often values occur, of one block or of each block of a grid.

    With :math:`b` bins on either side, their width is :math:`w = R / b`, and a value :math:`x` is counted in

    .. math:: b + \operatorname{sign}(x) \, (\lfloor |x| / w \rfloor + 1)

    so the middle one holds nothing but zeros, and the histogram of :math:`-x` is the mirror image.

    Attributes:
        counts: whole numbers, shape ``(*grid, 2 * b + 1)``, int64.
        exponent: :math:`e` of each block, shape ``grid``, int64.
        minimum: the least value, exactly, shape ``grid``, float32.
        maximum: the largest, likewise.

    >>> one = Histogram.of(torch.tensor([0.0, 0.3, 0.6]), bins=4)
    >>> one.counts, one.exponent
    (tensor([0, 0, 0, 0, 1, 0, 1, 1, 0]), tensor(0))
    >>> both = one.merge(Histogram.of(torch.tensor([-1.5]), bins=4))
    >>> both.counts, both.exponent
    (tensor([1, 0, 0, 0, 1, 1, 1, 0, 0]), tensor(1))
    """

    counts: Tensor
    exponent: Tensor
    minimum: Tensor
    maximum: Tensor

    @classmethod
    def of(cls, rows: Tensor, bins: int = 4096) -> Histogram:
        """Count values.

        Args:
            rows: the values of each block in a row, shape ``(*grid, n)``, any floating point type.
            bins: on either side of zero, a power of two.

        Raises:
            NumericalError: a value is not finite.
            InvalidValueError: there is no value, or ``bins`` is no power of two.
        """
        if bins < 2 or bins & (bins - 1):
            raise InvalidValueError(f"{bins!r} is no power of two from 2 on", where="bins")
        minimum, maximum = finite_range(rows)
        largest = torch.maximum(-minimum, maximum).clamp(min=2.0**SMALLEST_EXPONENT / 2)
        exponent = torch.frexp(largest).exponent.long()  # |x| = m * 2**e with m < 1, so values lie in (-2**e, 2**e)
        per_unit = _power_of_two(bins.bit_length() - 1 - exponent)  # 1 / w
        blocks, width = minimum.numel(), 2 * bins + 1
        first = torch.arange(blocks, device=rows.device).unsqueeze(1) * width + bins
        counts = torch.zeros(blocks * width, dtype=torch.long, device=rows.device)
        for part in rows.reshape(blocks, -1).split(max(CHUNK // blocks, 1), dim=1):
            part = part.float()
            steps = (part * per_unit.view(-1, 1)).trunc_() + part.sign()  # the product is exact, or 0 by underflow
            counts += torch.bincount((steps.long() + first).flatten(), minlength=blocks * width)
        return cls(counts.view(*minimum.shape, width), exponent, minimum, maximum)

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of the values of both, which have the same grid and as many bins.

        Raises:
            InvalidValueError: they have not.
        """
        if self.counts.shape != other.counts.shape:
            raise InvalidValueError(
                f"histograms of shapes {tuple(self.counts.shape)} and {tuple(other.counts.shape)} cannot be added",
                remedy="A target has to have the same blocks in every batch; 'default' or 'per_channel' do.",
            )
        exponent = torch.maximum(self.exponent, other.exponent)
        return Histogram(
            self.coarsened(exponent) + other.coarsened(exponent),
            exponent,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
        )

    def coarsened(self, exponent: Tensor) -> Tensor:
        """The counts in the bins that belong to an exponent that is as large or larger."""
        doublings = (exponent - self.exponent).unsqueeze(-1)
        if not bool(doublings.any()):
            return self.counts
        steps = self._steps()
        joined = steps.sign() * (((steps.abs() - 1) >> doublings.clamp(max=62)) + 1)
        return torch.zeros_like(self.counts).scatter_add_(-1, joined + self.bins, self.counts)

    @property
    def bins(self) -> int:
        """How many there are on either side of zero."""
        return self.counts.shape[-1] // 2

    @property
    def width(self) -> Tensor:
        """Of one bin of each block, shape ``grid``, float64."""
        return _power_of_two(self.exponent - self.bins.bit_length() + 1).double()

    @property
    def centres(self) -> Tensor:
        """The middle of each bin, but nowhere beyond the least and the largest value; shape of the counts, float64."""
        steps = self._steps().double()
        middles = (steps - steps.sign() / 2) * self.width.unsqueeze(-1)
        return middles.clamp(self.minimum.double().unsqueeze(-1), self.maximum.double().unsqueeze(-1))

    def quantile(self, share: float) -> Tensor:
        """The value below which a share of all values lies, of each block; shape ``grid``, float64.

        Inside of a bin values count as spread evenly, so it is off by less than the width of one bin.
        """
        total = self.counts.cumsum(-1)
        wanted = share * total[..., -1:].double()
        place = torch.searchsorted(total.double(), wanted).clamp(max=total.shape[-1] - 1)
        inside = self.counts.gather(-1, place).double()
        part = (wanted - (total.gather(-1, place).double() - inside)) / inside.clamp(min=1)
        step = (place - self.bins).double()  # the bin reaches from step - 1 to step, or from step to step + 1 below 0
        upwards = torch.where(step > 0, step - 1 + part, torch.where(step < 0, step + part, 0))
        value = (upwards * self.width.unsqueeze(-1)).squeeze(-1)
        return value.clamp(self.minimum.double(), self.maximum.double())

    def _steps(self) -> Tensor:
        """-b to b, the numbers of the bins as seen from zero."""
        return torch.arange(-self.bins, self.bins + 1, device=self.counts.device).expand_as(self.counts)


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """The histogram of the values of all."""
    return reduce(Histogram.merge, histograms)


def over_processes(histogram: Histogram | None) -> Histogram | None:
    """The histogram of what all processes saw, on each of them; None where none saw anything.

    Args:
        histogram: of this process.
    """
    mine = None if histogram is None else (histogram.counts, histogram.exponent, histogram.minimum, histogram.maximum)
    device = None if mine is None else mine[0].device
    gathered = of_each_process(None if mine is None else [tensor.cpu() for tensor in mine])
    found = [Histogram(*(tensor.to(device) for tensor in tensors)) for tensors in gathered if tensors is not None]
    return merged(found) if found else None


def _power_of_two(exponent: Tensor) -> Tensor:
    """Two to the power of whole numbers from -126 to 127, exactly: as the exponent bits of a float32."""
    return ((exponent + 127) << 23).int().view(torch.float32)


def finite_range(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each row, shape ``grid``, float32.

    Args:
        rows: shape ``(*grid, n)``.

    Raises:
        NumericalError: a value is not finite.
        InvalidValueError: there is no value.
    """
    if not rows.numel():
        raise InvalidValueError(
            f"there is no value in a tensor of shape {tuple(rows.shape)}",
            where="calibration",
            remedy="Leave out batches without samples.",
        )
    least, largest = torch.aminmax(rows.detach(), dim=-1)
    minimum, maximum = least.float(), largest.float()
    if not bool((minimum.isfinite() & maximum.isfinite()).all()):
        raise NumericalError(
            "a value is infinite, or not a number, so it has no range",
            where="calibration",
            remedy="Look for what makes it (an overflow of float16, a mask of -inf before a softmax), and leave that "
            "target out of the config list.",
        )
    return minimum, maximum
