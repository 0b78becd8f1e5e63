"""Blocks that run one after another: what each gives, the next takes.

The layers of a transformer or the parts of an ``nn.Sequential`` form such a chain. A block of a chain can be run alone
on what the block before it gave, so a model can be run block by block, with one block's inputs in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tersor.errors import TrainingError
from tersor.graph.inputs import evaluating, map_tensors

Call = dict[int | str, Any]
"""The arguments of one call, by position or by name."""

WHOLE = "<whole>"
"""The part of a block's output that is all of it; other parts are items of a tuple or a mapping."""


class Stop(BaseException):
    """Ends a forward pass from within a hook; no Exception, so that no model catches it."""


class Caught(NamedTuple):
    """What one batch is when it reaches a chain.

    Attributes:
        call: all arguments of the first block.
        others: for each block the arguments that no block made; empty where they are those of the first block.
    """

    call: Call
    others: list[Call]


@dataclass
class Chain:
    """Some blocks of a container, from the first to the last that holds a wanted module.

    Attributes:
        blocks: their names in the model, in the order in which they run.
        modules: for each block the names of the wanted modules in it.
        links: for each block which arguments the block before it made, and which part of its output each is.
        uniform: whether all other arguments are the same for every block.
        look: of the first block's call in the dry run, as :func:`look` gives it.
    """

    blocks: list[str]
    modules: list[list[str]]
    links: list[dict[int | str, Any]] = field(default_factory=list)
    uniform: bool = True
    look: object = None

    @property
    def breadth(self) -> int:
        """How many of the blocks hold a wanted module."""
        return sum(bool(names) for names in self.modules)

    def overlaps(self, other: Chain) -> bool:
        """Whether one chain lies within a block of the other."""
        return any(is_within(a.blocks[0], block) for a, b in ((self, other), (other, self)) for block in b.blocks)

    def run(self, model: nn.Module, index: int, call: Call) -> Any:
        """The output of one block; `call` stays as it is even if the block writes into its inputs."""
        call = self._copied(index, call)
        args = [call[slot] for slot in sorted(slot for slot in call if isinstance(slot, int))]
        kwargs = {slot: value for slot, value in call.items() if isinstance(slot, str)}
        return model.get_submodule(self.blocks[index])(*args, **kwargs)

    def following(self, index: int, call: Call, output: Any, others: Sequence[Call]) -> Call:
        """The call of the block behind block `index`, which was called by `call` and gave `output`."""
        parts = parts_of(output)
        carried = {slot: parts[part] for slot, part in self.links[index + 1].items()}
        return {**(others[index + 1] if others else call), **carried}

    def catch(self, model: nn.Module, forward: Callable[[], bool], *, whole: int = 0) -> Caught:
        """Run the model until all arguments that the blocks need are known.

        Args:
            model: the model.
            forward: runs it on one batch until :class:`Stop`, and tells whether that came.
            whole: the block, beside the first, of which all arguments are kept; 0 for none.

        Raises:
            TrainingError: this batch takes another way.
        """
        calls: list[Call] = []

        def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            index, call = len(calls), call_of(args, kwargs)
            made = self.links[index] if index not in (0, whole) else {}
            calls.append({slot: value for slot, value in call.items() if slot not in made})
            enough = whole == 0 and self.uniform and look(calls[0]) == self.look
            if enough or index == len(self.blocks) - 1:
                raise Stop
            if index == 0:
                calls[0] = self._copied(0, call)  # for the block runs on, and may write into its inputs

        with hooked(model, before=dict.fromkeys(self.blocks, keep)):
            if not forward():
                raise TrainingError(
                    "a batch does not run through all blocks, as the first batch does.",
                    where=self.blocks[0],
                    remedy="Give batches that are all of one kind.",
                )
        return Caught(calls[0], [{}, *calls[1:]] if len(calls) > 1 else [])

    def holds(self, model: nn.Module, forward: Callable[[], bool]) -> bool:
        """Whether the blocks, run alone, give the very numbers that they give within the model."""
        last = len(self.blocks) - 1
        with quiet(model):
            caught = self.catch(model, forward, whole=last)
            call = caught.call
            self.look = look(call)
            try:
                for index in range(last):
                    call = self.following(index, call, self.run(model, index, call), caught.others)
                pairs = zip(tensors_in(call), tensors_in(caught.others[last]), strict=True)
                return all(torch.equal(alone, within) for alone, within in pairs)
            except Exception:  # noqa: BLE001 - whatever a block raises that is not run where it should be
                return False

    def _copied(self, index: int, call: Call) -> Call:
        """The call of a block with its own copy of what the block before it gave."""
        copies: dict[int, Tensor] = {}

        def copy_once(tensor: Tensor) -> Tensor:  # a tensor that is given twice stays one
            return copies[id(tensor)] if id(tensor) in copies else copies.setdefault(id(tensor), tensor.clone())

        carried = self.links[max(index, 1)]
        return {slot: map_tensors(value, copy_once) if slot in carried else value for slot, value in call.items()}


