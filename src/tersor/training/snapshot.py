"""A model and its training as they were at one moment, to go back to."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tersor.training.evaluator import Evaluator

_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original$")


class Snapshot:
    """Copies of a model's parameters and buffers, and of the state of its optimizers and schedulers.

    It takes as much memory as the model and its optimizers do. Objects keep their identity when it is restored.

    Args:
        model: the model, wrapped or not.
        evaluator: whose optimizers and schedulers are kept too; None for the model alone.
        simulation: whether the buffers of a simulation (masks, scales) belong to it; running statistics always do.

    >>> layer = nn.Linear(2, 2)
    >>> before, weight = Snapshot(layer), layer.weight.detach().clone()
    >>> _ = nn.init.zeros_(layer.weight)
    >>> before.restore()
    >>> torch.equal(layer.weight, weight)
    True
    """

    def __init__(self, model: nn.Module, evaluator: Evaluator | None = None, *, simulation: bool = True) -> None:
        parameters, buffers = _by_name(model.named_parameters()), _by_name(model.named_buffers())
        kept = {name: of for name, of in buffers.items() if simulation or "parametrizations." not in name}
        self._tensors = {**parameters, **kept}
        self._values = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._evaluator = evaluator
        self.note_training()

    def note_training(self) -> None:
        """Keep the optimizers and schedulers as they are now; the model's values stay those from before."""
        self._training: Any = None if self._evaluator is None else copy.deepcopy(self._evaluator.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; it can be done again later. Gradients, which are those of other values, are dropped."""
        for name, tensor in self._tensors.items():
            tensor.copy_(self._values[name])
            tensor.grad = None
        if self._evaluator is not None:
            self._evaluator.load_state_dict(copy.deepcopy(self._training))

    def state_dict(self) -> dict[str, Any]:
        """What is kept, for ``torch.save``."""
        return {"values": self._values, "training": self._training}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what :meth:`state_dict` of a snapshot of the same model gave; :meth:`restore` then goes back to that."""
        self._values = {name: state["values"][name].to(tensor.device) for name, tensor in self._tensors.items()}
        self._training = state["training"]


def _by_name(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in tensors}


def plain_name(name: str) -> str:
    """The name that a parameter has while it is not parametrized.

    >>> plain_name("conv.parametrizations.weight.original")
    'conv.weight'
    """
    return _PARAMETRIZED.sub(r"\1", name)
