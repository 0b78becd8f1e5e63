"""Every architecture of the zoo on an engine: ``python -m benchmarks.deploy_zoo [--only PATTERN ...] [--resume]``.

Each row is exported in floating point and in int8, whole (``dense``) and with half of its channels cut (``pruned``);
each of the two in a process of its own, on one thread, with a time limit. ``results/deploy_zoo.json`` is rewritten
after each; ``--table`` writes ``docs/deploy_zoo.md`` from it and measures nothing.
"""

from __future__ import annotations

import inspect
import json
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.channel_sizes import RESULT as SIZES
from benchmarks.deploy_zoo_page import PAGE, PARTS, page
from benchmarks.forked import run_each
from benchmarks.zoo import chosen, parser, read, write
from tersor.analysis.batches import batch_size_of
from tersor.deploy import QuantizationSpeedup
from tersor.deploy.compiled import CompiledModel
from tersor.errors import TraceError
from tersor.graph import Masks, fresh_inputs, groups
from tersor.graph.inputs import as_call, named_tensors, tensors_of
from tersor.quantization import CalibrationConfig, PtqQuantizer
from tersor.speedup.slicing import bake
from tersor.speedup.verify import outputs_of, relative_error
from tersor.storage import write_text
from tests.zoo.build import built, seed_all
from tests.zoo.check import described
from tests.zoo.rows import Row

RESULT = Path(__file__).parent / "results" / "deploy_zoo.json"
LIMIT = 180.0
RATIO = 0.5
TOLERANCE = 1e-4
MIN_SNR = 40.0
LAYERS = {
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Linear",
    "Conv1D",  # the linear layer of Transformers' GPT-2
}  # fmt: skip

