r"""The two operators that a lowered program is made of, beside torch's own: values to stored numbers, and back.

Each engine wants quantization said in another way. So a program says it in one way of its own, which no compiler
takes apart, and each engine's emitter puts its own words in their place:

- ``tersor::quantize(x, scale, zero_point, kind, low, high, axis, block)``
- ``tersor::dequantize(q, scale, zero_point, kind, axis, block)``
- ``tersor::choose(x, kind, scheme, low, high, axis, block)``: scale and zero point for the range of a value, for what
  is dynamic.

``kind`` is the name of a type (``int4``); ``low`` and ``high`` are the least and the greatest stored number. Scales are
one number (``axis`` and ``block`` None), one for each index of dimension ``axis`` (``block`` None), or of ``x``'s rank,
with one for each ``block`` indices of ``axis`` and one for each index of the other dimensions: what the ONNX operators
mean by these words. Stored numbers and zero points are in the least type of torch that holds them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.config.dtypes import FloatDtype, IntDtype, QuantDtype, parse_dtype

SIGNS = IntDtype(1)
"""The type without a zero: values are rounded to their signs."""
COUNTED = 16
"""Up to so many bits float32 counts exactly enough; beyond, operators compute in float64, as the simulation does."""


def not_in_bytes(dtype: QuantDtype, *, is_activation: bool) -> str:
    """Why kernels that compute with bytes alone cannot hold values of a type; empty where they can.

    >>> not_in_bytes(IntDtype(16), is_activation=True), not_in_bytes(IntDtype(4), is_activation=True)
    ('has no int16 inputs and outputs', '')
    """
    if isinstance(dtype, FloatDtype) or dtype.bits > 8 or (dtype == SIGNS and is_activation):
        return f"has no {dtype.as_config()} {'inputs and outputs' if is_activation else 'weights'}"
    return ""


def storage_type(dtype: QuantDtype) -> torch.dtype:
    """The least type of torch that holds a type.

    >>> from tersor.config import IntDtype
    >>> storage_type(IntDtype(4)), storage_type(IntDtype(12)), storage_type(IntDtype(8, signed=False))
    (torch.int8, torch.int16, torch.uint8)
    """
    if isinstance(dtype, FloatDtype):
        return dtype.torch_dtype
    if dtype.bits <= 8:
        return torch.int8 if dtype.signed else torch.uint8
    needed = dtype.bits + (not dtype.signed)  # torch computes little with wider unsigned types
    return torch.int16 if needed <= 16 else torch.int32 if needed <= 32 else torch.int64


def spread(values: Tensor, like: Tensor, axis: int | None, block: int | None) -> Tensor:
    """Scales or zero points in a shape that broadcasts against a tensor.

    >>> spread(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 6), 1, 3)
    tensor([[1., 1., 1., 2., 2., 2.]])
    """
    if axis is None:
        return values
    if block is None:
        return values.view([-1 if dim == axis else 1 for dim in range(like.dim())])
    return values.repeat_interleave(block, axis).narrow(axis, 0, like.shape[axis])


@torch.library.custom_op("tersor::quantize", mutates_args=())
def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    kind: str,
    low: float,
    high: float,
    axis: int | None = None,
    block: int | None = None,
) -> Tensor:
    """The stored numbers: ``clip(round(x / scale) + zero_point, low, high)``, halves to even.

    ``int1`` has no zero: its numbers are signs, that of zero 1.
    """
    dtype = parse_dtype(kind)
    if kind == "int1":
        return torch.where(x < 0, -1, 1).to(torch.int8)
    wide = x.dtype is torch.float64 or dtype.bits > COUNTED
    q = (x.double() if wide else x.float()) * (1 / spread(scale.double() if wide else scale, x, axis, block))
    if isinstance(dtype, FloatDtype):
        return q.clamp(low, high).to(dtype.torch_dtype)
    return (q.round() + spread(zero_point, x, axis, block)).clamp(low, high).to(storage_type(dtype))


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, kind: str, *_: object) -> Tensor:
    return torch.empty_like(x, dtype=storage_type(parse_dtype(kind)))


@torch.library.custom_op("tersor::dequantize", mutates_args=())
def dequantize(
    q: Tensor, scale: Tensor, zero_point: Tensor, kind: str, axis: int | None = None, block: int | None = None
) -> Tensor:
    """The real values, float32: ``(q - zero_point) * scale``."""
    wide = torch.float64 if parse_dtype(kind).bits > COUNTED else torch.float32
    return ((q.to(wide) - spread(zero_point.to(wide), q, axis, block)) * spread(scale, q, axis, block)).float()


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("tersor::choose", mutates_args=())
def choose(
    x: Tensor, kind: str, scheme: str, low: float, high: float, axis: int | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point for the range of ``x``: of all of it, or of each row along ``axis``.

    The formulas are those of :meth:`tersor.quantization.Format.scale_and_zero_point`.
    """
    from tersor.quantization.format import Format  # here: the operator needs it when it runs alone

    dims = tuple(range(x.dim())) if axis is None else (axis,)
    form = Format(parse_dtype(kind), "affine" if scheme == "affine" else "symmetric", low, high)
    scale, zero_point = form.scale_and_zero_point(
        x.amin(dims, keepdim=axis is not None), x.amax(dims, keepdim=axis is not None)
    )
    return scale, zero_point.to(storage_type(form.dtype))


@choose.register_fake
def _(
    x: Tensor, kind: str, scheme: str, low: float, high: float, axis: int | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    shape = [] if axis is None else [1 if dim == axis else size for dim, size in enumerate(x.shape)]
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=storage_type(parse_dtype(kind)))
