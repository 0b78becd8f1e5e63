"""``docs/deploy_zoo.md`` from the results of ``benchmarks.deploy_zoo`` and ``benchmarks.channel_sizes``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "deploy_zoo.md"
PARTS = ("dense", "pruned")
STEPS = ("fp32", "int8")
TITLES = {
    "torchvision": "torchvision",
    "timm": "timm",
    "transformers": "Transformers (tiny random configurations)",
    "hard": "Hard cases",
}
INTRODUCTION = """\
# The zoo on an engine

Written by `python -m benchmarks.deploy_zoo --table` from `benchmarks/results/deploy_zoo.json` and
`channel_sizes.json`; measure again with `make deploy-zoo`.

Architectures of the zoo (see [zoo.md](zoo.md); random weights): here those that the test suite takes too, which are
balanced over families, and all hard cases. Each is tried *dense* and *pruned*: half of the choices (channels, heads) of
each free coupling group masked at random, and the model made small on its way to the engine.
*fp32*: the exported model runs there and its outputs are eager's, at another batch size where that is free, to 1e-4 of
the largest. *int8*: weights, inputs and outputs of all convolutions and linear layers quantized after training, two
random batches for calibration; the artefact's outputs agree with the simulation's by 40 dB, or by what the simulation
has against itself less 6 dB and then each layer does by 40 dB from the same inputs. Of a pruned row the calibration is
that of the masked model, cut along; before it is exported, the small model's simulation was found to be the masked
one's to 1e-4.
*SNR*: artefact against simulation in dB. *in int8*: operators of convolution and product that run in integers by the
engine's own profile, of those whose operands are all quantized. Placement here is the quantizer's default, not the
engine's preferred one (`engine_config`). Weights that are computed (weight norm) are stored before they are quantized.
"""
SIZES = """\
## Numbers of channels that engines like

CPU milliseconds of one int8 layer on one thread: a convolution ({map} x {map} map, 3 x 3, as many channels in as out)
and a product ({rows} rows, square). `python -m benchmarks.channel_sizes` measures it. A step up of the time from one
column to the next larger one shows the block in which a kernel computes.
"""

Record = Mapping[str, Any]


def page(document: Mapping[str, Any], sizes: Mapping[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        document: what ``results/deploy_zoo.json`` holds.
        sizes: what ``results/channel_sizes.json`` holds.
    """
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    sources = {source: [r for r in document["rows"] if r["source"] == source] for source in TITLES}
    sources = {source: rows for source, rows in sources.items() if rows}
    parts = [INTRODUCTION, f"Engine: {document['engine']}. Versions: {versions}.\n", _summaries(sources)]
    failed = [line for rows in sources.values() for row in rows for line in _failures(row)]
    if failed:
        parts.append("## What fails\n\n" + "\n".join(failed) + "\n")
    if sizes is not None:
        parts += [SIZES.format(**sizes), _sizes(sizes["milliseconds"]), advice(sizes["milliseconds"])]
    for source, rows in sources.items():
        parts.append(f"## {TITLES[source]}\n\n{_table(rows)}")
    return "\n".join(parts)


def counts(rows: Iterable[Record], part: str) -> tuple[int, int, int]:
    """How many rows were tried in a form, how many run in fp32, and how many of these in int8 too."""
    tried = [row[part] for row in rows if part in row]
    floating = [own for own in tried if _ok(own, "fp32")]
    return len(tried), len(floating), sum(_ok(own, "int8") for own in floating)


def _ok(found: Record, step: str) -> bool:
    return bool(found.get(step, {}).get("ok"))


def _summaries(sources: Mapping[str, list[Record]]) -> str:
    head = [""]
    for part in PARTS:
        head += [f"{part}: tried", "in fp32", "of these in int8"]
    lines = [_line(head), _line(["---", *["---:"] * 6])]
    everything = [row for rows in sources.values() for row in rows]
    for title, rows in [*((TITLES[source], rows) for source, rows in sources.items()), ("all", everything)]:
        lines.append(_line([title, *(str(count) for part in PARTS for count in counts(rows, part))]))
    return "\n".join(lines) + "\n"


def _failures(row: Record) -> Iterator[str]:
    for part in PARTS:
        found = row.get(part, {})
        if "build" in found:
            yield f"- `{row['name']}` {part}: {found['build']['message'][:300]}"
        for step in STEPS:
            if step in found and not found[step]["ok"]:
                yield f"- `{row['name']}` {part} {step}: {found[step]['failure']['message'][:300]}"
                break  # what fails in fp32 fails in int8 for the same reason


def _table(rows: Iterable[Record]) -> str:
    head = ["architecture"]
    for part in PARTS:
        head += [f"{part}: error in fp32", "SNR of int8", "in int8"]
    lines = [_line(head), _line(["---", *["---:"] * 6])]
    for row in rows:
        cells = [row["name"].partition("/")[2]]
        for part in PARTS:
            cells += _cells(row.get(part))
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _cells(found: Record | None) -> list[str]:
    if found is None:
        return ["", "", ""]
    floating, whole = found.get("fp32", {}), found.get("int8", {})
    error = f"{floating['error']:.0e}" if floating.get("ok") else "**fails**"
    if not whole.get("ok"):
        return [error, "**fails**", ""]
    if "note" in whole:
        return [error, "no layer", ""]
    return [error, "equal" if whole["snr"] >= 1e3 else f"{whole['snr']:.0f}", f"{whole['int8']} of {whole['asked']}"]


def _sizes(milliseconds: Mapping[str, Any]) -> str:
    columns = [(kind, engine) for kind, engines in milliseconds.items() for engine in engines]
    lines = [_line(["channels", *(f"{kind}, {engine}" for kind, engine in columns)])]
    lines.append(_line(["---:"] * (len(columns) + 1)))
    first = milliseconds[columns[0][0]][columns[0][1]]
    lines += [_line([size, *(f"{milliseconds[kind][engine][size]:.3f}" for kind, engine in columns)]) for size in first]
    return "\n".join(lines) + "\n"


def advice(milliseconds: Mapping[str, Any]) -> str:
    """A sentence for each engine and kind of layer: what one channel more costs, and which sizes are wasteful."""
    lines = []
    for kind, engines in milliseconds.items():
        for engine, own in engines.items():
            times = {int(size): time for size, time in own.items()}
            steps = {size: times[size + 1] / times[size] - 1 for size in times if size % 32 == 0 and size + 1 in times}
            dearest = max(steps, key=lambda size: steps[size])
            wasteful = [
                size for size, time in times.items() if any(time > 1.03 * times[more] for more in times if more > size)
            ]
            lines.append(
                f"- {kind}, {engine}: {dearest + 1} channels take {steps[dearest]:.0%} more than {dearest}; slower by "
                f"3 % or more than a larger size: {', '.join(map(str, wasteful)) or 'none of these'}."
            )
    return "\n".join([*lines, "", "`round_to=16` avoids all of it on both engines, `round_to=8` most.", ""])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
