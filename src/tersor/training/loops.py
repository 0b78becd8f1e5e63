"""Training for those who give only a data loader and a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tersor.errors import InvalidValueError, TrainingError
from tersor.training.averaging import WeightAverage
from tersor.training.batches import length_of, repeatable, take_apart, to_device
from tersor.training.functions import check_function
from tersor.training.position import Position, begin_again, skip, undrawn

SchedulerInterval = Literal["epoch", "step"]


class LoaderLoop:
    """The usual loop over a data loader, to be given to an evaluator as its ``training_func``.

    Args:
        loader: the batches; it is passed over once an epoch, so it must be a loader or a list and not an iterator.
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar; None where the model computes its loss from a mapping
            (``model(**batch).loss``, as Transformers do).
        device: where batches are moved to; None for where the model is.
        scheduler_interval: whether schedulers step after each epoch or after each step.
        accumulate: batches for one step. The last step of an epoch may have fewer; each is the mean of what it has.
        autocast: ``torch.bfloat16`` to run the model and the loss under autocast of that type.
        clip_norm: the longest that the gradient of all parameters together may be.
        ema_decay: how much of their average the parameters keep at each step; None for no average.

    Raises:
        InvalidValueError: the loader is an iterator, `loss_fn` is no function, or a setting is outside its range.
        TrainingError: `loss_fn` does not take two arguments.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        loss_fn: Callable[..., Tensor] | None,
        *,
        device: torch.device | str | None,
        scheduler_interval: SchedulerInterval,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
    ) -> None:
        if loss_fn is not None:
            check_function("loss_fn", loss_fn, ("outputs", "targets"))
        _check_settings(scheduler_interval, accumulate, autocast, clip_norm)
        self._loader = repeatable(loader, "train_loader")
        self._loss_fn = loss_fn
        self._device = device
        self._interval = scheduler_interval
        self._accumulate = accumulate
        self._autocast = autocast
        self._clip_norm = clip_norm
        self._average = None if ema_decay is None else WeightAverage(ema_decay)
        self._averaging = False
        self._position = Position()
        self._before: Mapping[str, Any] | None = None
        self.on_complete: Callable[[], None] | None = None
        """Called after each step, when optimizers, schedulers and averages belong together: a checkpoint's moment."""

    def __call__(
        self,
        model: Module,
        optimizers: Optimizer | Sequence[Optimizer],
        training_step: Callable[..., Tensor],
        lr_schedulers: LRScheduler | Sequence[LRScheduler] | None,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> int:
        """Train until the first limit is reached; return the number of whole epochs.

        Raises:
            InvalidValueError: neither limit is given.
            TrainingError: the loader is empty, or a loss is not a finite scalar.
        """
        if max_steps is None and max_epochs is None:
            raise InvalidValueError(
                "neither max_steps nor max_epochs is given, and a data loader alone has no end.",
                where="max_steps",
                remedy="Give one of them.",
            )
        before, self._before = self._before, None
        self._position = Position()
        if before is not None:
            over = before["position"]["steps"] == max_steps
            self._position = begin_again(before["position"], self._loader, over=over)
            for optimizer in listed(optimizers):
                optimizer._opt_called = True  # as it was before the crash; schedulers look there for the right order
        arguments = model, listed(optimizers), training_step, listed(lr_schedulers), max_steps, max_epochs
        if self._average is None:
            return self._run(*arguments, before)
        self._average.forget()
        if before is not None:
            self._average.load_state_dict(before["average"])
        self._averaging = True
        try:
            epochs = self._run(*arguments, before)
            self._average.write(model)
        finally:
            self._averaging = False
            self._average.forget()
        return epochs

    def state_dict(self) -> dict[str, Any]:
        """Where a run stands after a step, with the averaged weights; for ``torch.save``."""
        average = {} if self._average is None else self._average.state_dict()
        return {"position": self._position.state_dict(), "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next run, with the same limits, go on where :meth:`state_dict` was called."""
        self._before = state

    @property
    def steps_before(self) -> int:
        """How many steps were made before the crash from which the next run goes on."""
        return 0 if self._before is None else self._before["position"]["steps"]

    def averaged(self, model: Module) -> AbstractContextManager[None]:
        """A context in which `model` has its averaged weights, if it is just being trained and they are averaged."""
        return self._average.applied(model) if self._average is not None and self._averaging else nullcontext()

    def _run(
        self,
        model: Module,
        optimizers: Sequence[Optimizer],
        training_step: Callable[..., Tensor],
        schedulers: Sequence[LRScheduler],
        max_steps: int | None,
        max_epochs: int | None,
        before: Mapping[str, Any] | None,
    ) -> int:
        model.train()
        at = self._position
        begun = len(at.losses)  # the first loss of the step that is not complete yet
        # Gone on with after the last step of all, the loop still has that step's epoch to end.
        while at.losses or (at.steps != max_steps and at.epochs != max_epochs):
            for batches in () if at.steps == max_steps else self._rest_of_epoch(before):
                at.losses += self._descend(model, optimizers, training_step, batches, at.steps + 1)
                if not self._stepped():
                    continue
                at.steps += 1
                if self._average is not None:
                    self._average.update(model)
                if self._interval == "step":
                    _step(schedulers, fmean(at.losses[begun:]))
                begun = len(at.losses)
                if self.on_complete is not None:
                    self.on_complete()
                if at.steps == max_steps:
                    break
            if not at.losses:
                raise TrainingError("it gave no batch.", where="train_loader", remedy="Give at least one.")
            if at.steps == max_steps and len(at.losses) != length_of(self._loader):
                break
            if self._interval == "epoch":
                _step(schedulers, fmean(at.losses))
            at.end_epoch()
            begun, before = 0, None
        return at.epochs

    def _rest_of_epoch(self, before: Mapping[str, Any] | None) -> Iterator[list[Any]]:
        """The batches of an epoch, or of one that was begun before a crash those that were not descended on yet."""
        parts = self._parts()
        if self._position.losses and before is not None:
            skip(parts, len(self._position.losses), before["position"]["now"])
        elif self.on_complete is not None:
            self._position.begin_epoch(self._loader)
        return parts

    def _parts(self) -> Iterator[list[Any]]:
        """The batches of one epoch, as many together as make one step."""
        batches = iter(self._loader)
        while part := list(islice(batches, self._accumulate)):
            yield part

    def _stepped(self) -> bool:
        """Whether the last batches made a step."""
        return True

    def _descend(
        self,
        model: Module,
        optimizers: Sequence[Optimizer],
        training_step: Callable[..., Tensor],
        batches: Sequence[Any],
        number: int,
    ) -> list[float]:
        """Make one step of all optimizers on some batches; the loss of each batch."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses: list[float] = []
        for batch in batches:
            loss = training_step(to_device(batch, device_of(model, self._device)), model)
            losses.append(finite(loss, number))
            (loss if len(batches) == 1 else loss / len(batches)).backward()
        if self._clip_norm is not None:
            clip_grad_norm_(model.parameters(), self._clip_norm)
        for optimizer in optimizers:
            optimizer.step()
        return losses

    def training_step(self, batch: Any, model: Module) -> Tensor:
        """The scalar loss of `model` on `batch`."""
        args, kwargs, targets = take_apart(batch)
        with self._precision(model):
            outputs = model(*args, **kwargs)
            loss = _model_loss(outputs) if self._loss_fn is None else self._loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TrainingError(
                f"the loss is {got}.",
                where="the model" if self._loss_fn is None else "loss_fn",
                legal=("a tensor with one element",),
                remedy="Give a loss_fn, or a batch with labels, for which the model returns its loss."
                if self._loss_fn is None
                else "Reduce the loss to its mean.",
            )
        return loss

    def planned_steps(self, max_steps: int | None, max_epochs: int | None) -> int | None:
        """How many steps the limits allow, where it is known.

        >>> loop = LoaderLoop([1, 2, 3], None, device=None, scheduler_interval="epoch")
        >>> loop.planned_steps(None, 2), loop.planned_steps(4, 2)
        (6, 4)
        """
        length = length_of(self._loader)
        if max_epochs is None or length is None:
            return max_steps
        steps = math.ceil(length / self._accumulate) * max_epochs
        return min(steps, max_steps or steps)

    def first_inputs(self) -> Any:
        """The inputs of the first batch: a tensor, a tuple of arguments, or a dict of them."""
        # Looking at the data must not change what a seeded run does afterwards.
        with undrawn(self._loader):
            batch = next(iter(self._loader))
        if self._device is not None:
            batch = to_device(batch, torch.device(self._device))
        args, kwargs, _ = take_apart(batch)
        if kwargs:
            return dict(kwargs)
        return args[0] if len(args) == 1 else args

    def _precision(self, model: Module) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(device_of(model, self._device).type, dtype=self._autocast)


def finite(loss: Tensor, number: int) -> float:
    """The value of a loss.

    Args:
        loss: with one element.
        number: of the step, for the message.

    Raises:
        TrainingError: it is not finite; nothing has been spoilt by it yet.
    """
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at step {number}.",
            where="training",
            remedy="Lower the learning rate, and look for values that are not finite in the data.",
        )
    return value


def listed(one_or_many: Any) -> list[Any]:
    """What was given as None, one thing or several, as a list.

    >>> listed(None), listed("a"), listed(("a", "b"))
    ([], ['a'], ['a', 'b'])
    """
    if one_or_many is None:
        return []
    return list(one_or_many) if isinstance(one_or_many, (list, tuple)) else [one_or_many]


def device_of(model: Module, device: torch.device | str | None = None) -> torch.device:
    """The `device`, or where None is asked for the one of the model's first tensor."""
    if device is not None:
        return torch.device(device)
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _check_settings(
    interval: SchedulerInterval, accumulate: int, autocast: torch.dtype | None, clip_norm: float | None
) -> None:
    if interval not in ("epoch", "step"):
        raise InvalidValueError(f"{interval!r} is unknown.", where="scheduler_interval", legal=("'epoch'", "'step'"))
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise InvalidValueError(
            f"{accumulate!r} is no number of batches.", where="accumulate", legal=("a positive int",)
        )
    if autocast not in (None, torch.bfloat16):
        raise InvalidValueError(
            f"{autocast!r} cannot be trained in as it is.",
            where="autocast",
            legal=("torch.bfloat16", None),
            remedy="float16 needs its losses scaled, which AccelerateEvaluator and LightningEvaluator do.",
        )
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and clip_norm > 0):
        raise InvalidValueError(f"{clip_norm!r} is no length.", where="clip_norm", legal=("a positive number", None))


def _model_loss(outputs: Any) -> Any:
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _step(schedulers: Iterable[LRScheduler], loss: float) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()
