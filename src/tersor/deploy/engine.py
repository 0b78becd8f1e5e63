"""What an inference engine is to Tersor: it builds a file from a program, opens it, runs it, and says what it did."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from tersor.config.dtypes import QuantDtype
from tersor.deploy.lowering import Fallback, Program
from tersor.errors import MissingExtraError
from tersor.extras import missing

Precision = Literal["int8", "float"]


@dataclass(frozen=True)
class Operator:
    """One operator that an engine ran, by its own profile.

    Attributes:
        name: in the engine's graph; it often names the layer.
        kind: the engine's name of its type.
        precision: of the numbers that it computes with.
        milliseconds: of one call; None where the engine does not say.
        computes: whether it is a convolution or a matrix product, where the time goes.
        attends: whether it is a product of two values, as in attention, and not with a weight.
    """

    name: str
    kind: str
    precision: Precision
    milliseconds: float | None = None
    computes: bool = False
    attends: bool = False


@dataclass(frozen=True)
class Wishes:
    """What an engine wants quantized, and how.

    Attributes:
        non_negative: settings of an input or output that has no negative value.
        signed: of any other.
        products: of what a linear layer reads, where that has negative values; None for ``signed``.
        convolution_outputs: whether a convolution's output is wanted as well, and a sum's.
        linear_outputs: whether a linear layer's output is.
        sums: whether the operands of residual sums are.
        fused_sums: whether a sum is done by the convolution that makes one of its operands, so that only the other
            one is wanted.
        added: settings of what a convolution gives to a sum that is rounded, where the engine does not round it before;
            None where it does.
    """

    non_negative: Mapping[str, Any]
    signed: Mapping[str, Any]
    convolution_outputs: bool = False
    linear_outputs: bool = False
    sums: bool = True
    fused_sums: bool = False
    added: Mapping[str, Any] | None = None
    products: Mapping[str, Any] | None = None


UINT8: Mapping[str, Any] = {"quant_dtype": "uint8", "quant_scheme": "affine"}
INT8: Mapping[str, Any] = {"quant_dtype": "int8", "quant_scheme": "symmetric"}


class Session(ABC):
    """A file that an engine has opened."""

    @abstractmethod
    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, on the CPU, in the order of the program."""

    @abstractmethod
    def profile(self, inputs: Sequence[Tensor]) -> list[Operator]:
        """What ran, as the engine itself tells."""


class Engine(ABC):
    """An inference engine. A concrete one is final, in a file of its own, and listed in ``engines.py``.

    Attributes:
        name: as users write it.
        title: as its makers write it.
        packages: which have to be installed.
        extra: of Tersor's, that brings them.
        file: the name of what :meth:`build` writes.
        wishes: what it wants quantized.
        timed: options with which its profile says how long each operator takes, where it does not without.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]
    file: ClassVar[str]
    wishes: ClassVar[Wishes]
    timed: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def why_not(cls) -> str:
        """Why it cannot be used here; empty where it can."""
        return missing(*cls.packages)

    @classmethod
    def why_not_open(cls) -> str:
        """Why it cannot run here what was built elsewhere; empty where it can."""
        return cls.why_not()

    @classmethod
    def require(cls, *, to_open: bool = False) -> None:
        """Refuse to begin what would end without the engine.

        Args:
            to_open: whether it has only to run what was built.

        Raises:
            MissingExtraError: saying what is missing.
        """
        if reason := cls.why_not_open() if to_open else cls.why_not():
            raise MissingExtraError(
                reason,
                where=cls.title,
                remedy=f"Install it: pip install 'tersor[{cls.extra}]'." if cls.extra else "",
            )

    @classmethod
    def version(cls) -> str:
        """Of the engine that is installed."""
        return importlib.metadata.version(cls.packages[-1])

    @abstractmethod
    def lacks(self, dtype: QuantDtype, *, is_activation: bool) -> str:
        """Why it cannot hold values of a type; empty where it can."""

    @abstractmethod
    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """The program as this engine wants it, of the same values, and what could not be had."""

    @abstractmethod
    def build(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        """Write what it runs into a folder that is there and empty.

        Args:
            program: as :meth:`prepare` gave it.
            folder: where.
            options: the engine's own, by name.
        """

    @abstractmethod
    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """Open what :meth:`build` wrote.

        Raises:
            CheckpointError: it is damaged, or was written for another machine.
        """
