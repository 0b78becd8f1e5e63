"""MiniLM with quantized linear layers and nothing trained: ``python -m benchmarks.quantization_language``.

``benchmarks/language_models.py`` says where the model comes from and what measures it. All linear layers but the pooler
are quantized: weights and inputs to int8, or weights alone to a few bits, in groups of 128 neighbours along the inputs.
Each method that looks at data gets three calibrations, drawn with three seeds. Figures are those of the simulation.

Each row is one item, in a process of its own, on one thread; what is finished is in
``results/quantization_language.json`` at once and is not measured again. Seconds are those of the whole method, and of
no use where other work ran beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.forked import run_each
from benchmarks.language_models import LANGUAGE_MODELS, Batch
from tersor import quantization
from tersor.quantization import Quantizer
from tersor.storage import write_text

RESULT = Path(__file__).parent / "results" / "quantization_language.json"
SUBJECT = LANGUAGE_MODELS["minilm"]
SEEDS = 3
LIMIT = 1800.0
GROUP = [1, 128]

Record = dict[str, Any]
Make = Callable[..., Quantizer]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        make: the quantizer, of a model and a config list, with ``calibration`` where it looks at data.
        says: what it does.
        keys: of the config list, besides what selects the layers.
        targets: what is quantized.
        data: whether it looks at data.
        inputs: keys of the inputs alone.
    """

    make: Make
    says: str
    keys: Mapping[str, Any]
    targets: tuple[str, ...] = ("weight",)
    data: bool = True
    inputs: Mapping[str, Any] | None = None

    def config_list(self) -> list[dict[str, Any]]:
        """Every linear layer of the encoder."""
        selected = {"op_types": ["Linear"], "exclude_op_names": [*SUBJECT.excluded]}
        settings = {name: {} for name in self.targets}
        if self.inputs is not None:
            settings["_input_0"] = dict(self.inputs)
        return [{**selected, "target_names": [*self.targets], "target_settings": settings, **self.keys}]


_BOTH = ("weight", "_input_0")
_AFFINE = {"quant_scheme": "affine"}
_TOKEN = {"dynamic": True, "granularity": [-1]}


def _bits(bits: int) -> dict[str, Any]:
    return {"quant_dtype": f"int{bits}", "quant_scheme": "affine", "granularity": GROUP}


METHODS: dict[str, Method] = {
    "int8 PTQ": Method(quantization.PtqQuantizer, "inputs with one fixed range", {"quant_dtype": "int8"}, _BOTH),
    "int8 PTQ, affine inputs": Method(
        quantization.PtqQuantizer,
        "inputs with one fixed, asymmetric range",
        {"quant_dtype": "int8"},
        _BOTH,
        inputs=_AFFINE,
    ),
    "int8 PTQ, dynamic": Method(
        quantization.PtqQuantizer, "a range for each token", {"quant_dtype": "int8"}, _BOTH, data=False, inputs=_TOKEN
    ),
    "int8 SmoothQuant": Method(
        quantization.SmoothQuantizer, "inputs with one fixed range", {"quant_dtype": "int8"}, _BOTH
    ),
    "int8 SmoothQuant, affine inputs": Method(
        quantization.SmoothQuantizer,
        "inputs with one fixed, asymmetric range",
        {"quant_dtype": "int8"},
        _BOTH,
        inputs=_AFFINE,
    ),
    "int8 SmoothQuant, dynamic": Method(
        quantization.SmoothQuantizer, "a range for each token", {"quant_dtype": "int8"}, _BOTH, inputs=_TOKEN
    ),
    "int8 weights": Method(quantization.PtqQuantizer, "weights alone", {"quant_dtype": "int8"}, data=False),
}
for _width in (4, 3):
    METHODS |= {
        f"int{_width} round to nearest": Method(
            quantization.PtqQuantizer, f"weights in groups of {GROUP[1]}", _bits(_width), data=False
        ),
        f"int{_width} AWQ": Method(quantization.AWQQuantizer, f"weights in groups of {GROUP[1]}", _bits(_width)),
        f"int{_width} GPTQ": Method(quantization.GPTQQuantizer, f"weights in groups of {GROUP[1]}", _bits(_width)),
    }


class Item(NamedTuple):
    """One row of the results; without a method it is the model as it is."""

    method: str | None = None
    seed: int = 0


def items() -> list[Item]:
    """Every row."""
    seeded = [(name, range(SEEDS if method.data else 1)) for name, method in METHODS.items()]
    return [Item(), *(Item(name, seed) for name, seeds in seeded for seed in seeds)]


def measure(item: Item, publish: Callable[[Record], None]) -> Record:
    """One row; what raises is recorded."""
    record: Record = item._asdict()
    publish(record)
    try:
        model = SUBJECT.load()
        if item.method is not None:
            record["seconds"] = quantize(model, METHODS[item.method], SUBJECT.calibration(item.seed), item.seed)
        record["figures"] = {name: round(value, 4) for name, value in SUBJECT.measure(model).items()}
    except Exception as error:  # noqa: BLE001 it is what the record is for
        record["error"] = f"{type(error).__name__}: {error}"[:500]
    return record


def quantize(model: nn.Module, method: Method, batches: list[Batch], seed: int) -> float:
    """Quantize the model in place; how long it took."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"calibration": batches} if method.data else {}
    start = time.perf_counter()
    method.make(model, method.config_list(), example_inputs=batches[-1], **options).compress()
    return round(time.perf_counter() - start, 2)


def read() -> dict[Item, Record]:
    """The results by item; none where there are none."""
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    return {Item(row["method"], row["seed"]): row for row in rows}


def write(rows: Mapping[Item, Record]) -> None:
    """All rows under the versions that are installed now."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {name: importlib.metadata.version(name) for name in ("tersor", "transformers", *SUBJECT.packages)}
    document = {
        "versions": versions,
        "threads": 1,
        "data": SUBJECT.tokens,
        "says": {name: method.says for name, method in METHODS.items()},
        "rows": [rows[item] for item in items() if item in rows],
    }
    write_text(RESULT, json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*METHODS], default=[*METHODS], metavar="METHOD")
    parser.add_argument("--again", action="store_true", help="also what the results hold already; failures always are")
    options = parser.parse_args()
    rows = read()
    wanted = [item for item in items() if item.method is None or item.method in options.only]
    wanted = [item for item in wanted if options.again or "error" in rows.get(item, {"error": "is missing"})]
    for outcome in run_each(measure, wanted, limit=LIMIT):
        record = {**outcome.item._asdict(), **outcome.record}
        if outcome.ended is not None:
            record["error"] = outcome.ended
        rows[outcome.item] = record
        write(rows)
        print(record, flush=True)


if __name__ == "__main__":
    main()
