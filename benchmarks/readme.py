"""``python -m benchmarks.readme``: the README's measured section, written from ``results/*.json``."""

from __future__ import annotations

import json
import re
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
    return "\n".join(["", *rows, "", text, ""])


def main() -> None:
    """Rewrite the section."""
    readme = ROOT / "README.md"
    readme.write_text(SECTION.sub(section().replace("\\", r"\\"), readme.read_text()))


if __name__ == "__main__":
    main()
