"""The simulation for methods whose paper fixes the grid: it follows from no range of values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tersor.config.values import is_activation
from tersor.errors import ConflictError
from tersor.quantization.base import Quantizer, spec_of
from tersor.quantization.fake_quantize import FakeQuantize, check_same
from tersor.quantization.format import Format
from tersor.targets.planned import PlannedTarget


class FixedGrid(FakeQuantize):
    """Base of simulations on a grid that a method fixes. It starts as doing nothing.

    Args:
        name: ``module.target``, for messages.
        form: what is stored.

    Attributes:
        enabled: False passes values untouched.
    """

    def __init__(self, name: str, form: Format) -> None:
        super().__init__()
        self.name = name
        self.form = form
        self.enabled = False

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, of one shape."""

    @abstractmethod
    def rounded(self, value: Tensor) -> Tensor:
        """The value on the grid, from at least float32 and in its type, with the gradient that the paper gives it."""

    @property
    def measured(self) -> frozenset[str]:
        """The keys of a calibration that are no constants of the method."""
        return frozenset()

    def forward(self, value: Tensor) -> Tensor:
        """The value on the grid, in its own type."""
        if not self.enabled or not value.is_floating_point():
            return value
        return self.rounded(value.to(torch.promote_types(value.dtype, torch.float32))).to(value.dtype)

    def calibration(self) -> dict[str, Any]:
        """Scale, zero point and format."""
        scale, zero_point = (of.detach().cpu().clone() for of in self.grid())
        return {"scale": scale, "zero_point": zero_point, **self.form.as_calibration()}

    def check_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Refuse what is not of this grid.

        Raises:
            CheckpointError: naming the key that differs.
        """
        check_same(self.name, self.calibration(), calibration, measured=self.measured)

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Simulate from now on, and look at values no more."""
        self.enabled, self.watching = True, False

    def flags(self) -> dict[str, bool]:
        """What is on."""
        return {"enabled": self.enabled, **super().flags()}


def refuse_given(target: PlannedTarget, keys: tuple[str, ...], why: str) -> None:
    """Refuse settings that a method has no use for.

    Args:
        target: whose settings they are.
        keys: which must not be set.
        why: what the method does in their place.

    Raises:
        ConflictError: naming the first that is set.
    """
    for key in keys:
        value = getattr(spec_of(target), key)
        if value not in (None, False) and getattr(value, "name", None) != "default":
            raise ConflictError(
                f"{key!r} has no meaning here: {why}",
                where=f"{target.config.where}[{key!r}] on {target.name}",
                remedy="Leave it out.",
            )


def refuse_vector(quantizer: Quantizer, target: PlannedTarget) -> None:
    """Refuse a bias, or the scale of a norm, for methods that give all values of a tensor another size.

    Raises:
        ConflictError: it has fewer than two dimensions.
    """
    if not is_activation(target.config.target_name) and quantizer.latent(target).dim() < 2:
        raise ConflictError(
            f"{type(quantizer).__name__} does not keep the size of values, and here it matters",
            where=f"{target.config.where} on {target.name}",
            remedy="Set target_names to what it is made for: weights of two dimensions or more, inputs and outputs.",
        )
