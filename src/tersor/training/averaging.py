"""A moving average of the weights beside the model that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module

from tersor.errors import InvalidValueError
from tersor.training.snapshot import plain_name


class WeightAverage:
    r"""The exponential moving average of a model's parameters, as ``torch.optim.swa_utils.AveragedModel`` has it.

    The first update takes the parameters over, each later one computes :math:`a \leftarrow d a + (1 - d) w`. Buffers
    are not averaged: running statistics, masks and scales are those of the model. The model itself is not copied, so
    it may be wrapped; the averages, in float32 at least, are kept by name.

    Args:
        decay: d, from 0 (the last weights alone) up to but not including 1.

    Raises:
        InvalidValueError: another decay.

    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(decay=0.75)
    >>> for value in (1.0, 2.0, 4.0):
    ...     _ = torch.nn.init.constant_(layer.weight, value)
    ...     average.update(layer)
    >>> average.write(layer)
    >>> layer.weight.item()  # 1, then 0.75 + 0.25 * 2, then 0.75 * 1.25 + 0.25 * 4
    1.9375
    """

    def __init__(self, decay: float) -> None:
        if not (isinstance(decay, (int, float)) and not isinstance(decay, bool) and 0 <= decay < 1):
            raise InvalidValueError(
                f"{decay!r} is no share to keep.", where="ema_decay", legal=("a number from 0 to below 1", None)
            )
        self._decay = decay
        self._averages: dict[str, Tensor] = {}

    def forget(self) -> None:
        """Begin anew."""
        self._averages = {}

    @torch.no_grad()
    def update(self, model: Module) -> None:
        """Take the parameters as they are now into the average; one that is new or has changed its shape begins."""
        for name, parameter in _floating(model):
            kind = torch.promote_types(parameter.dtype, torch.float32)
            average = self._averages.get(name)
            if average is None or average.shape != parameter.shape:
                self._averages[name] = parameter.detach().to(kind, copy=True)
            else:
                average.lerp_(parameter.detach().to(kind), 1 - self._decay)

    @torch.no_grad()
    def write(self, model: Module) -> None:
        """Put the averages into the model, in place."""
        for name, parameter in _floating(model):
            average = self._averages.get(name)
            if average is not None and average.shape == parameter.shape:
                parameter.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, no copies."""
        return self._averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from these."""
        self._averages = dict(state)

    @contextmanager
    def applied(self, model: Module) -> Iterator[None]:
        """Give the model its averages for a while, and then its own weights back."""
        own = {name: parameter.detach().clone() for name, parameter in _floating(model)}
        self.write(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in _floating(model):
                    parameter.copy_(own[name])


def _floating(model: Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            yield plain_name(name), parameter
