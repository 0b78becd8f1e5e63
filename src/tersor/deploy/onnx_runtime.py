"""ONNX Runtime: one ONNX file with Q/DQ, whose int8 kernels the runtime itself finds."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final
from uuid import uuid4

import torch
from torch import Tensor, fx

from tersor.config.dtypes import FloatDtype, QuantDtype
from tersor.deploy.engine import UINT8, Engine, Operator, Session, Wishes
from tersor.deploy.graph import DEQUANTIZE, Graph, module_of
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.movement import dequantize_late, pad_behind_rounding, pads_convolutions, quantize_early
from tersor.deploy.onnx import write_program
from tersor.deploy.operators import dequantize, spread
from tersor.deploy.placement import (
    fixed_zero_points,
    gather_numbers,
    integer_biases,
    join_twins,
    products,
    unsigned_activations,
)
from tersor.deploy.unsupported import in_floating_point
from tersor.errors import CheckpointError

FLOATING = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
)  # fmt: skip
INTEGER = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat",
     "DynamicQuantizeMatMul", "QAttention", "MatMulNBits"}
)  # fmt: skip

_ATEN = torch.ops.aten
_INNER: Mapping[Any, tuple[int, int]] = {
    _ATEN.linear.default: (1, 1), _ATEN.matmul.default: (1, -2), _ATEN.mm.default: (1, -2),
    _ATEN.addmm.default: (2, -2),
}  # fmt: skip
"""Products: which argument the weight is, and in which of its dimensions lies what is summed over."""
_TURNS = frozenset({_ATEN.t.default, _ATEN.transpose.int, _ATEN.permute.default})
DISABLED = ("MatMulAddFusion", "DoubleQDQPairsRemover", "ReluQuantRewrite", "WeightBiasQuantization")
"""Optimizers of ONNX Runtime that are kept off.

