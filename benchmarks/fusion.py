"""Pruned, quantized and distilled at once, or one after another: ``python -m benchmarks.fusion``.

Two networks for MNIST, both trained: the residual one of ``examples/mnist.py`` and one that others trained
(``benchmarks/digits.py``). So many channels leave that 75, 90 or 95 % of the MACs do; weights have 8 or 4 bits, inputs
and outputs 8; the teacher is the network before. Every row makes the same number of optimizer steps on the same images
in the same order (by seed), with AdamW; each phase of a sequence has its own cosine from the same learning rate:

- ``pruned``: L1 norm at once, then fine-tuned.
- ``quantized``: quantization-aware training.
- ``sequential``: pruned and fine-tuned, made small, then quantized, then distilled while it stays quantized; a third of
  the steps each, as NNI's documents do it.
- ``fused``: pruned on a schedule over the first tenth, rounded from a third on, distilled all the time; one run.

What comes out is finalized and compiled for ONNX Runtime; its accuracy is over all 10,000 test images, its latency the
median of single images on one thread. One item is a process of its own; what is finished is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import tersor
from benchmarks import digits
from benchmarks.forked import run_each
from examples import mnist
from tersor.compressor import Compressor
from tersor.deploy import CompiledModel, QuantizationSpeedup
from tersor.distillation import LogitDistiller
from tersor.finalize import Finalized
from tersor.graph import functions_as_modules
from tersor.graph.operations import Add
from tersor.pruning import L1NormPruner
from tersor.quantization import QATQuantizer, auto_fuse
from tersor.speedup import ModelSpeedup
from tersor.storage import write_text

RESULT = Path(__file__).parent / "results" / "fusion.json"
NETWORKS = {"residual": mnist.trained_model, "digits": digits.trained_model}
REMOVED, BITS, SEEDS = (0.75, 0.9, 0.95), (8, 4), (0, 1, 2)
METHODS = ("pruned", "quantized", "sequential", "fused")
STEPS, BATCH_SIZE, LEARNING_RATE = 300, 128, 0.005
Record = dict[str, Any]


class Item(NamedTuple):
    """One row: a network, the share of MACs that leaves, bits of weights, how, and a seed."""

    network: str
    removed: float
    bits: int
    method: str
    seed: int


@cache
def data() -> mnist.Data:
    """All images."""
    return mnist.load_data()


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """So many batches as there are steps."""
    train, draws = data().train, torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train.labels), generator=draws)
    return [(train.images[own], train.labels[own]) for own in order.split(BATCH_SIZE)[:STEPS]]


@cache
def ratio_for(network: str, removed: float) -> float:
    """The share of channels that leaves with so many of the MACs, of all convolutions alike, to a hundredth."""
    model, example = NETWORKS[network](), data().example_input
    whole = tersor.compare(model, model, example).after.macs
    low, high = 0.3, 0.95
    while high - low > 0.005:
        middle = (low + high) / 2
        small = cut(copy.deepcopy(model), middle)
        low, high = (
            (low, middle)
            if tersor.compare(model, small, example).after.macs <= (1 - removed) * whole
            else (middle, high)
        )
    return round(high, 3)


def channels(model: nn.Module, ratio: float) -> list[dict[str, Any]]:
    """The config list that prunes all convolutions, and hidden linear layers."""
    hidden = [name for name, own in model.named_modules() if isinstance(own, nn.Linear)][:-1]
    entries: list[dict[str, Any]] = [{"op_types": ["Conv2d"], "sparse_ratio": ratio}]
    entries += [{"op_names": hidden, "sparse_ratio": ratio}] if hidden else []
    return tersor.auto_set_dependency_group_ids(model, entries, data().example_input)


def cut(model: nn.Module, ratio: float) -> nn.Module:
    """Pruned by L1 norm, and small."""
    example = data().example_input
    pruner = L1NormPruner(model, channels(model, ratio), example_inputs=example)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return ModelSpeedup(model, example, masks).speedup_model()


def with_names(model: nn.Module, bits: int) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The model with modules in place of functions, and what is rounded there: layers with their norms, and sums."""
    example = data().example_input
    traced = functions_as_modules(model, example)
    layers = {
        "target_names": ["weight", "_input_0"],
        "target_settings": {
            "weight": {"quant_dtype": f"int{bits}"},
            "_input_0": {"quant_dtype": "uint8", "quant_scheme": "affine"},
        },
    }
    config_list: list[dict[str, Any]] = [
        {"op_types": ["Conv2d", "Linear"], "fuse_names": auto_fuse(traced, example), **layers}
    ]
    if any(isinstance(own, Add) for own in traced.modules()):
        sums = {"op_types": ["Add"], "target_names": ["_input_0", "_input_1"]}
        config_list.append({**sums, "quant_dtype": "uint8", "quant_scheme": "affine"})
    return traced, config_list


