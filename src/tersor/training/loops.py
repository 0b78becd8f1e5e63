"""Training and evaluation for those who give only a data loader and a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tersor.errors import InvalidValueError, TrainingError
from tersor.training.batches import batch_size, take_apart, to_device
from tersor.training.functions import check_function

SchedulerInterval = Literal["epoch", "step"]


class LoaderLoop:
    """The usual loop over a data loader, to be given to an evaluator as its ``training_func``.

    Args:
        loader: the batches; it is passed over once an epoch, so it must be a loader or a list and not an iterator.
        loss_fn: ``loss_fn(outputs, targets)`` gives a scalar; None where the model computes its loss from a mapping
            (``model(**batch).loss``, as Transformers do).
        device: where batches are moved to; None for where the model is.
        scheduler_interval: whether schedulers step after each epoch or after each step.

    Raises:
        InvalidValueError: the loader is an iterator, the interval is unknown, or `loss_fn` is no function.
        TrainingError: `loss_fn` does not take two arguments.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        loss_fn: Callable[..., Tensor] | None,
        *,
        device: torch.device | str | None,
        scheduler_interval: SchedulerInterval,
    ) -> None:
        if scheduler_interval not in ("epoch", "step"):
            raise InvalidValueError(
                f"{scheduler_interval!r} is unknown.", where="scheduler_interval", legal=("'epoch'", "'step'")
            )
        if loss_fn is not None:
            check_function("loss_fn", loss_fn, ("outputs", "targets"))
        self._loader = repeatable(loader, "train_loader")
        self._loss_fn = loss_fn
        self._device = device
        self._interval = scheduler_interval

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
        schedulers = listed(lr_schedulers)
        model.train()
        steps = epochs = 0
        while steps != max_steps and epochs != max_epochs:
            remaining = None if max_steps is None else max_steps - steps
            losses: list[float] = []
            for batch in islice(self._loader, remaining):
                losses.append(self._one_step(model, listed(optimizers), training_step, batch, steps + 1))
                steps += 1
                if self._interval == "step":
                    _step(schedulers, losses[-1])
            if not losses:
                raise TrainingError("it gave no batch.", where="train_loader", remedy="Give at least one.")
            whole = remaining is None or len(losses) < remaining or len(losses) == length_of(self._loader)
            if whole:
                epochs += 1
                if self._interval == "epoch":
                    _step(schedulers, sum(losses) / len(losses))
        return epochs

    def training_step(self, batch: Any, model: Module) -> Tensor:
        """The scalar loss of `model` on `batch`."""
        args, kwargs, targets = take_apart(batch)
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
        return min(length * max_epochs, max_steps or length * max_epochs)

    def first_inputs(self) -> Any:
        """The inputs of the first batch: a tensor, a tuple of arguments, or a dict of them."""
        # Looking at the data must not change what a seeded run does afterwards.
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(self._loader))
        if self._device is not None:
            batch = to_device(batch, torch.device(self._device))
        args, kwargs, _ = take_apart(batch)
        if kwargs:
            return dict(kwargs)
        return args[0] if len(args) == 1 else args

    def _one_step(
        self,
        model: Module,
        optimizers: Sequence[Optimizer],
        training_step: Callable[..., Tensor],
        batch: Any,
        number: int,
    ) -> float:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = training_step(to_device(batch, device_of(model, self._device)), model)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {number}.",
                where="training",
                remedy="Lower the learning rate, and look for values that are not finite in the data.",
            )
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return value


class LoaderEvaluation:
    """The mean of a metric over a data loader, every sample with the same weight; an ``evaluating_func``.

    Args:
        loader: the batches, as for training.
        metric: ``metric(outputs, targets)``, the mean over one batch; `accuracy` where None.
        device: where batches are moved to; None for where the model is.
    """

    def __init__(
        self, loader: Iterable[Any], metric: Callable[..., float] | None, device: torch.device | str | None
    ) -> None:
        self._loader = repeatable(loader, "eval_loader")
        self._metric = accuracy if metric is None else metric
        check_function("metric", self._metric, ("outputs", "targets"))
        self._device = device

    def __call__(self, model: Module) -> float:
        """Evaluate `model`, in eval mode and without gradients."""
        model.eval()
        device = device_of(model, self._device)
        total, samples = 0.0, 0
        with torch.no_grad():
            for batch in self._loader:
                args, kwargs, targets = take_apart(to_device(batch, device))
                size = batch_size(batch)
                total += float(self._metric(model(*args, **kwargs), targets)) * size
                samples += size
        if not samples:
            raise TrainingError("it gave no sample.", where="eval_loader", remedy="Give at least one batch.")
        return total / samples


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """The share of right answers: ``argmax`` over the classes, which are dimension 1 of `outputs`.

    >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    0.5

    Raises:
        TrainingError: `outputs` are no scores of classes, or `targets` no indices of them.
    """
    fits = isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.dim() >= 2
    if not fits or targets.shape != outputs.shape[:1] + outputs.shape[2:] or targets.is_floating_point():
        raise TrainingError(
            "accuracy needs outputs of shape (batch, classes, ...) and class indices of shape (batch, ...).",
            where="metric",
            remedy="Give a metric(outputs, targets) of your own.",
        )
    return (outputs.argmax(dim=1) == targets).float().mean().item()


def listed(one_or_many: Any) -> list[Any]:
    """What was given as None, one thing or several, as a list.

    >>> listed(None), listed("a"), listed(("a", "b"))
    ([], ['a'], ['a', 'b'])
    """
    if one_or_many is None:
        return []
    return list(one_or_many) if isinstance(one_or_many, (list, tuple)) else [one_or_many]


def repeatable(loader: Iterable[Any], where: str) -> Iterable[Any]:
    """The `loader`, if one can pass over it again and again.

    Raises:
        InvalidValueError: it cannot be iterated, or only once.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise InvalidValueError(
            f"the {type(loader).__name__} cannot be passed over once an epoch.",
            where=where,
            legal=("a DataLoader", "a list of batches", "anything whose __iter__ starts anew"),
        )
    return loader


def length_of(loader: Iterable[Any]) -> int | None:
    """The number of batches, or None where the loader does not know (a loader of an iterable data set)."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def device_of(model: Module, device: torch.device | str | None = None) -> torch.device:
    """The `device`, or where None is asked for the one of the model's first tensor."""
    if device is not None:
        return torch.device(device)
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _model_loss(outputs: Any) -> Any:
    return outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)


def _step(schedulers: Iterable[LRScheduler], loss: float) -> None:
    for scheduler in schedulers:
        if isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step(loss)
        else:
            scheduler.step()
