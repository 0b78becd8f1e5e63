"""One figure before and after compression, and numbers as people read them."""

from __future__ import annotations

import math
from dataclasses import dataclass


def si(value: float, unit: str = "") -> str:
    """A number with three significant digits, an SI prefix and its unit.

    Args:
        value: in the plain unit (bytes, seconds, or a count, for which ``unit`` is empty).
        unit: ``"B"``, ``"s"`` or nothing. Counts and bytes below 1000 are written in full.

    >>> si(78_010), si(4.089e9), si(312_336, "B"), si(0.00214, "s"), si(999), si(0)
    ('78.0 k', '4.09 G', '312 kB', '2.14 ms', '999', '0')
    """
    if not math.isfinite(value):
        return "n/a"
    if value == 0 or (unit != "s" and abs(value) < 1000):
        return f"{value:.0f} {unit}".rstrip()
    prefixes = {4: "T", 3: "G", 2: "M", 1: "k", 0: "", -1: "m", -2: "µ", -3: "n"}
    # The exponent of the rounded number: 999.9 is written as 1.00 k, not as 1000.
    exponent = math.floor(math.log10(float(f"{abs(value):.2e}")) + 1e-9) // 3
    exponent = max(-3, min(4 if unit != "s" else 0, exponent))
    scaled = value / 1000**exponent
    digits = max(0, 2 - math.floor(math.log10(float(f"{abs(scaled):.2e}")) + 1e-9))
    return f"{scaled:.{digits}f} {prefixes[exponent]}{unit}".rstrip()


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 as a percentage.

    >>> percent(0.4375)
    '43.8 %'
    """
    return f"{100 * share:.{digits}f} %"


_WORDS = {"": ("fewer", "more"), "B": ("smaller", "larger"), "s": ("faster", "slower")}


@dataclass(frozen=True)
class Metric:
    """One figure of a comparison.

    Attributes:
        key: the name that ``Comparison.ratio`` takes.
        label: the name for people.
        before: the figure of the model before, in the plain unit.
        after: the figure of the model after.
        unit: ``""`` (a count), ``"B"``, ``"s"``, or ``"score"`` for an accuracy, of which more is better.
        ratio: after / before; 1 where both are zero. For a latency it is the median over paired rounds, which need
            not be the quotient of the two medians.
        spread: for a latency, the 10th and 90th percentile before and after.
    """

    key: str
    label: str
    before: float
    after: float
    unit: str
    ratio: float
    spread: tuple[tuple[float, float], tuple[float, float]] | None = None

    @property
    def texts(self) -> tuple[str, str]:
        """Both figures for people.

        >>> Metric("macs", "MACs", 4e9, 1e9, "", 0.25).texts
        ('4.00 G', '1.00 G')
        >>> Metric("accuracy", "Accuracy", 0.993, 0.99, "score", 0.997).texts
        ('99.30 %', '99.00 %')
        """
        if self.unit != "score":
            return si(self.before, self.unit), si(self.after, self.unit)
        if self._is_share:
            return percent(self.before, 2), percent(self.after, 2)
        return f"{self.before:.5g}", f"{self.after:.5g}"

    @property
    def change(self) -> str:
        """What happened, in two words.

        >>> Metric("macs", "MACs", 4e9, 1e9, "", 0.25).change
        '4.00x fewer'
        >>> Metric("latency", "Latency", 1e-3, 1.1e-3, "s", 1.1).change
        '1.10x slower'
        >>> Metric("accuracy", "Accuracy", 0.993, 0.99, "score", 0.997).change
        '-0.30 points'
        """
        if self.unit == "score":
            difference = self.after - self.before
            return f"{100 * difference:+.2f} points" if self._is_share else f"{difference:+.4g}"
        if not 0 < self.ratio < math.inf:
            return "n/a"
        factor = 1 / self.ratio if self.ratio <= 1 else self.ratio
        if f"{factor:.2f}" == "1.00":
            return "unchanged"
        return f"{factor:.{2 if factor < 10 else 1}f}x {_WORDS[self.unit][self.ratio > 1]}"

    @property
    def _is_share(self) -> bool:
        return 0 <= self.before <= 1 and 0 <= self.after <= 1
