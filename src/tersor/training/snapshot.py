"""A model and its training as they were at one moment, to go back to."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tersor.training.evaluator import Evaluator


class Snapshot:
    """Copies of a model's parameters and buffers, and of the state of its optimizers and schedulers.

    It takes as much memory as the model and its optimizers do. Objects keep their identity when it is restored.

    Args:
        model: the model, wrapped or not.
        evaluator: whose optimizers and schedulers are kept too; None for the model alone.
        buffers: whether buffers (running statistics) belong to it.

    >>> layer = nn.Linear(2, 2)
    >>> before, weight = Snapshot(layer), layer.weight.detach().clone()
    >>> _ = nn.init.zeros_(layer.weight)
    >>> before.restore()
    >>> torch.equal(layer.weight, weight)
    True
    """

    def __init__(self, model: nn.Module, evaluator: Evaluator | None = None, *, buffers: bool = True) -> None:
        tensors: list[Tensor] = [*model.parameters(), *(model.buffers() if buffers else ())]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors]
        self._evaluator = evaluator
        self._training: Any = None if evaluator is None else copy.deepcopy(evaluator.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; it can be done again later."""
        for tensor, value in self._tensors:
            tensor.copy_(value)
        if self._evaluator is not None:
            self._evaluator.load_state_dict(copy.deepcopy(self._training))
