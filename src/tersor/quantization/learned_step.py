"""The rounding whose step is learned, as a function on tensors, and the steps to begin with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def lsq(x: Tensor, scale: Tensor, low: int, high: int, gradient_scale: float = 1.0) -> Tensor:
    r"""Round to multiples of a step that takes gradients.

    .. math:: \hat{x} = s \cdot \operatorname{round}(\operatorname{clip}(x / s, l, h))

    The gradient of :math:`x` goes straight through where :math:`l < x/s < h` and is 0 elsewhere. That of the step is

    .. math::
        \frac{\partial \hat{x}}{\partial s} = \begin{cases}
            \operatorname{round}(x/s) - x/s & l < x/s < h \\
            l & x/s \le l \\
            h & x/s \ge h
        \end{cases}

    It tells on which side of a value its level lies, and so draws steps to where fewer values are torn from theirs.
    The gradient of fake quantization with a fixed grid knows only of the values that are clipped.

    Paper: Esser, McKinstry, Bablani, Appuswamy, Modha: Learned Step Size Quantization (ICLR 2020), equations 1 to 3.

    Args:
        x: any floating-point tensor; half types are computed in float32.
        scale: the step, positive, broadcastable against ``x``.
        low: the least level.
        high: the greatest.
        gradient_scale: what the gradient of the step is multiplied by, for it to be of the same order as the
            gradients of the weights; the paper's is one over the square root of ``high`` times the number of elements.

    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> rounded = lsq(torch.tensor([-9.0, 0.2, 9.0]), step, -2, 1)
    >>> rounded.tolist()
    [-1.0, 0.0, 0.5]
    >>> rounded.sum().backward()
    >>> round(step.grad.item(), 6)  # -2 + (0 - 0.4) + 1
    -1.4
    """
    return _LearnedStep.apply(x, scale, None, low, high, gradient_scale)


def lsq_plus(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, *, gradient_scale: float = 1.0
) -> Tensor:
    r"""Round to a grid whose step and offset both take gradients.

    .. math:: \hat{x} = s \cdot (\operatorname{clip}(\operatorname{round}(x / s) + z, l, h) - z), \qquad
        z = \operatorname{clip}(\operatorname{round}(\text{zero point}), l, h)

    The paper's offset is :math:`\beta = -s z`. A kernel holds an integer zero point, so that zero is exact; hence it is
    the zero point that is learned, and rounded. The gradients are the paper's in these coordinates: with
    :math:`l - z < x/s < h - z` inside,

    .. math::
        \frac{\partial \hat{x}}{\partial s} = \begin{cases}
            \operatorname{round}(x/s) - x/s \\
            l - z \\
            h - z
        \end{cases}
        \qquad
        \frac{\partial \hat{x}}{\partial z} = \begin{cases}
            0 & \text{inside} \\
            -s & \text{below} \\
            -s & \text{above}
        \end{cases}

    Paper: Bhalgat, Lee, Nagel, Blankevoort, Kwak: LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization (CVPR workshops 2020), equations 3 to 7.

    Args:
        x: any floating-point tensor; half types are computed in float32.
        scale: the step, positive, broadcastable against ``x``.
        zero_point: the level of zero, in levels, of the shape of ``scale``.
        low: the least level.
        high: the greatest.
        gradient_scale: what the gradients of the step and of the zero point are multiplied by.

    >>> zero_point = torch.tensor(-1.2, requires_grad=True)
    >>> lsq_plus(torch.tensor([-9.0, 0.7, 9.0]), torch.tensor(0.5), zero_point, -2, 1).tolist()
    [-0.5, 0.5, 1.0]
    """
    return _LearnedStep.apply(x, scale, zero_point, low, high, gradient_scale)


class _LearnedStep(torch.autograd.Function):
    """Both of the above. Only ``x`` is kept for the backward pass; what else it takes is computed again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int, gradient_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.low, ctx.high, ctx.gradient_scale = low, high, gradient_scale
        _, distance = _steps(x, scale, zero_point, low, high)
        return (distance * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, scale, zero_point = ctx.saved_tensors
        (gradient,) = gradients
        steps, distance = _steps(x, scale, zero_point, ctx.low, ctx.high)
        least, greatest = _edges(zero_point, ctx.low, ctx.high)
        inside = (steps > least) & (steps < greatest)
        of_x = gradient * inside if ctx.needs_input_grad[0] else None
        of_scale = of_zero_point = None
        if ctx.needs_input_grad[1]:
            of_scale = gradient * torch.where(inside, distance - steps, distance) * ctx.gradient_scale
            of_scale = of_scale.sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            of_zero_point = torch.where(inside, 0, -gradient * scale) * ctx.gradient_scale
            of_zero_point = of_zero_point.sum_to_size(zero_point.shape)
        return of_x, of_scale, of_zero_point, None, None, None


def _steps(x: Tensor, scale: Tensor, zero_point: Tensor | None, low: int, high: int) -> tuple[Tensor, Tensor]:
    """How many steps each value is from zero, and how many its level is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # a scale of no dimensions would not widen a half type
    steps = wide * (1 / scale)  # as torch's kernels have it
    least, greatest = _edges(zero_point, low, high)
    return steps, steps.round().clamp(least, greatest)


def _edges(zero_point: Tensor | None, low: int, high: int) -> tuple[Any, Any]:
    if zero_point is None:
        return low, high
    zero_point = zero_point.round().clamp(low, high)
    return low - zero_point, high - zero_point
