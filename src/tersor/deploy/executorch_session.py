"""A file of ExecuTorch that is opened: it runs, and says what ran."""

from __future__ import annotations

import importlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

from torch import Tensor

from tersor.deploy.engine import Operator, Session
from tersor.errors import CheckpointError, InvalidValueError, TraceError

RUNTIME = "executorch.runtime"
COMPUTING = ("Convolution", "Deconvolution", "Fully Connected", "Batch Matrix Multiply", "Scaled Dot")
"""How XNNPACK's names of convolutions and products begin."""
ATTENDING = COMPUTING[3:]
PORTABLE = frozenset({"convolution", "linear", "addmm", "mm", "bmm"})
"""Those of ExecuTorch's own kernels, in floating point, for what XNNPACK does not take."""
CALLED = "DELEGATE_CALL"
"""In a profile this ends the operators of one part that XNNPACK runs."""
PROFILED_CALLS = 5


@final
class ExecuTorchSession(Session):
    """A program that is loaded.

    Args:
        path: of the program.
        names: of the file that names the modules of its convolutions and products, see :func:`operators_of`.
        threads: None leaves them as they are.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, path: Path, names: Path, threads: int | None) -> None:
        self._path, self._threads = path, threads
        try:
            self._modules: list[list[str]] = json.loads(names.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=os.fspath(names)) from error
        with POOL.of(threads) as age:
            self._age, self._program = age, self._load()
        about = self._program.load_method("forward").metadata
        self._planned = [tuple(about.input_tensor_meta(at).sizes()) for at in range(about.num_inputs())]

    def _load(self, **arguments: Any) -> Any:
        try:
            program = imported(RUNTIME).Runtime.get().load_program(self._path, **arguments)
            program.load_method("forward")
        except Exception as error:
            raise CheckpointError(
                f"ExecuTorch cannot open it: {first_line(error)}",
                where=os.fspath(self._path),
                remedy="Compile it again with the version that is to run it.",
            ) from error
        return program

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs.

        Raises:
            InvalidValueError: an input is larger than memory is planned for.
            TraceError: the runtime refuses the inputs, by a number.
        """
        with POOL.of(self._threads) as age:
            if age != self._age:
                self._age, self._program = age, self._load()
            return self._execute(self._program, inputs)

    def _execute(self, program: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        held = [value.detach().cpu().contiguous() for value in inputs]
        for index, (value, planned) in enumerate(zip(held, self._planned, strict=True)):
            if len(planned) == value.dim() and any(own > most for own, most in zip(value.shape, planned, strict=True)):
                raise InvalidValueError(
                    f"{tuple(value.shape)} is larger than {planned}, for which memory is planned",
                    where=f"input {index}",
                    remedy="Compile it again with options={'max_batch': ...}.",
                )
        try:
            return list(program.load_method("forward").execute(held))
        except RuntimeError as error:
            raise TraceError(f"ExecuTorch cannot run it: {first_line(error)}", where=os.fspath(self._path)) from error

    def profile(self, inputs: Sequence[Tensor]) -> list[Operator]:
        """What ran, by ExecuTorch's own profile (ETDump), in the median of some calls."""
        with POOL.of(self._threads), TemporaryDirectory(prefix="tersor-") as name:
            program = self._load(enable_etdump=True)
            for _ in range(PROFILED_CALLS):
                self._execute(program, inputs)
            written, unused = (os.path.join(name, f"profile.{kind}") for kind in ("etdp", "bin"))
            program.write_etdump_result_to_file(written, unused)
            with quiet():
                blocks = imported("executorch.devtools").Inspector(etdump_path=written).event_blocks
        events = [event for block in blocks if block.name == "Execute" for event in block.events]
        return operators_of([(event.name, float(event.perf_data.p50)) for event in events], self._modules)


def operators_of(events: Sequence[tuple[str, float]], modules: Sequence[Sequence[str]]) -> list[Operator]:
    """What ran, of the events of a profile.

    Args:
        events: the names of one run and their milliseconds. What XNNPACK runs comes before the ``DELEGATE_CALL`` that
            it was, and ExecuTorch's own kernels are called ``native_call_...``.
        modules: for each call of XNNPACK, the modules that its convolutions and products come from, in order.

    >>> events = [("Fully Connected (NC, QS8, QC8W) GEMM #1", 0.2), ("DELEGATE_CALL", 0.3), ("native_call_gelu.out", 1)]
    >>> [(own.name, own.kind, own.precision) for own in operators_of(events, [["fc"]])]
    [('fc', 'Fully Connected (NC, QS8, QC8W) GEMM', 'int8'), ('gelu', 'gelu', 'float')]
    """
    found: list[Operator] = []
    part: list[Operator] = []
    calls = iter(modules)
    for name, milliseconds in events:
        if name == CALLED:
            found += _named(part, next(calls, ()))
            part = []
        elif name.startswith("native_call_"):
            kind = name.removeprefix("native_call_").rpartition(".")[0]
            found.append(Operator(kind, kind, "float", milliseconds, computes=kind in PORTABLE, attends=kind == "bmm"))
        elif name != "OPERATOR_CALL" and "::" not in name:
            kind = name.rpartition(" #")[0] or name
            part.append(
                Operator(
                    kind,
                    kind,
                    "int8" if "8" in kind.partition("(")[2].partition(")")[0] else "float",
                    milliseconds,
                    computes=kind.startswith(COMPUTING),
                    attends=kind.startswith(ATTENDING),
                )
            )
    return found + part


def _named(operators: Sequence[Operator], modules: Sequence[str]) -> list[Operator]:
    """The operators of one part, those that compute called by their modules where as many are known."""
    if len(modules) != sum(own.computes for own in operators):
        return list(operators)
    names = iter(modules)
    return [replace(own, name=next(names) or own.name) if own.computes else own for own in operators]


class _Pool:
    """ExecuTorch's threads, which belong to the process; what was loaded with older ones must not run any more."""

    def __init__(self) -> None:
        self._age, self._lock = 0, threading.RLock()

    @contextmanager
    def of(self, threads: int | None) -> Iterator[int]:
        """Have so many threads, for one caller at a time; the age of the pool."""
        bindings = imported("executorch.extension.pybindings.portable_lib")
        with self._lock:
            if threads is not None and bindings._threadpool_get_thread_count() != threads:
                bindings._unsafe_reset_threadpool(threads)
                self._age += 1
            yield self._age


POOL = _Pool()


@cache
def imported(name: str) -> Any:
    """A module of an optional package, which is slow to import and warns while it is."""
    with quiet():
        return importlib.import_module(name)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@contextmanager
def quiet() -> Iterator[None]:
    """Without what ExecuTorch warns of while it is imported and lowers, and without its handler of all log messages."""
    handlers = list(logging.root.handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.root.handlers[:] = handlers
