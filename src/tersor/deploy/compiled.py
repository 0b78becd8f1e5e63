"""A model that an engine runs: called with tensors, measured, saved and loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tersor.analysis.latency import Latency, measure
from tersor.deploy.engine import Operator
from tersor.deploy.engines import engine_of
from tersor.deploy.lowering import Fallback
from tersor.deploy.structure import Signature
from tersor.errors import CheckpointError, InvalidValueError
from tersor.storage import replacing_folder

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
        floor: what the simulation has against itself where its inputs change by a millionth, in dB; None where it was
            not needed.
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
    simulation_snr: float = float("inf")
    float_snr: float | None = None
    floor: float | None = None
    top1: float = 1.0
    fallbacks: tuple[Fallback, ...] = ()
    milliseconds: float | None = None

    @property
    def coverage(self) -> float:
        """The share of the operators that were to run in integers and do."""
        return min(1.0, self.int8 / self.asked) if self.asked else 1.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "coverage": self.coverage}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DeployReport:
        """From what :meth:`to_dict` gave."""
        own = {key: value for key, value in content.items() if key != "coverage"}
        own["operators"] = tuple(Operator(**operator) for operator in own["operators"])
        own["fallbacks"] = tuple(Fallback(**fallback) for fallback in own["fallbacks"])
        return cls(**own)


class CompiledModel:
    """A model that an engine runs. Made by :class:`tersor.deploy.QuantizationSpeedup`, or loaded from a folder.

    Called like the model: tensors in, tensors out, on the CPU.

    Attributes:
        report: what became of the model.
        signature: what it takes and gives.
    """

    def __init__(
        self,
        engine: str,
        folder: Path,
        signature: Signature,
        report: DeployReport,
        *,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine, self.folder, self.signature, self.report = engine, folder, signature, report
        self.options = dict(options or {})
        self.session = engine_of(engine).open(folder, threads=threads, options=self.options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, nested as the model's."""
        with torch.no_grad():
            return self.signature.unflatten(self.session.run(self.signature.flatten(args, kwargs)))

    def latency(self, example_inputs: Any, *, repeats: int = 50, seconds: float = 5.0) -> Latency:
        """Measure single calls; see :func:`tersor.analysis.measure`."""
        return measure({"compiled": self}, example_inputs, repeats=repeats, seconds=seconds)["compiled"]

    def with_report(self, **changes: Any) -> CompiledModel:
        """The same, with other figures in its report."""
        self.report = replace(self.report, **changes)
        return self

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write a folder with the engine's files and ``deployment.json``, whole or not at all.

        Raises:
            InvalidValueError: there is a folder of something else.
        """
        directory = Path(directory)
        if directory.exists() and any(directory.iterdir()) and not (directory / RECORD).exists():
            raise InvalidValueError(
                "is there and holds something else", where=str(directory), remedy="Name a new folder."
            )
        with replacing_folder(directory) as temporary:
            for file in sorted(self.folder.iterdir()):
                if file.name != RECORD:
                    shutil.copy2(file, temporary / file.name)
            record = {
                "format": FORMAT,
                "engine": self.engine,
                "options": self.options,
                "signature": self.signature.to_dict(),
                "report": self.report.to_dict(),
                "files": {file.name: _sha256(file) for file in sorted(temporary.iterdir())},
            }
            (temporary / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        return directory

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, threads: int | None = None) -> CompiledModel:
        """Open what :meth:`save` wrote. The model's code is not needed.

        Raises:
            CheckpointError: there is no such folder, or a file is missing or damaged.
            MissingExtraError: its engine is not installed.
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
        for name, checksum in record["files"].items():
            file = directory / name
            if not file.exists():
                raise CheckpointError("is missing", where=str(file))
            if _sha256(file) != checksum:
                raise CheckpointError("is damaged: its checksum is another one", where=str(file))
        signature, report = Signature.from_dict(record["signature"]), DeployReport.from_dict(record["report"])
        return cls(record["engine"], directory, signature, report, threads=threads, options=record["options"])


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder, but for the record."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != RECORD)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
