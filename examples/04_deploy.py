"""Deployment: an int8 artefact for each inference engine that is installed, and the proof that it is right and fast.

The network of the quickstart is quantized as each engine wants it: ``engine_config`` says what, and some hundred images
say in which range. ``QuantizationSpeedup`` writes the engine's file, runs it beside the simulation, and fails where
they disagree or where the engine does not compute in integers. What was gained is stated against fp32 on the same
engine, too: an engine alone is often faster than eager PyTorch. On the smallest networks there is nothing to gain.

It takes half a minute on one core. Run it with ``python examples/04_deploy.py``.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console

from mnist import BATCH_SIZE, accuracy, load_data, trained_model
from tersor.deploy import CompiledModel, QuantizationSpeedup, engine_config, engines, side_by_side
from tersor.quantization import PtqQuantizer

OUTPUT = Path("runs/deploy")
CALIBRATION_IMAGES = 512


def main() -> None:
    """Deploy one network on every engine, and compare."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=CALIBRATION_IMAGES, help="calibrate on so many, at most 512")
    asked = arguments.parse_args()

    console = Console()
    data = load_data()
    x = data.example_input
    threads = torch.get_num_threads()  # as many for each
    original = trained_model()
    before = accuracy(original, data)
    console.print(f"Accuracy {before:.2%} as it was trained.")

    artefacts: dict[str, CompiledModel] = {}
    for name, engine in engines().items():
        if reason := engine.why_not():
            console.print(f"{engine.title} is left out: {reason}.")
            continue
        network, config_list = engine_config(original, x, name)
        batches = data.train.images[: min(asked.images, CALIBRATION_IMAGES)].split(BATCH_SIZE)
        quantizer = PtqQuantizer(network, config_list, calibration=batches)
        quantizer.compress()
        # Inductor's integer kernel misreads inputs of one channel, so it leaves the first of ten layers in fp32.
        options = {"max_batch": 1000} if name in ("executorch", "tensorrt") else {}  # they plan their memory ahead
        speedup = QuantizationSpeedup(
            quantizer, x, engine=name, float_model=original, min_coverage=0.9, options=options
        )
        compiled = speedup.compile()
        artefacts[name] = CompiledModel.load(compiled.save(OUTPUT / name), threads=threads)  # by the engine alone
        after = accuracy(artefacts[name], data)
        console.print(f"Accuracy {after:.2%} on {engine.title}.", compiled.report.table())
        if after < before - 0.005:
            raise SystemExit("The artefact has lost half a point or more.")

    sizes = (1, len(x))
    console.print(side_by_side(original, x, compressed=artefacts, batch_sizes=sizes, threads=threads, eager_only=True))


if __name__ == "__main__":
    main()
