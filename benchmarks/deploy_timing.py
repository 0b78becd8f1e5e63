"""All files of one network, opened in one process and called in turn: a part of ``benchmarks.deploy``.

In each round every row is called a few times, in another order each time, so that what slows the machine slows all
alike; a ratio is the median over rounds of one row's time by another's in the same round. With one thread the time is
the processor's, else the clock's. Before a row's turn there is a pause, since threads of the last one still spin, and a
call that is not counted, since caches hold the last one's values.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.deploy import ROWS, Item, place, read, record_of
from benchmarks.deploy_networks import BATCHES, NETWORKS, Call, Inputs
from tersor.analysis.latency import Latency, paired_ratio
from tersor.storage import write_text

PAUSE = 0.01
TURN = 0.02
"""Seconds of one row's turn, where a call is shorter."""
SLOW = 3
"""What is in floating point has its turn in every third round only, since it is slow."""
LEAST, MOST = 9, 90
"""Rounds."""


def main(folder: Path, network: str, threads: int, seconds: float) -> None:
    """Time every batch size, and write one record each."""
    torch.set_num_threads(threads)
    for batch in BATCHES:
        start = time.perf_counter()
        inputs = NETWORKS[network].example(batch)
        calls, errors = opened(folder, network, batch, threads, inputs)
        opening = time.perf_counter() - start
        turns = rounds(calls, inputs, threads, seconds)
        record = {
            "network": network,
            "threads": threads,
            "batch": batch,
            "clock": "processor" if threads == 1 else "wall",
            "rows": summary(turns),
            "errors": errors,
        }
        path = folder / network / "records" / f"times-{threads}-{batch:02}.txt"
        write_text(path, json.dumps(record) + "\n")
        print(f"{network}, {threads} threads, batch {batch}: opened in {opening:.0f} s", flush=True)


def opened(
    folder: Path, network: str, batch: int, threads: int, inputs: Inputs
) -> tuple[dict[str, Call], dict[str, str]]:
    """Every row that was built, called once; what cannot be opened, and why."""
    calls: dict[str, Call] = {}
    errors: dict[str, str] = {}
    for name, row in ROWS.items():
        item = Item(network, name)
        if not row.fits(NETWORKS[network]) or "error" in read(record_of(folder, item)):
            continue
        try:
            call = row.open(place(folder, item), batch, threads)
            call(*inputs)
        except Exception as error:  # noqa: BLE001 the other rows are still wanted
            errors[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            calls[name] = call
    return calls, errors


def rounds(calls: Mapping[str, Call], inputs: Inputs, threads: int, seconds: float) -> dict[str, dict[int, float]]:
    """Seconds of one call, for each row and each round in which it had a turn."""
    clock = time.process_time if threads == 1 else time.perf_counter
    lengths = {name: _once(call, inputs, time.perf_counter) for name, call in calls.items()}
    found: dict[str, dict[int, float]] = {name: {} for name in calls}
    order, draws = list(calls), random.Random(0)
    start, number = time.perf_counter(), 0
    while number < LEAST or (number < MOST and time.perf_counter() - start < seconds):
        draws.shuffle(order)
        for name in order:
            if ROWS[name].kind == "float" and number % SLOW:
                continue
            call, repeats = calls[name], max(1, min(20, round(TURN / lengths[name])))
            time.sleep(PAUSE)
            if lengths[name] < 10 * TURN:
                call(*inputs)
            began = clock()
            for _ in range(repeats):
                call(*inputs)
            found[name][number] = (clock() - began) / repeats
        number += 1
    return found


def _once(call: Call, inputs: Inputs, clock: Any) -> float:
    call(*inputs)
    began = clock()
    call(*inputs)
    return clock() - began


def summary(turns: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """For each row the median in milliseconds, and for Tersor's the ratio to every other row, with its interval."""
    rows: dict[str, Any] = {}
    for name, own in turns.items():
        latency = Latency(tuple(own.values()))
        rows[name] = {
            "ms": round(1000 * latency.median, 4),
            "p10": round(1000 * latency.p10, 4),
            "p90": round(1000 * latency.p90, 4),
            "rounds": len(own),
        }
        if ROWS[name].kind == "tersor":
            rows[name]["ratios"] = {other: ratio(own, its) for other, its in turns.items() if other != name}
    return rows


def ratio(own: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """The median of the ratios in rounds that both have, and an interval that holds the true one in 95 % of cases.

    >>> ratio({0: 1.0, 1: 3.0, 2: 1.0}, {0: 2.0, 2: 2.0})
    [0.5, 0.5, 0.5]
    """
    both = [number for number in own if number in other]
    found = paired_ratio(Latency(tuple(own[n] for n in both)), Latency(tuple(other[n] for n in both)))
    return [round(value, 4) for value in (found.median, found.low, found.high)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
