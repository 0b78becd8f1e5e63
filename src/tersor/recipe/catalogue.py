"""Every pruner that there is, what it does and what it needs: read off the classes themselves."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from rich.table import Table

import tersor.pruning
from tersor.pruning import Pruner
from tersor.pruning.learning import LearningPruner
from tersor.pruning.schedule import ScheduledPruner
from tersor.recipe.arguments import COMPRESSOR_PARTS, arguments_of

FORMULA = re.compile(r":math:`[^`]*`")
NEEDS_INPUTS = re.compile(r"\b(no|neither) example inputs\b")
SCHEDULE_PARTS = ("pruner", "evaluator", "log_dir")


@dataclass(frozen=True)
class Listed:
    """One pruner.

    Attributes:
        name: as a recipe says it.
        summary: what it does.
        needs: what it cannot do without.
        arguments: what a recipe may say, with the defaults; those without one stand for themselves.
    """

    name: str
    summary: str
    needs: tuple[str, ...]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """All pruners of a module.

    Attributes:
        pruners: they decide what leaves.
        schedules: they decide how much leaves when.
    """

    pruners: tuple[Listed, ...]
    schedules: tuple[Listed, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table("pruner", "what it does", "needs", "arguments", box=None, padding=(0, 2, 0, 0))
        for number, kind in enumerate((self.pruners, self.schedules)):
            if number:
                table.add_row()
            for own in kind:
                table.add_row(own.name, own.summary, ", ".join(own.needs), ", ".join(own.arguments))
        return table


def catalogue(home: ModuleType = tersor.pruning) -> Catalogue:
    """List the pruners of a module.

    >>> next(own.needs for own in catalogue().pruners if own.name == "WandaPruner")
    ('calibration data',)
    """
    classes = [
        found
        for found in vars(home).values()
        if isinstance(found, type) and issubclass(found, Pruner) and not inspect.isabstract(found)
        if {"config_list", "pruner"} & set(inspect.signature(found).parameters)  # a recipe has no masks to give
    ]
    classes.sort(key=lambda cls: cls.__name__)
    return Catalogue(
        tuple(_listed(cls, COMPRESSOR_PARTS) for cls in classes if not issubclass(cls, ScheduledPruner)),
        tuple(_listed(cls, SCHEDULE_PARTS) for cls in classes if issubclass(cls, ScheduledPruner)),
    )


def summary_of(cls: type) -> str:
    r"""The first line of a class's docstring; that of its module, where a formula stands in the middle of it.

    >>> from tersor.pruning import L1NormPruner, WandaPruner
    >>> summary_of(L1NormPruner)
    'Removes the blocks (by default output channels) of least L1 norm.'
    >>> summary_of(WandaPruner)
    'Wanda: a weight is worth its magnitude times the norm of what it multiplies.'
    """
    first = " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split()).replace("``", "")
    first = re.sub(rf",? {FORMULA.pattern}\.$", ".", first)
    if FORMULA.search(first):
        first = (sys.modules[cls.__module__].__doc__ or "").partition("\n")[0]
    return first


def needs_of(cls: type[Pruner]) -> tuple[str, ...]:
    """What a pruner cannot do without, beside a model and a config list."""
    parameters, doc = inspect.signature(cls).parameters, inspect.getdoc(cls) or ""
    needs = {
        "a pruner": "pruner" in parameters,
        "calibration data": "calibration" in parameters,
        "training before it prunes": issubclass(cls, LearningPruner),
        "training while it prunes": cls.needs_training,
        "example inputs": NEEDS_INPUTS.search(doc.partition("Raises:")[2]) is not None,
    }
    return tuple(need for need, needed in needs.items() if needed)


def _listed(cls: type[Pruner], others: tuple[str, ...]) -> Listed:
    arguments = arguments_of(cls, others).items()
    spelt = tuple(name if own.default is own.empty else f"{name}={own.default!r}" for name, own in arguments)
    return Listed(cls.__name__, summary_of(cls), needs_of(cls), spelt)
