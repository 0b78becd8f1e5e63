"""``python -m benchmarks.run speedup wrapping allocation``: measure, and write ``benchmarks/results/NAME.json``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def main(names: list[str]) -> None:
    """Run the named benchmarks one after the other."""
    for name in names:
        print(f"== {name}", flush=True)
        figures = importlib.import_module(f"benchmarks.{name}").run()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {package: importlib.metadata.version(package) for package in ("tersor", "torch-pruning")}
        document = {"versions": versions, "cpu_capability": torch.backends.cpu.get_cpu_capability(), **figures}
        (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:] or ["speedup", "wrapping", "allocation"])
