"""TensorRT: a strongly typed engine for NVIDIA GPUs, built from one ONNX file with Q/DQ.

TensorRT knows symmetric types alone: int8 and fp8 for weights and activations, int4 in blocks for weights. What lies on
a grid with another zero point is rounded in floating point instead, to the same values, and reported. Strong typing
means that an operator runs in the types that the file says, so what stands between two Q/DQ pairs cannot silently
become something else.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from tersor.config.dtypes import FloatDtype, IntDtype, QuantDtype, parse_dtype
from tersor.config.values import is_activation
from tersor.deploy.engine import INT8, Engine, Operator, Precision, Session, Wishes
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph, module_of
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.onnx import write_program
from tersor.deploy.placement import join_twins
from tersor.deploy.unsupported import in_floating_point
from tersor.errors import CheckpointError, InvalidValueError, TraceError

OPTIONS: Mapping[str, Any] = {"min_batch": 1, "opt_batch": 8, "max_batch": 64, "optimization_level": 3}
"""What ``options`` may hold: the batches that an engine with a free batch size is built for (fastest at the middle
one), and how long TensorRT looks for fast kernels (0 to 5)."""
INT4 = IntDtype(4)
_MULTIPLYING = ("conv", "gemm", "matmul", "matrix", "fc", "mha")
"""Parts of the names of layer types that multiply matrices, in the words of TensorRT's inspector."""


