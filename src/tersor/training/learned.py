"""What compressors learn beside the weights: a tensor in a transform, its place in the model, its Adam."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tersor.errors import ConflictError
from tersor.targets.planned import PlannedTarget
from tersor.training.ranks import mean_over_processes
from tersor.wrapping import ModelWrappers, Transform


@final
class Learned(nn.Module):
    """Numbers of a target (one a block, or one an element), learned by a compressor's own optimizer.

    It is a buffer that takes gradients, and no ``nn.Parameter``. So it moves, copies and saves with the model, while an
    optimizer, a clipping of gradients or a ``DistributedDataParallel`` of the user's, which go by
    ``model.parameters()``, never see it. It stays the same object and keeps its type wherever the model moves.

    Args:
        start: the values to begin with.

    Attributes:
        value: the numbers by now, of the shape that they began with.
    """

    value: Tensor

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        value = self.value
        value.grad = None
        value.data = value.data.to(fn(value.data).device)  # its type is its own: what is learned is small
        return self


@final
class Learner:
    """Adam on what a compressor learns, with the same steps on each process.

    Gradients are averaged over the processes and forgotten after the step. A step whose gradients are not all finite is
    left out, as a gradient scaler does with the user's.

    Paper: Kingma, Ba: Adam: A Method for Stochastic Optimization (ICLR 2015).

    Args:
        learned: what is learned, by the name of the target.
        learning_rate: of Adam.

    >>> learned = Learned(torch.ones(2))
    >>> learner = Learner({"fc.weight": learned}, learning_rate=0.01)
    >>> learner.start()
    >>> (learned.value * torch.tensor([2.0, -3.0])).sum().backward()
    >>> learner.step()
    >>> learned.value.detach()
    tensor([0.9900, 1.0100])
    """

    def __init__(self, learned: Mapping[str, Learned], learning_rate: float) -> None:
        self.learned = learned
        self.learning_rate = learning_rate
        self.learning = False
        self._adam = self._fresh()

    def _fresh(self) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [own.value for own in self.learned.values()]}], lr=self.learning_rate)

    def start(self) -> None:
        """Learn from now on, with an Adam that remembers nothing."""
        self._adam = self._fresh()
        self._take_gradients(True)

    def stop(self) -> None:
        """Learn no more: the values stay as they are, and gradients are not computed."""
        self._take_gradients(False)

    def _take_gradients(self, learning: bool) -> None:
        self.learning = learning
        for own in self.learned.values():
            own.value.requires_grad_(learning)
            own.value.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One step; what no gradient reached has a gradient of zero."""
        values = [own.value for own in self.learned.values()]
        for value in values:
            value.grad = mean_over_processes(torch.zeros_like(value) if value.grad is None else value.grad)
        if all(bool(value.grad.isfinite().all()) for value in values if value.grad is not None):
            self._adam.step()
        self._adam.zero_grad()

    def state(self) -> dict[str, Any]:
        """Copies of the values and of what Adam remembers."""
        values = {name: own.value.detach().clone() for name, own in self.learned.items()}
        return {"learning": self.learning, "values": values, "adam": copy.deepcopy(self._adam.state_dict())}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._adam = self._fresh()
        self._adam.load_state_dict(copy.deepcopy(state["adam"]))
        for name, own in self.learned.items():
            own.value.copy_(state["values"][name])
        self._take_gradients(state["learning"])


def put_on(target: PlannedTarget, transform: Transform, wrappers: ModelWrappers) -> None:
    """Put a transform with something learned on a target's tensor, under every name that the model has for it.

    Args:
        target: a target of a plan.
        transform: takes the place of what stands at its stage.
        wrappers: of the model.

    Raises:
        ConflictError: the same tensor was given twice, as two targets.
    """
    places = wrappers.tied(*target.place)
    for place in places:
        known = wrappers[place[0]].stack(place[1]).find(transform.stage)
        if type(known) is type(transform):
            raise ConflictError(
                f"is the tensor of {', '.join('.'.join(other) for other in places if other != target.place)} as well",
                where=f"{target.config.where} on {target.name}",
                remedy="Give one of its names to the compressor; what is learned there holds for all.",
            )
    for place in places:
        wrappers[place[0]].stack(place[1]).put(transform)
