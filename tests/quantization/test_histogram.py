"""Histograms against counts and quantiles by numpy, in float64."""

import itertools

import numpy as np
import pytest
import torch

from tersor.errors import InvalidValueError, NumericalError
from tersor.quantization.histogram import Histogram, merged, over_processes
from tersor.testing.processes import in_two_processes, why_not_two

BINS = 256


def streams(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = (1e-36, 1e-3, 1.0, 100.0, 3e37, 0.0)
    return [torch.randn(500, generator=generator) * scale for scale in scales]


def counted(values, reach, bins):
    """The definition, in float64: by the width of a bin, away from zero, with zeros by themselves."""
    x = values.double().numpy()
    steps = np.sign(x) * (np.floor(np.abs(x) * bins / reach) + 1)
    return np.bincount((steps + bins).astype(int), minlength=2 * bins + 1)


@pytest.mark.parametrize("values", [*streams(), torch.tensor([1.0, -1.0, 0.5, 2.0, -0.0]), torch.rand(99) + 7])
def test_counts_are_those_of_the_definition(values):
    found = Histogram.of(values, BINS)
    reach = 2.0 ** found.exponent.item()
    largest = values.abs().max().item()
    assert largest < reach
    assert found.exponent == -100 or reach <= 2 * largest
    np.testing.assert_array_equal(found.counts.numpy(), counted(values, reach, BINS))
    assert (found.minimum, found.maximum) == (values.min(), values.max())


def test_any_order_and_any_sharing_gives_the_same_counts():
    batches = streams()
    whole = Histogram.of(torch.cat(batches), BINS)
    for order in itertools.islice(itertools.permutations(batches), 0, 720, 37):
        found = merged(Histogram.of(batch, BINS) for batch in order)
        assert torch.equal(found.counts, whole.counts)
        assert found.exponent == whole.exponent
        assert (found.minimum, found.maximum) == (whole.minimum, whole.maximum)


def test_zeros_make_no_bins_wider():
    tiny = torch.tensor([1e-5, -3e-5])
    found = Histogram.of(torch.zeros(3), BINS).merge(Histogram.of(tiny, BINS))
    assert torch.equal(found.counts, Histogram.of(torch.cat([tiny, torch.zeros(3)]), BINS).counts)
    assert found.exponent == -15


def test_the_mirror_image_has_the_counts_mirrored():
    values = torch.cat(streams())
    assert torch.equal(Histogram.of(-values, BINS).counts, Histogram.of(values, BINS).counts.flip(0))


def test_blocks_are_counted_apart():
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(2, 3, 50, generator=generator) * 10 ** torch.arange(6.0).view(2, 3, 1) for _ in "ab")
    both = Histogram.of(first, BINS).merge(Histogram.of(second.flip(0), BINS))
    for row, column in itertools.product(range(2), range(3)):
        alone = Histogram.of(torch.cat([first[row, column], second.flip(0)[row, column]]), BINS)
        assert torch.equal(both.counts[row, column], alone.counts)
        assert both.exponent[row, column] == alone.exponent


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_counted_by_their_values(dtype):
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(Histogram.of(values, BINS).counts, Histogram.of(values.float(), BINS).counts)


def test_values_are_counted_in_parts(monkeypatch):
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    whole = Histogram.of(values, BINS)
    monkeypatch.setattr("tersor.quantization.histogram.CHUNK", 21)
    assert torch.equal(Histogram.of(values, BINS).counts, whole.counts)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.77, 0.9999, 1.0])
@pytest.mark.parametrize(
    "values",
    [
        torch.randn(5000, generator=torch.Generator().manual_seed(0)),
        torch.randn(5000, generator=torch.Generator().manual_seed(1)).relu(),
        -torch.rand(5000, generator=torch.Generator().manual_seed(2)) - 1,
        torch.full((10,), 3.0),
        torch.zeros(10),
    ],
)
def test_quantiles_are_off_by_less_than_a_bin(values, share):
    found = Histogram.of(values)
    exact = np.quantile(values.double().numpy(), share, method="inverted_cdf")
    assert abs(found.quantile(share).item() - exact) <= found.width.item()


def test_centres_are_in_the_middle_of_bins_and_inside_of_the_range():
    found = Histogram.of(torch.tensor([-0.3, 0.9]), bins=4)
    assert found.centres.tolist() == pytest.approx([-0.3, -0.3, -0.3, -0.125, 0, 0.125, 0.375, 0.625, 0.875])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.tensor([1.0, torch.inf]), NumericalError, "infinite, or not a number"),
        (torch.tensor([[1.0, torch.nan], [1.0, 2.0]]), NumericalError, "infinite, or not a number"),
        (torch.tensor([1e300], dtype=torch.double), NumericalError, "infinite, or not a number"),
        (torch.zeros(0), InvalidValueError, "no value in a tensor of shape \\(0,\\)"),
        (torch.zeros(3, 0), InvalidValueError, "no value in a tensor of shape \\(3, 0\\)"),
    ],
)
def test_values_that_cannot_be_counted(values, error, message):
    with pytest.raises(error, match=message):
        Histogram.of(values)


def test_numbers_of_bins_and_blocks_that_do_not_fit():
    with pytest.raises(InvalidValueError, match="bins: 100 is no power of two"):
        Histogram.of(torch.ones(1), bins=100)
    with pytest.raises(InvalidValueError, match=r"\(2, 9\) and \(3, 9\) cannot be added"):
        Histogram.of(torch.ones(2, 1), bins=4).merge(Histogram.of(torch.ones(3, 1), bins=4))


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_count_together_and_one_may_have_seen_nothing():
    batches = streams()
    shares = [batches[:2], batches[2:]]

    def work(rank):
        whole = over_processes(merged(Histogram.of(batch, BINS) for batch in shares[rank]))
        half = over_processes(Histogram.of(batches[0], BINS) if rank else None)
        assert over_processes(None) is None
        return {"counts": whole.counts, "exponent": whole.exponent, "half": half.counts}

    expected = Histogram.of(torch.cat(batches), BINS)
    for found in in_two_processes(work):
        assert torch.equal(found["counts"], expected.counts)
        assert torch.equal(found["exponent"], expected.exponent)
        assert torch.equal(found["half"], Histogram.of(batches[0], BINS).counts)
