"""LSQ+: a step and an offset of each grid are learned together with the weights."""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor

from tersor.config.values import is_activation
from tersor.quantization.base import spec_of
from tersor.quantization.format import Format
from tersor.quantization.learned_scale import First, LearnedScaleQuantizer
from tersor.targets.planned import PlannedTarget

SHRINKINGS = 40
"""How many ranges are tried for the one of least squared error."""


@final
class LsqPlusQuantizer(LearnedScaleQuantizer):
    r"""Learns the distance between two levels, and where zero lies among them.

    .. math:: \hat{x} = s \cdot (\operatorname{clip}(\operatorname{round}(x / s) + z, q_{min}, q_{max}) - z)

    Activations such as SiLU, GELU and hard swish have a short negative tail. A signed type spends half of its levels on
    it, an unsigned one cuts it off; with an offset every level is used. Use it as
    :class:`tersor.quantization.LsqQuantizer`, for 2 to 4 bits, where values are skewed. The paper's offset is
    :math:`\beta = -s z`; see :func:`tersor.quantization.learned_step.lsq_plus`. The zero point is an integer between
    the lowest and the highest level, as kernels need it.

    Inputs and outputs are affine here unless the config list says symmetric. Weights are symmetric, as in the paper's
    best configuration, unless it says affine. It begins with

    .. math::
        s_0 = \frac{\max(|\mu - 3\sigma|, |\mu + 3\sigma|)}{2^{b-1}} \text{ (weights)}, \qquad
        s_0, z_0 = \arg\min \lVert \hat{x} - x \rVert^2 \text{ (inputs and outputs)}

    with the mean and the standard deviation of the weights that no mask removes. For an affine weight the range is
    :math:`\mu \pm 3\sigma`.

    Paper: Bhalgat, Lee, Nagel, Blankevoort, Kwak: LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization (CVPR workshops 2020).

    Args: those of :class:`tersor.quantization.learned_scale.LearnedScaleQuantizer`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(4, 8))
        >>> config_list = [{"op_names": ["1"], "target_names": ["weight", "_input_0"], "quant_dtype": "int4"}]
        >>> quantizer = LsqPlusQuantizer(model, config_list)
        >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.01), torch.randn(16, 4)
        >>> quantizer.start()
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     quantizer.loss(model(x).square().mean()).backward()
        ...     quantizer.before_step()
        ...     optimizer.step()
        ...     quantizer.step()
        >>> quantizer.finish()
        >>> int(quantizer.get_calibration_config()["1"]["_input_0"]["zero_point"])  # few levels for the short tail
        -6
    """

    methods = frozenset({"lsq_plus_clamp_round"})

    def form(self, target: PlannedTarget) -> Format:
        """What a target is stored as."""
        spec, config = spec_of(target), target.config
        entry = self.plan.entries[config.entry_index]
        own = entry.target_settings.get(config.target_name)
        written = "quant_scheme" in entry.settings.given() or (own is not None and "quant_scheme" in own.given())
        if is_activation(config.target_name) and not written:
            spec = spec.model_copy(update={"quant_scheme": "affine"})
        return Format.of(spec, where=f"{config.where} on {target.name}", full=self.full_range)

    def first(self, target: PlannedTarget, form: Format) -> First:
        """By the spread of weights, by the error that rounding inputs and outputs makes."""
        if is_activation(target.config.target_name):
            return partial(closest_grid, form=form)
        return partial(three_sigma, form=form)


def three_sigma(rows: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """The grid of which mean and standard deviation, times three, are the edges. Zeros are what a mask removed.

    Args:
        rows: values, a row for each grid.
        form: symmetric: the zero point is 0; affine: it follows the edges.

    Returns:
        Scales and zero points, not rounded.
    """
    kept = rows != 0
    count = kept.sum(-1).clamp(min=1)
    mean = rows.sum(-1) / count
    deviation = ((rows - mean.unsqueeze(-1)).square() * kept).sum(-1).div(count).sqrt()
    return grid_between(mean - 3 * deviation, mean + 3 * deviation, form)


def grid_between(minimum: Tensor, maximum: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """The scale and the zero point whose levels reach from one value to another.

    >>> from tersor.config import IntDtype
    >>> form = Format(IntDtype(2), "affine", -2, 1)
    >>> grid_between(torch.tensor(-1.0), torch.tensor(5.0), form)  # 0 is half a step from the lowest level
    (tensor(2.), tensor(-1.5000))
    """
    if form.scheme == "symmetric":
        # the paper divides by 2^(b-1), the magnitude of the lowest level of a signed type
        return torch.maximum(minimum.abs(), maximum.abs()) / max(-form.low, form.high), torch.zeros_like(minimum)
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    scale = (maximum - minimum) / (form.high - form.low)
    scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1, scale)
    return scale, form.low - minimum / scale


def closest_grid(rows: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Of the grids over the whole range and over smaller and smaller shares of it, that of least squared error.

    Args:
        rows: values, a row for each grid.
        form: what is stored.

    Returns:
        Scales and zero points, not rounded.

    >>> from tersor.config import IntDtype
    >>> rows = torch.tensor([0.0] + [1.0] * 99 + [9.0])  # one outlier: better clipped than to round all others to 0
    >>> scale, _ = closest_grid(rows, Format(IntDtype(2), "affine", -2, 1))
    >>> bool(scale < 2)
    True
    """
    low, high = rows.amin(-1), rows.amax(-1)
    best = least = None
    for share in range(SHRINKINGS, 0, -1):
        scale, zero_point = grid_between(low * share / SHRINKINGS, high * share / SHRINKINGS, form)
        scale = torch.where(scale < torch.finfo(scale.dtype).tiny, 1, scale)
        rounded = form.simulate(rows, scale.unsqueeze(-1), zero_point.round().unsqueeze(-1))
        error = (rounded - rows).square().sum(-1)
        if best is None or least is None:
            best, least = (scale, zero_point), error
        else:
            better = error < least
            best = (torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1]))
            least = torch.where(better, error, least)
    assert best is not None
    return best
