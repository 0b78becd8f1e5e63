"""What became of a model that was deployed, and the file that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from tersor.analysis.metrics import si
from tersor.deploy.agreement import decibels
from tersor.deploy.engine import Operator
from tersor.deploy.layerwise import Layerwise
from tersor.deploy.lowering import Fallback
from tersor.deploy.structure import Signature
from tersor.errors import CheckpointError
from tersor.storage import sha256_of

FORMAT = "tersor-deployment"
RECORD = "deployment.json"


@dataclass(frozen=True)
class DeployReport:
    """What became of a model.

    Attributes:
        engine: its name.
        version: of the engine.
        bytes: of all files that the engine needs.
        float_bytes: of the model's parameters and buffers before, in their own types.
        operators: what runs, by the engine's own profile.
        asked: how many convolutions and products with a weight have both operands quantized in the simulation.
        int8: how many convolutions and products run in integers.
        simulation_snr: the outputs against those of the simulation, in dB.
        float_snr: the outputs against those of the model before, in dB; None where that is not known.
        floor: what the simulation has against itself where its values change by what float32 is off by, in dB; None
            where it was not needed, as ``layers``.
        layers: how far each layer is from the simulation's, from the same inputs.
        top1: the share of samples whose largest output is that of the simulation.
        fallbacks: what does not run as asked, and why.
        milliseconds: the median of a call on the example inputs; None where it was not measured.
    """

    engine: str
    version: str
    bytes: int
    float_bytes: int
    operators: tuple[Operator, ...] = ()
    asked: int = 0
    int8: int = 0
    simulation_snr: float = inf
    float_snr: float | None = None
    floor: float | None = None
    layers: Layerwise | None = None
    top1: float = 1.0
    fallbacks: tuple[Fallback, ...] = ()
    milliseconds: float | None = None

    @property
    def coverage(self) -> float:
        """The share of the operators that were to run in integers and do."""
        return min(1.0, self.int8 / self.asked) if self.asked else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: what is exact is ``"inf"``."""
        return {**_without_infinity(asdict(self)), "coverage": self.coverage}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DeployReport:
        """From what :meth:`to_dict` gave."""
        own = _with_infinity({key: value for key, value in content.items() if key != "coverage"})
        own["operators"] = tuple(Operator(**operator) for operator in own["operators"])
        own["layers"] = Layerwise(**_with_infinity(own["layers"])) if own.get("layers") else None
        own["fallbacks"] = tuple(Fallback(**fallback) for fallback in own["fallbacks"])
        return cls(**own)

    def table(self, signature: Signature | None = None) -> Table:
        """The figures, one a row.

        Args:
            signature: to be shown as well.
        """
        table = Table(show_header=False)
        table.add_row("engine", f"{self.engine} {self.version}")
        for own in signature.inputs if signature is not None else ():
            table.add_row(f"input {own.name}", f"{own.dtype} {tuple(size or 'any' for size in own.shape)}")
        table.add_row("file", f"{si(self.bytes, 'B')}, {self.bytes / max(1, self.float_bytes):.2f} of the parameters")
        if self.milliseconds is not None:
            table.add_row("latency", si(self.milliseconds / 1000, "s"))
        if self.asked:
            table.add_row("in int8", f"{self.int8} of {self.asked} convolutions and products that are quantized")
        table.add_row("against the simulation", f"{decibels(self.simulation_snr)}, the same answer for {self.top1:.1%}")
        if self.floor is not None:
            table.add_row("the simulation against itself", decibels(self.floor))
        if self.layers is not None:
            of_same = f"{decibels(self.layers.snr)} or more, the same answer for {self.layers.top1:.1%}"
            table.add_row("each layer, from the same inputs", of_same)
        if self.float_snr is not None:
            table.add_row("against fp32", decibels(self.float_snr))
        for fallback in self.fallbacks:
            table.add_row(f"not as asked: {fallback.where}", fallback.reason)
        return table


def _without_infinity(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_infinity(value) if isinstance(value, dict) else str(value) if value in (inf, -inf) else value
        for key, value in content.items()
    }


def _with_infinity(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if value in ("inf", "-inf") else value for key, value in content.items()}


@dataclass(frozen=True)
class Deployment:
    """What ``deployment.json`` says. Printing it with rich shows it.

    Attributes:
        directory: where it lies.
        engine: that it was built for.
        options: of the engine.
        signature: what it takes and gives.
        report: what became of the model.
        files: the checksum of each file.
    """

    directory: Path
    engine: str
    options: Mapping[str, Any]
    signature: Signature
    report: DeployReport
    files: Mapping[str, str]

    def check_files(self) -> None:
        """Refuse a folder that is not as it was written.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for name, checksum in self.files.items():
            file = self.directory / name
            if not file.exists():
                raise CheckpointError("is missing", where=str(file))
            if sha256_of(file) != checksum:
                raise CheckpointError("is damaged: its checksum is another one", where=str(file))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "engine": self.engine,
            "options": dict(self.options),
            "signature": self.signature.to_dict(),
            "report": self.report.to_dict(),
            "files": dict(self.files),
        }

    def __rich__(self) -> Group:
        """What it is, and what it computes with."""
        return Group(self.report.table(self.signature), operators_table(self.report.operators))


def is_deployment(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that :meth:`CompiledModel.save` wrote."""
    return (Path(directory) / RECORD).is_file()


def read_deployment(directory: str | os.PathLike[str]) -> Deployment:
    """Read the record of a deployment; its engine need not be installed, and its files are not looked at.

    Raises:
        CheckpointError: there is no such folder, or the record is damaged.
    """
    directory = Path(directory)
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(
            f"holds no {RECORD}", where=str(directory), remedy="Give a folder that save() wrote."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"is no JSON: {error}", where=str(directory / RECORD)) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError("is no record of a deployment", where=str(directory / RECORD))
    try:
        signature, report = Signature.from_dict(record["signature"]), DeployReport.from_dict(record["report"])
        return Deployment(directory, record["engine"], dict(record["options"]), signature, report, record["files"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"is damaged ({type(error).__name__}: {error})",
            where=str(directory / RECORD),
            remedy="Deploy the model again.",
        ) from None


def operators_table(operators: Sequence[Operator]) -> Table:
    """The operators that hold convolutions and products, and the sum of the others."""
    table = Table("operator", "type", "precision")
    table.add_column("ms", justify="right")
    for own in operators:
        if own.computes:
            spent = "" if own.milliseconds is None else f"{own.milliseconds:.3f}"
            table.add_row(own.name, own.kind, own.precision, spent)
    others = [own.milliseconds or 0.0 for own in operators if not own.computes]
    if others:
        table.add_row(f"{len(others)} others", "", "", f"{sum(others):.3f}")
    return table
