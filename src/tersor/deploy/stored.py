"""What a calibration says about a target, in the words of the operators of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.config import Granularity
from tersor.config.dtypes import IntDtype, QuantDtype, parse_dtype
from tersor.deploy.operators import dequantize, quantize, storage_type
from tersor.errors import CheckpointError


@dataclass(frozen=True)
class Stored:
    """How the values of one target are stored.

    Attributes:
        dtype: the type of the stored numbers.
        scheme: ``symmetric`` or ``affine``.
        low: the least of them.
        high: the greatest.
        scale: float32, in one of the shapes of :mod:`tersor.deploy.operators`; None where it is dynamic.
        zero_point: of the scale's shape, in the type of the stored numbers.
        axis: the dimension along which scales differ.
        block: how many indices of it share one; None for one each.
    """

    dtype: QuantDtype
    scheme: str
    low: float
    high: float
    scale: Tensor | None
    zero_point: Tensor | None
    axis: int | None = None
    block: int | None = None

    @classmethod
    def of(cls, calibration: Mapping[str, Any], where: str, shape: Sequence[int] | None = None) -> Stored:
        """What a calibration says.

        Args:
            calibration: of one target, as ``get_calibration_config()`` gives it.
            where: what errors call the target.
            shape: of a parameter; None for inputs and outputs.

        Raises:
            CheckpointError: it is no calibration, or its scales do not fit the shape.
        """
        try:
            dtype, scheme = parse_dtype(calibration["quant_dtype"]), str(calibration["quant_scheme"])
            low, high = calibration["quant_min"], calibration["quant_max"]
            if calibration.get("dynamic"):
                axis, block = _dynamic_axis(calibration.get("granularity", "default"), where)
                return cls(dtype, scheme, low, high, None, None, axis, block)
            scale = torch.as_tensor(calibration["scale"]).detach().cpu().float()
            zero_point = torch.as_tensor(calibration["zero_point"]).detach().cpu().double()
            _check(scale, zero_point, low, high, where)
        except KeyError as error:
            raise CheckpointError(
                f"there is no {error.args[0]!r} in its calibration",
                where=where,
                remedy="Give what get_calibration_config() or load_calibration() returned.",
            ) from None
        scale = torch.where(scale == 0, 1, scale)  # what DoReFa measured is all masked: zeros on any grid
        if bool((zero_point != zero_point.round()).any()):  # DoReFa: levels lie half a step beside zero
            scale, zero_point, low, high = scale / 2, 2 * zero_point, 2 * low, 2 * high
            dtype, zero_point, low, high = _centred(zero_point, low, high)
        axis, block, scale, zero_point = _along_one_axis(scale, zero_point, shape, where)
        return cls(dtype, scheme, low, high, scale, zero_point.to(storage_type(dtype)), axis, block)

    @property
    def kind(self) -> str:
        """The name of the type."""
        return self.dtype.as_config()

    def numbers(self, values: Tensor) -> Tensor:
        """The stored numbers of a parameter's values."""
        assert self.scale is not None
        assert self.zero_point is not None
        if self.kind == "int1":  # of values that are signs by now, or zero where they are masked
            held = IntDtype(2)
            return quantize(
                values, self.scale, self.zero_point, held.as_config(), self.low, self.high, self.axis, self.block
            )
        return quantize(values, self.scale, self.zero_point, self.kind, self.low, self.high, self.axis, self.block)

    def values(self, numbers: Tensor) -> Tensor:
        """The real values of a parameter's stored numbers, float32."""
        assert self.scale is not None
        assert self.zero_point is not None
        return dequantize(numbers, self.scale, self.zero_point, self.kind, self.axis, self.block)


def _check(scale: Tensor, zero_point: Tensor, low: float, high: float, where: str) -> None:
    """Refuse what no grid has.

    Raises:
        CheckpointError: shapes that differ, scales below 0 or not finite, zero points that cannot be stored.
    """
    if scale.shape != zero_point.shape:
        shapes = tuple(scale.shape), tuple(zero_point.shape)
        raise CheckpointError(f"scales of shape {shapes[0]} and zero points of shape {shapes[1]}", where=where)
    if not bool((scale.isfinite() & (scale >= 0)).all() and zero_point.isfinite().all()):
        raise CheckpointError("a scale is negative, or not finite, in its calibration", where=where)
    if bool(((zero_point < low) | (zero_point > high)).any()):
        raise CheckpointError(
            "a zero point in its calibration cannot be stored", where=where, legal=[f"{low:g} to {high:g}"]
        )


def _centred(zero_point: Tensor, low: float, high: float) -> tuple[QuantDtype, Tensor, float, float]:
    """Numbers around zero for levels that lie beside it, all odd: one bit more holds them."""
    middle = int(zero_point.flatten()[0])
    low, high = low - middle, high - middle
    return IntDtype(int(high).bit_length() + 1), zero_point - middle, low, high


def _along_one_axis(
    scale: Tensor, zero_point: Tensor, shape: Sequence[int] | None, where: str
) -> tuple[int | None, int | None, Tensor, Tensor]:
    """Axis, block and scales from a grid of scales: blocks that are cut along several dimensions are cut finer."""
    if scale.numel() == 1:
        return None, None, scale.reshape(()), zero_point.reshape(())
    varying = [dim for dim, size in enumerate(scale.shape) if size > 1]
    if shape is None and len(varying) == 1:
        return varying[0], None, scale.flatten(), zero_point.flatten()
    if shape is None:
        raise CheckpointError(
            f"scales of shape {tuple(scale.shape)}, along several dimensions of an input or output, cannot be deployed",
            where=where,
            remedy="Quantize it with one scale, or with one for each channel.",
        )
    if len(shape) != scale.dim() or any(size % count for size, count in zip(shape, scale.shape, strict=True)):
        raise CheckpointError(
            f"scales of shape {tuple(scale.shape)} do not fit a value of shape {tuple(shape)}",
            where=where,
            remedy="Give the calibration of this model, and of its present shape.",
        )
    blocks = [size // count for size, count in zip(shape, scale.shape, strict=True)]
    if len(varying) == 1 and blocks[varying[0]] == 1:
        return varying[0], None, scale.flatten(), zero_point.flatten()
    # The longest block stays one; all other dimensions get a scale for each index.
    axis = max(range(len(blocks)), key=lambda dim: blocks[dim])
    for dim, block in enumerate(blocks):
        if dim != axis and block > 1:
            scale, zero_point = (each.repeat_interleave(block, dim) for each in (scale, zero_point))
    return axis, blocks[axis], scale.contiguous(), zero_point.contiguous()


def _dynamic_axis(granularity: Any, where: str) -> tuple[int | None, int | None]:
    """Where the rows of a dynamic value lie: None for all of it, -1 for one scale each token."""
    parsed = Granularity.parse(granularity)
    if parsed.name == "default":
        return None, None
    block = parsed.block
    if block is not None and block and block[-1] == -1 and all(size == 1 for size in block[:-1]):
        return -1, None
    raise CheckpointError(
        f"dynamic scales in blocks of {granularity!r} cannot be deployed",
        where=where,
        legal=("default (one for the tensor)", "[-1] (one for each token)"),
    )
