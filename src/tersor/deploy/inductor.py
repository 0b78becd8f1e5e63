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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.config.dtypes import FloatDtype, QuantDtype
from tersor.deploy.decomposed import decompose
from tersor.deploy.engine import UINT8, Engine, Operator, Session, Wishes
from tersor.deploy.graph import Graph, module_of
from tersor.deploy.inductor_patterns import contraction_behind, fit_patterns
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.placement import join_twins
from tersor.errors import CheckpointError, InvalidValueError, TraceError

SHIM = "aoti_torch_cpu_"
INTEGER = frozenset({"_qconv_pointwise_tensor", "_qconv2d_pointwise_binary_tensor", "_qlinear_pointwise_tensor",
                     "_qlinear_pointwise_binary_tensor", "_int_mm_out", "_weight_int8pack_mm"})  # fmt: skip
FLOATING = frozenset({"convolution", "_convolution_pointwise", "_convolution_pointwise_binary",
                      "_convolution_pointwise_binary_", "_convolution_transpose_pointwise", "_linear_pointwise",
                      "_linear_pointwise_binary", "_mkl_linear", "mkldnn_rnn_layer", "addmm_out", "mm_out"})  # fmt: skip
ATTENDING = frozenset({"bmm_out", "baddbmm_out", "_scaled_dot_product_flash_attention_for_cpu"})
RECORD = "tersor"


@final
class Inductor(Engine):
    """AOTInductor on the CPU, for x86 with AVX2 or more.

    The package holds machine code for the CPU that compiled it. It needs a C++ compiler to be built and none to be
    opened. ``options`` are settings of ``torch._inductor.config``, such as ``{"max_autotune": True}``.
    """

    name: ClassVar[str] = "inductor"
    title: ClassVar[str] = "Inductor"
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    extra: ClassVar[str] = ""
    file: ClassVar[str] = "model.pt2"
    wishes: ClassVar[Wishes] = Wishes(non_negative=UINT8, signed=UINT8, fused_sums=True)

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
        """Its kernels have int8 and uint8, weights in int8 alone; narrower numbers are stored in these."""
        if isinstance(dtype, FloatDtype) or dtype.bits != 8:
            return f"has no kernel for {dtype.as_config()}"
        return ""

    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """Each value quantized once, and all as the patterns of Inductor want it."""
        graph = Graph(program)
        join_twins(graph)
        fallbacks = fit_patterns(graph)
        return graph.close(), fallbacks

    def build(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        """One package."""
        import torch._inductor  # slow to import

        exported = decompose(program).exported
        modules: dict[str, str] = {}
        for node in exported.graph.nodes:
            node.meta.pop("stack_trace", None)  # it would stand in the package, with the paths of this machine
            if (source := contraction_behind(node)) is not None:
                modules[node.name] = module_of(source)
        known = {"freezing": True, "cpp.enable_kernel_profile": True, "cpp.dynamic_threads": True}
        record = json.dumps({**asdict_of(Machine.here()), "modules": modules})
        for name in options:
            if name not in torch._inductor.config._config:
                raise InvalidValueError(f"{name!r} is no setting of torch._inductor.config", where="options")
        with torch.no_grad(), _quiet():  # freezing, which packs the weights, happens without gradients alone
            try:
                torch._inductor.aoti_compile_and_package(
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

    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """Load the package, if this machine can run it."""
        return _Session(folder / self.file, threads)
