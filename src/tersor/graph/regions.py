"""Blocks of code under autocast or without gradients, as they show in a graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast


class Adds(Protocol):
    """What nodes are added to."""

    def add(self, op: str, target: Any, args: Any = (), kwargs: Any = None) -> fx.Node:
        """A new node at the end."""
        ...


class Autocast:
    """Enters and leaves autocast in the graph where the model does, seen by how the state differs from the caller's.

    Args:
        nodes: the graph.
        devices: types of the devices that the model uses.
    """

    def __init__(self, nodes: Adds, devices: set[str]) -> None:
        self._nodes = nodes
        self._devices = sorted(device for device in devices if torch.amp.is_autocast_available(device))
        self._callers = self._now = self._state()
        self._open: list[fx.Node] = []

    def _state(self) -> tuple[Any, ...]:
        depth = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        kinds = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in self._devices]
        return depth, *kinds

    def follow(self) -> None:
        """Before each node: bring the graph to where the model is."""
        state = self._state()
        if state == self._now:
            return
        self._now = state
        while self._open:
            self._nodes.add("call_function", _exit_autocast, (self._open.pop(),)).meta["impure"] = True
        if state != self._callers:
            for kind in state[1:]:
                node = self._nodes.add("call_function", _enter_autocast, (*kind, torch.is_autocast_cache_enabled()))
                node.meta["impure"] = True
                self._open.append(node)


class Gradients:
    """What the code switches; while a model is traced, gradients are on from the start.

    What is computed without them is detached where it is used with them. Where the code asks for them although they
    are on, the graph switches them on, and puts back what its caller had.
    """

    def __init__(self, nodes: Adds) -> None:
        self._nodes = nodes
        self._stop = False
        self._callers: fx.Node | None = None

    def switch(self, flow: bool) -> None:
        """The code is about to switch gradients on or off."""
        are_on = torch.is_grad_enabled()  # already off inside the forward of an autograd.Function
        if not (flow and are_on):
            self._stop = not flow and (are_on or self._stop)
            return
        if self._callers is None:
            value, self._callers = True, self._nodes.add("call_function", torch.is_grad_enabled)
        else:
            value, self._callers = self._callers, None
        self._nodes.add("call_function", torch._C._set_grad_enabled, (value,)).meta["impure"] = True

    def are_stopped(self) -> bool:
        """Whether what is computed now gets no gradient."""
        return self._stop and not torch.is_grad_enabled()
