"""One global threshold over all weights of ResNet-50, element by element, on one thread."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from benchmarks.networks import build
from tersor.pruning import LevelPruner

REPEATS = 5


def run() -> dict[str, Any]:
    """Score, allocate and mask 23 million weights in one global group."""
    torch.set_num_threads(1)
    model = build("resnet50", biases=False)
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "global_group_id": "all"}]
    pruner = LevelPruner(model, config_list)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        masks = pruner.generate_masks()
        times.append(time.perf_counter() - start)
    weights = [mask for targets in masks.values() for mask in targets.values() if mask.dim() == 4]
    total, removed = sum(mask.numel() for mask in weights), sum(int((~mask).sum()) for mask in weights)
    pruner.unwrap_model()
    result = {"weights": total, "removed": removed, "seconds": round(statistics.median(times), 3)}
    print(result)
    return {"network": "resnet50", "threads": 1, "repeats": REPEATS, **result}
