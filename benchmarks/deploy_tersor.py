"""Tersor's rows of ``benchmarks.deploy``: what an engine wants, quantized by ``PtqQuantizer``, made real.

Nothing is chosen by hand: ``engine_config`` says what is quantized, and the defaults of the quantizer and of the
speedup do the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.deploy_networks import Call, Inputs, Network, by_sixteen
from benchmarks.deploy_rows import Row, Task
from tersor.deploy import CompiledModel, QuantizationSpeedup, engines, post_training, read_deployment
from tersor.deploy.agreement import agreement
from tersor.quantization import PtqQuantizer

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "inductor": "Inductor"}


def quantized(task: Task, engine: str) -> PtqQuantizer:
    """The network, calibrated."""
    batches = [(*inputs, None) for inputs in task.calibration]  # what stands last is taken for the targets
    return post_training(task.model, task.network.example(4), batches, engine)


def tersor_build(engine: str) -> Any:
    """How to build for an engine: one file for each batch size."""

    def build(task: Task) -> dict[str, Any]:
        quantizer = quantized(task, engine)
        record: dict[str, Any] = {}
        for batch in task.batches:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                compiled = QuantizationSpeedup(
                    quantizer,
                    task.network.example(batch),
                    engine=engine,
                    dynamic_batch=False,
                    on_failure="warn",
                ).compile()
            compiled.save(task.place(batch))
            report = compiled.report
            record.setdefault("bytes", report.bytes)
            record[f"batch_{batch}"] = {
                "simulation_snr": report.simulation_snr,
                "floor": report.floor,
                "layers": report.to_dict()["layers"],
                "asked": report.asked,
                "int8": report.int8,
                "coverage": report.coverage,
                "fallbacks": [f"{fallback.where}: {fallback.reason}" for fallback in report.fallbacks][:5],
                "warnings": [str(one.message)[:500] for one in caught if "deploy" in str(one.filename)][:3],
            }
        call = opened(task.folder, max(task.batches), torch.get_num_threads())
        record["simulation"] = against(call, quantizer.model, task.network)
        return record

    return build


def against(call: Call, simulation: nn.Module, network: Network) -> dict[str, Any]:
    """An artefact beside the simulation, on all samples that are tested with."""
    inputs = network.tests()
    with torch.no_grad():
        expected = torch.cat([simulation.eval()(*part) for part in inputs])
    found = agreement([torch.cat([by_sixteen(call, part) for part in inputs])], [expected])
    return {"snr": found.snr, "top1": found.top1 if network.classifies else None}


def opened(folder: Path, batch: int, threads: int) -> Call:
    """What ``save`` wrote."""
    compiled = CompiledModel.load(folder / str(batch), threads=threads)

    def call(*inputs: Tensor) -> Tensor:
        return compiled(*inputs)

    return call


def opened_bf16(folder: Path, batch: int, threads: int) -> Call:
    """The same file, with what is not quantized in bf16."""
    saved = read_deployment(folder / str(batch))
    compiled = CompiledModel(
        saved.engine, saved.directory, saved.signature, saved.report, threads=threads, options={"precision": "bf16"}
    )

    def call(*inputs: Tensor) -> Tensor:
        return compiled(*inputs)

    return call


def profile(folder: Path, batch: int, inputs: Inputs) -> dict[str, Any]:
    """From the engine's own profile, as the artefact tells it."""
    operators = CompiledModel.load(folder / str(batch), threads=1).session.profile(list(inputs))
    weighted = [operator for operator in operators if operator.computes and not operator.attends]
    floating = [operator.name for operator in weighted if operator.precision == "float"]
    return {
        "int8": len(weighted) - len(floating),
        "contractions": len(weighted),
        "floating": floating[:10],
        "attention": sum(operator.attends for operator in operators),
    }


def _rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name, engine in engines().items():
        if name not in TITLES or engine.why_not():
            continue
        build, title = tersor_build(name), TITLES[name]
        rows[f"Tersor, {title}"] = Row(name, "tersor", f"int8 for {title}", build, opened, profile=profile)
        rows[f"Tersor, {title}, half the channels"] = Row(
            name,
            "tersor",
            f"half of the channels pruned, then int8 for {title}",
            build,
            opened,
            fits=lambda network: network.channels,
            profile=profile,
            half=True,
        )
    if "Tersor, OpenVINO" in rows:
        rows["Tersor, OpenVINO, bf16"] = Row(
            "openvino",
            "tersor",
            "the same file; the rest in bf16",
            tersor_build("openvino"),
            opened_bf16,
            fits=lambda network: network.attends,
            base="Tersor, OpenVINO",
        )
    return rows


TERSOR: Mapping[str, Row] = _rows()
"""One row for each engine that is there, and those of pruned networks."""