The first takes a product and the sum with its bias together, and then runs them in floating point. The second takes a
value that is rounded twice, on two grids, for one that is rounded once, on a third grid: faster, and wrong. The third
takes a ReLU for done where floats of eight bits follow, which do have negative values. The fourth rounds
weights to int8 that nobody asked to round. Whoever opens the file without
Tersor finds the list in its metadata (``session.get_modelmeta().custom_metadata_map``) and gives it as
``InferenceSession(..., disabled_optimizers=...)``.
"""
DISABLED_KEY = "tersor.disabled_optimizers"


@final
class OnnxRuntime(Engine):
    """ONNX Runtime on the CPU."""

    name: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "ONNX Runtime"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    file: ClassVar[str] = "model.onnx"
    wishes: ClassVar[Wishes] = Wishes(non_negative=UINT8, signed=UINT8, convolution_outputs=True)

    def lacks(self, dtype: QuantDtype, *, is_activation: bool) -> str:
        """It has integers of 4, 8 and 16 bits and both types of fp8."""
        if isinstance(dtype, FloatDtype) or dtype.bits in (4, 8, 16):
            return ""
        return f"has no {dtype.as_config()}"

    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """Activations as uint8, each value quantized once."""
        graph = Graph(program)
        fallbacks = (*_without_rows(graph), *_without_inner_scales(graph))
        fixed_zero_points(graph)
        unsigned_activations(graph)
        join_twins(graph)
        pad_behind_rounding(graph)
        dequantize_late(graph, stays=pads_convolutions)
        quantize_early(graph)
        join_twins(graph)
        integer_biases(graph)
        gather_numbers(graph)
        products(graph)
        return graph.close(), fallbacks

    def build(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        """One file; its metadata name the optimizers that whoever opens it should keep off."""
        write_program(program, folder / self.file, metadata={DISABLED_KEY: ",".join(DISABLED)})

    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """A session on the CPU."""
        return _Session(folder / self.file, threads)


def _without_rows(graph: Graph) -> tuple[Fallback, ...]:
    """Round in floating point what has a scale for each row that is chosen while the model runs.

    ONNX Runtime takes the product of such rows for one with a single scale, and then fails.
    """
    where: dict[str, None] = {}
    for node in graph.calls(DEQUANTIZE):
        axis = (*node.args[4:], None)[0]
        if axis is not None and graph.constant(node.args[1]) is None:
            where[module_of(node)] = None
            in_floating_point(graph, node)
    return tuple(Fallback(name, "a scale for each token: the product is in floating point") for name in where)


def _without_inner_scales(graph: Graph) -> tuple[Fallback, ...]:
    """Store in floating point what has a scale for each number that a product sums over: a weight that is read turned.

    No integer kernel can take such scales out of a sum; ONNX Runtime tries to, and then fails.
    """
    where: dict[str, None] = {}
    for node in graph.calls(*_INNER):
        place, inner = _INNER[node.target]
        weight: Any = node.args[place]
        turns: list[fx.Node] = []
        source = weight
        while isinstance(source, fx.Node) and source.target in _TURNS:
            turns.append(source)
            source = source.args[0]
        if not isinstance(source, fx.Node) or source.target is not DEQUANTIZE or len(source.args) < 5:
            continue
        numbers, scale, zero_point = (graph.constant(own) for own in source.args[:3])
        if source.args[4] is None or numbers is None or scale is None or zero_point is None or scale.numel() == 1:
            continue
        settings: Any = (*source.args[3:], None)
        kind, axis, block = settings[:3]
        if block is None and _turned(spread(scale, numbers, axis, None), turns).shape[inner] > 1:  # blocks have kernels
            values = _turned(dequantize(numbers, scale, zero_point, kind, axis), turns).contiguous()
            node.replace_input_with(weight, graph.new_constant(values, f"{source.name}_values"))
            where[module_of(node)] = None
    graph.graph.eliminate_dead_code()
    return tuple(Fallback(name, "its weight has scales along what is summed over: in floating point") for name in where)


def _turned(value: Tensor, turns: Sequence[fx.Node]) -> Tensor:
    """What comes of a tensor behind these nodes, of which the last comes first."""
    for turn in reversed(turns):
        turning: Any = turn.target
        value = turning(value, *turn.args[1:])
    return value


class _Session(Session):
    def __init__(self, path: Path, threads: int | None) -> None:
        self._path, self._threads = path, threads
        self._session = self._open(profiled=False)
        self._inputs = [value.name for value in self._session.get_inputs()]

    def _open(self, *, profiled: bool) -> Any:
        import onnxruntime  # here, because the package is optional

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Products with weights in blocks would round what they read to int8, which nobody asked for.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        if profiled:
            options.enable_profiling = True
            # It adds the time to this name, which two processes may have in common.
            options.profile_file_prefix = os.path.join(tempfile.gettempdir(), f"tersor-profile-{uuid4().hex}")
        try:
            return onnxruntime.InferenceSession(
                os.fspath(self._path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(DISABLED)
            )
        except Exception as error:
            raise CheckpointError(
                f"ONNX Runtime cannot open it: {str(error).splitlines()[0]}", where=os.fspath(self._path)
            ) from error

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [torch.from_numpy(value) for value in self._session.run(None, self._feed(inputs))]

    def profile(self, inputs: Sequence[Tensor]) -> list[Operator]:
        session = self._open(profiled=True)
        runs = 5
        for _ in range(runs):
            session.run(None, self._feed(inputs))
        path = Path(session.end_profiling())
        try:
            events = json.loads(path.read_text())
        finally:
            path.unlink()
        spent: Counter[tuple[str, str]] = Counter()
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                kind = event["args"]["op_name"]
                spent[event["name"].removesuffix("_kernel_time"), kind] += event["dur"]
        attending = _attending(self._path)
        return [
            Operator(
                name,
                kind,
                "int8" if kind in INTEGER or kind.startswith(("QLinear", "Quantize", "Dequantize")) else "float",
                microseconds / runs / 1000,
                computes=kind in INTEGER | FLOATING,
                attends=any(name == product or name.startswith(f"{product}/") for product in attending),
            )
            for (name, kind), microseconds in spent.items()
        ]

    def _feed(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        return {name: value.detach().cpu().numpy() for name, value in zip(self._inputs, inputs, strict=True)}


MOVEMENT = frozenset({"DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Cast", "Identity", "Unsqueeze"})


def _attending(path: Path) -> list[str]:
    """The names of a file's products of two values; what they are fused to is called by them and something more."""
    import onnx  # here, because the package is optional

    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    weights = {weight.name for weight in graph.initializer}

    def is_weight(name: str) -> bool:
        while name in makers and makers[name].op_type in MOVEMENT:
            name = makers[name].input[0]
        return name in weights or (name in makers and makers[name].op_type == "Constant")

    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm", "Einsum")]
    return [node.name for node in products if not any(is_weight(name) for name in node.input[:2])]
