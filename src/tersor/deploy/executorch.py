"""ExecuTorch: one program file for phones and small computers, with int8 kernels of XNNPACK for ARM and x86."""

from __future__ import annotations

import importlib
import json
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from tersor.config.dtypes import FloatDtype, QuantDtype
from tersor.deploy.decomposed import decompose
from tersor.deploy.engine import Engine, Operator, Session, Wishes
from tersor.deploy.executorch_patterns import (
    bytes_alone,
    dequantize_for_each,
    far_sums,
    limit_in_kernels,
    misfit,
)
from tersor.deploy.graph import Graph, module_of
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.movement import dequantize_late, merge_limits, on_one_grid, quantize_early
from tersor.deploy.operators import SIGNS
from tersor.deploy.packing import fit_parameters
from tersor.deploy.placement import gather_numbers, join_twins, signed_activations, whole_ranges
from tersor.errors import CheckpointError, InvalidValueError, TraceError

BYTE: Mapping[str, Any] = {"quant_dtype": "int8", "quant_scheme": "affine"}
OPTIONS: Mapping[str, Any] = {"max_batch": 64}
"""What ``options`` may hold: the largest batch, for which memory is planned where the size of the batch is free."""
COMPUTING = ("Convolution", "Deconvolution", "Fully Connected", "Batch Matrix Multiply", "Scaled Dot")
"""How XNNPACK's names of convolutions and products begin."""
PORTABLE = frozenset({"convolution", "linear", "addmm", "mm", "bmm"})
"""Those of ExecuTorch's own kernels, in floating point, for what XNNPACK does not take."""
CONTRACTIONS = tuple(f"aten.{name}.default" for name in sorted(PORTABLE))
CALLED = "DELEGATE_CALL"
"""In a profile this ends the operators of one part that XNNPACK runs."""
PROFILED_CALLS = 5
_RUNTIME = "executorch.runtime"
_BINDINGS = "executorch.extension.pybindings.portable_lib"


