"""Every error that Tersor raises on purpose.

    TersorError
    ├── ConfigError          a config list, a recipe or a setting is wrong
    │   ├── UnknownKeyError      a key that no spec has
    │   ├── InvalidValueError    a value of the wrong type or outside its range
    │   ├── UnmatchedError       a name, a type or a pattern that matches nothing in the model
    │   └── ConflictError        two settings that cannot hold together
    ├── WrapError            a model cannot be wrapped or unwrapped as asked
    ├── MaskError            masks do not fit the model
    │   └── EmptyLayerError      a mask would leave nothing of a layer
    ├── NumericalError       numbers that cannot be computed with: not finite, a singular matrix
    ├── TrainingError        the training or evaluating functions cannot be called as asked
    ├── TraceError           the model cannot be run or followed on the example inputs
    ├── EquivalenceError     a change that must not alter what a model computes did alter it
    ├── SpeedupError         the model cannot be made small
    │   └── VerificationError    the small model does not compute what the masked one does
    ├── CheckpointError      a file is damaged, foreign or does not fit
    └── MissingExtraError    an optional package is not installed

Each message says where, what, why and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TersorError(Exception):
    """Base of all errors.

    Args:
        what: what is wrong, with the value that is wrong.
        where: the place that the user wrote or named (``config_list[0]['sparse_ratio']``, ``conv1.weight``, a path).
        legal: the values that would be accepted.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, where: str = "", legal: Iterable[object] = (), remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.legal = tuple(str(value) for value in legal)
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if (self.legal or self.remedy) and not text.endswith((".", "?", "!")):
            text += "."
        if self.legal:
            text += f" Legal: {', '.join(self.legal)}."
        if self.remedy:
            text += f" {self.remedy}"
        return text


class ConfigError(TersorError, ValueError):
    """A config list, a recipe or a setting is wrong."""


class UnknownKeyError(ConfigError):
    """A key that no spec has."""


class InvalidValueError(ConfigError):
    """A value of the wrong type or outside its range."""


class UnmatchedError(ConfigError):
    """A name, a type or a pattern that matches nothing in the model."""


class ConflictError(ConfigError):
    """Two settings that cannot hold together."""


class WrapError(TersorError, RuntimeError):
    """A model cannot be wrapped or unwrapped as asked."""


class MaskError(TersorError, ValueError):
    """Masks do not fit the model."""


class EmptyLayerError(MaskError):
    """A mask would leave nothing of a layer."""


class NumericalError(TersorError, ArithmeticError):
    """Numbers that cannot be computed with: not finite, or a matrix that no damping makes invertible."""


class TrainingError(TersorError, RuntimeError):
    """The training or evaluating functions cannot be called as asked."""


class TraceError(TersorError, RuntimeError):
    """The model cannot be run or followed on the example inputs."""


class EquivalenceError(TersorError, RuntimeError):
    """A change that must not alter what a model computes did alter it; it was taken back."""


class SpeedupError(TersorError, RuntimeError):
    """The model cannot be made small."""


class VerificationError(SpeedupError):
    """The small model does not compute what the masked one does."""


class CheckpointError(TersorError, RuntimeError):
    """A file is damaged, foreign or does not fit."""


class MissingExtraError(TersorError, ImportError):
    """An optional package is not installed."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """The remedy that offers the nearest spelling, or an empty string where nothing is near or the name is no mistake.

    >>> nearest("sparse_ration", ["sparse_ratio", "granularity"])
    "Did you mean 'sparse_ratio'?"
    >>> nearest("xyz", ["sparse_ratio"]), nearest("Linear", ["Linear", "Bilinear"])
    ('', '')
    """
    known = list(candidates)
    if name in known:
        return ""
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f"Did you mean {folded[close[0]]!r}?" if close else ""
