"""A model that an engine runs: called with tensors, measured, saved and loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tersor.analysis.latency import Latency, measure
from tersor.deploy.engines import engine_of
from tersor.deploy.record import FORMAT, RECORD, DeployReport, is_deployment, read_deployment
from tersor.deploy.structure import Signature
from tersor.errors import InvalidValueError
from tersor.storage import replacing_folder, sha256_of


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
        self.session = engine_of(engine, to_open=True).open(folder, threads=threads, options=self.options)

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
        refuse_other_folder(directory)
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
                "files": {file.name: sha256_of(file) for file in sorted(temporary.iterdir())},
            }
            (temporary / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False), encoding="utf-8")
        return directory

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, threads: int | None = None) -> CompiledModel:
        """Open what :meth:`save` wrote. The model's code is not needed.

        Raises:
            CheckpointError: there is no such folder, or a file is missing or damaged.
            MissingExtraError: its engine is not installed.
        """
        record = read_deployment(directory)
        record.check_files()
        return cls(
            record.engine,
            record.directory,
            record.signature,
            record.report,
            threads=threads,
            options=record.options,
        )


def refuse_other_folder(directory: str | os.PathLike[str]) -> None:
    """Replacing a deployment deletes the older folder, so it must be one.

    Raises:
        InvalidValueError: there is something else.
    """
    directory = Path(directory)
    if directory.exists() and (directory.is_file() or (any(directory.iterdir()) and not is_deployment(directory))):
        raise InvalidValueError("is there and holds something else", where=str(directory), remedy="Name a new folder.")


def size_of(folder: Path) -> int:
    """The bytes of all files in a folder, but for the record."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and file.name != RECORD)
