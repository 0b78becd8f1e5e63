"""Accuracy with 50 to 95 % of the MACs removed: ``python -m benchmarks.pruning`` -> results/pruning.json.

Two networks for MNIST: the residual one of ``examples/mnist.py``, and one that others trained
(``benchmarks/digits.py``). Every pruner of Tersor (``benchmarks/pruning_rows.py``) and those of the peers that are
installed (``benchmarks/pruning_peers.py``) cut all convolutions and linear layers but the classifier. The ratio is
searched with which the small model lacks no more MACs than it must to reach the target; then all are fine-tuned alike.
The seed decides the order of the training images and which of them a pruner sees.

One network, method and seed are one item, in a process of its own; what is finished is in the results at once, and is
not measured again. ``--table`` prints what they hold, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import digits
from benchmarks.forked import run_each
from benchmarks.pruning_page import vision_table
from benchmarks.pruning_peers import PEERS
from benchmarks.pruning_rows import MOST, PRUNERS, Cut, Method, Task
from examples import mnist
from tersor.analysis import count
from tersor.storage import write_text

RESULT = Path(__file__).parent / "results" / "pruning.json"
TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95)
METHODS: dict[str, Method] = {**PRUNERS, **PEERS}
GRID = (*(step / 16 for step in range(1, 16)), MOST)
PRECISION = 1 / 512
"""Where the search for a ratio begins and ends: half a channel of a layer of 256."""
IMAGES, BATCH_SIZE = 6_400, 64
"""Fine-tuning: one pass over the first training images, AdamW, one cycle of the learning rate."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """A trained network, the name of the layer that is left alone, and the rate at which the small ones are tuned."""

    trained: Callable[[], nn.Module]
    classifier: str
    learning_rate: float


NETWORKS = {
    "residual": Network(mnist.trained_model, "head.2", 1e-2),
    "digits": Network(digits.trained_model, "fc_layers.2", 2e-3),
}


@cache
def data() -> mnist.Data:
    """MNIST; tested in batches that stay in a processor's cache."""
    loaded = mnist.load_data()
    loaded.train.batch_size, loaded.test.batch_size = BATCH_SIZE, 100
    return loaded


@cache
def trained(network: str) -> nn.Module:
    """The network, read once."""
    return NETWORKS[network].trained()


def task_of(network: str, seed: int) -> Task:
    """What a method gets."""
    return Task(trained(network), NETWORKS[network].classifier, data(), seed)


@dataclass(frozen=True)
class Size:
    """How large a network is; MACs for one image."""

    macs: int
    parameters: int

    @classmethod
    def of(cls, model: nn.Module) -> Size:
        """Counted by running it."""
        counts = count(model, data().example_input[:2])
        return cls(counts.macs, counts.parameters)

    def removed_by(self, small: Size) -> tuple[float, float]:
        """The shares of MACs and of parameters that a smaller one lacks."""
        return 1 - small.macs / self.macs, 1 - small.parameters / self.parameters


def search(removed: Callable[[float], float], target: float) -> float:
    """The smallest ratio that reaches the target: the first of a coarse grid, then by bisection below it.

    A pruner that spares what it would empty (Torch-Pruning) removes less again when it is asked for nearly all.

    Args:
        removed: from a ratio to the share of MACs removed.
        target: the share to reach.

    Raises:
        ValueError: it is out of reach.
    """
    low = 0.0
    for high in GRID:
        if removed(high) >= target:
            break
        low = high
    else:
        raise ValueError(f"no more than {max(map(removed, GRID)):.1%} of the MACs can be removed")
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (low, middle) if removed(middle) >= target else (middle, high)
    return high


def ratios(cut: Cut, whole: Size) -> dict[float, float]:
    """The ratio for each target."""

    @cache
    def removed(ratio: float) -> float:
        return whole.removed_by(Size.of(cut(ratio)))[0]

    return {target: search(removed, target) for target in TARGETS}


@cache
def ratios_like(network: str, method: str) -> dict[float, float]:
    """The ratios of a method that has the same on any data."""
    return ratios(METHODS[method].prepare(task_of(network, 0)), Size.of(trained(network)))


