"""Finds the chains of a model by watching it run: no architecture is known here."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tersor.graph.modes import Mode
from tersor.training.chains import Call, Chain, call_of, is_within, leaves, parts_of, tensors_in, versions_of

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum, nn.Module)


def candidates(model: nn.Module, wanted: Sequence[str]) -> list[Chain]:
    """What may be a chain: two or more children of a list that hold wanted modules and share no parameter."""
    within: dict[str, list[str]] = defaultdict(list)
    for name in wanted:
        for prefix in itertools.accumulate(name.split("."), "{}.{}".format):
            within[prefix].append(name)
    found: list[Chain] = []
    for name, container in model.named_modules():
        if not isinstance(container, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        children = [
            f"{name}.{child}" if name else child for child, module in container._modules.items() if module is not None
        ]
        holding = [position for position, child in enumerate(children) if within[child]]
        if len(holding) >= 2:
            blocks = children[holding[0] : holding[-1] + 1]
            found.append(Chain(blocks, [within[block] for block in blocks]))
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    shared = [users for users in names.values() if len(users) > 1]
    return [chain for chain in found if not any(_reaches_outside(users, chain.blocks) for users in shared)]


class Births(Mode):
    """Notes when each tensor was made, or last written into, by a clock that others set forward."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.clock = 0
        self._times = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._times[tensor] = self.clock
        return result

    def begin(self, call: Call) -> int:
        """Set the clock forward; what `call` holds is older than the time that is given back."""
        for tensor in tensors_in(call):
            self._times.setdefault(tensor, self.clock)
        self.clock += 1
        return self.clock

    def is_older(self, tensor: Tensor, time: int) -> bool:
        """Whether it is known to have been there, with its values, before `time`."""
        return tensor in self._times and self._times[tensor] < time


class Trail:
    """Watches the blocks of a candidate in the dry run, and completes it if they form a chain.

    They do if each is called once and in order, if each takes something that the one before gave, untouched, and if
    whatever else it takes was there before the first block began. So no argument depends on blocks in another way.
    """

    def __init__(self, chain: Chain, births: Births) -> None:
        self.chain = chain
        self.intact = True
        self._births = births
        self._start = 0
        self._first: Call = {}
        self._output: Any = None
        self._versions: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether every block was called and each check passed."""
        return self.intact and len(self.chain.links) == len(self.chain.blocks)

    def enter(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A block is called."""
        call = call_of(args, kwargs)
        self.intact &= index == len(self.chain.links) and all(
            isinstance(v, (Tensor, *_CONSTANTS)) for v in leaves(call)
        )
        if not self.intact:
            self._first, self._output = {}, None
        elif index == 0:
            self._first, self._start = call, self._births.begin(call)
            self.chain.links.append({})
        else:
            self._link(call)

    def leave(self, output: Any) -> None:
        """A block has given its output."""
        if self.intact:
            self._output, self._versions = output, versions_of(output)

    def _link(self, call: Call) -> None:
        parts = parts_of(self._output)
        links: dict[int | str, Any] = {}
        for slot, value in call.items():
            source = next((part for part, made in parts.items() if made is value), None)
            if source is not None and tensors_in(value):
                links[slot] = source
            else:
                self.intact &= all(self._births.is_older(tensor, self._start) for tensor in tensors_in(value))
        self.intact &= bool(links) and versions_of(self._output) == self._versions
        self.chain.links.append(links)
        others = call.keys() - links.keys()
        same = call.keys() == self._first.keys() and all(_is_same(call[slot], self._first[slot]) for slot in others)
        self.chain.uniform &= same


def _reaches_outside(users: Sequence[str], blocks: Sequence[str]) -> bool:
    """Whether a block uses a parameter that others use too, so that to change it changes what lies behind."""
    owners = {next((block for block in blocks if is_within(user, block)), None) for user in users}
    return len(owners) > 1


def _is_same(value: Any, other: Any) -> bool:
    """Whether two arguments are one object, or equal constants."""
    return value is other or (isinstance(value, _CONSTANTS) and type(value) is type(other) and value == other)
