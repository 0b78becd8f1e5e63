"""Gradients of few bits, right on average: section 2.5 of DoReFa-Net."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.graph.inputs import map_tensors


def quantized_gradient(gradient: Tensor, bits: int) -> Tensor:
    r"""A gradient of few bits that is right on average: each sample is rounded up or down at random.

    .. math::
        \tilde{g} = 2 m \left[\frac{1}{n} \operatorname{round}\left(n \left(\frac{g}{2 m} + \frac{1}{2}\right)
        + \sigma\right) - \frac{1}{2}\right], \qquad n = 2^k - 1, \quad \sigma \sim U(-1/2, 1/2)

    The noise is what makes the mean right; without it small gradients would all be lost, or all be grown to half a
    step.

    Paper: Zhou, Wu, Ni, Zhou, Wen, Zou: DoReFa-Net (arXiv 1606.06160), equation 12.

    Args:
        gradient: of any shape, the samples first; :math:`m` is the largest magnitude of each. Fewer than two dimensions
            are one sample.
        bits: :math:`k`.

    Returns:
        of the same shape and type. What is not finite stays so, for a gradient scaler to see.

    >>> quantized_gradient(torch.tensor([[2.0, -2.0], [3.0, -3.0]]), bits=1)
    tensor([[ 2., -2.],
            [ 3., -3.]])
    """
    exact, steps = gradient.to(torch.promote_types(gradient.dtype, torch.float32)), 2**bits - 1
    inside = list(range(1, exact.dim()))
    largest = exact.abs().amax(inside, keepdim=True) if inside else exact.abs().max()
    unit = exact / (2 * largest.clamp_min(torch.finfo(exact.dtype).tiny)) + 0.5
    levels = (steps * unit + (torch.rand_like(exact) - 0.5)).round().clamp(0, steps)
    return (2 * largest * (levels / steps - 0.5)).to(gradient.dtype)


def low_bit_gradient(value: Tensor, bits: int) -> Tensor:
    """The value as it is, with :func:`quantized_gradient` in the backward pass."""
    quantizes = value.requires_grad and value.is_floating_point()
    return _LowBitGradient.apply(value, bits) if quantizes else value


class _LowBitGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return value.clone()  # not the value itself, into which a ReLU in place could not write then

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return quantized_gradient(gradients[0], ctx.bits), None


@final
class LowBitGradients:
    """A forward hook that makes the gradient of each output of a module one of few bits.

    Args:
        bits: of the gradients.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output as it is."""
        return map_tensors(output, lambda value: low_bit_gradient(value, self.bits))
