r"""Which range to map onto the levels of a format: where clipping a few values costs less than rounding all of them.

The whole range of the values rounds an outlier as well as the rest, at the price of a large step for all. A smaller one
clips the outliers. Here are three ways to choose. All work on values with counts, those of a histogram or values at
hand, of many blocks at once, and give a minimum and a maximum for each block; a format makes a scale of them.

- :func:`percentile_range`: a fixed share of the values is clipped, whatever the format.
- :func:`least_squares_range`: the least squared error of clipping and rounding together.
- :func:`entropy_range`: the least information lost, in the manner of TensorRT.

The last two search. A range is :math:`[r_l \min, r_h \max]` with ratios :math:`r` of at most 1. A symmetric format has
one ratio for both ends. For an affine one both ends are moved together, then each while the other rests: with a
rounding error of :math:`s^2 / 12`, the mean squared error is a convex function of the ends, which this way descends to
its least value. Ratios fall by factors, since outliers may be a thousand times as large as the rest, first by large
ones and then by small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tersor.config import IntDtype
from tersor.quantization.format import Format
from tersor.quantization.histogram import CHUNK, Histogram, finite_range

Range = tuple[Tensor, Tensor]
"""Minimum and maximum of each block."""
RangeLoss = Callable[[Tensor, Tensor], Tensor]
"""What is lost with the ranges from a minimum to a maximum: one number for each block."""

LEAST_SHARE = 1e-9
"""What stands for none where a divergence divides by a share."""
BLOCKS = 64
"""How many get a histogram at once."""
ROUNDS = ((-40, 0, 4), (-8, 8, 16), (-8, 8, 64))
"""Of a search: the first and last exponent, and how many of them halve a ratio. 2**-10 is the least ratio to begin."""


def percentile_range(histogram: Histogram, percentile: float = 99.99) -> Range:
    """From the (100 - p)-th percentile to the p-th: no more than 2 (100 - p) of a hundred values are clipped.

    Args:
        histogram: of each block.
        percentile: above 50; 100 is the whole range.

    >>> histogram = Histogram.of(torch.cat([torch.arange(1000) / 1000, torch.tensor([50.0])]))
    >>> percentile_range(histogram, percentile=99.5)[1] < 1
    tensor(True)
    """
    return histogram.quantile((100 - percentile) / 100).float(), histogram.quantile(percentile / 100).float()


def least_squares_range(histogram: Histogram, form: Format) -> Range:
    """The range with the least :func:`squared_error` of the values in a histogram.

    A value that is clipped counts by how far, so ranges stay wide where outliers are many or far away.

    Papers: Shin, Hwang, Sung: Fixed-Point Performance Analysis of Recurrent Neural Networks (ICASSP 2016), for the
    criterion; Banner, Nahshan, Soudry: Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment
    (NeurIPS 2019), for what it does for networks.

    Args:
        histogram: of each block.
        form: what the values are to be stored in.
    """
    values, counts = histogram.centres.float(), histogram.counts
    if counts.dim() == 1:  # most bins of one block are empty
        filled = counts > 0
        values, counts = values[filled], counts[filled]
    return _search(partial(squared_error, values, form, counts), histogram.minimum, histogram.maximum, form)


def least_squares_range_of_values(values: Tensor, form: Format) -> Range:
    """As :func:`least_squares_range`, from the values themselves.

    Args:
        values: of each block in a row, shape ``(*grid, n)``.
        form: what they are to be stored in.

    Raises:
        NumericalError: a value is not finite.
        InvalidValueError: there is no value.

    >>> ternary = Format(IntDtype(2), "symmetric", -1, 1)  # holds -s, 0 and s
    >>> scale, _ = ternary.scale_and_zero_point(
    ...     *least_squares_range_of_values(torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.6]), ternary)
    ... )
    >>> round(scale.item(), 2)  # the mean of the magnitudes
    1.1
    """
    minimum, maximum = finite_range(values)
    return _search(partial(squared_error, values, form, None), minimum, maximum, form)


def by_histograms(values: Tensor, choose: Callable[[Histogram], Range]) -> Range:
    """A choice by histograms, from the values themselves: without the histograms of all blocks in memory at once.

    Args:
        values: of each block in a row, shape ``(*grid, n)``.
        choose: makes ranges of histograms.
    """
    grid, rows = values.shape[:-1], values.reshape(-1, values.shape[-1])
    ranges = [choose(Histogram.of(some)) for some in rows.split(BLOCKS)]
    low, high = (torch.cat(ends).view(grid) for ends in zip(*ranges, strict=True))
    return low, high


def squared_error(values: Tensor, form: Format, counts: Tensor | None, minimum: Tensor, maximum: Tensor) -> Tensor:
    r"""What storing values in a format costs: :math:`\sum_i c_i (x_i - \hat{x}_i)^2` of each block.

    With the centres of a histogram for values it is the expected error, but for what bins of width :math:`w` add to any
    range, :math:`w^2 / 12` for each value.

    Args:
        values: shape ``(*grid, n)``.
        form: gives :math:`\hat{x}`.
        counts: how often each value occurs, shape ``(*grid, n)``; None is once.
        minimum: of the range, shape ``grid``.
        maximum: likewise.

    Returns:
        Shape ``grid``, float64.
    """
    length, grid = values.shape[-1], minimum.shape
    scale, zero_point = (each.reshape(-1, 1) for each in form.scale_and_zero_point(minimum, maximum))
    rows, weights = values.reshape(-1, length), None if counts is None else counts.reshape(-1, length)
    errors: list[Tensor] = []
    at_once = max(CHUNK // length, 1)
    for start in range(0, len(rows), at_once):
        total, blocks = torch.zeros((), dtype=torch.double, device=values.device), slice(start, start + at_once)
        for first in range(0, length, CHUNK):
            place = blocks, slice(first, first + CHUNK)
            part = rows[place].float()
            squares = (form.simulate(part, scale[blocks], zero_point[blocks]) - part).square()
            total = total + (squares if weights is None else squares * weights[place]).sum(-1, dtype=torch.double)
        errors.append(total)
    return torch.cat(errors).view(grid)


def entropy_range(histogram: Histogram, form: Format) -> Range:
    """The range with the least :func:`divergence`.

    It looks at how the values inside are told apart, and at outliers only by how many they are, so it clips more than
    least squares do.

    Reference: Migacz: 8-bit Inference with TensorRT (GTC 2017). There it is for the magnitudes of a symmetric type;
    here levels are the format's own, so that both ends of an affine one are found.

    Args:
        histogram: of each block.
        form: what the values are to be stored in.
    """
    return _search(partial(divergence, histogram, form), histogram.minimum, histogram.maximum, form)


def divergence(histogram: Histogram, form: Format, minimum: Tensor, maximum: Tensor) -> Tensor:
    r"""The Kullback-Leibler divergence of how values are distributed from what a format with a range leaves of that.

    .. math:: D = \sum_i p_i \log \frac{p_i}{q_i}

    over the bins inside of the range. :math:`p` is the reference: the histogram, where values outside are counted in
    the outermost bins that are inside. :math:`q` knows levels only: the values inside that have one level in common are
    spread evenly over those of its bins that are not empty. Zeros are left out, since every format has them.

    Args:
        histogram: of each block.
        form: has the levels.
        minimum: of the range, shape ``grid``.
        maximum: likewise.

    Returns:
        Shape ``grid``, float64; infinite where a range has more levels than bins, so that nothing can be said.
    """
    centres, counts = histogram.centres, histogram.counts.double()
    counts[..., histogram.bins] = 0
    inside = (centres >= minimum.unsqueeze(-1)) & (centres <= maximum.unsqueeze(-1))
    kept = counts * inside
    reference = kept.clone()
    first = inside.int().argmax(-1, keepdim=True)
    last = inside.shape[-1] - 1 - inside.flip(-1).int().argmax(-1, keepdim=True)
    places = torch.arange(inside.shape[-1], device=counts.device)
    reference.scatter_add_(-1, first, (counts * (places < first)).sum(-1, keepdim=True))
    reference.scatter_add_(-1, last, (counts * (places > last)).sum(-1, keepdim=True))
    scale, zero_point = (each.unsqueeze(-1) for each in form.scale_and_zero_point(minimum, maximum))
    stored = form.quantize(centres.float(), scale, zero_point)
    level = (stored.diff(dim=-1, prepend=stored[..., :1]) != 0).cumsum(-1)  # bins are in order, so levels are as well
    mass = torch.zeros_like(kept).scatter_add_(-1, level, kept)
    filled = torch.zeros_like(kept).scatter_add_(-1, level, (reference > 0).double())
    p = reference / reference.sum(-1, keepdim=True).clamp(min=1)
    q = (mass / filled.clamp(min=1)).gather(-1, level) / kept.sum(-1, keepdim=True).clamp(min=1)
    found = torch.where(p > 0, p * (p / q.clamp(min=LEAST_SHARE)).log(), 0).sum(-1)
    levels = form.high - form.low + 1 if isinstance(form.dtype, IntDtype) else 2**form.dtype.bits
    reach = scale.squeeze(-1) * (form.high - form.low)
    return torch.where(reach < levels * histogram.width, torch.inf, found)


def _search(loss: RangeLoss, minimum: Tensor, maximum: Tensor, form: Format) -> Range:
    """The range within the whole one that loses least; of those that lose as much, the whole one. It contains 0."""
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    ratios = torch.ones(2, *minimum.shape, device=minimum.device)
    least = loss(minimum, maximum)
    ends = ([1, 0],) if form.scheme == "symmetric" else ([1, 0], [1], [0])
    for smallest, largest, per_octave in ROUNDS:
        for end in ends:
            start = ratios.clone()
            for exponent in range(largest, smallest - 1, -1):
                tried = start.clone()
                tried[end] = (start[end] * 2 ** (exponent / per_octave)).clamp(max=1)
                lost = loss(tried[0] * minimum, tried[1] * maximum)
                better = lost < least
                least, ratios = torch.where(better, lost, least), torch.where(better, tried, ratios)
    return ratios[0] * minimum, ratios[1] * maximum