@final
class ExecuTorch(Engine):
    """ExecuTorch with XNNPACK, for the CPUs of phones and small computers; it runs on this one's too.

    XNNPACK has int8 kernels for what reads int8 and gives int8, so outputs of linear layers are rounded as well. What
    it does not take runs in ExecuTorch's own kernels, in floating point.

    Options:
        max_batch: the largest batch, 64 if not said; memory is planned for it where the size of the batch is free.
    """

    name: ClassVar[str] = "executorch"
    title: ClassVar[str] = "ExecuTorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"
    file: ClassVar[str] = "model.pte"
    names: ClassVar[str] = "modules.json"
    wishes: ClassVar[Wishes] = Wishes(non_negative=BYTE, signed=BYTE, convolution_outputs=True, linear_outputs=True)

    def lacks(self, dtype: QuantDtype, *, is_activation: bool) -> str:
        """Its kernels compute with int8; numbers of less than eight bits are stored in it, but for signs."""
        if isinstance(dtype, FloatDtype) or dtype.bits > 8 or (dtype == SIGNS and is_activation):
            return f"has no {dtype.as_config()} {'inputs and outputs' if is_activation else 'weights'}"
        return ""

    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """Each value quantized once, as int8, right behind what made it, and all as XNNPACK's kernels take it."""
        graph = Graph(program)
        signed_activations(graph)
        rounded = bytes_alone(graph)
        join_twins(graph)
        dequantize_late(graph)
        quantize_early(graph)
        join_twins(graph)
        gather_numbers(graph)
        whole_ranges(graph)
        merge_limits(graph)
        limit_in_kernels(graph)
        on_one_grid(graph)
        join_twins(graph)
        added = far_sums(graph)
        fitted = fit_parameters(graph, misfit)
        dequantize_for_each(graph)
        return graph.close(), (*rounded, *added, *fitted)

    def build(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        """The program file, and the names of the modules that its convolutions and products come from.

        Raises:
            InvalidValueError: an unknown option.
            TraceError: ExecuTorch has no kernel for an operator.
        """
        largest = _max_batch(options)
        exported = decompose(program, named=(torch.int8,)).exported
        with torch.no_grad(), _quiet():
            try:
                edge = _lowered(exported)
                with _bounded(edge.exported_program(), exported, largest):
                    made: bytes = edge.to_executorch(_settings()).buffer
            except Exception as error:
                raise TraceError(
                    f"ExecuTorch cannot lower it: {_first_line(error)}",
                    where=type(error).__name__,
                    remedy="Try another engine, or dynamic_batch=False.",
                ) from error
        (folder / self.file).write_bytes(made)
        (folder / self.names).write_text(json.dumps(_modules(edge.exported_program())), encoding="utf-8")

    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """Load the program. Threads belong to the whole process: sessions that differ in them load anew in turns."""
        return _Session(folder / self.file, folder / self.names, threads)


class _Session(Session):
    def __init__(self, path: Path, names: Path, threads: int | None) -> None:
        self._path, self._threads = path, threads
        try:
            self._modules: list[list[str]] = json.loads(names.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=os.fspath(names)) from error
        with POOL.of(threads) as age:
            self._age, self._method = age, self._load().load_method("forward")

    def _load(self, **arguments: Any) -> Any:
        with _quiet():
            runtime = importlib.import_module(_RUNTIME).Runtime.get()
        try:
            program = runtime.load_program(self._path, **arguments)
            program.load_method("forward")
        except Exception as error:
            raise CheckpointError(
                f"ExecuTorch cannot open it: {_first_line(error)}",
                where=os.fspath(self._path),
                remedy="Compile it again with the version that is to run it.",
            ) from error
        return program

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with POOL.of(self._threads) as age:
            if age != self._age:
                self._age, self._method = age, self._load().load_method("forward")
            return list(self._method.execute(self._checked(inputs)))

    def _checked(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Refuse what there is no memory for; the runtime would say so by a number alone."""
        about = self._method.metadata
        held = [value.detach().cpu().contiguous() for value in inputs]
        for index, value in enumerate(held):
            planned = tuple(about.input_tensor_meta(index).sizes())
            if len(planned) == value.dim() and any(own > most for own, most in zip(value.shape, planned, strict=True)):
                raise InvalidValueError(
                    f"{tuple(value.shape)} is larger than {planned}, for which memory is planned",
                    where=f"input {index}",
                    remedy="Compile it again with options={'max_batch': ...}.",
                )
        return held

    def profile(self, inputs: Sequence[Tensor]) -> list[Operator]:
        with POOL.of(self._threads), TemporaryDirectory(prefix="tersor-") as name:
            program = self._load(enable_etdump=True)
            held, method = self._checked(inputs), program.load_method("forward")
            for _ in range(PROFILED_CALLS):
                method.execute(held)
            written = Path(name) / "profile.etdp"
            program.write_etdump_result_to_file(os.fspath(written), os.fspath(Path(name) / "profile.bin"))
            with _quiet():
                inspected = importlib.import_module("executorch.devtools").Inspector(etdump_path=os.fspath(written))
        events = [event for block in inspected.event_blocks if block.name == "Execute" for event in block.events]
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
                    attends=kind.startswith(COMPUTING[3:]),
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
        with _quiet():
            bindings = importlib.import_module(_BINDINGS)
        with self._lock:
            if threads is not None and bindings._threadpool_get_thread_count() != threads:
                bindings._unsafe_reset_threadpool(threads)
                self._age += 1
            yield self._age


POOL = _Pool()


def _lowered(exported: ExportedProgram) -> Any:
    """The program with what XNNPACK takes handed to it."""
    exir: Any = importlib.import_module("executorch.exir")
    partitioning: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    return exir.to_edge_transform_and_lower(exported, partitioner=[partitioning.XnnpackPartitioner()])


def _settings() -> Any:
    """Inputs are read where they lie, so no memory is planned for them."""
    exir: Any = importlib.import_module("executorch.exir")
    passes: Any = importlib.import_module("executorch.exir.passes")
    return exir.ExecutorchBackendConfig(memory_planning_pass=passes.MemoryPlanningPass(alloc_graph_input=False))


@contextmanager
def _bounded(edge: ExportedProgram, exported: ExportedProgram, largest: int) -> Iterator[None]:
    """Let the free sizes of a program end at what memory is planned for.

    What lowers a program asks whether a batch is small enough for this or that library (NNPACK: less than 16), and the
    sizes are taken to be as the answer for the example was.
    """
    values = [node.meta.get("val") for node in edge.graph.nodes]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    environment = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if environment is None:
        yield
        return
    before = dict(environment.var_to_range)
    for symbol, known in exported.range_constraints.items():
        upper = largest if known.upper is int_oo else known.upper
        environment.var_to_range[symbol] = ValueRanges(min(known.lower, upper), upper)
    try:
        yield
    finally:
        environment.var_to_range.update(before)


def _modules(edge: ExportedProgram) -> list[list[str]]:
    """For each call of XNNPACK, the modules that its convolutions and products come from, in order."""
    found: list[list[str]] = []
    for node in edge.graph.nodes:
        if node.op == "call_function" and "call_delegate" in str(node.target):
            part = getattr(edge.graph_module, node.args[0].target).original_module
            found.append([module_of(own) for own in part.graph.nodes if _computes(own)])
    return found


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "").endswith(CONTRACTIONS)


def _max_batch(options: Mapping[str, Any]) -> int:
    for name in options:
        if name not in OPTIONS:
            raise InvalidValueError("is no option of ExecuTorch", where=f"options[{name!r}]", legal=OPTIONS)
    largest = options.get("max_batch", OPTIONS["max_batch"])
    if not isinstance(largest, int) or largest < 1:
        raise InvalidValueError(f"{largest!r} is no size of a batch", where="options['max_batch']")
    return largest


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what ExecuTorch warns of while it is imported and lowers, and without its handler of all log messages."""
    handlers = list(logging.root.handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.root.handlers[:] = handlers
