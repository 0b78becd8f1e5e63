"""Rows of ``benchmarks.deploy`` for what others make of the same networks and the same calibration data.

ONNX Runtime's ``quantize_static``, by hand: activations uint8 with a zero point, weights int8 with a scale for each
channel, which its kernels want; three choices of what is quantized. NNCF on OpenVINO's representation, with the preset
for transformers where there is attention. torchao's PT2E with the quantizer for x86, compiled ahead of time.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.deploy_networks import Inputs, Network
from benchmarks.deploy_rows import (
    Row,
    Task,
    arrays,
    convert_openvino,
    export_onnx,
    exported,
    onnx_session,
    open_inductor,
    open_onnx,
    open_openvino,
    openvino_model,
    package,
    quiet,
    save_openvino,
    size_of,
)
from tersor.deploy.onnx_runtime import FLOATING, INTEGER

UNFUSED = ("MatMulAddFusion",)
"""Without it a product and the sum with its bias stay two, and the product runs in int8."""


def attends(network: Network) -> bool:
    """Whether a network has products of attention."""
    return network.attends


# ONNX Runtime


def quantize_static(which: str) -> Any:
    """How to build one of ONNX Runtime's variants.

    Args:
        which: ``all`` operators that it can quantize, ``convgemm``: convolutions and products, or ``linear``: those of
            the products that have a weight.
    """

    def build(task: Task) -> dict[str, Any]:
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as folder, quiet():
            exact, prepared = Path(folder) / "exact.onnx", Path(folder) / "prepared.onnx"
            export_onnx(task, exact)
            quant_pre_process(exact, prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                task.folder / "model.onnx",
                _reader(prepared, task.calibration),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=None if which == "all" else ["Conv", "Gemm", "MatMul"],
                nodes_to_exclude=_products_of_values(prepared) if which == "linear" else [],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        return {"bytes": (task.folder / "model.onnx").stat().st_size}

    return build


def _reader(path: Path, calibration: list[Inputs]) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    names = [value.name for value in onnx.load(path).graph.input]
    feeds = iter([dict(zip(names, arrays(inputs), strict=True)) for inputs in calibration])

    class Reader(CalibrationDataReader):
        """One batch after the other."""

        def get_next(self) -> Any:
            return next(feeds, None)

    return Reader()


def _products_of_values(path: Path) -> list[str]:
    """The products of a file whose operands are both computed."""
    import onnx

    graph = onnx.load(path).graph
    stored = {value.name for value in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if not stored & set(node.input)]


def profile_onnx(*disabled: str) -> Any:
    """How to count in ONNX Runtime's profile.

    Args:
        *disabled: optimizers that are not to run.
    """

    def profile(folder: Path, batch: int, inputs: Inputs) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as prefix:
            path = folder / "model.onnx"
            session = onnx_session(path, batch, 1, disabled=disabled, profile=f"{prefix}/profile")
            names = [value.name for value in session.get_inputs()]
            session.run(None, dict(zip(names, arrays(inputs), strict=True)))
            events = json.loads(Path(session.end_profiling()).read_text())
        kinds = [event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")]
        counts = Counter(kinds)
        integers = sum(count for kind, count in counts.items() if kind in INTEGER)
        return {"int8": integers, "contractions": integers + sum(counts[kind] for kind in FLOATING)}

    return profile


# OpenVINO


def nncf(**options: str) -> Any:
    """How to build NNCF's network.

    Args:
        **options: of ``nncf.quantize``, by the names of enumerations' values.
    """

    def build(task: Task) -> dict[str, Any]:
        import nncf as package_

        logging.disable(logging.CRITICAL)
        chosen: dict[str, Any] = {}
        if "preset" in options:
            chosen["preset"] = package_.QuantizationPreset(options["preset"])
        if task.network.attends:
            chosen["model_type"] = package_.ModelType.TRANSFORMER
        with quiet():
            quantized = package_.quantize(
                convert_openvino(task),
                package_.Dataset([arrays(inputs) for inputs in task.calibration]),
                subset_size=len(task.calibration),
                **chosen,
            )
        return save_openvino(quantized, task)

    return build


def profile_openvino(folder: Path, batch: int, inputs: Inputs) -> dict[str, Any]:
    """Count in the graph that OpenVINO runs."""
    del inputs
    model = openvino_model(folder / str(batch) / "model.xml", "f32", 1).get_runtime_model()
    precisions = Counter(
        operator.get_rt_info()["runtimePrecision"].astype(str)
        for operator in model.get_ops()
        if operator.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
    )
    return {"int8": precisions["i8"] + precisions["u8"], "contractions": precisions.total()}


# Inductor


def build_pt2e(task: Task) -> dict[str, Any]:
    """Torchao's quantizer for x86 with its default configuration; one file for each batch size."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    model = copy.deepcopy(task.model)
    program = exported(model, task.network.example(4), strict=not task.network.attends)
    with torch.no_grad(), quiet():
        prepared = prepare_pt2e(program.module(), quantizer)
        for inputs in task.calibration:
            prepared(*inputs)
        converted = convert_pt2e(prepared)
        for batch in task.batches:
            fixed = torch.export.export(converted, task.network.example(batch))
            package(fixed, task.place(batch) / "model.pt2")
    return {"bytes": size_of(task.place(task.batches[0]))}


def _onnx_rows() -> dict[str, Row]:
    engine = "onnxruntime"
    says = {
        "all": "every operator that it can quantize",
        "convgemm": "convolutions and products",
        "linear": "convolutions and products with a weight",
    }
    rows: dict[str, Row] = {}
    for which, words in says.items():
        name = f"ORT quantize_static, {which}"
        fits = attends if which == "linear" else lambda network: True
        rows[name] = Row(engine, "peer", words, quantize_static(which), open_onnx(), fits=fits, profile=profile_onnx())
        rows[f"{name}, unfused"] = Row(
            engine,
            "peer",
            f"{words}; opened without MatMulAddFusion",
            quantize_static(which),
            open_onnx(*UNFUSED),
            fits=attends,
            profile=profile_onnx(*UNFUSED),
            base=name,
        )
    return rows


def _nncf_rows() -> dict[str, Row]:
    says = "nncf.quantize on OpenVINO's representation"
    build = nncf()
    default = Row("openvino", "peer", f"{says}", build, open_openvino("f32"), profile=profile_openvino)
    return {
        "NNCF": default,
        "NNCF, bf16": Row(
            "openvino", "peer", f"{says}; the rest in bf16", build, open_openvino("bf16"), fits=attends, base="NNCF"
        ),
        "NNCF, mixed": Row(
            "openvino",
            "peer",
            f"{says}, preset mixed",
            nncf(preset="mixed"),
            open_openvino("f32"),
            fits=lambda network: network.measure is not None and not network.attends,
            profile=profile_openvino,
        ),
    }


PEERS: Mapping[str, Row] = {
    **_onnx_rows(),
    **(_nncf_rows() if find_spec("nncf") else {}),
    **(
        {"torchao PT2E": Row("inductor", "peer", "X86InductorQuantizer, AOTInductor", build_pt2e, open_inductor)}
        if find_spec("torchao")
        else {}
    ),
}
"""The rows of the peers that are installed."""
