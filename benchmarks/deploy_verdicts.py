"""What was asked of ``benchmarks.deploy``, and what came out: numbers beside bars."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]

TITLES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "inductor": "Inductor"}
EXACT = {"onnxruntime": "ONNX Runtime fp32", "openvino": "OpenVINO fp32", "inductor": "AOTInductor fp32"}
"""The row in fp32 on the same engine."""
EAGER = "torch eager fp32"
SETTINGS = ((1, 1), (1, 16), (2, 1), (2, 16))
"""Threads and batch size."""
SLOWER, FILE, SNR, MARGIN = 1.03, 0.29, 40.0, 6.0
"""What was asked: ratio to the fastest peer, ratio to the file in fp32, dB against the simulation or to its floor."""
HALF = ", half the channels"
BF16 = ", bf16"
"""How rows are called that leave in bf16, and not in fp32, what is not quantized."""
FASTER, EAGER_FASTER, HALF_FILE = 2.0, 12.0, 1 / 12
"""What was asked of half the channels: times faster than all of them in int8, than eager fp32; file to that in fp32."""
USABLE = 10.0
"""A peer whose outputs are nearer than this to noise, in dB, computes something else; its time is not compared with."""


@dataclass(frozen=True)
class Verdict:
    """What was asked, and what came out.

    Attributes:
        what: in words.
        met: in how many cases.
        cases: of how many.
        worst: the case that is furthest away.
    """

    what: str
    met: int
    cases: int
    worst: str

    def line(self) -> str:
        """A row of the table."""
        word = "met" if self.met == self.cases else "**not met**"
        return f"| {self.what} | {word if self.cases else 'not measured'} | {self.met} of {self.cases} | {self.worst} |"


@dataclass(frozen=True)
class Case:
    """One number that was asked for.

    Attributes:
        where: in words.
        value: what was measured.
        bar: what was asked for.
        least: whether the bar is the least that is wanted; else the most.
        text: the number, as it is printed.
    """

    where: str
    value: float
    bar: float
    text: str
    least: bool = True

    @property
    def surplus(self) -> float:
        """How far on the right side."""
        return self.value - self.bar if self.least else self.bar - self.value


def verdict(what: str, cases: list[Case]) -> Verdict:
    """Count, and find the worst.

    >>> verdict("at most 1", [Case("a", 0.5, 1, "0.5", least=False), Case("b", 2, 1, "2.0", least=False)])
    Verdict(what='at most 1', met=1, cases=2, worst='b: 2.0')
    """
    worst = min(cases, key=lambda case: case.surplus / case.bar, default=None)
    met = sum(case.surplus >= 0 for case in cases)
    return Verdict(what, met, len(cases), "" if worst is None else f"{worst.where}: {worst.text}")


# Finding rows


def rows_of(document: Document, network: str) -> dict[str, Document]:
    """What was built of a network, by row, without what failed."""
    return {row["row"]: row for row in document["rows"] if row["network"] == network and "error" not in row}


def ours(
    document: Document, *, half: bool = False, opened_again: bool = False
) -> Iterator[tuple[str, str, str, Document]]:
    """Network, engine, row, and what was built, for Tersor's rows; with those that open another's file, if asked."""
    for network in document["networks"]:
        for name, row in rows_of(document, network).items():
            if name.endswith(BF16) and not opened_again:
                continue
            if document["says"][name]["kind"] == "tersor" and name.endswith(HALF) == half:
                yield network, document["says"][name]["engine"], name, row


def times_of(document: Document, network: str, threads: int, batch: int) -> dict[str, Document]:
    """What was timed, by row."""
    for record in document["times"]:
        if (record["network"], record["threads"], record["batch"]) == (network, threads, batch):
            return record["rows"]
    return {}


def fastest_peer(document: Document, network: str, name: str, setting: tuple[int, int]) -> tuple[str, list[float]]:
    """The peer on the same engine that a row has the largest ratio to, and that ratio; empty where there is none.

    What is in bf16 is compared with everything, what is in fp32 with what is in fp32.
    """
    says = document["says"]
    ratios = times_of(document, network, *setting).get(name, {}).get("ratios", {})
    built = rows_of(document, network)
    peers = {
        other: ratio
        for other, ratio in ratios.items()
        if says[other]["kind"] == "peer"
        and says[other]["engine"] == says[name]["engine"]
        and (name.endswith(BF16) or not other.endswith(BF16))
        and built.get(other, {}).get("snr", USABLE) >= USABLE
    }
    return max(peers.items(), key=lambda item: item[1][0], default=("", []))


def file_of(document: Document, network: str, name: str) -> float | None:
    """The bytes of a row's file; rows that open another's file in another way have its."""
    return rows_of(document, network).get(name, {}).get("bytes")


# What was asked


def verdicts(document: Document) -> list[Verdict]:
    """All of it."""
    return [
        *(verdict(f"{TITLES[engine]}: at most {SLOWER} times the fastest peer", latency(document, engine))
          for engine in TITLES),
        verdict(f"file at most {FILE} of that in fp32 on the same engine", files(document)),
        verdict("EfficientNet-Lite0 agrees with fp32 at least as often as NNCF's", agreement(document)),
        verdict("MiniLM's correlations are at least NNCF's", correlations(document)),
        verdict(f"each layer against the simulation's, from the same inputs: at least {SNR:.0f} dB", layers(document)),
        verdict("the artefact's answers are the simulation's, from the same inputs to the last layer",
                answers(document, layers=True)),
        verdict(f"artefact against simulation, end to end: at least {SNR:.0f} dB", exactness(document, floor=False)),
        verdict(f"... or at most {MARGIN:.0f} dB under the simulation's own floor", exactness(document, floor=True)),
        verdict("the artefact's answers are the simulation's, end to end", answers(document)),
        verdict("all convolutions and linear layers run in int8", coverage(document)),
        verdict(f"half the channels: at least {FASTER:.0f} times faster than all in int8", halved(document, "int8")),
        verdict(f"half the channels: at least {EAGER_FASTER:.0f} times faster than fp32", halved(document, "eager")),
        verdict("half the channels: file at most 1/12 of that in fp32", halved_files(document)),
    ]  # fmt: skip


def title(document: Document, network: str, engine: str, setting: tuple[int, int] | None = None) -> str:
    """Where a figure is from, in words."""
    words = f"{document['networks'][network]}, {TITLES[engine]}"
    return words if setting is None else f"{words}, {setting[0]} thread{'s'[: setting[0] - 1]}, batch {setting[1]}"


def latency(document: Document, engine: str) -> list[Case]:
    """Ratios to the fastest peer on an engine."""
    cases: list[Case] = []
    for network, own, name, _ in ours(document, opened_again=True):
        for setting in SETTINGS if own == engine else ():
            peer, ratio = fastest_peer(document, network, name, setting)
            if ratio:
                where = title(document, network, engine, setting)
                cases.append(Case(where, ratio[0], SLOWER, f"{ratio[0]:.3f} of {peer}", least=False))
    return cases


def files(document: Document) -> list[Case]:
    """Ratios to the file in fp32."""
    cases: list[Case] = []
    for network, engine, _, row in ours(document):
        if exact := file_of(document, network, EXACT[engine]):
            ratio = row["bytes"] / exact
            cases.append(Case(title(document, network, engine), ratio, FILE, f"{ratio:.3f}", least=False))
    return cases


def figures_of(document: Document, network: str, name: str) -> dict[int, dict[str, float]]:
    """Figures of accuracy by seed; counts of two halves are added up."""
    found: dict[int, dict[str, float]] = {}
    for row in document["accuracy"]:
        if (row["network"], row["row"]) == (network, name) and "figures" in row:
            figures = found.setdefault(row["seed"], {})
            for key, value in row["figures"].items():
                figures[key] = figures.get(key, 0) + value
    return found


def best_nncf(document: Document, network: str, key: str) -> float | None:
    """The mean over seeds of the better of NNCF's rows."""
    means = [
        statistics.mean(figures[key] for figures in found.values())
        for name in document["says"]
        if name.startswith("NNCF") and (found := figures_of(document, network, name))
    ]
    return max(means, default=None)


