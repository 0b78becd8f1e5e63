"""Language models with half of their weights gone and nothing trained: ``python -m benchmarks.pruning_language``.

MiniLM and SmolLM2 (``benchmarks/language_models.py`` says where they come from and what measures them) are pruned in
one shot, half of each linear layer but the pooler and the head: anywhere, and two of every four neighbours. Methods
that look at data get three calibrations, drawn with three seeds. Figures are those of the model with its pruned
weights written into it, and sparsity is counted there.

*Peak* is how far the process's resident memory rose above what it was with the model and the data loaded, as the
kernel's own high-water mark says (before, one batch is run and one layer pruned, so that libraries have what they
keep, and what is free is given back). The masks, a byte for each weight, are among it and stay; *forward* is the same
for one batch through the plain model. Compare them with *block*, the bytes of one block of the model.

Each row is one item, in a process of its own, on one thread; what is finished is in
``results/pruning_language.json`` at once and is not measured again. ``--table`` prints what it holds as Markdown, and
measures nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.forked import run_each
from benchmarks.language_models import LANGUAGE_MODELS, Batch
from benchmarks.pruning_page import language_table
from tersor import pruning
from tersor.pruning import Pruner
from tersor.storage import write_text

RESULT = Path(__file__).parent / "results" / "pruning_language.json"
PATTERNS: dict[str, dict[str, Any]] = {"50 %": {"sparse_ratio": 0.5}, "2:4": {"sparse_pattern": "2:4"}}
SEEDS = 3
LIMIT = 3600.0
MIB = 2**20

Record = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """How a model is given to a pruner, and whether it looks at data."""

    prepare: Callable[[nn.Module, list[dict[str, Any]], list[Batch]], Pruner]
    seeds: int = SEEDS


METHODS = {
    "Magnitude": Method(lambda model, config_list, _: pruning.LevelPruner(model, config_list), seeds=1),
    "Wanda": Method(lambda model, config_list, batches: pruning.WandaPruner(model, config_list, calibration=batches)),
    "SparseGPT": Method(
        lambda model, config_list, batches: pruning.SparseGPTPruner(model, config_list, calibration=batches)
    ),
}


class Item(NamedTuple):
    """One row of the results; without a method it is the dense model."""

    model: str
    pattern: str | None = None
    method: str | None = None
    seed: int = 0


def items(names: Iterable[str]) -> list[Item]:
    """Every row of these models."""
    return [
        item
        for name in names
        for item in (
            Item(name),
            *(
                Item(name, p, m, seed)
                for p in PATTERNS
                for m, method in METHODS.items()
                for seed in range(method.seeds)
            ),
        )
    ]


def measure(item: Item, publish: Callable[[Record], None]) -> Record:
    """One row; what raises is recorded."""
    record: Record = item._asdict()
    publish(record)
    try:
        model = LANGUAGE_MODELS[item.model].load()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # a mapped file gets into memory only as it is read
        record |= dense(item, model) if item.method is None else pruned(item, model)
    except Exception as error:  # noqa: BLE001 it is what the record is for
        record["error"] = f"{type(error).__name__}: {error}"[:500]
    return record


def dense(item: Item, model: nn.Module) -> Record:
    """The model as it is: its figures, its sizes, and what one batch through it takes."""
    subject = LANGUAGE_MODELS[item.model]
    batches = subject.calibration(0)
    run(model, batches[-1])
    with RisingMemory() as memory:
        run(model, batches[-1])
    return {
        "figures": rounded(subject.measure(model)),
        "calibration_tokens": sum(batch["input_ids"].numel() for batch in batches),
        "parameters_mib": mib(model.parameters()),
        "block_mib": mib(model.get_submodule(subject.block).parameters()),
        "forward_mib": memory.peak,
    }


def pruned(item: Item, model: nn.Module) -> Record:
    """Prune in one shot, write the pruned weights into the model, count what is zero, and measure."""
    assert item.method is not None
    assert item.pattern is not None
    subject = LANGUAGE_MODELS[item.model]
    everywhere = [{"op_types": ["Linear"], **PATTERNS[item.pattern]}]
    config_list = [{**everywhere[0], "exclude_op_names": [*subject.excluded]}]
    batches = subject.calibration(item.seed)
    run(model, batches[-1])
    one_layer = nn.Sequential(nn.Linear(256, 256))
    METHODS[item.method].prepare(one_layer, everywhere, [{"input": torch.randn(512, 256)}]).compress()
    with RisingMemory() as memory:
        start = time.perf_counter()
        pruner = METHODS[item.method].prepare(model, config_list, batches)
        _, masks = pruner.compress()
        seconds = time.perf_counter() - start
    layers = [name for name, targets in masks.items() if "weight" in targets]
    pruner.unwrap_model(bake=True)
    weights = [model.get_parameter(f"{name}.weight").detach() for name in layers]
    return {
        "sparsity": sparsity(weights, groups_of_four=item.pattern == "2:4"),
        "layers": len(layers),
        "seconds": round(seconds, 2),
        "seconds_per_layer": round(seconds / len(layers), 4),
        "peak_mib": memory.peak,
        "kept_mib": memory.kept,
        "masks_mib": mib(masks[name]["weight"] for name in layers),
        "figures": rounded(subject.measure(model)),
    }


def sparsity(weights: list[Tensor], *, groups_of_four: bool) -> Record:
    """The share of zeros in all weights, in the layer with the fewest, and in that with the most.

    Args:
        weights: of shape (out, in), as they are computed with.
        groups_of_four: also the share of four neighbours along the inputs with two zeros or more.
    """
    zeros = [(weight == 0).double() for weight in weights]
    shares = [float(zero.mean()) for zero in zeros]
    total = sum(float(zero.sum()) for zero in zeros) / sum(zero.numel() for zero in zeros)
    found = {"all": round(total, 6), "least": round(min(shares), 6), "most": round(max(shares), 6)}
    if groups_of_four:
        fours = torch.cat([zero.unflatten(1, (-1, 4)).sum(2).flatten() for zero in zeros])
        found["fours_with_two_zeros"] = round(float((fours >= 2).double().mean()), 6)
    return found


class RisingMemory:
    """How far the resident memory of this process rises in a block of code.

    Linux resets its high-water mark where 5 is written to ``/proc/self/clear_refs``: no sample can miss the peak.

    Attributes:
        peak: MiB above what it was before; None where there is no such file.
        kept: the same after the block.
    """

    peak: float | None = None
    kept: float | None = None
    _before: float | None = None

    def __enter__(self) -> RisingMemory:
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            give_back()
            clear.write_text("5")
            self._before = memory_line("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            self.peak = round(memory_line("VmHWM") - self._before, 1)
            give_back()
            self.kept = round(memory_line("VmRSS") - self._before, 1)


def give_back() -> None:
    """Return to the system what is free: garbage, and what the C library keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def memory_line(key: str) -> float:
    """One line of ``/proc/self/status``, in MiB."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(key))


@torch.no_grad()
def run(model: nn.Module, batch: Batch) -> None:
    """One batch through the model."""
    model(**batch)


def mib(tensors: Iterable[Tensor]) -> float:
    """Their bytes, in MiB."""
    return round(sum(tensor.numel() * tensor.element_size() for tensor in tensors) / MIB, 1)


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """Four digits behind the point say more than anyone can tell apart."""
    return {name: round(value, 4) for name, value in figures.items()}


def read() -> dict[Item, Record]:
    """The results by item; none where there are none."""
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    return {Item(*(row[field] for field in Item._fields)): row for row in rows}


def write(rows: Mapping[Item, Record]) -> None:
    """All rows under the versions that are installed now."""
    names = [name for name in LANGUAGE_MODELS if any(item.model == name for item in rows)]
    packages = {package for name in names for package in LANGUAGE_MODELS[name].packages}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: importlib.metadata.version(name) for name in ("tersor", "transformers", *sorted(packages))}
    document = {
        "versions": versions,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "data": {name: LANGUAGE_MODELS[name].tokens for name in names},
        "rows": [rows[item] for item in items(LANGUAGE_MODELS) if item in rows],
    }
    write_text(RESULT, json.dumps(document, indent=1) + "\n")


def line(record: Record) -> str:
    """One row in one line."""
    said = [str(record[key]) for key in Item._fields if record[key] is not None]
    if "error" in record:
        return f"{', '.join(said)}: {record['error']}"
    figures = ", ".join(f"{name} {value}" for name, value in record["figures"].items())
    return f"{', '.join(said)}: {figures}" + (
        f"; {record['sparsity']['all']:.2%} zero, {record['seconds']} s, {record['peak_mib']} MiB"
        if "sparsity" in record
        else ""
    )


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*LANGUAGE_MODELS], default=[*LANGUAGE_MODELS], metavar="MODEL")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], metavar="METHOD")
    parser.add_argument("--patterns", nargs="+", choices=[*PATTERNS], default=[*PATTERNS], metavar="PATTERN")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time; more than one blurs seconds")
    parser.add_argument("--again", action="store_true", help="also what the results hold already; failures always are")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    options = parser.parse_args()
    rows = read()
    if options.table:
        document = json.loads(RESULT.read_text())
        print("\n\n".join(language_table(document, name) for name in LANGUAGE_MODELS if Item(name) in rows))
        return
    wanted = [
        item
        for item in items(options.only)
        if item.method is None or (item.method in options.methods and item.pattern in options.patterns)
    ]
    wanted = [item for item in wanted if options.again or "error" in rows.get(item, {"error": "is missing"})]
    for outcome in run_each(measure, wanted, jobs=options.jobs, limit=LIMIT):
        record = {**outcome.item._asdict(), **outcome.record}
        if outcome.ended is not None:
            record["error"] = outcome.ended
        rows[outcome.item] = record
        write(rows)
        print(line(record), flush=True)


if __name__ == "__main__":
    main()
