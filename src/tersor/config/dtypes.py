"""Data types of quantized tensors, as values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

import torch

from tersor.errors import InvalidValueError, nearest

WIDEST = 32


@dataclass(frozen=True)
class IntDtype:
    """An integer type of any width.

    ``int1`` holds -1 and 1, and is for the methods that binarize; every other signed type holds zero as well.

    Attributes:
        bits: width in bits.
        signed: whether negative values exist.

    >>> IntDtype.parse("uint4"), IntDtype.parse(8).as_config()
    (IntDtype(bits=4, signed=False), 'int8')
    """

    bits: int
    signed: bool = True

    @classmethod
    def parse(cls, value: object) -> IntDtype:
        """Read a type.

        Args:
            value: a type; ``"int8"``, ``"uint4"`` and so on; a number of bits, which means a signed type.

        Raises:
            InvalidValueError: for anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Integral) and not isinstance(value, bool):
            bits, signed = int(value), True
        else:
            match = re.fullmatch(r"(u?)int(\d+)", value) if isinstance(value, str) else None
            bits, signed = (int(match[2]), not match[1]) if match else (0, True)
        if not 1 <= bits <= WIDEST:
            legal = [f"int1 to int{WIDEST}", f"uint1 to uint{WIDEST}", f"a number of bits from 1 to {WIDEST}"]
            raise InvalidValueError(f"{value!r} is no quantized data type.", legal=legal)
        return cls(bits, signed)

    def as_config(self) -> str:
        """The name that `parse` reads back."""
        return f"{'' if self.signed else 'u'}int{self.bits}"


@dataclass(frozen=True)
class FloatDtype:
    """A floating-point type of eight bits.

    Paper: Micikevicius et al.: FP8 Formats for Deep Learning (2022).

    Attributes:
        exponent: bits of the exponent.
        mantissa: bits of the mantissa.

    >>> FloatDtype(4, 3).as_config(), FloatDtype(4, 3).largest
    ('fp8_e4m3', 448.0)
    """

    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        """Width in bits."""
        return 1 + self.exponent + self.mantissa

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of torch that holds it."""
        return torch.float8_e4m3fn if self.exponent == 4 else torch.float8_e5m2

    @property
    def largest(self) -> float:
        """The largest value."""
        return torch.finfo(self.torch_dtype).max

    def as_config(self) -> str:
        """The name that `parse_dtype` reads back."""
        return f"fp8_e{self.exponent}m{self.mantissa}"


QuantDtype: TypeAlias = IntDtype | FloatDtype

_FLOATS: Mapping[str, FloatDtype] = {
    **dict.fromkeys(("fp8_e4m3", "float8_e4m3fn", "e4m3", "fp8"), FloatDtype(4, 3)),
    **dict.fromkeys(("fp8_e5m2", "float8_e5m2", "e5m2"), FloatDtype(5, 2)),
}


def parse_dtype(value: object) -> QuantDtype:
    """Read any type that a tensor is quantized to.

    Args:
        value: a type; the name of one (``"int8"``, ``"uint4"``, ``"fp8_e4m3"``, ``"fp8_e5m2"``); a number of bits.

    Raises:
        InvalidValueError: for anything else.

    >>> parse_dtype("fp8_e5m2")
    FloatDtype(exponent=5, mantissa=2)
    """
    if isinstance(value, FloatDtype):
        return value
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if isinstance(value, str) and value in _FLOATS:
        return _FLOATS[value]
    try:
        return IntDtype.parse(value)
    except InvalidValueError as error:
        names = ("int8", "uint8", "int4", *_FLOATS)
        remedy = nearest(value, names) if isinstance(value, str) else ""
        raise InvalidValueError(error.what, legal=(*error.legal, "fp8_e4m3", "fp8_e5m2"), remedy=remedy) from None
