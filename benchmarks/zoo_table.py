"""``docs/zoo.md`` from the results of the zoo."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "zoo.md"
TITLES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "Transformers (tiny random configurations)",
    "hard": "Hard cases",
}
INTRODUCTION = """\
# The zoo

Written by `python -m benchmarks.zoo --table` from `benchmarks/results/zoo.json`; measure again with `make zoo`.

Every architecture has random weights, with norms, biases, layer scales and position tables redrawn so that nothing is
trivially zero or one. Half of the choices (channels, heads) of each free coupling group are masked at random, and the
model is made small. *Error*: the largest difference between the small model's outputs and those of the original with
the completed masks burnt in, at another batch size, relative to the largest output. *Seconds*: coupling, masks and
speedup with its check, on one thread. *Gradient*: a finite one reaches every parameter that had one before. *Trains*:
a step in training mode. *Saved*: written to a checkpoint and read back. *Exported*: `torch.export` takes the small
model; "as before" stands for where it takes the original neither.
"""
LITTLE = 0.05
"""A smaller share of parameters removed counts as nothing."""
EXPLAINED = 0.3
"""Where less leaves, the note says what is frozen."""


def page(document: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        document: what ``results/zoo.json`` holds.
    """
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    sources = {source: [r for r in document["rows"] if r["source"] == source] for source in TITLES}
    sources = {source: records for source, records in sources.items() if records}
    parts = [INTRODUCTION, f"Versions: {versions}.\n", _summaries(sources)]
    for source, records in sources.items():
        parts.append(f"## {TITLES[source]}\n\n{_table(records)}")
    return "\n".join(parts)


def _summaries(sources: Mapping[str, list[dict[str, Any]]]) -> str:
    head = ("", "architectures", "succeed", "largest error", "parameters removed", f"under {LITTLE:.0%}")
    tail = ("median seconds", "slowest", "in place", "gradient", "trains", "saved", "exported")
    lines = [_line((*head, *tail)), _line(["---", *["---:"] * 12])]
    everything = [record for records in sources.values() for record in records]
    for title, records in [*((TITLES[s], r) for s, r in sources.items()), ("all", everything)]:
        lines.append(_line(_summary(title, records)))
    return "\n".join(lines) + "\n"


def _summary(title: str, records: list[dict[str, Any]]) -> Iterable[str]:
    good = [record for record in records if record["success"]]
    if not good:
        return [title, str(len(records)), "0", *[""] * 10]
    seconds = [record["seconds"] for record in good]
    later = [[_later(record, step) for record in good] for step in ("gradient", "train", "save", "export")]
    return [
        title,
        str(len(records)),
        f"{len(good)} ({len(good) / len(records):.1%})",
        f"{max(record['error'] for record in good):.0e}",
        f"{statistics.median(record['removed'] for record in good):.0%}",
        f"{sum(record['removed'] < LITTLE for record in good)}",
        f"{statistics.median(seconds):.2f}",
        f"{max(seconds):.2f}",
        f"{sum(record['form'] == 'in place' for record in good)}",
        *(f"{sum(answer == 'yes' for answer in answers)}" + _as_before(answers) for answers in later),
    ]


def _as_before(answers: list[str]) -> str:
    count = answers.count("as before")
    return f" + {count} as before" if count else ""


def _table(records: list[dict[str, Any]]) -> str:
    head = ("architecture", "parameters", "small", "MACs removed", "error", "seconds", "MB", "form", "note")
    lines = [_line(head), _line(["---", *["---:"] * 6, "---", "---"])]
    for record in records:
        name = record["name"].partition("/")[2]
        if record["success"]:
            before, after = record["parameters"]
            macs, left = record["macs"]
            figures = [_si(before), _si(after), f"{1 - left / macs:.0%}" if macs else "", f"{record['error']:.0e}"]
            figures += [f"{record['seconds']:.2f}", f"{record['memory_mb']:.0f}", record["form"]]
        else:
            figures = [""] * 7
        lines.append(_line([name, *figures, _note(record)]))
    return "\n".join(lines) + "\n"


def _note(record: Mapping[str, Any]) -> str:
    """What is worth knowing: a failure, what does not work, why little left."""
    if not record["success"]:
        failure = record["failure"]
        return f"**failed** in {failure['step']}: {failure['type']}: {failure['message'][:160]}"
    notes = [f"{step}: no" for step in ("gradient", "train", "save", "export") if _later(record, step) == "no"]
    if record["removed"] < EXPLAINED and record["groups"]["reasons"]:
        reason, count = next(iter(record["groups"]["reasons"].items()))
        notes.append(f"{record['groups']['frozen']} groups frozen, {count} of them: it {reason}")
    return "; ".join(notes)


def _later(record: Mapping[str, Any], step: str) -> str:
    """``yes``, ``no``, or ``as before`` where it does not work with the original either."""
    answer = record[step]
    if answer == "ok":
        return "yes"
    original = answer.partition("; the original: ")[2]
    return "as before" if original not in ("", "ok") else "no"


def _si(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
