"""Ranges over streams of batches, and over two processes."""

import copy
from functools import partial

import pytest
import torch

from tersor.config import Granularity, IntDtype, QuantizationSpec
from tersor.errors import InvalidValueError
from tersor.quantization import (
    ByHistogram,
    ByValues,
    Cut,
    Format,
    Latest,
    MinMax,
    MovingAverage,
    UniformQuantize,
    observer_of,
)
from tersor.quantization.clipping import least_squares_range, least_squares_range_of_values, percentile_range
from tersor.quantization.histogram import Histogram
from tersor.testing.processes import in_two_processes, why_not_two

FORM = Format.of(QuantizationSpec(quant_dtype="int8"))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1000, generator=generator) * scale for scale in (0.5, 1.0, 20.0, 2.0)]


def test_a_range_by_histogram_is_that_of_all_values_whatever_their_order():
    whole = Histogram.of(torch.cat(batches()))
    expected = percentile_range(whole), least_squares_range(whole, FORM)
    for order in (batches(), batches()[::-1]):
        found = [ByHistogram(percentile_range), ByHistogram(partial(least_squares_range, form=FORM))]
        for observer in found:
            for batch in order:
                observer.add(batch)
        assert [observer.range() for observer in found] == list(expected)


def test_values_at_hand_are_judged_by_themselves_and_forgotten_with_the_next():
    observer = ByValues(partial(least_squares_range_of_values, form=FORM))
    rows = torch.stack(batches())
    observer.add(100 * rows)
    observer.add(rows)
    low, high = least_squares_range_of_values(rows, FORM)
    assert torch.equal(observer.range()[0], low)
    assert torch.equal(observer.range()[1], high)


@pytest.mark.parametrize(
    ("name", "at_hand", "kind"),
    [
        ("minmax", False, MinMax),
        ("minmax", True, Latest),
        ("moving_average", False, MovingAverage),
        ("moving_average", True, Latest),
        *[(name, at_hand, kind) for name in ("percentile", "entropy", "mse") for at_hand, kind in
          ((False, ByHistogram), (True, ByValues))],
    ],
)  # fmt: skip
def test_names(name, at_hand, kind):
    observer = observer_of(name, FORM, at_hand=at_hand)
    assert type(observer) is kind
    for batch in batches():
        observer.add(batch.view(2, 500))
    low, high = observer.range()
    assert low.shape == high.shape == (2,)
    last = batches()[-1].view(2, 500).amax(1)
    top = last if at_hand else torch.cat([batch.view(2, 500) for batch in batches()], dim=1).amax(1)
    if "minmax" in name or kind is Latest:
        torch.testing.assert_close(high, top)
    assert (high <= top).all()
    assert (high > 0.3 * last).all()


def test_a_name_that_is_none():
    with pytest.raises(InvalidValueError, match=r"observer: 'entropi' is no observer.*Did you mean 'entropy'"):
        observer_of("entropi", FORM)


@pytest.mark.parametrize("name", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("at_hand", [False, True])
def test_a_value_that_is_not_finite_leaves_no_range(name, at_hand):
    observer = observer_of(name, FORM, at_hand=at_hand)
    observer.add(torch.ones(3))
    observer.add(torch.tensor([1.0, torch.inf]))
    if not at_hand:
        observer.add(torch.ones(3))
    assert not all(bool(end.isfinite()) for end in observer.range())


def test_before_anything_is_seen_the_range_is_empty():
    assert ByHistogram(percentile_range).range() == (torch.inf, -torch.inf)


def test_the_state_goes_on_where_it_was():
    first, second = ByHistogram(percentile_range), ByHistogram(percentile_range)
    for batch in batches()[:2]:
        first.add(batch)
    second.load_state_dict(first.state_dict())
    for observer in (first, second):
        for batch in batches()[2:]:
            observer.add(batch)
    assert second.range() == first.range() == percentile_range(Histogram.of(torch.cat(batches())))


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
@pytest.mark.parametrize("name", ["minmax", "percentile", "entropy", "mse"])
def test_two_processes_come_to_the_range_of_all_values(name):
    one = observer_of(name, FORM)
    for batch in batches():
        one.add(batch)

    def work(rank):
        observer = observer_of(name, FORM)
        for batch in batches()[rank::2]:
            observer.add(batch)
        observer.synchronize()
        return {"range": torch.stack(observer.range())}

    for found in in_two_processes(work):
        assert torch.equal(found["range"], torch.stack(one.range()))


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_both_learn_that_one_of_them_saw_infinity():
    def work(rank):
        observer = observer_of("mse", FORM)
        observer.add(torch.tensor([1.0, torch.inf if rank else 2.0]))
        observer.synchronize()
        return {"range": torch.stack(observer.range())}

    assert all(not found["range"].isfinite().all() for found in in_two_processes(work))


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage()])
@pytest.mark.parametrize("rows", [3, 8])
def test_other_blocks_than_before_are_refused_by_name(observer, rows):
    observer = copy.deepcopy(observer)
    by_token = Cut("fc._input_0", Granularity.parse([-1]), ((0, 0), (0, 0), (1, 1)))
    transform = UniformQuantize("fc._input_0", Format(IntDtype(8), "symmetric", -127, 127), by_token, observer)
    transform.watch(torch.ones(1, 4))
    with pytest.raises(InvalidValueError, match=rf"fc._input_0: values of \({rows}, 1\) blocks .* \(1, 1\).*dynamic"):
        transform.watch(torch.ones(rows, 4))
    assert [tuple(bound.shape) for bound in transform.observer.range()] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_moves_no_average(bad):
    observer = MovingAverage(decay=0.5)
    for rows in ([bad, 1.0], [0.0, 4.0], [-2.0, bad], [0.0, 8.0]):
        observer.add(torch.tensor(rows))
    assert [own.item() for own in observer.range()] == [0, 6]
