"""Accuracy of quantized networks: ``python -m benchmarks.quantization`` -> results/quantization.json.

Three networks: the residual one of ``examples/mnist.py``, one that others trained (``benchmarks/digits.py``), both
tested on all 10,000 images of MNIST, and EfficientNet-Lite0 (``benchmarks/efficientnet.py``), tested on views of
photographs. Every quantizer of Tersor (``benchmarks/quantization_rows.py``) and those of the peers that are installed
(``benchmarks/quantization_peers.py``) see the same calibration images, and those that train the same training images
as often. The seed decides which images these are, and their order. Measured are the accuracy where labels are known,
how often the answer is that of the network in fp32, and the signal-to-noise ratio of the logits.

One network, method and seed are one item, in a process of its own; what is finished is in the results at once, and is
not measured again. Seconds are wall time on a machine that does other things too: they say how long to wait, and are
no comparison. ``--table`` prints what the results hold, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import digits, efficientnet
from benchmarks.forked import run_each
from benchmarks.quantization_page import table
from benchmarks.quantization_peers import PEERS
from benchmarks.quantization_rows import QUANTIZERS, Classify, Method, Task
from examples import mnist
from tersor.storage import write_text

RESULT = Path(__file__).parent / "results" / "quantization.json"
METHODS: dict[str, Method] = {**QUANTIZERS, **PEERS}
CALIBRATION = 512
"""Training images to calibrate on, where the network has any."""
BATCH_SIZE = 64
"""Of fine-tuning: one pass over the first training images, AdamW, one cycle of the learning rate."""
PACKAGES = ("tersor", "nni", "torchao", "nncf", "openvino")

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Images to calibrate on, and others to test with; a label of -1 is not known."""

    calibration: Tensor
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Network:
    """A trained network and its data.

    Attributes:
        trained: makes it.
        ends: its first and its last layer.
        batch_size: of calibration and testing: as many images as stay in a processor's cache.
        parts: from a seed to the parts that are tested one after the other, each with a network of its own.
        tested: how, for the reader of the results.
        training_images: of fine-tuning; where there are none, rows that train are left out.
        learning_rate: of fine-tuning, at its highest.
    """

    trained: Callable[[], nn.Module]
    ends: tuple[str, str]
    batch_size: int
    parts: Callable[[int], list[Part]]
    tested: str
    training_images: int = 0
    learning_rate: float = 0.0


@cache
def data() -> mnist.Data:
    """MNIST."""
    return mnist.load_data()


def digits_of(seed: int) -> list[Part]:
    """All test images, and as many training images as are needed."""
    train, test = data().train, data().test
    chosen = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    return [Part(train.images[chosen], test.images, test.labels)]


def halves_of(seed: int) -> list[Part]:
    """Both halves of the photographs."""
    return [Part(*half) for half in efficientnet.halves(seed)]


MNIST = "MNIST's test images"
VIEWS = "six views of each of 35 photographs, each half of them by a network that was calibrated on crops of the other"
NETWORKS = {
    "residual": Network(mnist.trained_model, ("stem.0", "head.2"), 64, digits_of, MNIST, 12_800, 1e-3),
    "digits": Network(digits.trained_model, ("conv_layers.0", "fc_layers.2"), 64, digits_of, MNIST, 6_400, 3e-4),
    "efficientnet_lite0": Network(efficientnet.trained_model, ("_conv_stem", "_fc"), 8, halves_of, VIEWS),
}


@cache
def trained(network: str) -> nn.Module:
    """The network, read once."""
    return NETWORKS[network].trained()


@torch.no_grad()
def logits(network: str, classify: Classify, images: Tensor) -> Tensor:
    """What it answers."""
    return torch.cat([classify(batch) for batch in images.split(NETWORKS[network].batch_size)])


@cache
def reference(network: str, seed: int) -> list[Tensor]:
    """The logits of the network in fp32 for each part."""
    return [logits(network, trained(network), part.images) for part in NETWORKS[network].parts(seed)]


def figures(exact: Tensor, answered: Tensor, labels: Tensor) -> dict[str, float | None]:
    """What is compared; logits of shape (images, classes)."""
    known = labels >= 0
    noise = (exact.double() - answered.double()).square().sum()
    signal = exact.double().square().sum()
    snr = 10 * torch.log10(signal / noise.clamp(min=1e-12 * signal)).item()
    return {
        "accuracy": (answered.argmax(1) == labels)[known].double().mean().item(),
        "agreement": (answered.argmax(1) == exact.argmax(1)).double().mean().item(),
        "snr_db": round(snr, 2) if math.isfinite(snr) else None,  # where logits are no numbers
    }