def compared(document: Document, network: str, key: str, scale: float, digits: int) -> list[Case]:
    """Each of our rows beside the better of NNCF's, means over seeds."""
    cases: list[Case] = []
    for own, engine, name, _ in ours(document):
        found, theirs = figures_of(document, own, name), best_nncf(document, network, key)
        if own == network and found and theirs is not None:
            mean = statistics.mean(figures[key] for figures in found.values())
            text = f"{scale * mean:.{digits}f}, NNCF {scale * theirs:.{digits}f}"
            cases.append(Case(f"{TITLES[engine]}, {key}", mean, theirs, text))
    return cases


def agreement(document: Document) -> list[Case]:
    """Of EfficientNet-Lite0's answers with those in fp32."""
    return compared(document, "efficientnet_lite0", "agreeing", 1, 1)


def correlations(document: Document) -> list[Case]:
    """MiniLM's three."""
    return [case for key in CORRELATIONS for case in compared(document, "minilm", key, 1, 4)]


CORRELATIONS = {"wordsim353": "WordSim-353", "simlex999": "SimLex-999", "lee": "Lee"}


def floor_of(row: Document) -> float | None:
    """What the simulation has against itself, the least of both batch sizes."""
    found = [part["floor"] for key, part in row.items() if key.startswith("batch_") and part["floor"] is not None]
    return min(found, default=None)


