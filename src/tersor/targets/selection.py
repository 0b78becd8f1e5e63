"""Which modules an entry selects: the grammar of names, patterns and types."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from torch import nn

from tersor.config.entry import SELECTION_KEYS, Entry
from tersor.errors import UnmatchedError, nearest
from tersor.targets.settings import ModuleType, type_name

_MATCHES: Mapping[str, Callable[[str, Collection[str]], list[str]]] = {
    "op_names": lambda wanted, names: [wanted] if wanted in names else [],
    "op_names_re": lambda wanted, names: [name for name in names if re.match(wanted, name)],
    "op_partial_names": lambda wanted, names: [name for name in names if wanted in name],
}
_FEW = 12


class Selection(NamedTuple):
    """What an entry selects.

    Attributes:
        selected: names of modules, in the model's order.
        excluded: those that it would select but for an ``exclude_`` key.
    """

    selected: list[str]
    excluded: list[str]


class Modules:
    """The modules of a model that can be selected.

    The insides of parametrizations, which torch keeps in a submodule of that name, belong to their owner.

    Attributes:
        by_name: in the model's order; a shared module stands under each of its names.
        first_name: each name, and the first name of the module that it names.
    """

    def __init__(self, model: nn.Module) -> None:
        named = model.named_modules(remove_duplicate=False)
        self.by_name = {name: module for name, module in named if "parametrizations" not in name.split(".")}
        firsts: dict[nn.Module, str] = {}
        self.first_name = {name: firsts.setdefault(module, name) for name, module in self.by_name.items()}


def is_a(module: nn.Module, module_type: ModuleType) -> bool:
    """Whether a module is of a type, given as a class or by the name of one; subclasses count.

    >>> is_a(nn.Conv2d(1, 1, 1), "_ConvNd"), is_a(nn.Conv2d(1, 1, 1), nn.Linear)
    (True, False)
    """
    if isinstance(module_type, str):
        return any(base.__name__ == module_type for base in type(module).__mro__)
    return isinstance(module, module_type)


def select_modules(model: nn.Module, entry: Entry, default_types: Iterable[ModuleType]) -> list[str]:
    """The modules of an entry.

    Args:
        model: the model.
        entry: one entry of a config list.
        default_types: what ``"default"`` stands for in ``op_types``.

    Returns:
        Their names, in the model's order; a shared module goes by the first of its names.

    Raises:
        UnmatchedError: a name, a pattern or a type that matches nothing in the model, or an entry that selects nothing.

    >>> from tersor.config import parse_config_list
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> (entry,) = parse_config_list([{"op_types": ["Linear"], "exclude_op_names": ["2"]}], "pruning")
    >>> select_modules(model, entry, ())
    ['0']
    """
    return select(Modules(model), entry, tuple(default_types)).selected


def select(modules: Modules, entry: Entry, default_types: tuple[ModuleType, ...]) -> Selection:
    """As `select_modules`, also with the modules that the ``exclude_`` keys leave out."""
    chosen = _by_name(modules, entry, "")
    if entry.op_types is not None:
        typed = _by_type(modules, entry.op_types, default_types, f"{entry.where}['op_types']")
        named = any(getattr(entry, key) is not None for key in _MATCHES)
        chosen = chosen & typed if named else typed
    left_out = _by_name(modules, entry, "exclude_")
    left_out |= _by_type(modules, entry.exclude_op_types or (), default_types, f"{entry.where}['exclude_op_types']")
    if not chosen - left_out:
        keys = " and ".join(key for key in SELECTION_KEYS if getattr(entry, key) is not None)
        why = f"the exclude_ keys leave out all that {keys} select" if chosen else f"no module fits both {keys}"
        raise UnmatchedError(
            f"the entry selects no module: {why}.", where=entry.where, remedy="Loosen one of the keys."
        )
    ordered = [name for name, first in modules.first_name.items() if name == first and name in chosen]
    return Selection([name for name in ordered if name not in left_out], [name for name in ordered if name in left_out])


def _by_name(modules: Modules, entry: Entry, prefix: str) -> set[str]:
    """What the entry's keys of names match, each key by its own rule."""
    found: set[str] = set()
    for key, matching in _MATCHES.items():
        for wanted in getattr(entry, prefix + key, None) or ():
            hits = matching(wanted, modules.by_name)
            if not hits:
                raise _unmatched(wanted, modules.by_name, "module", f"{entry.where}[{prefix + key!r}]")
            found.update(modules.first_name[name] for name in hits)
    return found


def _by_type(
    modules: Modules, wanted: Iterable[ModuleType], default_types: tuple[ModuleType, ...], where: str
) -> set[str]:
    """What the types match."""
    found: set[str] = set()
    for module_type in wanted:
        kinds = default_types if module_type == "default" else (module_type,)
        hits = [name for name, module in modules.by_name.items() if any(is_a(module, kind) for kind in kinds)]
        if not hits:
            present = dict.fromkeys(type(module).__name__ for module in modules.by_name.values())
            registered = [type_name(kind) for kind in default_types if not type_name(kind).startswith("_")]
            raise _unmatched(type_name(module_type), present, "module type", where, also=registered)
        found.update(modules.first_name[name] for name in hits)
    return found


def _unmatched(wanted: str, present: Iterable[str], kind: str, where: str, also: Iterable[str] = ()) -> UnmatchedError:
    """The error, with the nearest spelling among what is present and what is known `also`."""
    known = [name for name in present if name]
    remedy = nearest(wanted, (*known, *also)) or f"Look at the model's {kind}s."
    what = f"{wanted!r} matches no {kind} of the model."
    return UnmatchedError(what, where=where, legal=known if len(known) <= _FEW else (), remedy=remedy)
