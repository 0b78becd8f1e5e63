"""Measured latency: interleaved rounds, so that a slow minute of the machine hits all models alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tersor.errors import InvalidValueError
from tersor.graph.inputs import as_call, tensors_of

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Latency:
    """Seconds of one call, measured ``len(times)`` times.

    >>> Latency((0.5, 0.1, 0.2, 0.3, 0.4)).median
    0.3
    """

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of all rounds, in seconds."""
        return statistics.median(self.times)

    @property
    def p10(self) -> float:
        """A tenth of the rounds were faster, in seconds."""
        return self._quantile(0.1)

    @property
    def p90(self) -> float:
        """A tenth of the rounds were slower, in seconds."""
        return self._quantile(0.9)

    def _quantile(self, share: float) -> float:
        return sorted(self.times)[round(share * (len(self.times) - 1))]

    def to_dict(self) -> dict[str, float]:
        """Ready for JSON; seconds."""
        return {"median": self.median, "p10": self.p10, "p90": self.p90, "rounds": len(self.times)}


@dataclass(frozen=True)
class Ratio:
    """A median of paired ratios, with an interval that holds the true median in 95 % of cases."""

    median: float
    low: float
    high: float


def paired_ratio(numerator: Latency, denominator: Latency) -> Ratio:
    r"""Ratio of two latencies that `measure` took in the same rounds.

    Both were measured within moments in each round :math:`i`, so :math:`a_i / b_i` cancels what slowed the machine.
    The interval needs no assumption on the distribution: the median of :math:`n` values lies between the order
    statistics of rank :math:`n/2 \mp 0.98 \sqrt n` (the binomial distribution at 1/2, approximated by the normal one).

    >>> paired_ratio(Latency((1.0, 2.0, 10.0)), Latency((2.0, 4.0, 20.0)))
    Ratio(median=0.5, low=0.5, high=0.5)
    """
    ratios = sorted(a / b for a, b in zip(numerator.times, denominator.times, strict=True))
    rounds = len(ratios)
    reach = 0.98 * math.sqrt(rounds)
    low = max(0, math.floor(rounds / 2 - reach))
    return Ratio(statistics.median(ratios), ratios[low], ratios[rounds - 1 - low])


def measure(
    models: Mapping[str, Callable[..., Any]],
    example_inputs: Any,
    *,
    repeats: int = 100,
    warmup: int = 5,
    seconds: float = 5.0,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time one call of each model, in turn (A B, B A, A B ...), without gradients.

    Args:
        models: name -> anything that can be called on the inputs, in the mode it is to be measured in.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; its batch is the batch size.
        repeats: rounds at most.
        warmup: untimed rounds at most; at least one is done.
        seconds: no further round is begun after this time, of which the warm-up may take a fifth, but three rounds
            are always timed.
        threads: CPU threads of torch while measuring; None leaves them as they are.

    Returns:
        The latency of each model by its name. All have the same number of rounds, in the same order.

    Raises:
        InvalidValueError: no model, or fewer than one repeat.

    >>> sorted(measure({"a": torch.sin, "b": torch.exp}, torch.zeros(8), repeats=5))
    ['a', 'b']
    """
    if not models or repeats < 1:
        raise InvalidValueError(
            f"{len(models)} models and {repeats} repeats measure nothing", where="measure", legal=("1 or more of each",)
        )
    args, kwargs = as_call(example_inputs)
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors_of((args, kwargs)))
    synchronize = (lambda: None) if on_cpu else torch.accelerator.synchronize

    def timed(model: Callable[..., Any]) -> float:
        synchronize()
        start = time.perf_counter()
        model(*args, **kwargs)
        synchronize()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {name: [] for name in models}
    order = list(models.items())
    threads_before = torch.get_num_threads()
    begin = time.perf_counter()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        # Not inference mode: a model that caches tensors (rotary tables, anchors) could not be trained afterwards.
        with torch.no_grad():
            for done in range(max(1, warmup)):
                if done and time.perf_counter() - begin > seconds / 5:
                    break
                for _, model in order:
                    timed(model)
            for done in range(repeats):
                if done >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
                    break
                for name, model in order:
                    times[name].append(timed(model))
                order.reverse()
    finally:
        torch.set_num_threads(threads_before)
    return {name: Latency(tuple(values)) for name, values in times.items()}