def exactness(document: Document, *, floor: bool) -> list[Case]:
    """Artefacts against their simulation, in dB."""
    cases: list[Case] = []
    for network, engine, _, row in ours(document):
        value, lowest = row["simulation"]["snr"], floor_of(row)
        least = min(SNR, lowest - MARGIN) if floor and lowest is not None else SNR
        text = f"{value:.1f} dB" + ("" if lowest is None else f" (floor {lowest:.1f})")
        cases.append(Case(title(document, network, engine), value, least, text))
    return cases


def layers(document: Document) -> list[Case]:
    """The layer of each artefact that agrees least with the simulation's from the same inputs, in dB."""
    return [
        Case(title(document, network, engine), own["snr"], SNR, f"{own['snr']:.1f} dB")
        for network, engine, _, row in ours(document)
        for own in layers_of(row)
    ]


def layers_of(row: Document) -> list[Document]:
    """What was found layer by layer, for each batch size where it was looked at."""
    return [part["layers"] for key, part in row.items() if key.startswith("batch_") and part.get("layers")]


def answers(document: Document, *, layers: bool = False) -> list[Case]:
    """Shares of samples with the simulation's answer, end to end or from the same inputs to the last layer."""
    if layers:
        return [
            Case(title(document, network, engine), own["top1"], 1.0, f"{own['top1']:.1%}")
            for network, engine, _, row in ours(document)
            for own in layers_of(row)
        ]
    return [
        Case(title(document, network, engine), row["simulation"]["top1"], 1.0, f"{row['simulation']['top1']:.1%}")
        for network, engine, _, row in ours(document)
        if row["simulation"]["top1"] is not None
    ]


def coverage(document: Document) -> list[Case]:
    """Shares of convolutions and linear layers in int8, by the engine's profile."""
    return [
        Case(
            title(document, network, engine),
            row["profile"]["int8"],
            row["profile"]["contractions"],
            f"{row['profile']['int8']} of {row['profile']['contractions']}",
        )
        for network, engine, _, row in ours(document)
        if row.get("profile", {}).get("contractions")
    ]


def halved(document: Document, against: str) -> list[Case]:
    """How many times faster half the channels in int8 are, than all of them in int8 or than eager fp32."""
    cases: list[Case] = []
    for network, engine, name, _ in ours(document, half=True):
        other = EAGER if against == "eager" else name.removesuffix(HALF)
        for setting in SETTINGS:
            ratio = times_of(document, network, *setting).get(name, {}).get("ratios", {}).get(other)
            if ratio:
                times = 1 / ratio[0]
                bar = EAGER_FASTER if against == "eager" else FASTER
                cases.append(Case(title(document, network, engine, setting), times, bar, f"{times:.2f} times"))
    return cases


def halved_files(document: Document) -> list[Case]:
    """Their files beside that of all channels in fp32."""
    cases: list[Case] = []
    for network, engine, _, row in ours(document, half=True):
        if exact := file_of(document, network, EXACT[engine]):
            ratio = row["bytes"] / exact
            where, text = title(document, network, engine), f"1/{1 / ratio:.1f}"
            cases.append(Case(where, ratio, HALF_FILE, text, least=False))
    return cases