def task_of(network: str, calibration: Tensor, seed: int) -> Task:
    """What a method gets."""
    facts = NETWORKS[network]
    train = None
    if facts.training_images:
        images, labels = (own[: facts.training_images] for own in (data().train.images, data().train.labels))
        train = mnist.Batches(images, labels, BATCH_SIZE, shuffled=True)
    return Task(trained(network), facts.ends, calibration, facts.batch_size, seed, train, facts.learning_rate)


def measure(network: str, name: str, seed: int) -> Record:
    """One item; what raises is recorded."""
    record: Record = {"network": network, "method": name, "seed": seed}
    method, parts = METHODS[name], NETWORKS[network].parts(seed)
    answers: list[Tensor] = []
    preparing = testing = 0.0
    try:
        for part in parts:
            task = task_of(network, part.calibration, seed)
            seconds, classify = timed(lambda task=task: method.quantize(task))
            preparing += seconds
            seconds, answered = timed(lambda part=part, classify=classify: logits(network, classify, part.images))
            testing += seconds
            answers.append(answered)
        labels = torch.cat([part.labels for part in parts])
        record |= figures(torch.cat(reference(network, seed)), torch.cat(answers), labels)
        record |= {"quantize_seconds": round(preparing, 2), "test_seconds": round(testing, 2)}
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
    versions |= {
        found.name: found.version for name in PACKAGES for found in importlib.metadata.distributions(name=name)
    }
    networks = {**before["networks"], record["network"]: facts_of(record["network"])}
    methods = before["methods"] | {
        name: {
            "says": method.says,
            "bits": None if method.bits is None else str(method.bits),
            "trains": method.trains,
        }
        for name, method in METHODS.items()
        if any(name == row["method"] for row in rows.values())
    }
    order = [*dict.fromkeys([*METHODS, *methods])]
    places = [*NETWORKS]
    document = {
        "versions": versions,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "fine_tuning": {"batch_size": BATCH_SIZE, "epochs": 1, "optimizer": "AdamW, OneCycleLR"},
        "networks": {name: networks[name] for name in NETWORKS if name in networks},
        "methods": {name: methods[name] for name in order if name in methods},
        "rows": sorted(
            rows.values(), key=lambda row: (places.index(row["network"]), order.index(row["method"]), row["seed"])
        ),
    }
    write_text(RESULT, json.dumps(document, indent=1, allow_nan=False) + "\n")


@cache
def facts_of(network: str) -> Record:
    """What a reader wants to know of a network."""
    facts = NETWORKS[network]
    parts = facts.parts(0)
    labels = torch.cat([part.labels for part in parts])
    return {
        "parameters": sum(parameter.numel() for parameter in trained(network).parameters()),
        "tested": facts.tested,
        "images": len(labels),
        "known": int((labels >= 0).sum()),
        "calibration_images": len(parts[0].calibration),
        "training_images": facts.training_images,
        "learning_rate": facts.learning_rate,
    }


def chosen(network: str, patterns: Iterable[str] | None) -> list[str]:
    """The methods that the network can have, and whose names match one of the patterns; all without any."""
    names = [
        name
        for name, method in METHODS.items()
        if (NETWORKS[network].training_images or not method.trains) and method.fits(trained(network))
    ]
    return [name for name in names if patterns is None or any(fnmatch(name, pattern) for pattern in patterns)]


def line(record: Record) -> str:
    """One item in one line."""
    cells = record.get("error") or (
        f"{record['accuracy']:.2%}, agrees {record['agreement']:.2%}, {record['snr_db']} dB "
        f"({record['quantize_seconds']:.0f} + {record['test_seconds']:.0f} s)"
    )
    return f"{record['network']}, {record['method']}, seed {record['seed']}: {cells}"


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="methods, such as 'LSQ*' or 'NNI*'")
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS])
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="items at a time")
    parser.add_argument("--again", action="store_true", help="also what the results hold already")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    options = parser.parse_args()
    if options.table:
        document = read()
        print("\n\n".join(table(document, network) for network in document["networks"]))
        return
    torch.set_num_threads(1)
    done = {key(row) for row in read()["rows"]}
    items = [(n, m, s) for n in options.networks for s in range(options.seeds) for m in chosen(n, options.only)]
    items = [item for item in items if options.again or item not in done]
    for network, seed in sorted({(network, seed) for network, _, seed in items}):
        reference(network, seed)  # once, before the processes fork
    for outcome in run_each(lambda item, _: measure(*item), items, jobs=options.jobs, limit=1800.0):
        network, method, seed = outcome.item
        record = {"network": network, "method": method, "seed": seed, **outcome.record}
        if outcome.ended is not None:
            record["error"] = outcome.ended
        write(record)
        print(line(record), flush=True)


if __name__ == "__main__":
    main()
