r"""What numbers a quantized tensor is stored as, and the arithmetic between them and the real ones.

A stored value q stands for :math:`(q - z) s`, with a scale s and a zero point z:

.. math:: q = \mathrm{clip}(\mathrm{round}(x \cdot s^{-1}) + z,\; q_{min},\; q_{max})

Halves are rounded to even, and the product with the inverse of the scale is what is rounded, as in PyTorch's own
kernels (``torch.fake_quantize_per_tensor_affine``), whose results these are.

Paper: Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (CVPR
2018), section 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tersor.config import FloatDtype, IntDtype, QuantDtype, QuantizationSpec
from tersor.errors import InvalidValueError

_NARROW = 16
"""Up to so many bits float32 counts exactly enough."""


@dataclass(frozen=True)
class Format:
    """The numbers that a tensor is stored as.

    Attributes:
        dtype: their type.
        scheme: ``symmetric`` (the zero point is fixed) or ``affine`` (it follows the range).
        low: the lowest.
        high: the highest.

    >>> form = Format.of(QuantizationSpec(quant_dtype="int8", quant_scheme="symmetric"))
    >>> (form.low, form.high), Format.of(QuantizationSpec(quant_dtype="uint4")).high
    ((-127, 127), 15)
    """

    dtype: QuantDtype
    scheme: Literal["affine", "symmetric"]
    low: float
    high: float

    @classmethod
    def of(cls, spec: QuantizationSpec, *, where: str = "", full: bool = False) -> Format:
        """What a spec asks for.

        Args:
            spec: its type, scheme and range; int8 and symmetric where nothing is said.
            where: what errors call it.
            full: whether the range is full where the spec says nothing; else signed symmetric types are narrow.

        Raises:
            InvalidValueError: ``int1``, which has no zero.
        """
        dtype, scheme = spec.quant_dtype or IntDtype(8), spec.quant_scheme or "symmetric"
        if isinstance(dtype, FloatDtype):
            return cls(dtype, scheme, -dtype.largest, dtype.largest)
        if not dtype.signed:
            return cls(dtype, scheme, 0, 2**dtype.bits - 1)
        if dtype.bits == 1:
            raise InvalidValueError(
                "int1 holds -1 and 1 and has neither a zero nor a range",
                where=where,
                remedy="Use uint1, at least int2, or a quantizer that binarizes: DoReFaQuantizer, BNNQuantizer.",
            )
        high = 2 ** (dtype.bits - 1) - 1
        narrow = spec.quant_range == "narrow" or (spec.quant_range is None and scheme == "symmetric" and not full)
        return cls(dtype, scheme, -high if narrow else -high - 1, high)

    def scale_and_zero_point(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        r"""The scale and the zero point for ranges of values.

        Symmetric: :math:`s = \max(|min|, |max|) / ((q_{max} - q_{min}) / 2)`, and z the middle. Affine: the range is
        extended to hold 0, which gets a stored value of its own, as padding needs; :math:`s = (max - min) / (q_{max} -
        q_{min})` and :math:`z = q_{min} - \mathrm{round}(min / s)`.

        Args:
            minimum: of the values, any shape.
            maximum: of the same shape.

        Returns:
            Scale and zero point, float32, of that shape. A range of nothing but zeros has scale 1. Zero points are
            whole numbers between ``low`` and ``high``.

        >>> form = Format.of(QuantizationSpec(quant_dtype="uint8", quant_scheme="affine"))
        >>> form.scale_and_zero_point(torch.tensor(-1.0), torch.tensor(1.55))
        (tensor(0.0100), tensor(100.))
        """
        minimum, maximum = minimum.double(), maximum.double()
        width = self.high - self.low
        if self.scheme == "symmetric":
            scale = torch.maximum(minimum.abs(), maximum.abs()) / (width / 2)
        else:
            minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
            scale = (maximum - minimum) / width
        scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1, scale).float()
        if self.scheme == "symmetric":
            return scale, torch.full_like(
                scale, 0 if isinstance(self.dtype, FloatDtype) else (width + 1) // 2 + self.low
            )
        return scale, (self.low - (minimum / scale).round()).clamp(self.low, self.high).float()

    def quantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The stored values, as float32 (float64 where float32 does not count far enough).

        Args:
            x: real values.
            scale: broadcasts against ``x``.
            zero_point: of the scale's shape.

        >>> form = Format.of(QuantizationSpec(quant_dtype="int4"))
        >>> form.quantize(torch.tensor([-9.0, 0.26, 1.0]), torch.tensor(0.5), torch.tensor(0.0))
        tensor([-7.,  1.,  2.])
        """
        return self._stored(self._shifted(x, scale, zero_point))

    def dequantize(self, q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The real values that stored ones stand for: ``(q - zero_point) * scale``."""
        return (q - zero_point) * scale

    def simulate(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Quantize and dequantize, in ``x``'s type and differentiable.

        The gradient goes straight through where the value lies within the range, and is 0 where it was clipped.

        Paper: Bengio, Leonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons (2013).

        >>> form = Format.of(QuantizationSpec(quant_dtype="int4"))
        >>> x = torch.tensor([-9.0, 0.26], requires_grad=True)
        >>> form.simulate(x, torch.tensor(0.5), torch.tensor(0.0)).sum().backward()
        >>> x.grad
        tensor([0., 1.])
        """
        result: Any = _Simulate.apply(x, scale, zero_point, self)
        return result

    def _shifted(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Before clipping."""
        wide = x.dtype is torch.float64 or (self.dtype.bits > _NARROW)
        x, scale = (x.double(), scale.double()) if wide else (x.float(), scale)
        x = x * (1 / scale)
        return x if isinstance(self.dtype, FloatDtype) else x.round_().add_(zero_point)

    def _stored(self, shifted: Tensor) -> Tensor:
        return self._in_type(shifted.clamp(self.low, self.high))

    def _in_type(self, stored: Tensor) -> Tensor:
        return stored.to(self.dtype.torch_dtype).to(stored.dtype) if isinstance(self.dtype, FloatDtype) else stored

    def as_calibration(self) -> dict[str, Any]:
        """What a calibration config says of it."""
        return {
            "quant_dtype": self.dtype.as_config(),
            "quant_bits": self.dtype.bits,
            "quant_scheme": self.scheme,
            "quant_min": self.low,
            "quant_max": self.high,
        }


class _Simulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, form: Format) -> Tensor:
        shifted = form._shifted(x, scale, zero_point)
        clipped = shifted.clamp(form.low, form.high)
        ctx.form = form
        if torch.compiler.is_compiling():  # what is fused is cheaper to compute again than to keep
            ctx.save_for_backward(x, scale, zero_point)
        else:
            ctx.save_for_backward(shifted == clipped)
        return form._in_type(clipped).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        inside, *parameters = ctx.saved_tensors
        if parameters:
            shifted = ctx.form._shifted(inside, *parameters)
            # A number in place of a bool, which would be kept for the backward pass after all, and is slow on CPU.
            beyond = (shifted - shifted.clamp(ctx.form.low, ctx.form.high)).abs()
            inside = 1 - (beyond * 1e6).clamp(max=1)
        return (gradients[0] * inside).to(gradients[0].dtype), None, None, None
