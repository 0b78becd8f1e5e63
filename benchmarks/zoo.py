"""Every architecture of the zoo cut by half: ``python -m benchmarks.zoo [--only PATTERN ...] [--resume]``.

Each row runs in a process of its own, on one thread, with a time limit; ``results/zoo.json`` is rewritten after each.
``--table`` writes ``docs/zoo.md`` from it and measures nothing. What is checked of a row says ``tests/zoo/check.py``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.forked import Outcome, run_each
from benchmarks.zoo_table import LITTLE, PAGE, page
from tersor.storage import write_text
from tests.zoo.check import LATER_STEPS, check
from tests.zoo.rows import Row

RESULT = Path(__file__).parent / "results" / "zoo.json"
SOURCES = {
    "torchvision": "torchvision_rows",
    "timm": "timm_rows",
    "transformers": "transformers_rows",
    "hard": "hard_cases",
}
LIMIT = 120.0

Record = dict[str, Any]


@functools.cache
def rows_of(source: str) -> tuple[Row, ...]:
    """The rows of one source; none where its package is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return tuple(importlib.import_module(f"tests.zoo.{SOURCES[source]}").rows())
        except (ImportError, pytest.skip.Exception) as error:
            print(f"{source}: {error}", flush=True)
            return ()


def chosen(sources: Iterable[str], patterns: Iterable[str] | None = None) -> list[Row]:
    """The rows of these sources whose names match one of the patterns, or contain it."""
    rows = [row for source in sources for row in rows_of(source)]
    if patterns is None:
        return rows
    return [row for row in rows if any(fnmatch(row.name, pattern) or pattern in row.name for pattern in patterns)]


def read(path: Path) -> dict[str, Record]:
    """Records by name; none where the file does not exist."""
    return {record["name"]: record for record in json.loads(path.read_text())["rows"]} if path.exists() else {}


def write(path: Path, records: Mapping[str, Record], packages: Iterable[str], **more: Any) -> None:
    """The records under the versions that they were measured with, whole or not at all."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: importlib.metadata.version(package) for package in packages}
    head = {"versions": versions, "cpu_capability": torch.backends.cpu.get_cpu_capability(), **more}
    order = {source: number for number, source in enumerate(SOURCES)}
    rows = sorted(records.values(), key=lambda record: (order.get(record["source"], len(order)), record["name"]))
    write_text(path, json.dumps({**head, "rows": rows}, indent=1) + "\n")


def concluded(outcome: Outcome[Row]) -> Record:
    """The record of a row, also of one whose process did not come to its end."""
    row, record = outcome.item, dict(outcome.record)
    step = record.pop("step", "build")
    record = {"name": row.name, "source": row.source, "family": row.family, "success": False, **record}
    if outcome.ended is not None and not record["success"]:
        record["failure"] = {"type": "Interrupted", "message": outcome.ended, "where": "", "step": step}
    elif outcome.ended is not None:
        record |= {later: "not reached" for later in LATER_STEPS if later not in record} | {step: outcome.ended}
    return record


def line(record: Record) -> str:
    """One row in one line."""
    if not record["success"]:
        failure = record["failure"]
        return f"FAILED {record['name']} [{failure['step']}] {failure['type']}: {failure['message'][:250]}"
    bad = [f"{step}: {record[step][:40]}" for step in LATER_STEPS if record[step] != "ok"]
    return (
        f"ok     {record['name']}: {record['removed']:.0%} of parameters, error {record['error']:.0e}, "
        f"{record['seconds']:.2f} s, {record['form']} {'; '.join(bad)}"
    )


def summary(records: Iterable[Record]) -> str:
    """How many rows, how many right, how far off, how fast."""
    records = list(records)
    good = [record for record in records if record["success"]]
    if not good:
        return f"{len(records)} rows, none succeeds"
    slowest = max(good, key=lambda record: record["seconds"])
    return (
        f"{len(records)} rows, {len(good)} succeed ({len(good) / len(records):.1%}); largest error "
        f"{max(record['error'] for record in good):.1e}; "
        f"{sum(record['removed'] < LITTLE for record in good)} lose less than {LITTLE:.0%} of their parameters; "
        f"median {statistics.median(record['seconds'] for record in good):.2f} s, slowest {slowest['name']} with "
        f"{slowest['seconds']:.2f} s"
    )


def measure(rows: Iterable[Row], records: dict[str, Record], write_records: Callable[[], None], options: Any) -> None:
    """Check the rows and put what was found into the records."""
    work = lambda row, publish: check(row, publish=publish)  # noqa: E731
    for outcome in run_each(work, rows, jobs=options.jobs, limit=options.limit):
        record = concluded(outcome)
        records[record["name"]] = record
        write_records()
        print(line(record), flush=True)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that say which rows."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--only", nargs="+", metavar="PATTERN", help="names that match or contain one of these")
    options.add_argument("--source", nargs="+", choices=[*SOURCES], default=[*SOURCES])
    options.add_argument("--sample", action="store_true", help="only the rows of the test suite's sample")
    options.add_argument("--resume", action="store_true", help="leave out what the results hold already")
    options.add_argument("--rerun-failed", action="store_true", help="like --resume, and failures again")
    options.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for one row")
    return options


def select(options: argparse.Namespace, records: dict[str, Record]) -> list[Row]:
    """The rows to measure; records that will not stay are dropped."""
    rows = chosen(options.source, options.only)
    rows = [row for row in rows if row.in_sample or not options.sample]
    if options.resume or options.rerun_failed:
        kept = {name for name, record in records.items() if record["success"] or not options.rerun_failed}
        return [row for row in rows if row.name not in kept]
    if not options.only and not options.sample:
        for name in [name for name, record in records.items() if record["source"] in options.source]:
            del records[name]
    return rows


def main() -> None:
    """Measure, or write the page."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--jobs", type=int, default=2, metavar="N", help="rows at a time")
    options.add_argument("--table", action="store_true", help=f"write {PAGE.name} from the results")
    chosen_options = options.parse_args()
    if chosen_options.table:
        write_text(PAGE, page(json.loads(RESULT.read_text())))
        return
    records = read(RESULT)
    rows = select(chosen_options, records)
    packages = ("tersor", "torchvision", "timm", "transformers")
    measure(rows, records, lambda: write(RESULT, records, packages), chosen_options)
    print(summary(records.values()))


if __name__ == "__main__":
    main()
