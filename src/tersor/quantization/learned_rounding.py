r"""Rounding up or down as something to be learned: the mathematics of AdaRound.

A weight w between two values of its grid goes to the lower one, :math:`\lfloor w / s \rfloor`, or to the one above.
Which is better for the layer's output depends on all other weights of its row. So the step up is made continuous, a
number h in [0, 1] for each weight; it is learned on calibration data, and driven to 0 or 1 on the way.

Paper: Nagel, Amjad, van Baalen, Louizos, Blankevoort: Up or Down? Adaptive Rounding for Post-Training Quantization
(ICML 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tersor.config import values
from tersor.quantization.format import Format
from tersor.training.learned import Learned, Learner
from tersor.training.ranks import mean_over_processes

GAMMA, ZETA = -0.1, 1.1
"""The sigmoid is stretched to this range, so that 0 and 1 are reached and not only approached."""


def step_up(v: Tensor) -> Tensor:
    r"""The rectified sigmoid :math:`h(V) = \mathrm{clip}(\sigma(V) (\zeta - \gamma) + \gamma, 0, 1)`; equation 23.

    >>> step_up(torch.tensor([-5.0, 0.0, 5.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_step_up(h: Tensor) -> Tensor:
    """The V at which :func:`step_up` is h, for h in [0, 1]."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def regularizer(h: Tensor, beta: float) -> Tensor:
    r"""What being undecided costs, :math:`\sum 1 - |2 h - 1|^\beta`; equation 24.

    A high beta leaves all alone but those that are nearly decided, a low one pulls on all.

    >>> regularizer(torch.tensor([0.0, 0.5, 0.75]), beta=2.0)
    tensor(1.7500)
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def soft_quantized(lower: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, form: Format) -> Tensor:
    r"""The weight :math:`s \cdot (\mathrm{clip}(\lfloor w / s \rfloor + h + z, n, p) - z)`; equation 22.

    Args:
        lower: the integers below the weights, :math:`\lfloor w / s \rfloor`.
        h: how far each is moved up, in [0, 1].
        scale: s, and
        zero_point: z, as they broadcast against the weights.
        form: what is rounded to, from n to p.

    Returns:
        The weights; where h is 0 or 1 they are on the grid.
    """
    return ((lower + h + zero_point).clamp(form.low, form.high) - zero_point) * scale


@final
@dataclass(frozen=True)
class RoundingSettings:
    """How roundings are learned.

    Attributes:
        iterations: steps of Adam.
        batch_size: samples of a step, drawn at random.
        learning_rate: of Adam.
        regular_scale: what it costs to leave everything undecided, in errors of rounding to the nearest.
        warm_start: the share of the steps at the beginning in which there is no regularizer.
        beta: of the regularizer, from the first value to the last, in equal steps.
    """

    iterations: int = 1000
    batch_size: int = 256
    learning_rate: float = 0.03
    regular_scale: float = 100.0
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        for name, kind in (("iterations", "number of steps"), ("batch_size", "number of samples")):
            with values.at(name):
                values.whole(getattr(self, name), kind, 1)
        for name, high in (("learning_rate", math.inf), ("regular_scale", math.inf), ("warm_start", 1)):
            with values.at(name):
                values.number(getattr(self, name), "share" if high == 1 else "number", 0, high)

    def beta_at(self, step: int) -> float | None:
        """The beta of a step; None in the warm start.

        >>> [RoundingSettings(iterations=11, warm_start=0.1).beta_at(step) for step in (0, 2, 6, 10)]
        [None, 20.0, 11.0, 2.0]
        """
        first, last = math.ceil(self.warm_start * self.iterations), self.iterations - 1
        if step < first:
            return None
        share = (step - first) / max(last - first, 1)
        return self.beta[0] + (self.beta[1] - self.beta[0]) * share


@torch.no_grad()
def adaround(
    rows: Tensor,
    inputs: Tensor,
    targets: Tensor,
    form: Format,
    scales: tuple[Tensor, Tensor],
    *,
    keep: Tensor | None = None,
    settings: RoundingSettings | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Learn which weights to round up and which down.

    With X the inputs and Y the targets, this minimises

    .. math:: \frac{\lVert X \tilde W^\top - Y \rVert^2}{\lVert X W_{nearest}^\top - Y \rVert^2} +
        \lambda \frac{1}{N} \sum_{ij} 1 - |2 h(V_{ij}) - 1|^\beta

    by Adam, from the V at which :math:`\tilde W` is W. The paper has no denominator; with it one :math:`\lambda` suits
    all layers, whatever the size of their weights and inputs.

    Args:
        rows: weights, shape (groups, rows, columns).
        inputs: what they multiply, shape (groups, samples, columns); those of the quantized model.
        targets: what should come of it, shape (groups, samples, rows), without bias; of the original model.
        form: what is rounded to; evenly spaced numbers.
        scales: scale and zero point, which broadcast against the rows.
        keep: a mask of the rows' shape, True keeps; the others are zero in the result.
        settings: how they are learned; those of :class:`RoundingSettings` by default.
        seed: of the samples of each step.

    Returns:
        The weights on their grid, of the rows' shape and type. Computation is in float32 or wider. Where several
        processes learn, each on samples of its own, gradients are averaged.

    Example:
        >>> from tersor.config import IntDtype
        >>> rows, x = torch.tensor([[[0.44, 0.4]]]), torch.ones(1, 8, 2)  # 0.84 is to come out: 1 + 0 is near
        >>> int4 = Format(IntDtype(4), "symmetric", low=-7, high=7)
        >>> adaround(rows, x, x @ rows.mT, int4, (torch.tensor(1.0), torch.tensor(0.0)))
        tensor([[[1., 0.]]])
    """
    settings = settings or RoundingSettings()
    dtype = torch.promote_types(rows.dtype, torch.float32)
    scale, zero_point = (each.to(dtype) for each in scales)
    weights = rows.to(dtype) if keep is None else rows.to(dtype) * keep
    steps = weights * (1 / scale)
    lower = steps.floor()
    kept = 1 if keep is None else keep

    def weight_at(h: Tensor) -> Tensor:
        return soft_quantized(lower, h, scale, zero_point, form) * kept

    worst = mean_over_processes(_error(weight_at(steps.round() - lower), inputs, targets))
    if not worst:
        return weight_at(steps.round() - lower).to(rows.dtype)
    own = Learned(inverse_step_up(steps - lower))
    learner = Learner({"rounding": own}, settings.learning_rate)
    learner.start()
    generator = torch.Generator().manual_seed(seed)
    for step in range(settings.iterations):
        drawn = torch.randint(inputs.shape[1], (settings.batch_size,), generator=generator).to(inputs.device)
        with torch.enable_grad():
            h, beta = step_up(own.value), settings.beta_at(step)
            loss = _error(weight_at(h), inputs[:, drawn], targets[:, drawn]) / worst
            if beta is not None:
                loss = loss + settings.regular_scale * regularizer(h, beta) / h.numel()
            loss.backward()
        learner.step()
    learner.stop()
    return weight_at((step_up(own.value) >= 0.5).to(dtype)).to(rows.dtype)


def _error(rows: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """What a layer's output is off by: the squared error of a sample, over all channels."""
    return (inputs.to(rows.dtype) @ rows.mT - targets).square().sum() / inputs.shape[1]
