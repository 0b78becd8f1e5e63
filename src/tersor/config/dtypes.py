"""Data types of quantized tensors, as values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from numbers import Integral

from tersor.errors import InvalidValueError

WIDEST = 32


@dataclass(frozen=True)
class IntDtype:
    """An integer type of any width.

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
            InvalidValueError: for anything else, and for widths that hold no two values of their kind (``int1``).
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Integral) and not isinstance(value, bool):
            bits, signed = int(value), True
        else:
            match = re.fullmatch(r"(u?)int(\d+)", value) if isinstance(value, str) else None
            bits, signed = (int(match[2]), not match[1]) if match else (0, True)
        # A symmetric signed type of one bit could hold nothing but zero.
        if not (2 if signed else 1) <= bits <= WIDEST:
            legal = [f"int2 to int{WIDEST}", f"uint1 to uint{WIDEST}", f"a number of bits from 2 to {WIDEST}"]
            raise InvalidValueError(f"{value!r} is no quantized data type.", legal=legal)
        return cls(bits, signed)

    def as_config(self) -> str:
        """The name that `parse` reads back."""
        return f"{'' if self.signed else 'u'}int{self.bits}"
