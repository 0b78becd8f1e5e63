"""OpenVINO: an IR of int8 weights and fake quantization, from which the runtime makes int8 kernels when it opens it."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from tersor.config.dtypes import FloatDtype, QuantDtype
from tersor.deploy.engine import INT8, UINT8, Engine, Operator, Session, Wishes
from tersor.deploy.graph import Graph
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.movement import before_pools
from tersor.deploy.onnx import write_program
from tersor.deploy.operators import SIGNS
from tersor.deploy.placement import join_twins, whole_ranges
from tersor.deploy.sums import bytes_in_sums, is_added_unrounded, is_wide, round_in_float
from tersor.errors import CheckpointError, InvalidValueError, TraceError

PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention"})
ATTENDING = frozenset({"MatMul", "ScaledDotProductAttention"})
INTEGERS = ("_i8", "_u8")
"""How names of kernels end that compute in integers; with integer weights alone they compute in f32."""
PRECISIONS = {"f32": "", "bf16": "BF16", "f16": "FP16"}
"""By name: what the device has to be capable of."""
SHAPES = 8
"""For so many shapes of inputs a session keeps compiled networks."""
PROFILED_CALLS = 5


@final
class OpenVino(Engine):
    """OpenVINO on the CPU.

    Its compiler moves fake quantization through what does not change values, so only the operands of convolutions,
    products and sums need it. It chooses the stored type by the range: uint8 where that begins at zero, int8 where it
    lies around zero, uint8 with a zero point anywhere else, which is slower.

    Options:
        precision: of what is not quantized: ``f32`` (default), or ``bf16`` and ``f16`` on processors that have them.
    """

    name: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "openvino")
    extra: ClassVar[str] = "openvino"
    file: ClassVar[str] = "model.xml"
    wishes: ClassVar[Wishes] = Wishes(
        non_negative=UINT8,
        signed={**INT8, "quant_range": "full"},
        added={**INT8, "quant_dtype": "int16"},
        products=UINT8,
    )

    def lacks(self, dtype: QuantDtype, *, is_activation: bool) -> str:
        """It has integers of at most 16 bits, and weights of fp8 and int1; inputs of these it would round to int8."""
        weights_alone = isinstance(dtype, FloatDtype) or dtype == SIGNS
        fits = not is_activation if weights_alone else dtype.bits <= 16
        return "" if fits else f"has no {dtype.as_config()} {'inputs and outputs' if is_activation else 'weights'}"

    def prepare(self, program: Program) -> tuple[Program, tuple[Fallback, ...]]:
        """Each value quantized once, in all of int8 or uint8, and in front of pools.

        Where OpenVINO would not round what a convolution gives to a sum, it is made to, at the cost of some speed.
        """
        graph = Graph(program)
        join_twins(graph)
        skipped = round_in_float(graph, lambda node: is_added_unrounded(node) and not is_wide(node))
        bytes_in_sums(graph)
        before_pools(graph)
        wide = round_in_float(graph, is_wide)
        whole_ranges(graph)
        return graph.close(), (
            *(
                Fallback(where, "added in floating point: OpenVINO would not round it (int16 is fast)")
                for where in skipped
            ),
            *(Fallback(where, "has more than 8 bits: what reads it runs in floating point") for where in wide),
        )

    def build(self, program: Program, folder: Path, options: Mapping[str, Any]) -> None:
        """``model.xml`` and ``model.bin``, by way of ONNX."""
        import openvino  # here, because the package is optional

        _precision(options)
        with TemporaryDirectory() as temporary:
            path = write_program(program, Path(temporary) / "model.onnx")
            try:
                model = openvino.convert_model(path)
            except Exception as error:
                raise TraceError(
                    f"OpenVINO cannot convert it: {_reason(error)}",
                    where=type(program).__name__,
                    remedy="Quantize in another way, or choose another engine.",
                ) from error
            _drop_zero_points(model)
            # Compressed to float16, the scales would not be those of the simulation any more.
            openvino.save_model(model, folder / self.file, compress_to_fp16=False)

    def open(self, folder: Path, *, threads: int | None, options: Mapping[str, Any]) -> Session:
        """A session on the CPU."""
        return _Session(folder / self.file, threads, _precision(options))


@cache
def _core() -> Any:
    """The runtime, one for as long as the process lives.

    On Linux its CPU plugin puts an alternative signal stack on the thread that first loads it, and takes it away with
    the runtime. Of two runtimes that end in the order in which they began, the second puts back the first's, which is
    gone, and the next signal (a data loader's worker ends) is a segmentation fault. One that stays cannot do that.
    """
    import openvino

    return openvino.Core()


class _Session(Session):
    """Keeps a compiled network for each shape of inputs: fixed shapes run 5 % faster than free ones."""

    def __init__(self, path: Path, threads: int | None, precision: str) -> None:
        import openvino

        self._core = _core()
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": precision,
            # Else the inputs of layers with integer weights alone would be rounded too.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        needed = PRECISIONS[precision]
        if needed and needed not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise InvalidValueError(f"this processor cannot compute in {precision}", where="options['precision']")
        try:
            self._model = self._core.read_model(path)
        except Exception as error:
            raise CheckpointError(
                f"OpenVINO {openvino.__version__.split('-')[0]} cannot open it{_written_by(path)}: {_reason(error)}",
                where=os.fspath(path),
                remedy="Compile it again with the version that is to run it.",
            ) from error
        self._requests: OrderedDict[tuple[tuple[int, ...], ...], Any] = OrderedDict()
        self._lock = threading.Lock()  # a request runs one call at a time

    def _compile(self, inputs: Sequence[Tensor], **settings: Any) -> Any:
        model = self._model.clone()
        model.reshape({index: list(tensor.shape) for index, tensor in enumerate(inputs)})
        return self._core.compile_model(model, "CPU", {**self._settings, **settings})

    def _request(self, inputs: Sequence[Tensor]) -> Any:
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        request = self._requests.get(shapes)
        if request is None:
            request = self._requests[shapes] = self._compile(inputs).create_infer_request()
            if len(self._requests) > SHAPES:
                self._requests.popitem(last=False)
        self._requests.move_to_end(shapes)
        return request

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with self._lock:
            request = self._request(inputs)
            _infer(request, inputs)
            return [torch.from_numpy(value.data.copy()) for value in request.output_tensors]

    def profile(self, inputs: Sequence[Tensor]) -> list[Operator]:
        compiled = self._compile(inputs, PERF_COUNT=True)
        request = compiled.create_infer_request()
        for _ in range(PROFILED_CALLS):
            _infer(request, inputs)
        attending = _products(self._model)
        operators: list[Operator] = []
        for node in compiled.get_runtime_model().get_ordered_ops():
            about = {key: value.astype(str) for key, value in node.get_rt_info().items()}
            if about["execTimeMcs"] != "not_executed":
                operators += _operators(node.get_friendly_name(), about, attending)
        return operators


def _operators(name: str, about: Mapping[str, str], attending: Mapping[str, bool]) -> list[Operator]:
    """What a node of the compiled network stands for: one operator, or the products in a subgraph.

    Args:
        name: of the node.
        about: what the runtime says of it.
        attending: of :func:`_products`.
    """
    kind, time = about["layerType"], int(about["execTimeMcs"]) / 1000
    parts = about["originalLayersNames"].split(",")
    products = [part for part in parts if part in attending] if kind == "Subgraph" else []
    if not products:
        precision = "int8" if about["primitiveType"].lower().endswith(INTEGERS) else "float"
        return [Operator(name, kind, precision, time, kind in PRODUCTS, kind in ATTENDING)]
    return [
        Operator(
            product,
            kind,
            # It says no precision of its parts; what is scaled after a product was a product of integers.
            "int8" if any(part.startswith(f"{product}/Dequantization") for part in parts) else "float",
            time / len(products),
            computes=True,
            attends=attending[product],
        )
        for product in products
    ]


def _products(model: Any) -> dict[str, bool]:
    """The matrix products of a network by name: whether both operands are values, and not a weight."""
    found: dict[str, bool] = {}
    for node in model.get_ops():
        if node.get_type_name() == "MatMul":
            operand = node.input_value(1).get_node()
            while operand.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose"):
                operand = operand.input_value(0).get_node()
            found[node.get_friendly_name()] = operand.get_type_name() != "Constant"
    return found


def _drop_zero_points(model: Any) -> None:
    """Take out subtractions of nothing: OpenVINO's own pass leaves those whose constant several layers share.

    Weights with a zero point run in floating point.
    """
    for node in model.get_ops():
        if node.get_type_name() != "Subtract" or node.input_value(0).get_node().get_type_name() != "Convert":
            continue
        shift = node.input_value(1).get_node()
        while shift.get_type_name() in ("Convert", "Reshape"):
            shift = shift.input_value(0).get_node()
        if shift.get_type_name() == "Constant" and not shift.data.any():
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(node.input_value(0))


def _infer(request: Any, inputs: Sequence[Tensor]) -> None:
    import openvino

    held = [tensor.detach().cpu().contiguous().numpy() for tensor in inputs]
    for index, value in enumerate(held):
        request.set_input_tensor(index, openvino.Tensor(value, shared_memory=True))
    request.infer()


def _precision(options: Mapping[str, Any]) -> str:
    if unknown := set(options) - {"precision"}:
        raise InvalidValueError(f"there is no {sorted(unknown)[0]!r}", where="options", legal=("precision",))
    precision = options.get("precision", "f32")
    if precision not in PRECISIONS:
        raise InvalidValueError(f"{precision!r} is not accepted", where="options['precision']", legal=PRECISIONS)
    return precision


def _reason(error: Exception) -> str:
    """The last line of a message that says something: the first ones say where in the C++ code it arose."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not re.match(r"(Exception|Check|Summary|--|While|FrontEnd API)", line)]
    return (told or lines or [repr(error)])[-1]


def _written_by(path: Path) -> str:
    """Which version wrote a file, as far as it says so."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r'<Runtime_version value="(\d+(?:\.\d+)*)', text)
    return f" ({found[1]} wrote it)" if found else ""
