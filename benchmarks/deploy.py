"""Int8 on real engines, beside peers: ``python -m benchmarks.deploy build``, then ``accuracy``, then ``time``.

``build`` makes every file (``benchmarks/deploy_rows.py``, ``deploy_peers.py``, ``deploy_tersor.py``) of every network
(``deploy_networks.py``) in a folder that is kept, each row in a process of its own, and compares its outputs.
``accuracy`` quantizes the two networks that have real weights again, with other calibration data, and measures.
``time`` opens all files of a network in one process and calls them in turn (``deploy_timing.py``): it is the only part
that wants a quiet machine. What is finished is not done again, and ``results/deploy.json`` holds what there is by then.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.deploy_networks import BATCHES, NETWORKS, Inputs, by_sixteen, half_the_channels
from benchmarks.deploy_peers import PEERS
from benchmarks.deploy_rows import FLOAT, MODEL, Row, Task
from benchmarks.deploy_tersor import TERSOR
from benchmarks.forked import run_each
from tersor.deploy.agreement import agreement
from tersor.storage import write_text

RESULT = Path(__file__).parent / "results" / "deploy.json"
ROWS: dict[str, Row] = {**FLOAT, **PEERS, **TERSOR}
LIMIT = 1800.0
SEEDS = 3
THREADS = (1, 2)
PACKAGES = ("tersor", "onnxruntime", "openvino", "nncf", "torchao", "transformers", "timm", "torchvision")

Record = dict[str, Any]


class Item(NamedTuple):
    """One row of one network; with a seed, its accuracy after one calibration."""

    network: str
    row: str
    seed: int | None = None
    half: int = 0


def place(folder: Path, item: Item) -> Path:
    """Where the files of a row are: those of its base, where it has one."""
    return folder / item.network / slug(ROWS[item.row].base or item.row)


def record_of(folder: Path, item: Item) -> Path:
    """Where it is written what came of an item."""
    name = slug(item.row) + ("" if item.seed is None else f"-{item.seed}-{item.half}")
    return folder / item.network / "records" / f"{name}.json"


def slug(name: str) -> str:
    """A name for a folder.

    >>> slug("ORT quantize_static, all")
    'ort-quantize_static-all'
    """
    return re.sub(r"[^a-z0-9_.]+", "-", name.lower())


def model_of(folder: Path, network: str, *, half: bool = False) -> nn.Module:
    """A network; what was built once is read."""
    path = folder / network / (f"half-{MODEL}" if half else MODEL)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = NETWORKS[network].build()
        torch.save(half_the_channels(model) if half else model, path)
    return torch.load(path, weights_only=False).eval()


def build_items() -> list[Item]:
    """Every row of every network."""
    return [Item(name, row) for name, network in NETWORKS.items() for row, of in ROWS.items() if of.fits(network)]


def accuracy_items() -> list[Item]:
    """NNCF's rows and Tersor's, with every seed, of the networks that have real weights; the first seed first."""
    rows = {name: row for name, row in ROWS.items() if row.base is None and not row.half}
    rows = {name: row for name, row in rows.items() if row.kind == "tersor" or name.startswith("NNCF")}
    found: list[Item] = []
    for name, network in NETWORKS.items():
        halves = (0, 1) if network.classifies else (0,)
        for row, of in rows.items():
            if network.measure and of.fits(network):
                found += [Item(name, row, seed, half) for seed in range(SEEDS) for half in halves]
        found += [Item(name, "torch eager fp32", 0, half) for half in halves if network.measure]
    return sorted(found, key=lambda item: item.seed or 0)


def build(folder: Path, item: Item) -> Record:
    """Build a row, and compare it with the network in fp32."""
    row, network = ROWS[item.row], NETWORKS[item.network]
    model = model_of(folder, item.network, half=row.half)
    files = place(folder, item)
    files.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    task = Task(network, model, network.calibration(0, 0), BATCHES, files)
    record = {} if row.base else row.build(task)
    record["seconds"] = round(time.perf_counter() - start, 1)
    call = row.open(files, max(BATCHES), 1)
    with torch.no_grad():
        expected = [model(*inputs) for inputs in network.tests()]
    found = agreement([torch.cat([by_sixteen(call, inputs) for inputs in network.tests()])], [torch.cat(expected)])
    record["snr"] = round(found.snr, 2) if math.isfinite(found.snr) else None
    record["top1"] = round(found.top1, 4) if network.classifies else None
    if row.profile is not None:
        record["profile"] = row.profile(files, 1, network.example(1))
    return record


def accuracy(folder: Path, item: Item) -> Record:
    """Quantize with one draw of calibration data, and measure; the files are thrown away."""
    row, network = ROWS[item.row], NETWORKS[item.network]
    assert network.measure is not None
    assert item.seed is not None
    model = model_of(folder, item.network)
    with tempfile.TemporaryDirectory(dir=folder / item.network) as temporary:
        files = Path(temporary)
        calibration: list[Inputs] = network.calibration(item.seed, item.half)
        task = Task(network, model, calibration, BATCHES[-1:], files)
        row.build(task)
        return {"figures": network.measure(row.open(files, BATCHES[-1], 1), item.seed, item.half)}


def work(folder: Path) -> Callable[[Item, Callable[[Record], None]], Record]:
    """What a forked process does; what raises is recorded."""

    def measure(item: Item, publish: Callable[[Record], None]) -> Record:
        publish({})
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        try:
            return build(folder, item) if item.seed is None else accuracy(folder, item)
        except Exception as error:  # noqa: BLE001 it is what the record is for
            return {"error": f"{type(error).__name__}: {error}"[:800]}

    return measure


def run(folder: Path, items: list[Item], *, again: bool, jobs: int) -> None:
    """Do what is missing, and failures again; rows that share files come after those that write them."""
    wanted = [item for item in items if again or "error" in read(record_of(folder, item))]
    for name in {item.network for item in wanted}:
        model_of(folder, name)
        if NETWORKS[name].channels:
            model_of(folder, name, half=True)
    own = [item for item in wanted if ROWS[item.row].base is None]
    for outcome in chain(*(run_each(work(folder), part, jobs=jobs, limit=LIMIT) for part in (own, shared(wanted)))):
        record = {**outcome.item._asdict(), **outcome.record}
        if outcome.ended is not None:
            record["error"] = outcome.ended
        path = record_of(folder, outcome.item)
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(record) + "\n")
        print(json.dumps(record)[:600], flush=True)
        collect(folder)


def shared(items: list[Item]) -> list[Item]:
    """Those that open another row's files."""
    return [item for item in items if ROWS[item.row].base is not None]