def fine_tune(model: nn.Module, learning_rate: float, seed: int) -> None:
    """The same for all."""
    train = data().train
    torch.manual_seed(seed)
    batches = mnist.Batches(train.images[:IMAGES], train.labels[:IMAGES], BATCH_SIZE, shuffled=True)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=len(batches))
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def measure(network: str, name: str, seed: int, publish: Callable[[Record], None]) -> Record:
    """All targets of one item; what raises is recorded."""
    record: Record = {"network": network, "method": name, "seed": seed, "points": {}}
    method, task, whole = METHODS[name], task_of(network, seed), Size.of(trained(network))
    try:
        prepared, cut = timed(lambda: method.prepare(task))
        asked = ratios(cut, whole) if method.like is None else ratios_like(network, method.like)
        for target in TARGETS:
            seconds, small = timed(lambda ratio=asked[target]: cut(ratio))
            macs, parameters = whole.removed_by(Size.of(small))
            small = small.eval().to(memory_format=torch.channels_last)  # it is only faster
            one_shot = mnist.accuracy(small, data())
            rate = NETWORKS[network].learning_rate
            tuning, _ = timed(lambda model=small, rate=rate: fine_tune(model, rate, seed))
            record["points"][str(target)] = {
                "ratio": round(asked[target], 4),
                "macs_removed": round(macs, 4),
                "parameters_removed": round(parameters, 4),
                "accuracy_before_fine_tuning": one_shot,
                "accuracy": mnist.accuracy(small, data()),
                "prune_seconds": round(prepared + seconds, 2),
                "fine_tune_seconds": round(tuning, 2),
            }
            publish(record)
    except Exception as error:  # noqa: BLE001 it is what the record is for
        record["error"] = f"{type(error).__name__}: {error}"[:500]
    return record


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def key(record: Record) -> tuple[str, str, int]:
    """What a record is of."""
    return record["network"], record["method"], record["seed"]


def read() -> Record:
    """The results; empty where there are none."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"networks": {}, "methods": {}, "rows": []}


def write(record: Record) -> None:
    """Put a record into what the results hold by now, also of peers that are installed elsewhere."""
    before = read()
    rows = {key(row): row for row in before["rows"]} | {key(record): record}
    versions = before.get("versions", {}) | {"python": platform.python_version(), "torch": torch.__version__}
    packages = ("tersor", "torch-pruning", "nni")
    versions |= {
        found.name: found.version for name in packages for found in importlib.metadata.distributions(name=name)
    }
    networks = dict(before["networks"])
    for name in {network for network, _, _ in rows} - set(networks):
        size = Size.of(trained(name))
        networks[name] = {
            "accuracy": mnist.accuracy(trained(name), data()),
            "macs": size.macs,
            "parameters": size.parameters,
            "learning_rate": NETWORKS[name].learning_rate,
        }
    says = before["methods"] | {name: METHODS[name].says for _, name, _ in rows if name in METHODS}
    order = [*says]
    document = {
        "versions": versions,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "fine_tuning": {"images": IMAGES, "batch_size": BATCH_SIZE, "epochs": 1, "optimizer": "AdamW, OneCycleLR"},
        "networks": networks,
        "methods": says,
        "rows": sorted(rows.values(), key=lambda row: (row["network"], order.index(row["method"]), row["seed"])),
    }
    write_text(RESULT, json.dumps(document, indent=1) + "\n")


def chosen(patterns: Iterable[str] | None) -> list[str]:
    """The methods whose names match one of the patterns; all without any."""
    return [name for name in METHODS if patterns is None or any(fnmatch(name, pattern) for pattern in patterns)]


def line(record: Record) -> str:
    """One item in one line."""
    cells = [
        f"{point['macs_removed']:.1%}: {point['accuracy_before_fine_tuning']:.2%} -> {point['accuracy']:.2%}"
        for point in record["points"].values()
    ]
    return f"{record['network']}, {record['method']}, seed {record['seed']}: " + "; ".join(
        [*cells, *([record["error"]] if "error" in record else [])]
    )


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="methods, such as 'L1' or 'NNI*'")
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="items at a time")
    parser.add_argument("--again", action="store_true", help="also what the results hold already")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    options = parser.parse_args()
    if options.table:
        document = read()
        print("\n\n".join(vision_table(document, network, "accuracy") for network in document["networks"]))
        return
    torch.set_num_threads(1)
    done = {key(row) for row in read()["rows"]}
    items = [(n, m, s) for n in options.networks for s in range(options.seeds) for m in chosen(options.only)]
    items = [item for item in items if options.again or item not in done]
    for network, like in sorted({(n, like) for n, m, _ in items if (like := METHODS[m].like) is not None}):
        ratios_like(network, like)  # once, before the processes fork
    for outcome in run_each(lambda item, publish: measure(*item, publish), items, jobs=options.jobs, limit=900.0):
        network, method, seed = outcome.item
        record = {"network": network, "method": method, "seed": seed, "points": {}, **outcome.record}
        if outcome.ended is not None:
            record["error"] = outcome.ended
        write(record)
        print(line(record), flush=True)


if __name__ == "__main__":
    main()
