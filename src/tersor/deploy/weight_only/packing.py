"""Weights as integers with one scale for each group of neighbours in a row: what both file formats store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tersor.config.dtypes import IntDtype
from tersor.deploy.operators import spread
from tersor.deploy.stored import Stored
from tersor.errors import InvalidValueError


@dataclass(frozen=True)
class Integers:
    """A matrix of integers. It stands for ``(numbers - zero_point) * scale``.

    Attributes:
        dtype: the type that the numbers fit.
        numbers: shape (rows, columns).
        scale: float32, shape (rows, groups).
        zero_point: int32, of that shape.
    """

    dtype: IntDtype
    numbers: Tensor
    scale: Tensor
    zero_point: Tensor

    @classmethod
    def of(cls, stored: Stored, values: Tensor, where: str) -> Integers:
        """The stored numbers of a matrix, and its scales by rows and groups.

        Args:
            stored: what its calibration says.
            values: latent or rounded: both have the same stored numbers.
            where: what errors call it.

        Raises:
            InvalidValueError: it is no matrix, its type is none of integers, or its scales do not follow rows.
        """
        if values.dim() != 2:
            raise InvalidValueError(f"has {values.dim()} dimensions, and only matrices are stored", where=where)
        if not isinstance(stored.dtype, IntDtype):
            raise InvalidValueError(f"{stored.kind} is no type of integers", where=where, remedy="Quantize to int8.")
        if stored.scale is None or stored.zero_point is None:
            raise InvalidValueError("its scales are dynamic, and files hold fixed ones", where=where)
        group = _group(stored, values, where)
        scale, zero_point = (
            spread(own, values, stored.axis, stored.block).expand(values.shape)[:, ::group].contiguous()
            for own in (stored.scale, stored.zero_point.int())
        )
        return cls(stored.dtype, stored.numbers(values.detach().cpu()), scale, zero_point)

    @property
    def group(self) -> int:
        """How many neighbours in a row share a scale."""
        return self.numbers.shape[1] // self.scale.shape[1]

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether all zero points are the middle of the type, which is 0 where it is signed."""
        return bool((self.zero_point == self._middle).all())

    def values(self) -> Tensor:
        """The real values, float32."""
        shifted = (self.numbers.int() - self._each(self.zero_point)).float()
        return shifted * self._each(self.scale)

    def signed(self) -> tuple[Tensor, Tensor]:
        """Numbers and zero points of the signed type of as many bits, int8: unsigned ones are shifted by half a range.

        >>> integers = Integers(IntDtype(4, False), torch.tensor([[15]]), torch.ones(1, 1), torch.tensor([[3]]))
        >>> integers.signed()
        (tensor([[7]], dtype=torch.int8), tensor([[-5]], dtype=torch.int8))
        """
        assert self.dtype.bits <= 8
        middle = self._middle
        return (self.numbers.int() - middle).to(torch.int8), (self.zero_point - middle).to(torch.int8)

    def in_groups_of(self, size: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of smaller groups, which say the same: shape (rows, columns / size)."""
        assert self.group % size == 0
        times = self.group // size
        return self.scale.repeat_interleave(times, 1), self.zero_point.repeat_interleave(times, 1)

    def with_rows(self, order: Tensor) -> Integers:
        """The same matrix with its rows in another order."""
        return Integers(self.dtype, self.numbers[order], self.scale[order], self.zero_point[order])

    @property
    def _middle(self) -> int:
        return 0 if self.dtype.signed else 2 ** (self.dtype.bits - 1)

    def _each(self, of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(self.group, 1)


def _group(stored: Stored, values: Tensor, where: str) -> int:
    """How many columns share a scale, in every row alike."""
    columns = values.shape[1]
    if stored.axis is None or (stored.axis == 0 and stored.block is None):
        return columns
    if stored.axis == 1:
        group = min(stored.block or 1, columns)
    else:  # blocks of more rows than columns: where does a scale change along a row?
        assert stored.scale is not None
        assert stored.zero_point is not None
        steps = [own[:, 1:] != own[:, :-1] for own in (stored.scale, stored.zero_point)]
        changes = torch.nonzero((steps[0] | steps[1]).any(0)).flatten() + 1
        group = math.gcd(columns, *changes.tolist())
    assert columns % group == 0
    if group == 1:
        raise InvalidValueError(
            "each of its columns has a scale of its own",
            where=where,
            legal=("one scale for each row", "one for each group of columns"),
            remedy="Set granularity: out_channel or [1, 32].",
        )
    return group


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Integers of a few bits in words of 32, one row after another, the first one in the lowest bits.

    Nothing lies between them: where 32 is no multiple of their width, some lie in two words. A number q is stored as
    q plus half the range, and each row begins a new word.

    Args:
        numbers: signed, int8, shape (rows, columns).
        bits: from 1 to 8.

    Returns:
        int32, shape (rows, columns * bits / 32, rounded up).

    >>> [hex(word) for word in pack(torch.arange(-8, 2, dtype=torch.int8)[None], 4)[0].tolist()]
    ['0x76543210', '0x98']
    """
    unsigned = (numbers.int() + 2 ** (bits - 1)).to(torch.uint8).numpy()
    rows, columns = unsigned.shape
    stream = np.unpackbits(unsigned[:, :, None], axis=2, count=bits, bitorder="little").reshape(rows, columns * bits)
    words = np.packbits(np.pad(stream, ((0, 0), (0, -columns * bits % 32))), axis=1, bitorder="little")
    return torch.from_numpy(words.view("<i4").astype(np.int32))
