"""Sizes that modules keep as numbers beside their tensors, made right in the modules themselves.

Which number in which ``forward`` is wrong is known from the repaired graph. In the module itself it most often comes
from an attribute of the same value: ``num_heads``, ``split_size``. Setting that keeps the module's class, and with it
the code that runs in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.speedup.resize import CORRECTED
from tersor.speedup.small_graph import Repair, Size

HINTS = ("heads", "group", "split", "head", "dim", "width", "channel", "size", "hidden")
"""Words in the names of attributes that hold sizes which a removal changes, the likeliest first."""
TRIES = 8
"""How many choices among attributes of the same value are run."""


@dataclass(frozen=True)
class _Place:
    """An attribute of a module that holds a size, or an item of one that is a tuple or list."""

    module: nn.Module
    name: str
    item: int | None = None

    def get(self) -> Any:
        value = getattr(self.module, self.name)
        return value if self.item is None else value[self.item]

    def set(self, new: Any) -> None:
        whole = getattr(self.module, self.name)
        if self.item is not None:
            new = [new if place == self.item else value for place, value in enumerate(whole)]
        if isinstance(whole, (tuple, list)):  # a new one: the old one may be the config's too
            new = type(whole)(*new) if hasattr(whole, "_fields") else type(whole)(new)
        setattr(self.module, self.name, new)


@dataclass(frozen=True)
class _Wanted:
    """A number in a ``forward``, what it must be, and the attributes that it may come from.

    Attributes:
        kind: the module's type, the attributes' names and which of several such numbers it is. For all of a kind the
            same choice is made.
    """

    module: str
    old: Size
    new: Size
    places: tuple[_Place, ...]
    kind: tuple[Any, ...]

    @property
    def options(self) -> list[tuple[str, ...]]:
        """Names of attributes that may be set: one, the likeliest first, or all."""
        names = self.kind[1]
        return [*((name,) for name in names), *([names] if len(names) > 1 else [])]


def repair_attributes(
    model: nn.Module, repairs: Iterable[Repair], is_right: Callable[[nn.Module], bool]
) -> dict[str, tuple[Size, Size]] | None:
    """Make a small model's own numbers right, as far as they are attributes of its modules.

    Attributes that hold an int, and ints in tuples and lists, are set where their value is that of the number in the
    code. Where several are, they are chosen by name, and the next choice is tried where the model does not compute what
    it must. Objects that modules share, like a config, are never changed.

    Args:
        model: its parameters are cut already.
        repairs: what :func:`tersor.speedup.rewrite.repair_graph` replaced in the model's graph.
        is_right: runs the model and says whether its outputs are as expected; False where it does not run.

    Returns:
        for each attribute (``layers.0.attn.num_heads``) its value before and after; None where no choice is right, and
        then the model is as it was given.
    """
    wanted = _wanted(dict(model.named_modules()), repairs)
    kinds = {number.kind: number.options for number in wanted}
    for choice in _choices(kinds):
        changes: dict[_Place, Size] = {}
        chosen = [(number, place) for number in wanted for place in number.places if place.name in choice[number.kind]]
        if any(changes.setdefault(place, number.new) != number.new for number, place in chosen):
            continue
        before = {(place.module, place.name): getattr(place.module, place.name) for place in changes}
        done = False
        try:
            for place, new in changes.items():
                place.set(new)
            done = is_right(model)
        finally:
            if not done:
                for (module, name), value in before.items():
                    setattr(module, name, value)
        if done:
            for place in changes:
                corrected = (*getattr(place.module, CORRECTED, ()), place.name)
                setattr(place.module, CORRECTED, tuple(dict.fromkeys(corrected)))
            return {_path(number, place): (number.old, number.new) for number, place in chosen}
    return None


def _path(number: _Wanted, place: _Place) -> str:
    path = f"{number.module}.{place.name}" if number.module else place.name
    return path if place.item is None else f"{path}[{place.item}]"


def _wanted(modules: Mapping[str, nn.Module], repairs: Iterable[Repair]) -> list[_Wanted]:
    """Numbers that are some attribute's; those of none may still be made of ones that are (``heads * head_dim``)."""
    numbers: dict[tuple[str, Size, Size], None] = {}
    for repair in repairs:
        module = modules.get(repair.module)
        for old, new in repair.literals:
            if module is None or isinstance(old, int) or _places(module, old):
                numbers[repair.module, old, new] = None
            elif isinstance(new, tuple):
                numbers.update({(repair.module, *pair): None for pair in zip(old, new, strict=False)})
    wanted: list[_Wanted] = []
    for name, old, new in numbers:
        places = _places(modules[name], old) if name in modules and old != new else []
        if places:
            names = sorted(dict.fromkeys(place.name for place in places), key=_unlikely)
            rank = sum(other.module == name and other.old == old for other in wanted)
            wanted.append(_Wanted(name, old, new, tuple(places), (type(modules[name]), tuple(names), rank)))
    return wanted


def _places(module: nn.Module, value: Size) -> list[_Place]:
    places = []
    for name, own in vars(module).items():
        if isinstance(own, (tuple, list)):
            if tuple(own) == value:
                places.append(_Place(module, name))
            places += [_Place(module, name, item) for item, one in enumerate(own) if type(one) is int and one == value]
        elif type(own) is int and own == value:
            places.append(_Place(module, name))
    return places


def _unlikely(name: str) -> int:
    return next((rank for rank, hint in enumerate(HINTS) if hint in name.lower()), len(HINTS))


def _choices(kinds: Mapping[Any, list[tuple[str, ...]]]) -> list[dict[Any, tuple[str, ...]]]:
    """The likeliest option for each kind; then the next ones for one kind at a time; at last all for each."""
    if not kinds:
        return []
    first = {kind: options[0] for kind, options in kinds.items()}
    others = [{**first, kind: option} for kind, options in kinds.items() for option in options[1:]]
    everything = {kind: options[-1] for kind, options in kinds.items()}
    return [first, *others[: TRIES - 2], *([everything] if others else [])]
