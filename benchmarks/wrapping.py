"""What simulation costs: memory that wrapping ResNet-50 adds, and a masked training step against a plain one."""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import nn

import tersor
from benchmarks.networks import build
from tersor.pruning import L1NormPruner, LevelPruner
from tersor.pruning.base import Pruner

REPEATS = 15


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all distinct storages behind parameters, buffers and masks."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def pruned(model: nn.Module, kind: str, example: torch.Tensor) -> Pruner:
    """Masks on half of the channels, or on half of the weights."""
    config_list: list[Any] = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
    if kind == "fine-grained":
        pruner: Pruner = LevelPruner(model, config_list)
    else:
        config_list = tersor.auto_set_dependency_group_ids(model, config_list, example)
        pruner = L1NormPruner(model, config_list, example_inputs=example)
    pruner.compress()
    return pruner


def step_seconds(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> float:
    """One training step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    model(images).logsumexp(1).mean().backward()
    optimizer.step()
    return time.perf_counter() - start


def run() -> dict[str, Any]:
    """Both kinds of masks on ResNet-50."""
    torch.set_num_threads(1)
    original, example = build("resnet50", biases=False), torch.randn(1, 3, 64, 64)
    images = torch.randn(8, 3, 224, 224)
    results: dict[str, Any] = {}
    for kind in ("channels", "fine-grained"):
        plain, masked = copy.deepcopy(original).train(), copy.deepcopy(original).train()
        before = tensor_bytes(masked)
        optimizers = [torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9) for model in (plain, masked)]
        pruned(masked, kind, example)
        added = tensor_bytes(masked) / before - 1
        for model, optimizer in zip((plain, masked), optimizers, strict=True):
            step_seconds(model, optimizer, images)
        pairs = [
            tuple(step_seconds(m, o, images) for m, o in zip((plain, masked), optimizers, strict=True))
            for _ in range(REPEATS)
        ]
        results[kind] = {
            "memory_added": round(added, 4),
            "plain_step_seconds": round(statistics.median(a for a, _ in pairs), 3),
            "masked_step_seconds": round(statistics.median(b for _, b in pairs), 3),
            "step_ratio": round(statistics.median(b / a for a, b in pairs), 3),
        }
        print(kind, results[kind], flush=True)
    return {"network": "resnet50", "batch": 8, "resolution": 224, "threads": 1, "repeats": REPEATS, "masks": results}
