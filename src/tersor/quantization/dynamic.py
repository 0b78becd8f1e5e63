"""Dynamic quantization: each value that passes has a scale of its own, from its own range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from tersor.config.values import is_activation
from tersor.errors import ConflictError
from tersor.quantization.base import Quantizer, spec_of
from tersor.quantization.cut import Cut
from tersor.quantization.fake_quantize import FakeQuantize, check_same
from tersor.quantization.format import Format
from tersor.targets.planned import PlannedTarget


@final
class DynamicQuantize(FakeQuantize):
    """Rounds an input or output to a grid that is laid anew, from its least to its greatest value, each time it passes.

    Nothing is clipped, and no calibration data is needed; a deployed model finds the range at run time, which costs a
    pass over the value. A scale for each token (``granularity: [-1]``, each row along the last dimension) keeps the
    outliers of one token from coarsening the others; it suits matrix products, whose rows are scaled afterwards.
    Transformers are usually served so: weights by channel, activations by token, dynamic.

    Masked elements count as zeros. A value that is infinite, or not a number, makes its whole block so.

    Papers: Zafrir, Boudoukh, Izsak, Wasserblat: Q8BERT (2019), for the technique in transformers; Yao et al.:
    ZeroQuant (NeurIPS 2022), by token.

    Args:
        name: ``module.target``, for messages.
        form: what is stored.
        cut: the blocks that share a scale.

    Attributes:
        enabled: False passes values untouched.
        scale: of the value that passed last, one for each of its blocks.
        zero_point: likewise.

    >>> from tersor.config import IntDtype
    >>> quantize = DynamicQuantize("fc._input_0", Format(IntDtype(4), "symmetric", -7, 7), Cut("", None, ()))
    >>> quantize.enabled = True
    >>> quantize.watch(torch.tensor([0.4, 7.0]))
    >>> quantize(torch.tensor([0.4, 7.0]))
    tensor([0., 7.])
    """

    def __init__(self, name: str, form: Format, cut: Cut) -> None:
        super().__init__()
        self.name = name
        self.form = form
        self.cut = cut
        self.enabled = False
        self.watching = True
        self.scale = torch.ones(())
        self.zero_point = torch.zeros(())

    @torch.no_grad()
    def watch(self, value: Tensor) -> None:
        """Take scale and zero point from the range of a value."""
        if self.enabled and value.is_floating_point() and value.numel():
            minimum, maximum = self.cut.rows(value).aminmax(dim=-1)
            self.scale, self.zero_point = self.form.scale_and_zero_point(minimum, maximum)

    def forward(self, value: Tensor) -> Tensor:
        """The value on the grid of what was watched last, in its own type."""
        if not (self.enabled and value.is_floating_point() and value.numel()):
            return value
        scale, zero_point = (self.cut.spread(each, value.shape) for each in (self.scale, self.zero_point))
        return self.form.simulate(value, scale, zero_point)

    def calibration(self) -> dict[str, Any]:
        """That it is dynamic, the format, and the granularity as in a config list; there is nothing to calibrate."""
        granularity = self.cut.granularity
        return {
            "dynamic": True,
            "granularity": "default" if granularity is None else granularity.as_config(),
            **self.form.as_calibration(),
        }

    def check_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Refuse what does not fit.

        Raises:
            CheckpointError: a scale that is fixed, another format or other blocks.
        """
        check_same(self.name, self.calibration(), calibration)

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """On from now on."""
        self.enabled = True

    def flags(self) -> dict[str, bool]:
        """Whether it is on."""
        return {"enabled": self.enabled, **super().flags()}


def dynamic(quantizer: Quantizer, target: PlannedTarget) -> DynamicQuantize | None:
    """The simulation of a target that its config list calls dynamic; None where it does not.

    For :meth:`tersor.quantization.base.Quantizer.fake_quantize`.

    Raises:
        ConflictError: it is a parameter.
    """
    if not spec_of(target).dynamic:
        return None
    if not is_activation(target.config.target_name):
        raise ConflictError(
            "a parameter does not change from one input to the next",
            where=f"{target.config.where}['dynamic'] on {target.name}",
            remedy="Set dynamic for inputs and outputs alone, in target_settings.",
        )
    return DynamicQuantize(target.name, quantizer.form(target), quantizer.cut(target))