Record = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Half of a row's work.

    Attributes:
        row: the architecture.
        name: ``dense`` or ``pruned``.
        engine: where it is to run.
    """

    row: Row
    name: str
    engine: str


def check(part: Part, publish: Callable[[Record], None] = lambda record: None) -> Record:
    """Export one form of a row in floating point and in int8, and compare both with what torch computes.

    Args:
        part: which row, in which form.
        publish: called with what is known before each step.

    Returns:
        for each of ``fp32`` and ``int8`` its figures with ``ok``, or the failure.
    """
    record: Record = {"step": "build"}
    publish(record)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = _Case(part)
        except Exception as error:  # noqa: BLE001 whatever it is, it is what the record is for
            return {"build": described(error), "seconds": round(time.perf_counter() - started, 1)}
        for step in (case.fp32, case.int8):
            record["step"] = step.__name__
            publish(record)
            began = time.perf_counter()
            figures: Record = {"ok": False}
            record[step.__name__] = figures
            try:
                step(figures)
                figures["ok"] = True
            except Exception as error:  # noqa: BLE001
                figures["failure"] = described(error)
            figures["seconds"] = round(time.perf_counter() - began, 1)
    del record["step"]
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record


class _Case:
    """One form of one row."""

    def __init__(self, part: Part) -> None:
        self.engine = part.engine
        self.model = built(part.row)
        seed_all(0)
        self.example = part.row.inputs()
        self.batches = [self.example, fresh_inputs(self.example, batch_size_of(self.example), seed=1)]
        self.masks: Masks | None = None
        if part.name == "pruned":
            coupling = groups(self.model, self.example)
            self.masks = coupling.random_masks(RATIO)
            bake(named_tensors(self.model), coupling.complete(self.masks))
        self.dynamic_batch = True

    def fp32(self, figures: Record) -> None:
        """The export that the int8 one is measured by."""
        try:
            compiled = self._compile(self.model)
        except TraceError as error:
            figures["batch"] = f"fixed: {error.what[:200]}"
            self.dynamic_batch = False
            compiled = self._compile(self.model)
        figures |= {"bytes": compiled.report.bytes, "batch": figures.get("batch", "free")}
        inputs = fresh_inputs(self.example, batch_size_of(self.example) + self.dynamic_batch, seed=2)
        args, kwargs = as_call(inputs)
        error = relative_error(tensors_of(compiled(*args, **kwargs)), outputs_of(self.model, inputs))
        figures["error"] = float(f"{error:.3g}")
        if not error <= TOLERANCE:
            raise AssertionError(f"the outputs differ from eager's by {error:.3g}")

    def int8(self, figures: Record) -> None:
        """All convolutions and linear layers quantized, weights, inputs and outputs.

        What departs from the simulation is refused by the speedup itself.
        """
        if stored := _stored(self.model):
            figures["stored"] = stored
        quantizer = self._quantized()
        if quantizer is None:
            figures["note"] = "has neither convolutions nor linear layers"
            return
        if self.masks is None:
            report = self._compile(quantizer).report
        else:
            calibration = quantizer.get_calibration_config()
            report = self._compile(quantizer.unwrap_model(), calibration).report
        figures |= {
            "bytes": report.bytes,
            "snr": round(report.simulation_snr, 1) if report.simulation_snr < 1e3 else 1e3,
            "floor": None if report.floor is None else round(min(report.floor, 1e3), 1),
            "layers": None if report.layers is None else round(min(report.layers.snr, 1e3), 1),
            "asked": report.asked,
            "int8": report.int8,
            "fallbacks": [f"{own.where}: {own.reason}" for own in report.fallbacks[:5]],
        }

    def _compile(self, model: Any, calibration: CalibrationConfig | None = None) -> CompiledModel:
        return QuantizationSpeedup(
            model,
            self.example,
            calibration,
            self.engine,
            masks=self.masks,
            min_snr=MIN_SNR,
            min_coverage=0.0,
            threads=1,
            dynamic_batch=self.dynamic_batch,
        ).compile()

    def _quantized(self) -> PtqQuantizer | None:
        kinds = sorted(LAYERS & {type(own).__name__ for own in self.model.modules()})
        if not kinds:
            return None
        quantizer = PtqQuantizer(
            self.model,
            [{"op_types": kinds, "quant_dtype": "int8"}],
            calibration=[_named(self.model, batch) for batch in self.batches],
            observer="minmax",
        )
        quantizer.compress()
        return quantizer


def _stored(model: nn.Module) -> list[str]:
    """Take parametrizations (weight norm) away, as quantizers ask for where they train nothing; whose they were."""
    found: list[str] = []
    for name, module in model.named_modules():
        for tensor in [*getattr(module, "parametrizations", ())]:
            parametrize.remove_parametrizations(module, tensor)
            found.append(name)
    return found


def _named(model: nn.Module, inputs: Any) -> Any:
    """Inputs as a calibration batch: in a tuple, the last would be taken for the target."""
    args, kwargs = as_call(inputs)
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def measure(rows: Iterable[Row], records: dict[str, Record], write_records: Callable[[], None], options: Any) -> None:
    """Check the parts of the rows and put what was found into the records."""
    parts = [Part(row, name, options.engine) for row in rows for name in options.part]
    parts = [part for part in parts if not (options.resume and part.name in records.get(part.row.name, {}))]
    _warm_up(options.engine)
    for outcome in run_each(check, parts, jobs=options.jobs, limit=options.limit):
        row, found = outcome.item.row, dict(outcome.record)
        step = found.pop("step", "build")
        if outcome.ended is not None:
            failure = {"type": "Interrupted", "message": outcome.ended, "where": ""}
            found[step] = failure if step == "build" else {"ok": False, "failure": failure}
        record = records.setdefault(row.name, {"name": row.name, "source": row.source, "family": row.family})
        record[outcome.item.name] = found
        write_records()
        print(line(row.name, outcome.item.name, found), flush=True)


def _warm_up(engine: str) -> None:
    """What is found out once is found out before the processes are forked."""
    row = Row("", "", "", lambda: nn.Linear(4, 4), lambda: torch.ones(2, 4))
    for name in PARTS:
        check(Part(row, name, engine))


def line(name: str, part: str, found: Record) -> str:
    """One part of a row in one line."""
    if "build" in found:
        return f"FAILED {name} {part} [build] {found['build']['message'][:200]}"
    words = []
    for step in ("fp32", "int8"):
        own = found.get(step, {"ok": False, "failure": {"message": "not reached"}})
        failure = own.get("failure", {}).get("message", "")[:200]
        figures = {
            key: own[key]
            for key in ("error", "snr", "floor", "layers", "asked", "int8", "note")
            if own.get(key) is not None
        }
        words.append(f"{step} {'ok' if own['ok'] else 'FAILED ' + failure} {figures}")
    return f"{name} {part}: {'; '.join(words)} {found.get('seconds', '')} s"


def main() -> None:
    """Measure, or write the page."""
    own = parser((__doc__ or "").splitlines()[0])
    own.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at a time")
    own.add_argument("--engine", default="onnxruntime")
    own.add_argument("--part", nargs="+", choices=PARTS, default=[*PARTS])
    own.add_argument("--results", type=Path, default=RESULT)
    own.add_argument("--table", action="store_true", help=f"write {PAGE.name} from the results")
    own.set_defaults(limit=LIMIT)
    options = own.parse_args()
    if options.table:
        sizes = json.loads(SIZES.read_text()) if SIZES.exists() else None
        write_text(PAGE, page(json.loads(options.results.read_text()), sizes))
        return
    records = read(options.results)
    rows = [row for row in chosen(options.source, options.only) if row.in_sample or not options.sample]
    packages = ("tersor", "onnx", "onnxruntime", "torchvision", "timm", "transformers")
    measure(rows, records, lambda: write(options.results, records, packages, engine=options.engine), options)


if __name__ == "__main__":
    main()