@contextmanager
def hooked(
    model: nn.Module,
    *,
    before: Mapping[str, Callable[[tuple[Any, ...], dict[str, Any]], None]],
    after: Mapping[str, Callable[[Any], None]] | None = None,
) -> Iterator[None]:
    """See what modules are called with and what they give, behind all hooks that they have."""
    with ExitStack() as stack:
        for name, see in before.items():
            hook = model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, see=see: see(args, kwargs), with_kwargs=True
            )
            stack.callback(hook.remove)
        for name, see in (after or {}).items():
            hook = model.get_submodule(name).register_forward_hook(lambda _, args, output, see=see: see(output))
            stack.callback(hook.remove)
        yield


@contextmanager
def quiet(model: nn.Module, part: nn.Module | None = None) -> Iterator[None]:
    """Run the model, or only a `part` of it, as :func:`tersor.graph.inputs.evaluating` does, without key-value caches.

    A cache grows with each run. A model that makes one where its ``config.use_cache`` is true is told not to. What a
    surrounding autocast keeps of the weights is forgotten, because they may have changed.
    """
    torch.clear_autocast_cache()
    configs = [getattr(module, "config", None) for module in model.modules()]
    caching: list[Any] = [config for config in configs if getattr(config, "use_cache", None) is True]
    with torch.inference_mode(False), evaluating(model if part is None else part):
        try:
            for config in caching:
                config.use_cache = False
            yield
        finally:
            for config in caching:
                config.use_cache = True


def call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Arguments by position or by name.

    >>> call_of(("a",), {"mask": "b"})
    {0: 'a', 'mask': 'b'}
    """
    return {**dict(enumerate(args)), **kwargs}


def parts_of(output: Any) -> dict[Any, Any]:
    """What the next block may take of an output: all of it, or an item.

    >>> parts_of(("x", "weights"))
    {'<whole>': ('x', 'weights'), 0: 'x', 1: 'weights'}
    """
    items = output.items() if isinstance(output, Mapping) else enumerate(output) if isinstance(output, tuple) else ()
    return {WHOLE: output, **dict(items)}


def leaves(value: Any) -> list[Any]:
    """Everything in nested tuples, lists and mappings, in order.

    >>> leaves({0: ("x", ["y"]), "mask": None})
    ['x', 'y', None]
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, (tuple, list)):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among the leaves."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def look(call: Call) -> object:
    """What two calls have in common when they differ only in their numbers: names, sizes and constants."""
    return [
        (slot, [leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves(value)])
        for slot, value in call.items()
    ]


def versions_of(value: Any) -> list[int]:
    """How often each tensor was written into; the same numbers mean the same values."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(value)]


def is_within(name: str, outer: str) -> bool:
    """Whether the module `name` is the module `outer` or lies in it.

    >>> is_within("layers.1.mlp", "layers.1"), is_within("layers.10", "layers.1"), is_within("layers", "")
    (True, False, True)
    """
    return not outer or f"{name}.".startswith(f"{outer}.")
