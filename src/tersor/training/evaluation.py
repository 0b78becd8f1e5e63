"""A metric over a data loader, for those who give no evaluating function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from tersor.errors import TrainingError
from tersor.training.batches import batch_size, repeatable, take_apart, to_device
from tersor.training.functions import check_function
from tersor.training.loops import device_of


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
