"""ExecuTorch: one program file for phones and small computers, with int8 kernels of XNNPACK for ARM and x86."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from tersor.config.dtypes import QuantDtype
from tersor.deploy.decomposed import decompose
from tersor.deploy.engine import Engine, Session, Wishes
from tersor.deploy.executorch_patterns import (
    bytes_alone,
    dequantize_for_each,
    explicit_padding,
    far_sums,
    limit_in_kernels,
    misfit,
    own_biases,
)
from tersor.deploy.executorch_session import PORTABLE, RUNTIME, ExecuTorchSession, first_line, imported, quiet
from tersor.deploy.graph import Graph, module_of
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.movement import dequantize_late, merge_limits, on_one_grid, quantize_early
from tersor.deploy.operators import not_in_bytes
from tersor.deploy.packing import fit_parameters
from tersor.deploy.placement import gather_numbers, join_twins, signed_activations, whole_ranges
from tersor.errors import InvalidValueError, TraceError

_ATEN = torch.ops.aten
MAX_BATCH = 64
"""The largest batch where nothing else is said."""
BYTE: Mapping[str, Any] = {"quant_dtype": "int8", "quant_scheme": "affine"}
CONTRACTIONS = tuple(f"aten.{name}.default" for name in sorted(PORTABLE))


@final
class ExecuTorch(Engine):
    """ExecuTorch with XNNPACK, for the CPUs of phones and small computers; it runs on this one's too.

    XNNPACK has int8 kernels for what reads int8 and gives int8, so outputs of linear layers are rounded as well. What
    it does not take runs in ExecuTorch's own kernels, in floating point. The profile is ExecuTorch's own (ETDump): it
    tells the precision of convolutions and products, not that of sums and means, which are called ``float`` there.

    Options:
        max_batch: the largest batch, for which memory is planned where its size is free; if not said, 64, or one more
            than the example has.
    """

    name: ClassVar[str] = "executorch"
    title: ClassVar[str] = "ExecuTorch"
    packages: ClassVar[tuple[str, ...]] = ("executorch",)
    extra: ClassVar[str] = "executorch"
    file: ClassVar[str] = "model.pte"
    names: ClassVar[str] = "modules.json"
    wishes: ClassVar[Wishes] = Wishes(non_negative=BYTE, signed=BYTE, convolution_outputs=True, linear_outputs=True)

    @classmethod
    def why_not(cls) -> str:
        """The package has no file of its own at its top, so any folder of that name looks like it."""
        return super().why_not() or ("" if importlib.util.find_spec(RUNTIME) else "not installed: executorch")

    def lacks(self, dtype: QuantDtype, *, is_activation: bool) -> str:
        """Its kernels compute with int8; numbers of less than eight bits are stored in it, but for signs."""
        return not_in_bytes(dtype, is_activation=is_activation)

    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """Each value quantized once, as int8, right behind what made it, and all as XNNPACK's kernels take it."""
        graph = Graph(program)
        signed_activations(graph)
        rounded = bytes_alone(graph)
        explicit_padding(graph)
        join_twins(graph)
        dequantize_late(graph)
        quantize_early(graph)
        join_twins(graph)
        gather_numbers(graph)
        whole_ranges(graph)
        merge_limits(graph)
        limit_in_kernels(graph)
        dequantize_late(graph)  # what is moved and then limited
        on_one_grid(graph)
        join_twins(graph)
        added = far_sums(graph)
        own_biases(graph)
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
        _refuse_volumes(exported)
        with torch.no_grad(), quiet():
            try:
                with _sizes_as_they_were(exported):
                    edge = _lowered(exported)
                    _bound_sizes(edge.exported_program(), exported, largest)
                    made: bytes = edge.to_executorch(_settings()).buffer
            except Exception as error:
                raise TraceError(
                    f"ExecuTorch cannot lower it: {first_line(error)}",
                    where=type(error).__name__,
                    remedy="Try another engine, or dynamic_batch=False.",
                ) from error
        (folder / self.file).write_bytes(made)
        (folder / self.names).write_text(json.dumps(_modules(edge.exported_program())), encoding="utf-8")

    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """Load the program. Threads belong to the whole process: sessions that differ in them load anew in turns."""
        return ExecuTorchSession(folder / self.file, folder / self.names, threads)


def _lowered(exported: ExportedProgram) -> Any:
    """The program with what XNNPACK takes handed to it."""
    partitioning = imported("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    return imported("executorch.exir").to_edge_transform_and_lower(
        exported, partitioner=[partitioning.XnnpackPartitioner()]
    )


def _settings() -> Any:
    """Inputs are read where they lie, so no memory is planned for them."""
    planning = imported("executorch.exir.passes").MemoryPlanningPass(alloc_graph_input=False)
    return imported("executorch.exir").ExecutorchBackendConfig(memory_planning_pass=planning)


def _refuse_volumes(exported: ExportedProgram) -> None:
    """ExecuTorch would take convolutions over volumes, and fail when they run."""
    for node in exported.graph.nodes:
        if node.target in (_ATEN.conv3d.default, _ATEN.conv_transpose3d.input):
            raise TraceError(
                f"ExecuTorch has no kernel for {node.target}", where=module_of(node), remedy="Try another engine."
            )


@contextmanager
def _sizes_as_they_were(exported: ExportedProgram) -> Iterator[None]:
    """Forget what is learned of a program's free sizes: whatever is made of it knows the same."""
    environment = next((size.node.shape_env for size in _free_sizes(exported)), None)
    before = dict(environment.var_to_range) if environment is not None else {}
    try:
        yield
    finally:
        if environment is not None:
            environment.var_to_range.update(before)


def _bound_sizes(edge: ExportedProgram, exported: ExportedProgram, largest: int | None) -> None:
    """Let the free sizes of a program end at what memory is planned for.

    What lowers a program asks whether a batch is small enough for this or that library (NNPACK: less than 16), and
    takes all batches to be as the example's.
    """
    for size in _free_sizes(edge):
        known = exported.range_constraints.get(size.node.expr)
        if known is not None:
            upper = (largest or max(MAX_BATCH, size.node.hint + 1)) if known.upper is int_oo else known.upper
            size.node.shape_env.var_to_range[size.node.expr] = ValueRanges(min(known.lower, upper), upper)


def _free_sizes(exported: ExportedProgram) -> list[Any]:
    values = [node.meta.get("val") for node in exported.graph.nodes]
    sizes = [size for value in values if isinstance(value, Tensor) for size in value.shape]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


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


def _max_batch(options: Mapping[str, Any]) -> int | None:
    for name in options:
        if name != "max_batch":
            raise InvalidValueError("is no option of ExecuTorch", where=f"options[{name!r}]", legal=("max_batch",))
    largest = options.get("max_batch")
    if largest is not None and (not isinstance(largest, int) or largest < 1):
        raise InvalidValueError(f"{largest!r} is no size of a batch", where="options['max_batch']")
    return largest
