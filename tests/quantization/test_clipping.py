"""Chosen ranges against brute force in float64, on the values themselves."""

from functools import partial

import numpy as np
import pytest
import torch

from tersor.config import QuantizationSpec
from tersor.errors import InvalidValueError, NumericalError
from tersor.quantization import Format
from tersor.quantization.clipping import (
    by_histograms,
    divergence,
    entropy_range,
    least_squares_range,
    least_squares_range_of_values,
    percentile_range,
    squared_error,
)
from tersor.quantization.histogram import Histogram

COUNT = 2000


def form_of(dtype, scheme="symmetric"):
    return Format.of(QuantizationSpec(quant_dtype=dtype, quant_scheme=scheme))


def samples(count=COUNT):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator)
    return {
        "normal": normal,
        "relu": normal.relu(),
        "gelu": torch.nn.functional.gelu(2 * normal),
        "outliers": torch.cat([normal, torch.tensor([60.0, -30.0])]),
        "one-sided outliers": torch.cat([normal.relu(), torch.full((3,), 40.0)]),
        "negative": -torch.rand(count, generator=generator) - 1,
        "skewed": normal.exp() - 0.3,
    }


def error_by_hand(x, form, minimum, maximum):
    """Sum of squares in float64, by the formulas of the format."""
    x = x.double().numpy()
    if form.scheme == "symmetric":
        scale, zero = max(abs(minimum), abs(maximum)) / ((form.high - form.low) / 2), (form.high + form.low + 1) // 2
    else:
        scale = (max(maximum, 0) - min(minimum, 0)) / (form.high - form.low)
        zero = np.clip(form.low - np.round(min(minimum, 0) / scale), form.low, form.high)
    stored = np.clip(np.round(x / scale) + zero, form.low, form.high)
    return float((((stored - zero) * scale - x) ** 2).sum())


def least_by_hand(x, form, steps):
    """The least error over a grid of ratios."""
    low, high = x.min().item(), x.max().item()
    ratios = np.geomspace(2**-8, 1, steps)
    if form.scheme == "symmetric":
        return min(error_by_hand(x, form, low * ratio, high * ratio) for ratio in ratios)
    lows = ratios if low < 0 else ratios[-1:]
    return min(error_by_hand(x, form, low * a, high * b) for a in lows for b in (ratios if high > 0 else ratios[-1:]))


FORMS = [("int8", "symmetric"), ("int8", "affine"), ("int4", "symmetric"), ("uint4", "affine"), ("int2", "symmetric")]


@pytest.mark.parametrize(("dtype", "scheme"), [*FORMS, ("uint2", "affine")])
@pytest.mark.parametrize("name", samples())
def test_least_squares_are_as_good_as_brute_force(name, dtype, scheme):
    x, form = samples()[name], form_of(dtype, scheme)
    found = least_squares_range(Histogram.of(x), form), least_squares_range_of_values(x, form)
    best = least_by_hand(x, form, 200 if scheme == "symmetric" else 14)
    for low, high in found:
        assert min(x.min().item(), 0) <= low <= 0 <= high <= max(x.max().item(), 0)
        assert error_by_hand(x, form, low.item(), high.item()) <= 1.02 * best
    assert best <= error_by_hand(x, form, x.min().item(), x.max().item())


@pytest.mark.parametrize(("dtype", "scheme"), FORMS)
def test_the_error_of_a_histogram_is_that_of_the_values(dtype, scheme):
    x, form = samples()["normal"], form_of(dtype, scheme)
    histogram = Histogram.of(x)
    low, high = torch.tensor(-2.0), torch.tensor(3.0)
    by_hand = error_by_hand(x, form, -2.0, 3.0)
    assert squared_error(x, form, None, low, high).item() == pytest.approx(by_hand, rel=1e-4)
    found = squared_error(histogram.centres, form, histogram.counts, low, high)
    between = COUNT * histogram.width.item() ** 2 / 12  # what bins add
    assert (found + between).item() == pytest.approx(by_hand, rel=2e-2)


@pytest.mark.parametrize(
    ("choose", "scheme"),
    [(least_squares_range, "symmetric"), (least_squares_range, "affine"), (entropy_range, "symmetric")],
)
def test_constants_keep_their_range(choose, scheme):
    values = torch.tensor([3.0, -0.25, 0.0]).unsqueeze(1).expand(3, 10)
    low, high = choose(Histogram.of(values, bins=256), form_of("int8", scheme))
    assert low.tolist() == [0, -0.25, 0]
    assert high.tolist() == [3, 0, 0]


@pytest.mark.parametrize("dtype", ["int12", "int16", "uint16"])
@pytest.mark.parametrize("choose", [least_squares_range, entropy_range])
def test_wide_types_clip_next_to_nothing(choose, dtype):
    x = samples()["normal"]
    low, high = choose(Histogram.of(x), form_of(dtype))
    clipped = ((x < low) | (x > high)).sum().item()
    assert clipped <= 2