@final
class TensorRT(Engine):
    """TensorRT on the first CUDA device.

    An engine is built for one type of GPU and one version of TensorRT; :meth:`open` refuses it anywhere else. Beside it
    lies the ONNX file that it was built from.
    """

    name: ClassVar[str] = "tensorrt"
    title: ClassVar[str] = "TensorRT"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "tensorrt")
    extra: ClassVar[str] = "tensorrt"
    file: ClassVar[str] = "model.engine"
    source: ClassVar[str] = "model.onnx"
    wishes: ClassVar[Wishes] = Wishes(non_negative=INT8, signed=INT8)

    @classmethod
    def why_not(cls) -> str:
        """A package is missing, or there is no CUDA device."""
        return super().why_not() or ("" if torch.cuda.is_available() else "there is no CUDA device")

    def lacks(self, dtype: QuantDtype, *, is_activation: bool) -> str:
        """It has int8 and fp8 (e4m3), and int4 for weights."""
        if isinstance(dtype, FloatDtype):
            return "" if dtype.exponent == 4 else f"has no {dtype.as_config()}, only fp8_e4m3"
        if dtype == IntDtype(8) or (dtype == INT4 and not is_activation):
            return ""
        if dtype.bits == 8:
            return f"has no {dtype.as_config()}, only int8 with zero point 0"
        return f"has no {dtype.as_config()} for {'activations' if is_activation else 'weights'}"

    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """What TensorRT cannot hold stays in floating point: zero points, dynamic scales, int4 that is not in blocks.

        uint8 with the zero point in the middle of its range becomes int8, whose numbers are smaller by 128.
        """
        graph = Graph(program)
        join_twins(graph)
        fallbacks: dict[str, Fallback] = {}
        for node in graph.calls(DEQUANTIZE):
            where = _name_of(graph, program, node)
            _to_signed(graph, node)
            if reason := _refused(graph, node):
                fallbacks.setdefault(where, Fallback(where, f"{reason}: its values stay in floating point"))
                in_floating_point(graph, node)
        return graph.close(), tuple(fallbacks.values())

    def build(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        """The ONNX file, and the engine that TensorRT builds from it on this GPU.

        Raises:
            InvalidValueError: an unknown option.
            TraceError: TensorRT's parser rejects an operator, or it finds no kernel.
        """
        chosen = _read_options(options)
        source = write_program(program, folder / self.source)
        (folder / self.file).write_bytes(_built(source, chosen))

    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """An execution context on the first CUDA device; ``threads`` are the CPU's and mean nothing here."""
        return _Session(folder / self.file)


def _read_options(options: Mapping[str, Any]) -> dict[str, int]:
    for name in options:
        if name not in OPTIONS:
            raise InvalidValueError("is no option of TensorRT", where=f"options[{name!r}]", legal=OPTIONS)
    chosen = {**OPTIONS, **options}
    if not 1 <= chosen["min_batch"] <= chosen["opt_batch"] <= chosen["max_batch"]:
        raise InvalidValueError(
            f"{chosen['min_batch']}, {chosen['opt_batch']}, {chosen['max_batch']} do not grow from 1 on",
            where="options: min_batch, opt_batch, max_batch",
        )
    return chosen


def _to_signed(graph: Graph, node: fx.Node) -> None:
    """Numbers of uint8 around 128 are those of int8 around 0."""
    numbers, scale, zero_point, kind, *place = node.args
    zero = graph.constant(zero_point)
    if kind != "uint8" or zero is None or not bool((zero.int() == 128).all()):
        return
    signed = graph.new_constant((zero.int() - 128).to(torch.int8), f"{node.name}_zero_point")
    held = graph.constant(numbers)
    if held is not None:
        made = graph.new_constant((held.int() - 128).to(torch.int8), f"{node.name}_numbers")
    else:
        assert isinstance(numbers, fx.Node)
        assert numbers.target is QUANTIZE
        x, _, _, _, low, high, *_ = numbers.args
        args = (x, scale, signed, "int8", low - 128, high - 128, *place)  # pyright: ignore[reportOperatorIssue]
        with graph.graph.inserting_before(node):
            made = graph.call(QUANTIZE, args, numbers, numbers.meta["val"].to(torch.int8))
    node.args = (made, scale, signed, "int8", *place)


def _refused(graph: Graph, node: fx.Node) -> str:
    """Why TensorRT cannot hold what a dequantize node reads; empty where it can."""
    numbers, scale, zero_point, kind, *place = node.args
    axis, block = (*place, None, None)[:2]
    zero = graph.constant(zero_point)
    if zero is None or graph.constant(scale) is None:
        return "TensorRT has no dynamic scales"
    if bool((zero.float() != 0).any()):
        return "TensorRT has no zero points but 0"
    is_weight, dtype = graph.constant(numbers) is not None, parse_dtype(str(kind))
    if not is_weight and axis is not None:
        return "TensorRT has one scale for an input or output"
    if dtype == INT4 and (block is None or node.meta["val"].dim() != 2):
        return "TensorRT has int4 in blocks of a matrix alone"
    if dtype != INT4 and block is not None:
        return f"TensorRT has no blocks of {kind}"
    return ""


def _name_of(graph: Graph, program: Program, node: fx.Node) -> str:
    """The name of the target that a dequantize node stands for; of a dynamic one, the module that reads it."""
    numbers, scale, _, kind, *_ = node.args
    is_weight, held = graph.constant(numbers) is not None, graph.constant(scale)
    for name, stored in program.targets.items():
        of_its_kind = is_activation(name.rpartition(".")[2]) is not is_weight and stored.kind == kind
        if of_its_kind and held is not None and stored.scale is not None and torch.equal(stored.scale, held):
            return name
    reader = next(iter(node.users), node)
    return module_of(reader) or reader.name


def _built(source: Path, options: Mapping[str, int]) -> bytes:
    trt: Any = importlib.import_module("tensorrt")  # here, because the package is optional
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    # Always on from TensorRT 11 on; before, without it, int8 would be a hint.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(os.fspath(source)):
        reasons = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise TraceError(f"TensorRT cannot read it: {reasons}", where=source.name)
    config = builder.create_builder_config()
    config.builder_optimization_level = options["optimization_level"]
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that it tells its types
    profile, is_free = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        value = network.get_input(index)
        shape = list(value.shape)
        if -1 in shape:
            is_free = True
            sizes = [options[name] for name in ("min_batch", "opt_batch", "max_batch")]
            profile.set_shape(value.name, *([own if size == -1 else size for size in shape] for own in sizes))
    if is_free:
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise TraceError("TensorRT found no kernels for it; its log says where", where=source.name)
    return bytes(engine)


class _Session(Session):
    def __init__(self, path: Path) -> None:
        self._trt: Any = importlib.import_module("tensorrt")
        self._logger = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise CheckpointError(
                "TensorRT cannot open it",
                where=os.fspath(path),
                remedy="An engine runs on the type of GPU, and with the version of TensorRT, that it was built for: "
                "compile it anew here.",
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]
        self._stream = torch.cuda.Stream()

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            held: list[Tensor] = []
            for name, value in zip(self._inputs, inputs, strict=True):
                held.append(value.detach().to("cuda", _torch_type(self._trt, self._engine, name)).contiguous())
                if not self._context.set_input_shape(name, tuple(held[-1].shape)):
                    profile = self._engine.get_tensor_profile_shape(name, 0)
                    raise InvalidValueError(
                        f"{tuple(held[-1].shape)} is not what the engine was built for",
                        where=name,
                        legal=[f"{tuple(profile[0])} to {tuple(profile[-1])}"],
                        remedy="Compile it with options={'max_batch': ...}.",
                    )
                self._context.set_tensor_address(name, held[-1].data_ptr())
            outputs: list[Tensor] = []
            for name in self._outputs:
                shape = tuple(self._context.get_tensor_shape(name))
                outputs.append(torch.empty(shape, dtype=_torch_type(self._trt, self._engine, name), device="cuda"))
                self._context.set_tensor_address(name, outputs[-1].data_ptr())
            self._context.execute_async_v3(self._stream.cuda_stream)
        self._stream.synchronize()
        return [value.cpu() for value in outputs]

    def profile(self, inputs: Sequence[Tensor]) -> list[Operator]:
        times = _times(self._trt)
        self._context.profiler = times
        runs = 5
        for _ in range(runs):
            self.run(inputs)
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return operators_of(json.loads(text), {name: spent / runs for name, spent in times.spent.items()})


def _times(trt: Any) -> Any:
    """A profiler that sums up what each layer took; its class derives from one of an optional package."""

    class Times(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.spent: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.spent[layer_name] = self.spent.get(layer_name, 0.0) + ms

    return Times()


def operators_of(information: Mapping[str, Any], milliseconds: Mapping[str, float]) -> list[Operator]:
    """What TensorRT's inspector says of an engine's layers.

    Args:
        information: its JSON. Layers have a name, a type, and inputs with a data type, which versions 10 and 11 spell
            differently.
        milliseconds: of each layer, by its name.

    >>> conv = {"Name": "conv1", "LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "Int8 NC/4HW4"}]}
    >>> operators_of({"Layers": [conv, "reformat"]}, {"conv1": 0.5})[0]
    Operator(name='conv1', kind='CaskConvolution', precision='int8', milliseconds=0.5, computes=True, attends=False)
    """
    operators: list[Operator] = []
    for layer in information["Layers"]:
        if isinstance(layer, str):  # of an engine that was built without details
            layer = {"Name": layer, "LayerType": ""}
        name, kind = str(layer.get("Name", "")), str(layer.get("LayerType", ""))
        computes = any(word in kind.lower() for word in _MULTIPLYING) or layer.get("ParameterType") == "Convolution"
        operators.append(Operator(name, kind, _precision(layer), milliseconds.get(name), computes))
    return operators


def _precision(layer: Mapping[str, Any]) -> Precision:
    """Integers, or fp8, where the first input is: what a layer reads is what it multiplies."""
    inputs = layer.get("Inputs") or [{}]
    first: Mapping[str, Any] = inputs[0] if isinstance(inputs[0], Mapping) else {}
    said = " ".join(str(first.get(key, "")) for key in ("Format/Datatype", "DataType", "Datatype", "Format")).lower()
    return "int8" if "int8" in said or "fp8" in said else "float"


def _torch_type(trt: Any, engine: Any, name: str) -> torch.dtype:
    types = {
        trt.float32: torch.float32, trt.float16: torch.float16, trt.bfloat16: torch.bfloat16, trt.int8: torch.int8,
        trt.int32: torch.int32, trt.int64: torch.int64, trt.bool: torch.bool, trt.uint8: torch.uint8,
    }  # fmt: skip
    return types[engine.get_tensor_dtype(name)]
