"""LSQ+: a step and an offset of each grid are learned together with the weights."""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor

from tersor.config.values import is_activation
from tersor.quantization.base import spec_of
from tersor.quantization.format import Format
from tersor.quantization.learned_scale import LearnedScaleQuantizer
from tersor.quantization.learned_uniform import Initializer, above_zero
from tersor.targets.planned import PlannedTarget

SHRINKINGS = 40
"""How many ranges are tried for the one of least squared error."""
SAMPLES = 100_000
"""How many values are looked at for that."""


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
        >>> -8 < int(quantizer.get_calibration_config()["1"]["_input_0"]["zero_point"]) < -4  # the tail gets few levels
        True
    """

    works_on_shards = True
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

    def first(self, target: PlannedTarget, form: Format) -> Initializer:
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
        return above_zero(torch.maximum(minimum.abs(), maximum.abs()) / max(-form.low, form.high)), minimum * 0
    minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
    scale = above_zero((maximum - minimum) / (form.high - form.low))
    return scale, form.low - minimum / scale


def closest_grid(rows: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Of the grids over the whole range and over smaller and smaller shares of it, that of least squared error.

    Of more than a hundred thousand values every so many are looked at.

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
    stride = max(rows.numel() // SAMPLES, 1) | 1  # odd, so as not to keep step with channels
    shares = torch.arange(SHRINKINGS, 0, -1, device=rows.device) / SHRINKINGS
    rows = rows[..., ::stride]
    grids = grid_between(rows.amin(-1, keepdim=True) * shares, rows.amax(-1, keepdim=True) * shares, form)
    error = errors_of_grids(rows, *grids, form.low, form.high)
    best = error.argmin(-1, keepdim=True)
    scale, zero_point = (each.gather(-1, best).squeeze(-1) for each in grids)
    return scale, zero_point


@torch.library.custom_op("tersor::errors_of_grids", mutates_args=())
def errors_of_grids(rows: Tensor, scale: Tensor, zero_point: Tensor, low: float, high: float) -> Tensor:
    """The squared error that each of some grids makes; an operator, for a compiler not to unroll the loop.

    Args:
        rows: shape (*grid, values of a block).
        scale: shape (*grid, grids to try).
        zero_point: likewise; rounded here.
        low: the lowest level.
        high: the highest.

    Returns:
        The shape of ``scale``.
    """
    errors: list[Tensor] = []
    for each, zero in zip(scale.unbind(-1), zero_point.round().unbind(-1), strict=True):
        each, zero = each.unsqueeze(-1), zero.unsqueeze(-1)
        rounded = (((rows * (1 / each)).round() + zero).clamp(low, high) - zero) * each
        errors.append((rounded - rows).square().sum(-1))
    return torch.stack(errors, -1)


@errors_of_grids.register_fake
def _(rows: Tensor, scale: Tensor, zero_point: Tensor, low: float, high: float) -> Tensor:
    return torch.empty_like(scale)
