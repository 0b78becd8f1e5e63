"""Which operators pruning has made faster, by the engine's own profiles."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tersor.deploy.engine import Operator
from tersor.deploy.record import DeployReport

FASTER = 0.95
"""An operator that takes a larger share than this of its time before has not become faster: profiles are not exact."""
SMALL = 0.01
"""Operators that took less than this share of all are not looked at: there is nothing to be had, nor to be measured."""


@dataclass(frozen=True)
class OperatorChange:
    """A convolution or matrix product before and after.

    Attributes:
        name: in the engine's graph, before.
        kind: the engine's name of its type, after.
        before: milliseconds of one call.
        after: likewise.
    """

    name: str
    kind: str
    before: float
    after: float

    @property
    def is_faster(self) -> bool:
        """Whether pruning was of use here."""
        return self.after <= FASTER * self.before


def compare_operators(before: DeployReport, after: DeployReport) -> tuple[OperatorChange, ...]:
    """The convolutions and matrix products of a model before and after it was made smaller.

    They are told by their names, which engines take from the graph; where names differ, by their order, if there are as
    many as before.

    Args:
        before: of the model before, compiled for the same engine.
        after: of the smaller model.

    Returns:
        Those of both that took a hundredth of the time, slowest first; none where they cannot be told, or where the
        engine does not say how long they take.

    >>> report = lambda *times: DeployReport("e", "1", 0, 0, tuple(
    ...     Operator(f"conv_{n}", "Conv", "int8", time, computes=True) for n, time in enumerate(times)))
    >>> [change.is_faster for change in compare_operators(report(4.0, 1.0), report(2.0, 1.2))]
    [True, False]
    """
    pairs = _pairs(*([own for own in report.operators if own.computes] for report in (before, after)))
    found = [
        OperatorChange(old.name, new.kind, old.milliseconds, new.milliseconds)
        for old, new in pairs
        if old.milliseconds is not None and new.milliseconds is not None
    ]
    total = sum(own.milliseconds or 0.0 for own in before.operators)
    return tuple(sorted((own for own in found if own.before >= SMALL * total), key=lambda own: -own.before))


def _pairs(before: list[Operator], after: list[Operator]) -> list[tuple[Operator, Operator]]:
    named = {own.name: own for own in after}
    unique = len(named) == len(after) and max(Counter(own.name for own in before).values(), default=0) <= 1
    if unique and all(own.name in named for own in before):
        return [(own, named[own.name]) for own in before]
    return list(zip(before, after, strict=True)) if len(before) == len(after) else []
