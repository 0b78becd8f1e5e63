"""Observers: what range the values of a target lie in, found while they pass.

Config lists and quantizers name them (``observer``), see :func:`observer_of`:

- ``minmax``: the least and the greatest value. No value is clipped, so a single outlier coarsens all others.
- ``moving_average``: of the extremes of batches. An outlier counts for as much as its batch does.
- ``percentile``, ``entropy``, ``mse``: by how values are distributed, see :mod:`tersor.quantization.clipping`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from tersor.config.specs import OBSERVERS
from tersor.errors import InvalidValueError, NumericalError, nearest
from tersor.quantization.clipping import (
    Range,
    by_histograms,
    entropy_range,
    least_squares_range,
    least_squares_range_of_values,
    percentile_range,
)
from tersor.quantization.format import Format
from tersor.quantization.histogram import Histogram, over_processes
from tersor.training.ranks import of_each_process, processes, sum_over_processes


class Sized(nn.Module):
    """A module whose buffers take the shapes that a checkpoint holds: how many scales there are is seen at run time.

    They keep their type wherever the model moves: a model in bfloat16 has scales in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer).device)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self._buffers.items():
            held = state_dict.get(prefix + name)
            if buffer is not None and held is not None and held.shape != buffer.shape:
                setattr(self, name, torch.empty_like(held, dtype=buffer.dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def put(self, name: str, value: Tensor) -> None:
        """Write a buffer, in place where its shape allows it."""
        buffer = self._buffers[name]
        assert buffer is not None
        if buffer.shape == value.shape and buffer.device == value.device:
            if torch.compiler.is_compiling():
                # A copy is an operator that the compiler does not fuse (torch 2.13): it would keep what is around it
                # for the backward pass, bools among it, which are slow on CPU.
                buffer.zero_().add_(value.to(buffer.dtype))
            else:
                buffer.copy_(value)
        else:
            setattr(self, name, value.detach().to(buffer.dtype))


class RangeObserver(Sized, ABC):
    """Base of all observers. It sees batch after batch and then says what range is to be stored."""

    @abstractmethod
    def add(self, rows: Tensor) -> None:
        """Take in values.

        Args:
            rows: shape (*grid, values of a block), float32 or wider, without gradients.

        Raises:
            InvalidValueError: the grid is another than before, and what was seen before counts.
        """

    @abstractmethod
    def range(self) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each block, of the grid's shape; inf and -inf where nothing was seen."""

    def synchronize(self) -> None:
        """Come to the same on all processes."""


class _Range(RangeObserver):
    """An observer that knows no more than a minimum and a maximum."""

    minimum: Tensor
    maximum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("minimum", torch.tensor(torch.inf))
        self.register_buffer("maximum", torch.tensor(-torch.inf))

    def range(self) -> tuple[Tensor, Tensor]:
        """What was put."""
        return self.minimum, self.maximum

    def _check_blocks(self, new: Tensor) -> None:
        """Refuse others than before, for which there would be no range; () is where nothing was seen, or one block."""
        if self.minimum.shape not in ((), new.shape):
            raise InvalidValueError(
                f"values of {tuple(new.shape)} blocks come after values of {tuple(self.minimum.shape)}",
                remedy="A target has to have the same blocks in every batch; 'default' or 'per_channel' do, and for "
                "one scale a token set dynamic: True.",
            )

    def _put(self, minimum: Tensor, maximum: Tensor) -> None:
        self.put("minimum", minimum)
        self.put("maximum", maximum)


class Extremes(_Range):
    """Base of the observers for which the least and the greatest value of each batch are enough."""

    def add(self, rows: Tensor) -> None:
        """Take in a batch."""
        self.include(rows.amin(-1), rows.amax(-1))

    @abstractmethod
    def include(self, minimum: Tensor, maximum: Tensor) -> None:
        """Take in a batch of which the least and the greatest value of each block are known."""


@final
class MinMax(Extremes):
    """The least and the greatest value of all.

    >>> observer = MinMax()
    >>> observer.add(torch.tensor([1.0, 3.0]))
    >>> observer.add(torch.tensor([-1.0, 2.0]))
    >>> observer.range()
    (tensor(-1.), tensor(3.))
    """

    def include(self, minimum: Tensor, maximum: Tensor) -> None:
        """Widen the range."""
        self._check_blocks(minimum)
        self._put(torch.minimum(self.minimum, minimum), torch.maximum(self.maximum, maximum))

    def synchronize(self) -> None:
        """The least and the greatest of all processes."""
        if processes() > 1:
            dist.all_reduce(self.minimum, op=dist.ReduceOp.MIN)
            dist.all_reduce(self.maximum, op=dist.ReduceOp.MAX)


@final
class Latest(Extremes):
    """The range of the values seen last: for weights, which are all seen at once."""

    def include(self, minimum: Tensor, maximum: Tensor) -> None:
        """Forget what was before."""
        self._put(minimum, maximum)


@final
class MovingAverage(Extremes):
    """The exponential moving averages of the minima and maxima of batches; the first batch counts as it is.

    A batch with values that are not finite is left out, as a gradient scaler leaves out its step.

    Paper: Jacob et al. (CVPR 2018), section 3.1.

    Args:
        decay: the share of the old average that stays.

    >>> observer = MovingAverage(decay=0.5)
    >>> observer.add(torch.tensor([0.0, 4.0]))
    >>> observer.add(torch.tensor([0.0, 8.0]))
    >>> observer.range()
    (tensor(0.), tensor(6.))
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay

    def include(self, minimum: Tensor, maximum: Tensor) -> None:
        """Move towards this batch's."""
        self._check_blocks(minimum)
        finite = minimum.isfinite() & maximum.isfinite()
        self._put(self._moved(self.minimum, minimum, finite), self._moved(self.maximum, maximum, finite))

    def _moved(self, average: Tensor, new: Tensor, finite: Tensor) -> Tensor:
        moved = torch.where(average.isinf(), new, average + (new - average) * (1 - self.decay))
        return torch.where(finite, moved, average)

    def synchronize(self) -> None:
        """The mean of all processes' averages."""
        mean_ranges([self])


@torch.no_grad()
def mean_ranges(observers: Sequence[MovingAverage]) -> None:
    """Give each of many averages its mean over the processes that have seen anything, by a single exchange."""
    if processes() == 1 or not observers:
        return
    buffers = [buffer for observer in observers for buffer in (observer.minimum, observer.maximum)]
    flat = torch.cat([buffer.flatten().to(buffers[0].device) for buffer in buffers])
    seen = flat.isfinite()
    total, count = sum_over_processes(torch.stack([torch.where(seen, flat, 0), seen.to(flat.dtype)]))
    mean = torch.where(count > 0, total / count, flat)
    for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view(buffer.shape))


@final
class ByHistogram(RangeObserver):
    """A range chosen by how all values are distributed, which a histogram keeps (:class:`Histogram`).

    The range is the same in whatever order the batches come, and however they are shared out among processes.

    Args:
        choose: makes a range of a histogram, as those of :mod:`tersor.quantization.clipping` do.

    >>> observer = ByHistogram(partial(percentile_range, percentile=99.0))
    >>> observer.add(torch.arange(1000.0))
    >>> observer.add(torch.tensor([1e5]))
    >>> observer.range()[1] < 1000
    tensor(True)
    """

    counts: Tensor
    exponent: Tensor
    minimum: Tensor
    maximum: Tensor

    BINS, BINS_OF_MANY = 4096, 1024
    """On either side of zero: of one block, and of each of many, which would take 64 kB of memory each."""

    def __init__(self, choose: Callable[[Histogram], Range]) -> None:
        super().__init__()
        self.choose = choose
        self.register_buffer("counts", torch.zeros(0, dtype=torch.long))
        self.register_buffer("exponent", torch.zeros((), dtype=torch.long))
        self.register_buffer("minimum", torch.tensor(torch.inf))
        self.register_buffer("maximum", torch.tensor(-torch.inf))

    @property
    def seen(self) -> Histogram | None:
        """The histogram of what was seen so far; None before anything was."""
        return Histogram(self.counts, self.exponent, self.minimum, self.maximum) if self.counts.numel() else None

    def add(self, rows: Tensor) -> None:
        """Count values. One that is not finite makes the range so, for good."""
        try:
            new = Histogram.of(rows, self.BINS if rows.dim() == 1 else self.BINS_OF_MANY)
        except NumericalError:
            self.put("minimum", torch.full_like(self.minimum, torch.nan))
            return
        if not self._failed():
            self._keep(new if self.seen is None else self.seen.merge(new))

    def range(self) -> Range:
        """What is chosen."""
        return (self.minimum, self.maximum) if self.seen is None or self._failed() else self.choose(self.seen)

    def synchronize(self) -> None:
        """Count what all processes have seen."""
        if any(of_each_process(self._failed())):
            self.put("minimum", torch.full_like(self.minimum, torch.nan))
        elif processes() > 1 and (total := over_processes(self.seen)) is not None:
            self._keep(total)

    def _failed(self) -> bool:
        return bool(self.minimum.isnan().any())

    def _keep(self, histogram: Histogram) -> None:
        for name in ("counts", "exponent", "minimum", "maximum"):
            self.put(name, getattr(histogram, name))


@final
class ByValues(_Range):
    """A range chosen from the values seen last themselves: for weights, which are all at hand.

    Args:
        choose: makes a range of rows of values, shape ``(*grid, n)``.
    """

    def __init__(self, choose: Callable[[Tensor], Range]) -> None:
        super().__init__()
        self.choose = choose

    def add(self, rows: Tensor) -> None:
        """Choose, and forget what was before."""
        minimum, maximum = rows.aminmax(dim=-1)
        if bool((minimum.isfinite() & maximum.isfinite()).all()):
            minimum, maximum = self.choose(rows)
        self._put(minimum, maximum)


def observer_of(name: str, form: Format, *, at_hand: bool = False) -> RangeObserver:
    """The observer of a name.

    Args:
        name: as ``observer`` in a config list.
        form: what the values are to be stored in.
        at_hand: whether all values are seen at once, as weights are; what was seen before is forgotten then, and no
            histogram is kept.

    Raises:
        InvalidValueError: there is none of this name.

    >>> from tersor.config import IntDtype
    >>> form = Format(IntDtype(8), "symmetric", -127, 127)
    >>> observer_of("mse", form), observer_of("minmax", form)
    (ByHistogram(), MinMax())
    """
    choices: dict[str, Callable[[Histogram], Range]] = {
        "percentile": percentile_range,
        "entropy": partial(entropy_range, form=form),
        "mse": partial(least_squares_range, form=form),
    }
    if name not in OBSERVERS:
        raise InvalidValueError(
            f"{name!r} is no observer", where="observer", legal=OBSERVERS, remedy=nearest(name, OBSERVERS)
        )
    if name in ("minmax", "moving_average"):
        return Latest() if at_hand else MinMax() if name == "minmax" else MovingAverage()
    if not at_hand:
        return ByHistogram(choices[name])
    if name == "mse":
        return ByValues(partial(least_squares_range_of_values, form=form))
    return ByValues(partial(by_histograms, choose=choices[name]))
