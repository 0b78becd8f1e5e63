"""Order, medians and time limits on a clock that the test turns itself."""

import time

import pytest
import torch

from tersor.analysis import Latency, Ratio, measure, paired_ratio
from tersor.errors import InvalidValueError


class Clock:
    """Callables that take a set time, on a clock that they move."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def taking(self, name, seconds):
        def call(_):
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return call


def test_rounds_are_interleaved_and_turned_round(monkeypatch):
    clock = Clock(monkeypatch)
    models = {"a": clock.taking("a", 0.02), "b": clock.taking("b", 0.01)}
    latency = measure(models, torch.zeros(1), repeats=4, warmup=1)
    assert clock.calls == ["a", "b", *["a", "b", "b", "a"] * 2]  # the warm-up first
    assert latency["a"].times == pytest.approx([0.02] * 4)
    assert latency["b"].median == pytest.approx(0.01)


def test_a_machine_that_slows_down_leaves_the_paired_ratio_alone(monkeypatch):
    clock = Clock(monkeypatch)
    slowing = lambda base: lambda: base * (1 + 100 * clock.now)  # noqa: E731
    latency = measure({"a": clock.taking("a", slowing(2e-4)), "b": clock.taking("b", slowing(1e-4))}, torch.zeros(1))
    assert latency["a"].p90 > 5 * latency["a"].p10
    assert paired_ratio(latency["b"], latency["a"]).median == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(("seconds_a_call", "rounds"), [(0.1, 10), (7.0, 3)])
def test_no_round_begins_after_the_time_is_over_but_three_are_timed(monkeypatch, seconds_a_call, rounds):
    clock = Clock(monkeypatch)
    latency = measure({"a": clock.taking("a", seconds_a_call)}, torch.zeros(1), repeats=1000, warmup=99, seconds=1.25)
    # The warm-up may take a fifth of the time: three calls of 0.1 s, or the one that is always done.
    assert len(latency["a"].times) == rounds
    assert len(clock.calls) - rounds == (3 if rounds == 10 else 1)


def test_quantiles():
    latency = Latency(tuple(float(value) for value in range(101)))
    assert (latency.p10, latency.median, latency.p90) == (10, 50, 90)
    assert latency.to_dict() == {"median": 50, "p10": 10, "p90": 90, "rounds": 101}


def test_interval_of_the_median_has_the_binomial_ranks():
    ones = Latency((1.0,) * 100)
    # 100 / 2 -+ 0.98 * 10: the 41st and the 60th smallest, which hold the median with 95 % (binomial: 0.943 to 0.965).
    assert paired_ratio(Latency(tuple(float(i) for i in range(1, 101))), ones) == Ratio(50.5, 41.0, 60.0)


def test_threads_and_gradient_mode_are_restored():
    seen = []
    threads = torch.get_num_threads()
    measure(
        {"a": lambda _: seen.append((torch.get_num_threads(), torch.is_grad_enabled()))},
        torch.zeros(1),
        repeats=1,
        warmup=1,
        threads=threads + 1,
    )
    assert seen == [(threads + 1, False)] * 2
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, True)


@pytest.mark.parametrize(("models", "repeats"), [({}, 5), ({"a": torch.sin}, 0)])
def test_nothing_to_measure_is_an_error(models, repeats):
    with pytest.raises(InvalidValueError, match="measure nothing"):
        measure(models, torch.zeros(1), repeats=repeats)
