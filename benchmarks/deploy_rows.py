"""What ``benchmarks.deploy`` builds and times: torch, and each engine in floating point.

A row builds one file, or one for each batch size, and opens it as something that is called with a network's inputs.
What is quantized is in ``deploy_peers.py`` and ``deploy_tersor.py``. Batch sizes are fixed in the files or when they
are opened, for everybody: engines plan better so.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from benchmarks.deploy_networks import Call, Inputs, Network

MODEL = "model.pt"
"""The network itself, which the rows of torch open."""


Profile = Callable[[Path, int, Inputs], dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """What a row builds from.

    Attributes:
        network: the network's description.
        model: the network.
        calibration: what a quantizer may look at.
        batches: the batch sizes to build for.
        folder: where to write.
    """

    network: Network
    model: nn.Module
    calibration: list[Inputs]
    batches: tuple[int, ...]
    folder: Path

    def place(self, batch: int) -> Path:
        """The folder of what is built for one batch size."""
        place = self.folder / str(batch)
        place.mkdir(parents=True, exist_ok=True)
        return place


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        engine: torch, onnxruntime, openvino or inductor.
        kind: ``float``, ``peer`` or ``tersor``.
        says: what it is, in words.
        build: writes the files; what it returns is recorded.
        open: what was written for a batch size, with so many threads.
        fits: whether it is for a network.
        profile: from the same to how many convolutions and products run in int8, and how many do not, by the engine's
            own profile; None where that is not known.
        half: whether it is of the network with half the channels.
        base: the row whose files it opens in another way; None where it has its own.
    """

    engine: str
    kind: str
    says: str
    build: Callable[[Task], dict[str, Any]]
    open: Callable[[Path, int, int], Call]
    fits: Callable[[Network], bool] = lambda network: True
    profile: Profile | None = None
    half: bool = False
    base: str | None = None


def exported(model: nn.Module, example: Inputs, *, strict: bool = False) -> ExportedProgram:
    """``torch.export`` with a free batch size."""
    dynamic = tuple({0: Dim("batch", min=1, max=1024)} for _ in example)
    with torch.no_grad(), quiet():
        return torch.export.export(model, example, dynamic_shapes=dynamic, strict=strict)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def arrays(inputs: Inputs) -> list[Any]:
    """For engines that take numpy's arrays."""
    return [value.numpy() for value in inputs]


# torch


def build_torch(task: Task) -> dict[str, Any]:
    """Nothing but the parameters, for their size."""
    return {"bytes": sum(value.numel() * value.element_size() for value in task.model.state_dict().values())}


def _stored(folder: Path) -> nn.Module:
    return torch.load(folder.parent / MODEL, weights_only=False).eval()


def open_eager(folder: Path, batch: int, threads: int) -> Call:
    """As it is."""
    del batch, threads
    return _without_gradients(_stored(folder))


def open_bf16(folder: Path, batch: int, threads: int) -> Call:
    """With parameters and images in bfloat16."""
    del batch, threads
    model = _stored(folder).to(torch.bfloat16)
    call = _without_gradients(model)
    return lambda *inputs: call(
        *(value.to(torch.bfloat16) if value.is_floating_point() else value for value in inputs)
    ).float()


def open_compiled(folder: Path, batch: int, threads: int) -> Call:
    """``torch.compile``, with weights as constants (``freezing``), compiled for this batch size."""
    import torch._inductor.config as inductor

    del batch, threads
    compiled = torch.compile(_stored(folder), dynamic=False)
    call = _without_gradients(compiled)

    def frozen(*inputs: Tensor) -> Tensor:
        with inductor.patch(freezing=True):
            return call(*inputs)

    return frozen


