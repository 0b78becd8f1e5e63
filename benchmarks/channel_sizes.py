"""How an int8 layer's time follows its number of channels: ``python -m benchmarks.channel_sizes``.

One convolution (3 x 3, as many channels in as out, on a map of 28 x 28) and one product (128 rows, square) are written
as ONNX with Q/DQ and timed in ONNX Runtime and OpenVINO: CPU milliseconds of one call on one thread, the least of many,
all sizes in turn so that a disturbance meets every one. ``results/channel_sizes.json`` is what ``docs/deploy_zoo.md``
shows.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tersor.storage import write_text

RESULT = Path(__file__).parent / "results" / "channel_sizes.json"
SIZES = (16, 20, 24, 28, 30, 32, 33, 36, 40, 44, 48, 52, 56, 60, 62, 64, 65, 68, 72, 80, 88, 96, 112, 127, 128, 129)
ROUNDS, CALLS = 12, 8
MAP, ROWS = 28, 128


def layer(kind: str, channels: int) -> bytes:
    """An ONNX file of one int8 layer: ``convolution`` or ``product``."""
    from onnx import TensorProto, helper, numpy_helper

    draws = np.random.default_rng(0)
    shape = (channels, channels, 3, 3) if kind == "convolution" else (channels, channels)
    along = 0 if kind == "convolution" else 1
    constants = {
        "x_scale": np.float32(0.02),
        "y_scale": np.float32(0.05),
        "zero": np.uint8(128),
        "weight": draws.integers(-127, 128, shape).astype(np.int8),
        "w_scale": np.full(channels, 0.01, np.float32),
        "w_zero": np.zeros(channels, np.int8),
    }
    node = helper.make_node
    compute = (
        node("Conv", ["xd", "wd"], ["z"], pads=[1, 1, 1, 1])
        if kind == "convolution"
        else node("MatMul", ["xd", "wd"], ["z"])
    )
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "x_scale", "zero"], ["xd"]),
        node("DequantizeLinear", ["weight", "w_scale", "w_zero"], ["wd"], axis=along),
        compute,
        node("QuantizeLinear", ["z", "y_scale", "zero"], ["zq"]),
        node("DequantizeLinear", ["zq", "y_scale", "zero"], ["y"]),
    ]
    sizes = list(inputs_of(kind, channels).shape)
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, sizes)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


def inputs_of(kind: str, channels: int) -> np.ndarray[Any, Any]:
    """What the layer is run on."""
    shape = (1, channels, MAP, MAP) if kind == "convolution" else (1, ROWS, channels)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def in_onnx_runtime(file: bytes, x: np.ndarray[Any, Any]) -> Callable[[], object]:
    """Runs it there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


def in_openvino(file: bytes, x: np.ndarray[Any, Any]) -> Callable[[], object]:
    """Runs it there."""
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file, b""), "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda: compiled([x])


ENGINES = {"onnxruntime": in_onnx_runtime, "openvino": in_openvino}


def measure() -> dict[str, dict[str, dict[str, float]]]:
    """CPU milliseconds by kind, engine and number of channels."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in ("convolution", "product"):
        for engine, opened in ENGINES.items():
            runs = {size: opened(layer(kind, size), inputs_of(kind, size)) for size in SIZES}
            least = dict.fromkeys(runs, float("inf"))
            for _ in range(ROUNDS):
                for size, run in runs.items():
                    for _ in range(CALLS):
                        began = time.process_time()
                        run()
                        least[size] = min(least[size], time.process_time() - began)
            found.setdefault(kind, {})[engine] = {str(size): round(1000 * own, 4) for size, own in least.items()}
    return found


def main() -> None:
    """Measure and write."""
    packages = {name: version(name) for name in ("onnx", *ENGINES)}
    head = {"versions": {"python": platform.python_version(), **packages}, "map": MAP, "rows": ROWS}
    write_text(RESULT, json.dumps({**head, "milliseconds": measure()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