def test_each_block_gets_the_range_that_it_gets_alone(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 2, 300, generator=generator) * 10 ** torch.arange(4.0).view(2, 2, 1)
    form = form_of("int4")
    monkeypatch.setattr("tersor.quantization.clipping.CHUNK", 700)  # in parts
    choices = (
        partial(least_squares_range_of_values, form=form),
        partial(by_histograms, choose=percentile_range),
    )
    for choose in choices:
        low, high = choose(values)
        assert low.shape == high.shape == (2, 2)
        alone = [choose(row) for row in values.view(4, 300)]
        torch.testing.assert_close(low.flatten(), torch.stack([one for one, _ in alone]))
        torch.testing.assert_close(high.flatten(), torch.stack([one for _, one in alone]))


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
@pytest.mark.parametrize("name", samples())
def test_percentiles(name, percentile):
    x = samples()[name]
    histogram = Histogram.of(x)
    low, high = percentile_range(histogram, percentile)
    for found, share in ((low, 100 - percentile), (high, percentile)):
        exact = np.percentile(x.double().numpy(), share, method="inverted_cdf")
        assert found.item() == pytest.approx(exact, abs=histogram.width.item())


def divergence_by_hand(x, form, minimum, maximum, bins=4096):
    """Migacz's steps, bin by bin, with levels that are the format's own."""
    reach = 2.0 ** np.ceil(np.log2(np.abs(x).max() * (1 + 1e-9)))
    edges = np.linspace(-reach, reach, 2 * bins + 1)
    positive, negative = (np.histogram(side, edges[bins:])[0] for side in (x[x > 0], -x[x < 0]))
    counts = np.concatenate([negative[::-1], positive])
    centres = np.clip((edges[1:] + edges[:-1]) / 2, x.min(), x.max())
    inside = (centres >= minimum) & (centres <= maximum)
    first, last = np.flatnonzero(inside)[[0, -1]]
    reference = np.where(inside, counts, 0).astype(float)
    reference[first] += counts[:first].sum()
    reference[last] += counts[last + 1 :].sum()
    scale, zero = (v.item() for v in form.scale_and_zero_point(torch.tensor(minimum), torch.tensor(maximum)))
    level = np.clip(np.round(centres / scale) + zero, form.low, form.high)
    spread = np.zeros_like(reference)
    for value in np.unique(level):
        members = level == value
        filled = members & (reference > 0)
        if filled.any():
            spread[filled] = counts[members & inside].sum() / filled.sum()
    p, q = reference / reference.sum(), spread / counts[inside].sum()
    some = p > 0
    return float((p[some] * np.log(p[some] / np.maximum(q[some], 1e-9))).sum())


@pytest.mark.parametrize(("dtype", "scheme"), [("int8", "symmetric"), ("int8", "affine"), ("uint4", "affine")])
@pytest.mark.parametrize("name", samples())
def test_the_divergence_is_that_of_the_definition(name, dtype, scheme):
    x, form = samples()[name], form_of(dtype, scheme)
    histogram = Histogram.of(x)
    for ratio in (1.0, 0.6):
        low, high = histogram.minimum * ratio, histogram.maximum * ratio
        if scheme == "affine":
            low = histogram.minimum
        found = divergence(histogram, form, low, high).item()
        by_hand = divergence_by_hand(x.double().numpy(), form, low.item(), high.item())
        assert found == pytest.approx(by_hand, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["normal", "outliers", "skewed"])
def test_entropy_is_as_good_as_brute_force(name):
    x, form = samples(20 * COUNT)[name].double().numpy(), form_of("int8")  # fewer values make it jump
    histogram = Histogram.of(torch.from_numpy(x))
    low, high = (end.item() for end in entropy_range(histogram, form))
    width, least, largest = histogram.width.item(), x.min(), x.max()
    ratios = [r for r in np.geomspace(2**-5, 1, 30) if max(-least, largest) * r * 2 >= 255 * width]
    best = min(divergence_by_hand(x, form, least * ratio, largest * ratio) for ratio in ratios)
    assert divergence_by_hand(x, form, low, high) <= 1.05 * best


def test_a_range_with_more_levels_than_bins_is_out_of_the_question():
    histogram = Histogram.of(torch.cat([torch.full((1000,), 1e-5), torch.ones(1)]))
    form = form_of("int8")
    assert divergence(histogram, form, torch.tensor(0.0), torch.tensor(1e-4)).item() == np.inf
    assert entropy_range(histogram, form)[1] > 255 / 2 * histogram.width - 1e-6


def test_outliers_are_clipped_by_entropy_and_percentiles_and_their_error_counts_for_least_squares():
    histogram, form = Histogram.of(samples()["one-sided outliers"]), form_of("int8")
    assert entropy_range(histogram, form)[1] < 5
    assert percentile_range(histogram, 99.5)[1] < 5
    assert least_squares_range(histogram, form)[1] > 35


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (torch.tensor([1.0, torch.nan]), NumericalError),
        (torch.tensor([-torch.inf]), NumericalError),
        (torch.zeros(0), InvalidValueError),
    ],
)
def test_values_without_a_range(values, error):
    with pytest.raises(error):
        least_squares_range_of_values(values, form_of("int8"))