def _without_gradients(model: Callable[..., Tensor]) -> Call:
    def call(*inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(*inputs)

    return call


# ONNX Runtime


def export_onnx(task: Task, path: Path) -> None:
    """Torch's exporter, with a free batch size."""
    program = exported(copy.deepcopy(task.model), task.network.example(4))
    with quiet():
        torch.onnx.export(program, (), path, dynamo=True, external_data=False, verbose=False)


def build_onnx(task: Task) -> dict[str, Any]:
    """One file for all batch sizes."""
    export_onnx(task, task.folder / "model.onnx")
    return {"bytes": (task.folder / "model.onnx").stat().st_size}


def onnx_session(path: Path, batch: int, threads: int, *, disabled: tuple[str, ...] = (), profile: str = "") -> Any:
    """A session whose batch size is fixed when it is opened."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_free_dimension_override_by_name("batch", batch)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
    )


def open_onnx(*disabled: str) -> Callable[[Path, int, int], Call]:
    """How to open a file of ONNX.

    Args:
        *disabled: optimizers that are not to run.
    """

    def opens(folder: Path, batch: int, threads: int) -> Call:
        session = onnx_session(folder / "model.onnx", batch, threads, disabled=disabled)
        names = [value.name for value in session.get_inputs()]

        def call(*inputs: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, dict(zip(names, arrays(inputs), strict=True)))[0])

        return call

    return opens


# OpenVINO


def convert_openvino(task: Task) -> Any:
    """OpenVINO's representation of the network, with a free batch size."""
    import openvino

    example = task.network.example(4)
    with quiet():
        converted = openvino.convert_model(exported(copy.deepcopy(task.model), example))
    fix_batch(converted, -1, example)
    return converted


def fix_batch(converted: Any, batch: int, example: Inputs) -> None:
    """Set the shapes of its inputs; -1 leaves the batch size free."""
    import openvino

    shapes = [openvino.PartialShape([batch, *value.shape[1:]]) for value in example]
    converted.reshape(dict(zip(converted.inputs, shapes, strict=True)))


def save_openvino(converted: Any, task: Task) -> dict[str, Any]:
    """One file for each batch size."""
    import openvino

    for batch in task.batches:
        fixed = converted.clone()
        fix_batch(fixed, batch, task.network.example(4))
        openvino.save_model(fixed, task.place(batch) / "model.xml", compress_to_fp16=False)
    return {"bytes": size_of(task.place(task.batches[0]))}


def size_of(folder: Path) -> int:
    """The bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


def build_openvino(task: Task) -> dict[str, Any]:
    """In fp32, uncompressed."""
    return save_openvino(convert_openvino(task), task)


def open_openvino(precision: str) -> Callable[[Path, int, int], Call]:
    """How to open a file of OpenVINO.

    Args:
        precision: of what is in floating point, ``f32`` or ``bf16``.
    """

    def opens(folder: Path, batch: int, threads: int) -> Call:
        request = openvino_model(folder / str(batch) / "model.xml", precision, threads).create_infer_request()

        def call(*inputs: Tensor) -> Tensor:
            return torch.from_numpy(request.infer(arrays(inputs), share_inputs=True, share_outputs=False)[0])

        return call

    return opens


def openvino_model(path: Path, precision: str, threads: int, **options: Any) -> Any:
    """Compiled for one stream of calls."""
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    return openvino.Core().compile_model(path, "CPU", {**hints, **options})


# Inductor


def package(program: ExportedProgram, path: Path) -> None:
    """A shared library made ahead of time, which asks for the number of threads when it runs."""
    import torch._inductor
    import torch._inductor.config as inductor

    with inductor.patch({"freezing": True, "cpp.dynamic_threads": True}), torch.no_grad(), quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def build_inductor(task: Task) -> dict[str, Any]:
    """In fp32: one file for each batch size."""
    for batch in task.batches:
        with torch.no_grad():
            program = torch.export.export(copy.deepcopy(task.model), task.network.example(batch))
        package(program, task.place(batch) / "model.pt2")
    return {"bytes": size_of(task.place(task.batches[0]))}


def open_inductor(folder: Path, batch: int, threads: int) -> Call:
    """Loaded; torch's number of threads is the process's."""
    import torch._inductor

    del threads
    with quiet():
        return _without_gradients(torch._inductor.aoti_load_package(str(folder / str(batch) / "model.pt2")))


FLOAT: Mapping[str, Row] = {
    "torch eager fp32": Row("torch", "float", "as it is", build_torch, open_eager),
    "torch eager bf16": Row("torch", "float", "in bfloat16", build_torch, open_bf16, base="torch eager fp32"),
    "torch.compile fp32": Row(
        "torch", "float", "Inductor, with `freezing`", build_torch, open_compiled, base="torch eager fp32"
    ),
    "ONNX Runtime fp32": Row("onnxruntime", "float", "of torch's exporter", build_onnx, open_onnx()),
    "OpenVINO fp32": Row("openvino", "float", "of torch.export's program", build_openvino, open_openvino("f32")),
    "OpenVINO bf16": Row(
        "openvino", "float", "the same file", build_openvino, open_openvino("bf16"), base="OpenVINO fp32"
    ),
    "AOTInductor fp32": Row("inductor", "float", "of torch.export's program", build_inductor, open_inductor),
}
"""What is not quantized."""
