"""Where a pass over a data loader stands, and how to come there again after a crash: batch by batch, draw by draw."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from tersor.errors import CheckpointError
from tersor.training.random_state import random_state, set_random_state


@dataclass
class Position:
    """Where a run of the loop stands.

    Attributes:
        steps: optimizer steps made.
        epochs: whole passes over the data.
        losses: of each batch of this epoch so far.
        begin: all that the order and the augmentation of this epoch's batches were drawn from, as it was before.
    """

    steps: int = 0
    epochs: int = 0
    losses: list[float] = field(default_factory=list)
    begin: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what random numbers come next; for ``torch.save``."""
        return {**asdict(self), "now": random_state()}

    def begin_epoch(self, loader: Iterable[Any]) -> None:
        """Note what the coming pass over the loader depends on."""
        self.begin = {"random": random_state(), "loader": loader_state(loader)}

    def end_epoch(self) -> None:
        """The pass is complete."""
        self.epochs += 1
        self.losses, self.begin = [], {}


def begin_again(state: dict[str, Any], loader: Iterable[Any], *, over: bool) -> Position:
    """The position that :meth:`Position.state_dict` gave, with generators and loader as they were.

    Args:
        state: what it gave.
        loader: the same loader.
        over: whether no more batch is needed. Otherwise generators are as when the epoch began, so that its batches
            come once more, and :func:`skip` is to follow.
    """
    position = Position(state["steps"], state["epochs"], [*state["losses"]], state["begin"])
    if over or not position.losses:
        set_random_state(state["now"])
    else:
        set_random_state(position.begin["random"])
    if position.losses:
        set_loader_state(loader, position.begin["loader"])
    return position


def skip(parts: Iterator[list[Any]], batches: int, then: dict[str, Any]) -> None:
    """Read so many batches once more; random numbers then go on as they did there.

    >>> parts = iter([["a", "b"], ["c"]])
    >>> skip(parts, 2, random_state())
    >>> [*parts]
    [['c']]

    Raises:
        CheckpointError: there are fewer than there were.
    """
    while batches > 0:
        part = next(parts, None)
        if part is None or len(part) > batches:
            raise CheckpointError(
                "it no longer gives the batches that it gave before the crash",
                where="train_loader",
                remedy="Give the same data and the same batch size, or begin anew.",
            )
        batches -= len(part)
    set_random_state(then)


def loader_state(loader: Any) -> dict[str, Any]:
    """What the order of a loader's next pass depends on, beside the global generators.

    Of PyTorch's loaders that is the generators that they and their samplers were given; of others their own
    ``state_dict()``, if they have one, as a cache of a teacher's outputs does.

    >>> draws = torch.Generator().manual_seed(0)
    >>> loader = torch.utils.data.DataLoader(range(5), batch_size=None, shuffle=True, generator=draws)
    >>> state, first = loader_state(loader), [*loader]
    >>> set_loader_state(loader, state)
    >>> first == [*loader]
    True
    """
    if not isinstance(loader, DataLoader) and hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        return {"own": loader.state_dict()}
    return {"generators": [generator.get_state() for generator in _generators(loader)]}


def set_loader_state(loader: Any, state: dict[str, Any]) -> None:
    """Let the next pass be what it was after :func:`loader_state`."""
    if "own" in state:
        loader.load_state_dict(state["own"])
    else:
        for generator, own in zip(_generators(loader), state["generators"], strict=True):
            generator.set_state(own)


@contextmanager
def undrawn(loader: Any) -> Iterator[None]:
    """Leave all random numbers that a pass over a loader draws as they were."""
    draws, own = random_state(), loader_state(loader)
    try:
        yield
    finally:
        set_random_state(draws)
        set_loader_state(loader, own)


def _generators(loader: Any) -> list[torch.Generator]:
    """Those of a loader and its samplers, each once."""
    within = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    within.append(getattr(within[-1], "sampler", None))
    found = [getattr(holder, "generator", None) for holder in within]
    return [*{id(own): own for own in found if isinstance(own, torch.Generator)}.values()]