def evaluator_of(model: nn.Module, part: list[Any]) -> tersor.TorchEvaluator:
    """The usual loop over some of the batches, with a cosine of its own."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(part))
    return tersor.TorchEvaluator.from_loader(
        part,
        F.cross_entropy,
        optimizer,
        cosine,
        scheduler_interval="step",
        dummy_input=data().example_input,
        progress=False,
    )


def pruned(model: nn.Module, item: Item, part: list[Any]) -> nn.Module:
    """Small, and fine-tuned."""
    small = cut(model, ratio_for(item.network, item.removed))
    evaluator_of(small, part).train(small, max_steps=len(part))
    return small


def quantized(model: nn.Module, item: Item, part: list[Any]) -> tuple[nn.Module, QATQuantizer]:
    """Trained with rounded values."""
    graph, config_list = with_names(model, item.bits)
    quantizer = QATQuantizer(graph, config_list, evaluator_of(graph, part))
    quantizer.compress(max_steps=len(part))
    return graph, quantizer


def sequential(model: nn.Module, item: Item, parts: list[Any]) -> Compressor:
    """One after another."""
    teacher, third = copy.deepcopy(model), len(parts) // 3
    small = pruned(model, item, parts[:third])
    graph, quantizer = quantized(small, item, parts[third : 2 * third])
    quantizer.keeps_scales = True
    distiller = LogitDistiller.from_compressor(quantizer, None, teacher)
    rest = parts[2 * third :]
    # A new optimizer for the last phase: its learning rate begins anew.
    quantizer.evaluator = None
    distiller.evaluator = evaluator_of(graph, rest)
    distiller.compress(max_steps=len(rest))
    return distiller


def fused(model: nn.Module, item: Item, parts: list[Any]) -> Compressor:
    """At once."""
    teacher, steps = copy.deepcopy(model), len(parts)
    graph, config_list = with_names(model, item.bits)
    return tersor.compress(
        graph,
        {
            "pruning": {
                "config_list": channels(graph, ratio_for(item.network, item.removed)),
                "schedule": {"interval_steps": steps // 100, "total_times": 10},
            },
            "quantization": {"config_list": config_list, "arguments": {"quant_start_step": steps // 3}},
            "distillation": {"distiller": "LogitDistiller"},
        },
        evaluator_of(graph, parts),
        max_steps=steps,
        teacher_model=teacher,
    )


def compiled_of(result: nn.Module | Compressor | Finalized) -> CompiledModel:
    """What ONNX Runtime runs."""
    if isinstance(result, Finalized):
        return result.deploy("onnxruntime", on_failure="warn", threads=1, unsupported="widen")
    speedup = QuantizationSpeedup(
        result, data().example_input, engine="onnxruntime", on_failure="warn", threads=1, unsupported="widen"
    )
    return speedup.compile()


def measure(item: Item) -> Record:
    """One row."""
    torch.manual_seed(item.seed)
    model, parts, start = NETWORKS[item.network](), batches(item.seed), time.perf_counter()
    before = copy.deepcopy(model)
    if item.method == "pruned":
        result: Any = pruned(model, item, parts)
        small = result
    elif item.method == "quantized":
        _, result = quantized(model, item, parts)
        small = before
    else:
        result = tersor.finalize((sequential if item.method == "sequential" else fused)(model, item, parts))
        small = result.plain()
    seconds = time.perf_counter() - start
    simulated = result.eval() if isinstance(result, nn.Module) else result.model.eval()
    example = data().example_input
    compiled = compiled_of(result)
    found = tersor.compare(before, small, example)
    return {
        **item._asdict(),
        "accuracy": mnist.accuracy(simulated, data()),
        "deployed": mnist.accuracy(compiled, data()),
        "macs": found.after.macs / found.before.macs,
        "parameters": found.after.parameters / found.before.parameters,
        "bytes": compiled.report.bytes,
        "int8": compiled.report.coverage,
        "error": getattr(result, "error", None),
        "milliseconds": round(1000 * compiled.latency(example[:1], seconds=1.0).median, 4),
        "seconds": round(seconds, 1),
    }


def items() -> list[Item]:
    """All rows; those that have no such choice once."""
    found = [
        Item(network, 0.0 if method == "quantized" else removed, 32 if method == "pruned" else bits, method, seed)
        for seed in SEEDS
        for network in NETWORKS
        for removed in REMOVED
        for bits in BITS
        for method in METHODS
    ]
    return list(dict.fromkeys(found))


def dense(network: str) -> Record:
    """The network as it is."""
    model, example = NETWORKS[network](), data().example_input
    compiled = compiled_of(model)
    return {
        "network": network,
        "accuracy": mnist.accuracy(model, data()),
        "bytes": compiled.report.bytes,
        "macs": tersor.compare(model, model, example).after.macs,
        "milliseconds": round(1000 * compiled.latency(example[:1], seconds=1.0).median, 4),
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    rows: list[Record] = known["rows"]
    done = {tuple(row[field] for field in Item._fields) for row in rows if "error_message" not in row}
    data()
    base = {network: dense(network) for network in NETWORKS}
    for network in options.networks:
        for removed in REMOVED:
            ratio_for(network, removed)
    wanted = [item for item in items() if tuple(item) not in done and item.network in options.networks]
    for outcome in run_each(lambda item, _: measure(item), wanted, jobs=options.jobs, limit=900.0):
        record = outcome.record if outcome.ended is None else {**outcome.item._asdict(), "error_message": outcome.ended}
        rows = [row for row in rows if tuple(row[field] for field in Item._fields) != tuple(outcome.item)] + [record]
        print(json.dumps(record), flush=True)
        document = {
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "steps": STEPS,
            "batch_size": BATCH_SIZE,
            "dense": base,
            "rows": sorted(rows, key=lambda row: [str(row[field]) for field in Item._fields]),
        }
        write_text(RESULT, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
