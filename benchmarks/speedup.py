"""Half of all output channels removed from torchvision's networks: is it exact, and how long does it take?

Tersor's time is that of plan, pruning and speedup, with and without its check of the result (a forward pass of the
masked and one of the small model); Torch-Pruning's that of building its pruner and one ``step()``, which checks
nothing. All on copies of one model, in turn, on one thread, with example inputs of 2 and of 16 images.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tersor
from benchmarks.networks import build
from tersor.graph import groups
from tersor.pruning import L1NormPruner
from tersor.speedup import ModelSpeedup

NETWORKS = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121")
CONFIG_LIST = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
BATCHES = (2, 16)
REPEATS = 5


def shrink(model: nn.Module, example: torch.Tensor, *, verify: bool = True) -> None:
    """Plan, prune and speed up with Tersor; the model's own run is shared by all three."""
    coupling = groups(model, example)
    pruner = L1NormPruner(
        model, tersor.auto_set_dependency_group_ids(model, CONFIG_LIST, coupling), example_inputs=coupling
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, coupling, masks, verify=verify).speedup_model()


def shrink_unverified(model: nn.Module, example: torch.Tensor) -> None:
    """The same without the check that Torch-Pruning does not make either."""
    shrink(model, example, verify=False)


def torch_pruning(model: nn.Module, example: torch.Tensor) -> None:
    """The same with Torch-Pruning."""
    import torch_pruning as tp

    classifier = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    importance = tp.importance.MagnitudeImportance(p=1)
    tp.pruner.MagnitudePruner(
        model, example, importance=importance, pruning_ratio=0.5, ignored_layers=[classifier]
    ).step()


def seconds(function: Callable[[nn.Module, torch.Tensor], Any], model: nn.Module, example: torch.Tensor) -> float:
    """Wall time on a fresh copy."""
    model = copy.deepcopy(model)
    start = time.perf_counter()
    function(model, example)
    return time.perf_counter() - start


def error(model: nn.Module, example: torch.Tensor) -> tuple[float, float]:
    """Largest difference of the small model's outputs from the masked one's at batch size 3, relative; share kept."""
    pruner_model, small = copy.deepcopy(model), copy.deepcopy(model)
    shrink(small, example)
    config_list = tersor.auto_set_dependency_group_ids(pruner_model, CONFIG_LIST, example)
    masked, _ = L1NormPruner(pruner_model, config_list, example_inputs=example).compress()
    fresh = torch.randn(3, *example.shape[1:])
    with torch.no_grad():
        expected, actual = masked(fresh).double(), small(fresh).double()
    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    return float((actual - expected).abs().max() / expected.abs().max()), kept


def run() -> dict[str, Any]:
    """All networks."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in NETWORKS:
        model = build(name)
        relative_error, kept = error(model, torch.randn(2, 3, 224, 224))
        times = {str(batch): compare(model, torch.randn(batch, 3, 224, 224)) for batch in BATCHES}
        results[name] = {"relative_error": relative_error, "parameters_kept": round(kept, 4), "batch": times}
        print(name, results[name], flush=True)
    return {"resolution": 224, "threads": 1, "repeats": REPEATS, "networks": results}


def compare(model: nn.Module, example: torch.Tensor) -> dict[str, float]:
    """Medians of the three, and of their ratios run by run."""
    functions = (shrink, shrink_unverified, torch_pruning)
    runs = [tuple(seconds(function, model, example) for function in functions) for _ in range(REPEATS)]
    return {
        "tersor_seconds": round(statistics.median(ours for ours, _, _ in runs), 3),
        "tersor_unverified_seconds": round(statistics.median(bare for _, bare, _ in runs), 3),
        "torch_pruning_seconds": round(statistics.median(theirs for _, _, theirs in runs), 3),
        "ratio": round(statistics.median(ours / theirs for ours, _, theirs in runs), 3),
        "ratio_unverified": round(statistics.median(bare / theirs for _, bare, theirs in runs), 3),
    }
