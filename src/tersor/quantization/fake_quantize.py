"""What every quantizer puts on a target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tersor.errors import CheckpointError, NumericalError
from tersor.quantization.observers import Sized
from tersor.wrapping import Stage, Transform


class FakeQuantize(Sized, Transform):
    """Simulates the quantization of one target: rounds to the grid of its type and back."""

    stage = Stage.QUANTIZE

    @abstractmethod
    def calibration(self) -> dict[str, Any]:
        """What a deployed kernel needs: scale, zero point, type."""

    @abstractmethod
    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Take over what :meth:`calibration` of another one returned."""

    def check_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Raise a ``CheckpointError`` where :meth:`load_calibration` could not take it."""

    def flags(self) -> dict[str, bool]:
        """The attributes that say what it does by now; part of :meth:`state`."""
        return {"watching": self.watching}

    def state(self) -> dict[str, Any]:
        """All that has to be kept to go on after a crash."""
        return {
            "flags": self.flags(),
            "tensors": {name: tensor.detach().clone() for name, tensor in self.state_dict().items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        for name, value in state["flags"].items():
            setattr(self, name, value)
        self.load_state_dict(state["tensors"])


def check_same(
    name: str, own: Mapping[str, Any], given: Mapping[str, Any], *, measured: frozenset[str] = frozenset()
) -> None:
    """Refuse a calibration that says something else than a target's own.

    Args:
        name: ``module.target``, for messages.
        own: what the target has.
        given: what it would take over.
        measured: keys of tensors that need only be of the same shape.

    Raises:
        CheckpointError: naming the key that differs.

    >>> check_same("fc.weight", {"quant_dtype": "int8"}, {"quant_dtype": "int4"})
    Traceback (most recent call last):
        ...
    tersor.errors.CheckpointError: fc.weight: quant_dtype is 'int4' in the calibration, and 'int8' here. Make ...
    """
    for key, value in own.items():
        if not _same(given.get(key), value, exactly=key not in measured):
            raise CheckpointError(
                f"{key} is {_shown(given.get(key))} in the calibration, and {_shown(value)} here",
                where=name,
                remedy="Make the quantizer from the config list that the calibration was made with.",
            )


def _same(given: object, own: object, *, exactly: bool) -> bool:
    if not isinstance(own, Tensor) or not isinstance(given, Tensor):
        return type(given) is type(own) and bool(given == own)
    return given.shape == own.shape and (not exactly or bool((given.cpu() == own).all()))


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return repr(value.item()) if value.numel() == 1 else f"of shape {tuple(value.shape)}"


def never_seen(what: str, where: str) -> NumericalError:
    """The error for a range that cannot be known.

    Args:
        what: where nothing passed, in words.
        where: the name of the target.
    """
    return NumericalError(
        f"no value was ever seen {what}",
        where=where,
        remedy="Give data that reaches this module, or leave it out; integers and bools are never rounded, and a "
        "weight that another module reads (attention's out_proj) has no inputs of its own.",
    )
