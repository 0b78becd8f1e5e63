"""The mode under which a model runs so that its labels are followed: it sees every operator with real tensors."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from tersor.graph import constants, contractions, indexing, movement, recurrent, reductions
from tersor.graph.inputs import tensors_of
from tersor.graph.labels import Ledger
from tersor.graph.modes import Mode
from tersor.graph.pointwise import find_rule
from tersor.graph.rules import COPIES, MOVEMENT, Call, Fields, Rule, base_name, preserves_values
from tersor.graph.zeros import stays_zero

RULE_MODULES = (constants, contractions, indexing, movement, recurrent, reductions)
"""The modules whose import registers the rules."""

Key = tuple[int, int, tuple[int, ...], tuple[int, ...]]

Step = tuple[str, list[tuple[tuple[int, ...], Fields]]]

UNSTEADY = frozenset({*MOVEMENT, *COPIES, *constants.MAKING, *constants.ALIKE, "copy"})
"""Operators that may or may not run, as the memory layout has it."""


class _Fact(NamedTuple):
    """What is known of a tensor.

    Attributes:
        labels: of its dimensions.
        is_weight: it is a parameter, as it is or reshaped.
        is_zero: it is zero at every index that leaves, once everything that leaves with it is masked.
    """

    labels: Fields
    is_weight: bool
    is_zero: bool


NOTHING = _Fact({}, False, False)


class Follower(Mode):
    """Sees every ATen call with real tensors and keeps the labels of each tensor.

    A tensor is known by where its values lie (storage, offset, shape, strides), not by its Python object: autograd
    makes new objects for views. A weak reference to each storage keeps its address from being used twice, but not its
    values alive: the run takes no more memory than the model's own forward pass.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.unknown: Counter[str] = Counter()
        self._facts: dict[Key, _Fact] = {}
        self._views: dict[int, set[Key]] = {}
        self._storages: dict[int, Any] = {}
        self.used: set[int] = set()
        self.steps: list[Step] = []
        self.inside = 0  # how many modules that are followed as one step are running
        self._writer: dict[int, int] = {}
        self._sources: list[tuple[int, ...]] = [()]
        self._sinks: list[int] = []

    def learn(self, tensor: Tensor, labels: Fields, *, is_weight: bool = False, is_zero: bool = False) -> None:
        """Remember what is known of a tensor."""
        key = key_of(tensor)
        self._facts[key] = _Fact(labels, is_weight, is_zero)
        self._views.setdefault(key[0], set()).add(key)
        if key[0] not in self._storages:
            # Without a storage (sparse tensors) the tensor itself is kept, and known by its identity.
            self._storages[key[0]] = StorageWeakRef(tensor.untyped_storage()) if _has_storage(tensor) else tensor

    def fact(self, tensor: Tensor) -> _Fact:
        """What is known of a tensor."""
        return self._facts.get(key_of(tensor), NOTHING)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        # An operator may change its operand's shape in place, so facts are looked up before it runs.
        operands = operands_in((*args, *kwargs.values()))
        keys = [key_of(tensor) for tensor in operands]
        facts = {id(tensor): self._facts.get(key, NOTHING) for tensor, key in zip(operands, keys, strict=True)}
        self.used.update(key[0] for key in keys)
        result = func(*args, **kwargs)
        outputs = operands_in((result,))
        self._tick({key[0] for key in keys}, outputs)
        if self.inside:
            return result
        names = [argument.name for argument in func._schema.arguments]
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        call = Call(func, arguments, result, self.ledger, lambda tensor: facts.get(id(tensor), NOTHING))
        touched = base_name(func) in constants.MAKING or any(f.labels for f in facts.values())
        touched = touched and any(tensor.numel() for tensor in outputs)
        if func._schema.is_mutable and base_name(func) in MOVEMENT and _same_layout(keys[0], key_of(operands[0])):
            labels: Any = facts[id(operands[0])].labels
        else:
            labels = self._apply(call, operands, facts) if touched else {}
        each = labels if isinstance(labels, list) else [labels] * len(outputs)
        writes = func._schema.is_mutable and operands and not preserves_values(func)
        if writes:
            self._forget_values(operands[0])
        if base_name(func) not in UNSTEADY:
            sized = zip(outputs, each, strict=True)
            self.steps.append((base_name(func), [(tuple(tensor.shape), own) for tensor, own in sized]))
        is_weight = preserves_values(func) and all(fact.is_weight for fact in facts.values())
        for tensor, own in zip(outputs, each, strict=True):
            self.learn(tensor, own, is_weight=is_weight, is_zero=bool(own) and stays_zero(call, own))
        return result

    def _tick(self, read: set[int], outputs: list[Tensor]) -> None:
        """Note which earlier operators this one's result rests on. A tensor rests on all that wrote its storage."""
        self.ledger.clock += 1
        written = {key_of(tensor)[0] for tensor in outputs}
        self._sources.append(tuple({self._writer[key] for key in read | written if key in self._writer}))
        if not outputs:
            self._sinks.append(self.ledger.clock)  # its result is a Python value, on which the model may decide
        for key in written:
            self._writer[key] = self.ledger.clock

    def live(self, results: Sequence[Tensor]) -> np.ndarray:
        """For each operator, whether its result reaches one of these tensors, or a decision of the model's code."""
        live = np.zeros(len(self._sources), dtype=bool)
        live[self._sinks] = True
        live[[self._writer[key_of(tensor)[0]] for tensor in results if key_of(tensor)[0] in self._writer]] = True
        for clock in range(len(live) - 1, 0, -1):
            if live[clock]:
                live[list(self._sources[clock])] = True
        return live

    def _apply(self, call: Call, operands: list[Tensor], facts: dict[int, _Fact]) -> Fields | list[Fields]:
        rule = find_rule(call.operator)
        name = call.name
        if rule is not None:
            labels = rule(call)
            writes = call.operator._schema.is_mutable and len(facts) > 1
            if not writes or set(labels) <= set(facts[id(operands[0])].labels) or not self._is_shared(operands[0]):
                return labels
            call.freeze(labels, f"'{name}' writes it into a view")
            return {}
        self.unknown[name] += 1
        for fact in facts.values():
            call.freeze(fact.labels, f"meets '{name}', which has no rule")
        return {}

    def _forget_values(self, written: Tensor) -> None:
        """A parameter's copy that was changed in place is no parameter any more, in whatever shape it is seen."""
        for key in self._views.get(key_of(written)[0], ()):
            self._facts[key] = _Fact(self._facts[key].labels, False, False)

    def _is_shared(self, written: Tensor) -> bool:
        """Whether the tensor that is written in place is also seen in another shape."""
        key = key_of(written)
        return len(self._views.get(key[0], set()) - {key}) > 0

    def step_through(self, module: nn.Module, rule: Rule) -> list[RemovableHandle]:
        """Follow a module as one step, by the rule that the user gave for its type."""
        names = list(inspect.signature(module.forward).parameters)
        own = {**module._parameters, **module._buffers}
        given: list[dict[str, Any]] = []

        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.inside += 1
            given.append({**own, **dict(zip(names, args, strict=False)), **kwargs})

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self.inside -= 1
            arguments = given.pop()
            if self.inside:
                return
            outputs = tensors_of(output)
            self._tick({key_of(tensor)[0] for tensor in tensors_of(arguments)}, outputs)
            labels = rule(Call(type(module), arguments, output, self.ledger, self.fact))
            each = labels if isinstance(labels, list) else [labels] * len(outputs)
            for tensor, fields in zip(outputs, each, strict=True):
                self.learn(tensor, fields)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]


def operands_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among an ATen operator's arguments or results, which nest no deeper than a list."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def key_of(tensor: Tensor) -> Key:
    """Where a tensor's values lie and how they are read."""
    if not _has_storage(tensor):
        return id(tensor), 0, tuple(tensor.shape), ()
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _same_layout(before: Key, after: Key) -> bool:
    """Whether the strides of the same tensor differ only where its size is 1."""
    strides = zip(before[2], before[3], after[3], strict=False)
    return before[:3] == after[:3] and all(size == 1 or a == b for size, a, b in strides)


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided
