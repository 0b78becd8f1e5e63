"""What every quantizer puts on a target."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

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
