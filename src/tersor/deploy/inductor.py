"""Inductor: torch's own compiler, ahead of time, to one package with int8 kernels of oneDNN. No package but torch."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.config.dtypes import QuantDtype
from tersor.deploy.decomposed import decompose
from tersor.deploy.engine import UINT8, Engine, Operator, Session, Wishes
from tersor.deploy.graph import Graph, module_of
from tersor.deploy.inductor_patterns import contraction_behind, misfit, round_before_pools
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.movement import dequantize_late, merge_limits
from tersor.deploy.operators import not_in_bytes
from tersor.deploy.packing import BYTES, fit_parameters
from tersor.deploy.placement import gather_numbers, join_twins, unsigned_activations, whole_ranges
from tersor.errors import CheckpointError, InvalidValueError, TraceError
from tersor.storage import replacing_file

SHIM = "aoti_torch_cpu_"
CALL = rf"(?:{SHIM}|(?:graph_\d+_)?cpp_fused_)\w+"
"""What the code that Inductor writes calls: a library, or a kernel that it has written itself."""
INTEGER = frozenset({"_qconv_pointwise_tensor", "_qconv2d_pointwise_binary_tensor", "_qlinear_pointwise_tensor",
                     "_qlinear_pointwise_binary_tensor", "_int_mm_out", "_weight_int8pack_mm"})  # fmt: skip
FLOATING = frozenset({"convolution", "_convolution_pointwise", "_convolution_pointwise_binary",
                      "_convolution_pointwise_binary_", "_convolution_transpose_pointwise", "_linear_pointwise",
                      "_linear_pointwise_binary", "_mkl_linear", "addmm_out", "mm_out",
                      "mkldnn_rnn_layer"})  # fmt: skip
ATTENDING = frozenset({"bmm_out", "baddbmm_out", "_scaled_dot_product_flash_attention_for_cpu"})
RECORD = "tersor"


@final
class Inductor(Engine):
    """AOTInductor on the CPU, for x86 with AVX2 or more.

    The package holds machine code for the CPU that compiled it. It needs a C++ compiler to be built and none to be
    opened. What it calls stands in its code; it says how long that takes where it was compiled with the option
    ``{"cpp.enable_kernel_profile": True}``, which slows it by 5 to 10 %.

    Options:
        any: a setting of ``torch._inductor.config``, such as ``{"max_autotune": True}``.
    """

    name: ClassVar[str] = "inductor"
    title: ClassVar[str] = "Inductor"
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    extra: ClassVar[str] = ""
    file: ClassVar[str] = "model.pt2"
    wishes: ClassVar[Wishes] = Wishes(non_negative=UINT8, signed=UINT8, fused_sums=True)
    timed: ClassVar[Mapping[str, Any]] = {"cpp.enable_kernel_profile": True}

    @classmethod
    def why_not(cls) -> str:
        """Without a C++ compiler nothing can be built."""
        compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        return "" if shutil.which(compiler) else f"no C++ compiler: {compiler} is not found"

    @classmethod
    def why_not_open(cls) -> str:
        """What is built runs with torch alone."""
        return ""

    def lacks(self, dtype: QuantDtype, *, is_activation: bool) -> str:
        """Its kernels compute with bytes; numbers of less than eight bits are stored in these, but for signs."""
        return not_in_bytes(dtype, is_activation=is_activation)

    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """Each value quantized once, and all as the patterns of Inductor want it."""
        graph = Graph(program)
        unsigned_activations(graph)  # convolutions take nothing else
        join_twins(graph)
        dequantize_late(graph)  # behind what pads inside a convolution's own code
        round_before_pools(graph)
        gather_numbers(graph)
        whole_ranges(graph)
        merge_limits(graph)
        fallbacks = fit_parameters(graph, misfit)
        return graph.close(), fallbacks

    def build(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        """One package."""
        from torch._inductor import aoti_compile_and_package, config  # slow to import

        exported = decompose(program, named=BYTES).exported
        known_settings: Any = config._config  # pyright: ignore
        modules: dict[str, str] = {}
        for node in exported.graph.nodes:
            node.meta.pop("stack_trace", None)  # it would stand in the package, with the paths of this machine
            if (source := contraction_behind(node)) is not None:
                modules[node.name] = module_of(source)
        known: dict[str, Any] = {
            "freezing": True,
            "cpp.dynamic_threads": True,  # else it runs with as many threads as compiled it
        }
        if "aot_inductor.enable_line_tables" in known_settings:
            known["aot_inductor.enable_line_tables"] = False
        record = json.dumps({**Machine.here().to_dict(), "modules": modules})
        for name in options:
            if name not in known_settings:
                raise InvalidValueError(f"{name!r} is no setting of torch._inductor.config", where="options")
        with torch.no_grad(), _quiet():  # freezing, which packs the weights, happens without gradients alone
            try:
                aoti_compile_and_package(
                    exported,
                    package_path=os.fspath(folder / self.file),
                    inductor_configs={**known, "aot_inductor.metadata": {RECORD: record}, **options},
                )
            except Exception as error:
                raise TraceError(
                    f"Inductor cannot compile it: {str(error).strip().splitlines()[0] if str(error) else error!r}",
                    where=type(error).__name__,
                    remedy="Try another engine.",
                ) from error
        _deflate(folder / self.file)

    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """Load the package, if this machine can run it."""
        return _Session(folder / self.file, threads)


@dataclass(frozen=True)
class Machine:
    """What a package is compiled for.

    Attributes:
        torch: its version.
        architecture: of the processor.
        capability: the widest instructions that torch uses, as it names them.
        features: what else the processor has, as far as torch tells.
    """

    torch: str
    architecture: str
    capability: str
    features: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        tell = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch do not tell
        features = tuple(sorted(name for name, value in tell().items() if value is True))
        return cls(torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), features)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def check(self, where: str) -> None:
        """Refuse what was compiled for another machine, of which this is the record.

        Raises:
            CheckpointError: saying what differs.
        """
        own = Machine.here()
        missing = sorted(set(self.features) - set(own.features)) if own.features else []
        differs = [
            f"{name} {theirs}, and this is {ours}"
            for name, theirs, ours in (
                ("torch", self.torch, own.torch),
                ("a processor of type", self.architecture, own.architecture),
                ("a processor with", self.capability, own.capability),
            )
            if theirs != ours
        ]
        if missing and not differs:
            differs = [f"a processor with {', '.join(missing)}, which this one lacks"]
        if differs:
            raise CheckpointError(
                f"was compiled for {differs[0]}", where=where, remedy="Compile it again on a machine like this one."
            )


class _Session(Session):
    def __init__(self, path: Path, threads: int | None) -> None:
        self._path, self._threads = path, threads
        record = _record_of(path)
        self._modules: dict[str, str] = record.pop("modules")
        Machine(**{**record, "features": tuple(record["features"])}).check(os.fspath(path))
        import torch._inductor  # slow to import

        try:
            self._loader = torch._inductor.aoti_load_package(os.fspath(path)).loader
        except Exception as error:
            raise CheckpointError(f"cannot be opened: {str(error).splitlines()[0]}", where=os.fspath(path)) from error

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), _threads(self._threads):
            return self._loader.run([value.detach().cpu() for value in inputs])

    def profile(self, inputs: Sequence[Tensor]) -> list[Operator]:
        calls = _calls(self._path, self._modules)
        times = self._times(inputs, len(calls))
        return [_operator(name, layer, spent) for (name, layer), spent in zip(calls, times, strict=True)]

    def _times(self, inputs: Sequence[Tensor], count: int) -> list[float] | list[None]:
        """Milliseconds of each call, where the package was compiled to tell them."""
        from torch.profiler import ProfilerActivity, profile

        runs = 3
        self.run(inputs)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
            for _ in range(runs):
                self.run(inputs)
        events = [event for event in recorded.events() or () if re.match(CALL, event.name)]
        if len(events) != count * runs:
            return [None] * count
        events.sort(key=lambda event: event.time_range.start)
        spent = [event.time_range.elapsed_us() / 1000 for event in events]
        return [sum(spent[position::count]) / runs for position in range(count)]


def _operator(name: str, layer: str, milliseconds: float | None) -> Operator:
    kind = name.removeprefix(SHIM).removeprefix("mkldnn_")
    integer = kind in INTEGER or kind.startswith("quantized")
    computes = kind in INTEGER | FLOATING | ATTENDING
    return Operator(
        layer or kind, kind, "int8" if integer else "float", milliseconds, computes=computes, attends=kind in ATTENDING
    )


def _calls(path: Path, modules: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a package calls, in order, and in which module; comments in its code name the nodes of the graph."""
    with zipfile.ZipFile(path) as package:
        code = next(package.read(name).decode() for name in package.namelist() if name.endswith(".wrapper.cpp"))
    _, _, body = code.partition("::run_impl(")
    found: list[tuple[str, str]] = []
    nodes: list[str] = []
    for line in body.splitlines():
        if (comment := re.search(r"Source Nodes: \[(.*?)\]", line)) is not None:
            nodes = comment[1].split(", ")
        elif (call := re.match(rf"\s*(?:AOTI_TORCH_ERROR_CODE_CHECK\()?({CALL})\(", line)) is not None:
            named = [modules[node] for node in nodes if node in modules] if call[1].startswith(SHIM) else []
            found.append((call[1], named[-1] if named else ""))
            nodes = []
    return found


def _record_of(path: Path) -> dict[str, Any]:
    """What :meth:`Inductor.build` wrote into a package."""
    try:
        with zipfile.ZipFile(path) as package:
            name = next(name for name in package.namelist() if name.endswith("_metadata.json"))
            return json.loads(json.loads(package.read(name))[RECORD])
    except (OSError, ValueError, KeyError, StopIteration, zipfile.BadZipFile) as error:
        raise CheckpointError(f"is no package that Tersor compiled: {error}", where=os.fspath(path)) from error


def _deflate(package: Path) -> None:
    """Compress a package in place: torch stores its code, source and machine, as it is."""
    with (
        replacing_file(package) as temporary,
        zipfile.ZipFile(package) as stored,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """The threads of torch belong to the whole process: they are put back."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch warns itself of while it compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