def read(path: Path) -> Record:
    """One record; an error where there is none."""
    return json.loads(path.read_text()) if path.exists() else {"error": "is missing"}


def run_timing(folder: Path, networks: list[str], seconds: float) -> None:
    """A process for each network and number of threads: engines fix theirs when they are loaded."""
    for network in networks:
        for threads in THREADS:
            start = time.perf_counter()
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            }
            command = [sys.executable, "-m", "benchmarks.deploy_timing", str(folder), network, str(threads)]
            subprocess.run([*command, str(seconds)], env=environment, check=True)
            print(f"{network}, {threads} threads: {time.perf_counter() - start:.0f} s", flush=True)
            collect(folder)


@cache
def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    known = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    flags = set(" ".join(re.findall(r"^flags\s*: (.*)", text, re.MULTILINE)).split())
    return {
        "processor": name[1] if name else platform.processor(),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in known if flag in flags],
    }


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        if list(importlib.metadata.distributions(name=name)):
            found[name] = importlib.metadata.version(name)
    return found


def collect(folder: Path) -> None:
    """All records of a folder into the results."""
    document = {
        "versions": versions(),
        "machine": machine(),
        "networks": {name: network.title for name, network in NETWORKS.items()},
        "says": {name: {"engine": row.engine, "kind": row.kind, "says": row.says} for name, row in ROWS.items()},
        "rows": list(_found(folder, build_items())),
        "accuracy": list(_found(folder, accuracy_items())),
        "times": [
            json.loads(path.read_text())
            for name in NETWORKS
            for path in sorted((folder / name / "records").glob("times-*.txt"))
        ],
    }
    write_text(RESULT, json.dumps(document, indent=1) + "\n")


def _found(folder: Path, items: list[Item]) -> Iterator[Record]:
    for item in items:
        if (path := record_of(folder, item)).exists():
            yield read(path)


def main() -> None:
    """Build, measure accuracy, or time."""
    parser = argparse.ArgumentParser(description="Int8 on real engines, beside peers.")
    parser.add_argument("step", choices=["build", "accuracy", "time", "collect"])
    parser.add_argument("--artefacts", type=Path, required=True, help="the folder of what is built; it grows to 4 GB")
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS], default=[*NETWORKS], metavar="NETWORK")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="ROW")
    parser.add_argument("--again", action="store_true", help="also what is finished already")
    parser.add_argument("--jobs", type=int, default=1, help="rows that are built at a time, each on one core")
    parser.add_argument("--seconds", type=float, default=25.0, help="of one batch size with one number of threads")
    options = parser.parse_args()
    folder = options.artefacts.resolve()
    if options.step == "time":
        run_timing(folder, options.networks, options.seconds)
    elif options.step != "collect":
        items = build_items() if options.step == "build" else accuracy_items()
        chosen = [item for item in items if item.network in options.networks and item.row in options.rows]
        run(folder, chosen, again=options.again, jobs=options.jobs)
    collect(folder)


if __name__ == "__main__":
    main()
