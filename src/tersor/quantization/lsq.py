"""LSQ: the step of each grid is learned by its own gradient, together with the weights."""

from __future__ import annotations

from functools import partial
from typing import final

import torch
from torch import Tensor

from tersor.config.values import is_activation
from tersor.errors import ConflictError
from tersor.quantization.format import Format
from tersor.quantization.learned_scale import LearnedScaleQuantizer
from tersor.quantization.learned_uniform import Initializer
from tersor.targets.planned import PlannedTarget


@final
class LsqQuantizer(LearnedScaleQuantizer):
    r"""Learns the distance between two levels, by the gradient that rounding itself has for it.

    .. math::
        \hat{x} = s \cdot \operatorname{round}(\operatorname{clip}(x / s, -Q_N, Q_P)), \qquad
        s_0 = \frac{2 \langle |x| \rangle}{\sqrt{Q_P}}

    A range that follows the extremes, as in :class:`tersor.quantization.QATQuantizer`, wastes most of few levels on
    outliers; a learned step trades what is clipped against how finely the rest is rounded. Use it for 2 to 4 bits. Its
    gradient is that of :func:`tersor.quantization.learned_step.lsq`, times the paper's :math:`1 / \sqrt{N Q_P}` for N
    values. What is learned is the logarithm of the step, so that steps stay positive, which the paper leaves to chance;
    see :class:`tersor.quantization.learned_uniform.LearnedUniform`.

    As in the paper signed types use all of their levels, :math:`Q_N = 2^{b-1}`, zero is level 0, and of unsigned types
    :math:`Q_N = 0`. Give inputs and outputs that are never negative, such as those after a ReLU, an unsigned type: a
    signed one would have half of its levels for nothing. Where both signs occur, but unequally (SiLU, GELU), take
    :class:`tersor.quantization.LsqPlusQuantizer`. Weights that a mask removes do not count in :math:`s_0`.

    Paper: Esser, McKinstry, Bablani, Appuswamy, Modha: Learned Step Size Quantization (ICLR 2020).

    Args: those of :class:`tersor.quantization.learned_scale.LearnedScaleQuantizer`.

    Raises:
        ConflictError: an affine scheme, which needs an offset.

    Example:
        >>> layer = torch.nn.Linear(4, 8)
        >>> config_list = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int2"}]
        >>> quantizer = LsqQuantizer(layer, config_list)
        >>> optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.01), torch.randn(16, 4)
        >>> quantizer.start()
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     quantizer.loss(layer(x).square().mean()).backward()
        ...     quantizer.before_step()
        ...     optimizer.step()
        ...     quantizer.step()
        >>> quantizer.finish()
        >>> quantizer.get_calibration_config()[""]["weight"]["scale"].shape
        torch.Size([8, 1])
    """

    works_on_shards = True
    methods = frozenset({"lsq_clamp_round"})

    def form(self, target: PlannedTarget) -> Format:
        """What a target is stored as."""
        form = super().form(target)
        if form.scheme == "affine":
            raise ConflictError(
                "LSQ learns a step and no zero point",
                where=f"{target.config.where}['quant_scheme'] on {target.name}",
                legal=("symmetric",),
                remedy="Use LsqPlusQuantizer, or an unsigned quant_dtype for values that are never negative.",
            )
        return form

    def first(self, target: PlannedTarget, form: Format) -> Initializer:
        """By the mean magnitude."""
        return partial(first_step, high=form.high, zeros_count=is_activation(target.config.target_name))


def first_step(rows: Tensor, high: float, *, zeros_count: bool = True) -> tuple[Tensor, Tensor]:
    """The step to begin with: twice the mean magnitude over the square root of the greatest level.

    Args:
        rows: values, a row for each step.
        high: the greatest level.
        zeros_count: whether zeros are values like others; those of a parameter are what a mask removed.

    Returns:
        The steps, and zero points of 0.

    >>> first_step(torch.tensor([[1.0, -3.0], [0.0, 4.0]]), 4, zeros_count=False)
    (tensor([2., 4.]), tensor([0., 0.]))
    """
    count = rows.shape[-1] if zeros_count else (rows != 0).sum(-1).clamp(min=1)
    step = 2 * rows.abs().sum(-1) / count / high**0.5
    return step, torch.zeros_like(step)
