"""``python -m benchmarks.readme``: the README's measured section, written from ``results/*.json``."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vgg11_bn": "VGG11-BN",
    "mobilenet_v2": "MobileNetV2",
    "densenet121": "DenseNet-121",
}
SECTION = re.compile(r"(?<=<!-- measured -->\n).*(?=<!-- /measured -->)", re.DOTALL)


def results(name: str) -> dict[str, Any]:
    """One committed result."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def section() -> str:
    """The tables and sentences between the markers."""
    rows = [
        "| | relative error | parameters kept | images | seconds | Torch-Pruning | ratio | without the check |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, network in results("speedup")["networks"].items():
        error, kept = f"{network['relative_error']:.0e}", f"{network['parameters_kept']:.0%}"
        for number, (batch, row) in enumerate(network["batch"].items()):
            first = ["" if number else cell for cell in (NAMES[name], error, kept)]
            seconds = (row["tersor_seconds"], row["torch_pruning_seconds"], row["ratio"], row["ratio_unverified"])
            rows.append("| " + " | ".join([*first, batch, *(f"{value:.2f}" for value in seconds)]) + " |")
    masks, allocation = results("wrapping")["masks"], results("allocation")
    channels, fine = masks["channels"], masks["fine-grained"]
    text = (
        f"Wrapping ResNet-50 adds {channels['memory_added']:.1%} to its memory with channel masks and"
        f" {fine['memory_added']:.0%} with a mask of its own for each weight; a masked training step takes"
        f" {channels['step_ratio']:.2f} and {fine['step_ratio']:.2f} times a plain one. One global threshold over"
        f" {allocation['weights'] / 1e6:.1f} million weights takes {allocation['seconds']:.1f} s on one thread."
    )
    return "\n".join(["", *rows, "", text, "", zoo(), "", pruners(), "", quantizers(), ""])


def pruners() -> str:
    """What pruning without any training keeps, in words."""
    rows, share = results("pruning")["rows"], "0.8"
    best: list[str] = []
    for network in results("pruning")["networks"]:
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["network"] == network and share in row["points"]:
                found.setdefault(row["method"], []).append(row["points"][share]["accuracy_before_fine_tuning"])
        theirs = max(statistics.mean(found[name]) for name in found if name.startswith(("Torch-Pruning", "NNI")))
        best.append(f"{statistics.mean(found['OBS']):.1%} on {network} (best of Torch-Pruning and NNI: {theirs:.1%})")
    perplexity: dict[str | None, list[float]] = {}
    for row in results("pruning_language")["rows"]:
        if row["model"] == "smollm2" and row["pattern"] in (None, "50 %"):
            perplexity.setdefault(row["method"], []).append(row["figures"]["perplexity"])
    words = [f"{statistics.mean(values):.1f} ({name})" for name, values in perplexity.items() if name]
    return (
        "With 80% of the MACs of two networks for MNIST removed, and without any training, `OBSPruner` keeps an"
        f" accuracy of {' and '.join(best)}; with half of its weights gone, SmolLM2-135M's perplexity goes from"
        f" {perplexity[None][0]:.1f} to {', '.join(words)}. Every pruner beside its peers, before and after"
        " fine-tuning: [docs/pruning.md](docs/pruning.md)."
    )


def quantizers() -> str:
    """What int8 without training and 4 bits with it keep, in words."""
    document = results("quantization")
    rows = [row for row in document["rows"] if "accuracy" in row]
    of: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        of.setdefault(row["network"], {}).setdefault(row["method"], []).append(row)

    def mean(network: str, method: str, key: str) -> float:
        return statistics.mean(row[key] for row in of[network][method])

    words: list[str] = []
    for network, methods in of.items():
        peers = [name for name in methods if name.startswith(("torchao PTQ", "NNCF PTQ", "NNI 3.0 PTQ"))]
        peers = [name for name in peers if document["methods"][name]["bits"] == "8/8"]
        best = max((mean(network, name, "snr_db"), name) for name in peers)
        words.append(f"{mean(network, 'PTQ', 'snr_db'):.1f} dB on {network} (best peer: {best[0]:.1f}, {best[1]})")
    gained = {
        network: mean(network, "LSQ, 4 bits", "accuracy") - mean(network, "fp32", "accuracy")
        for network in of
        if "LSQ, 4 bits" in of[network]
    }
    trained = [f"{100 * gain:+.2f} points on {network}" for network, gain in gained.items()]
    figures = [row["figures"] for row in results("quantization_language")["rows"] if row["method"] == "int8 PTQ"]
    exact = next(row["figures"] for row in results("quantization_language")["rows"] if row["method"] is None)
    names = {"wordsim353": "WordSim-353", "simlex999": "SimLex-999", "lee": "Lee"}
    language = [
        f"{statistics.mean(f[key] for f in figures):.3f} on {name} ({exact[key]:.3f})" for key, name in names.items()
    ]
    return (
        "`PtqQuantizer` to int8, inputs with a zero point, without training: the logits keep a signal-to-noise ratio of"
        f" {', '.join(words)}; MiniLM's correlations with people are {', '.join(language)}, in brackets those in fp32."
        f" `LsqQuantizer` at 4 bits after some hundred steps: {', '.join(trained)}, relative to fp32. Every quantizer"
        " beside its peers: [docs/quantization.md](docs/quantization.md)."
    )


def zoo() -> str:
    """What came of every architecture of the zoo, in words."""
    records = results("zoo")["rows"]
    good = [record for record in records if record["success"]]
    slowest = max(good, key=lambda record: record["seconds"])
    in_place = sum(record["form"] == "in place" for record in good)
    text = (
        f"Of the {len(records)} architectures of the zoo ([docs/zoo.md](docs/zoo.md); half of all prunable channels and"
        f" heads removed) {len(good)} ({len(good) / len(records):.1%}) come out right: {in_place} in their own classes,"
        f" the others as a graph; relative error at most {max(record['error'] for record in good):.0e}, median share of"
        f" parameters removed {statistics.median(record['removed'] for record in good):.0%}, median time"
        f" {statistics.median(record['seconds'] for record in good):.2f} s, at most {slowest['seconds']:.1f} s"
        f" ({slowest['name']}). The others raise an error that names the place; none is silently wrong."
    )
    if not (ROOT / "benchmarks" / "results" / "zoo_peer.json").exists():
        return text
    peer = results("zoo_peer")["summary"]
    ratios = " and ".join(f"{ratio:.2f} with {batch} images" for batch, ratio in peer["median_ratio"].items())
    return text + (
        f" Torch-Pruning runs on {peer['theirs_ran']} of {peer['rows']} vision rows that were compared and is exact"
        f" on {peer['theirs_exact']}; where both are exact, the median ratio of our time to its is {ratios}."
    )


def main() -> None:
    """Rewrite the section."""
    readme = ROOT / "README.md"
    readme.write_text(SECTION.sub(section().replace("\\", r"\\"), readme.read_text()))


if __name__ == "__main__":
    main()
