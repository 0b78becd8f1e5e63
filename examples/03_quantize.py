"""Quantization: 8 bits by calibration alone, 4 bits by a short training, and what each costs in accuracy.

In the network of the quickstart, whatever multiplies or adds comes to read numbers of few bits. Functions become
modules first, so that sums have names too; each convolution is fused with its batch norm and its activation, as a
deployed kernel will have it. With 8 bits some hundred images are enough, and nothing is trained. With fewer, one more
epoch is trained with rounded values. On this network 4 bits cost less than 0.1 points either way; with ``--bits 2``
calibration alone leaves 32 %, and the training comes back to 96 %. Last, weights and calibration are saved and loaded
again, and give the same outputs to the bit.

All of this is simulated: values are rounded, but multiplied as floats. It shows what is lost, not how fast it will be.
The sizes are those that the parameters would take.

It takes about a minute on one core; ``--images 5000`` is a quick look. Run it with ``python examples/03_quantize.py``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from mnist import BATCH_SIZE, Batches, Data, accuracy, build_model, load_data, trained_model
from tersor.graph import functions_as_modules
from tersor.quantization import CalibrationConfig, PtqQuantizer, QATQuantizer, auto_fuse
from tersor.storage import load_calibration, save_calibration

OUTPUT = Path("runs/quantize")
CALIBRATION_IMAGES = 512
LEARNING_RATE = 0.002  # a tenth of that of the training


def config_list(model: nn.Module, example_input: Tensor, bits: int) -> list[dict[str, Any]]:
    """Weights and inputs of all layers, and what is added up; 8 bits for the first and the last layer, and for sums."""
    layers = {
        "target_names": ["weight", "_input_0"],
        # An input that a ReLU has left without negative values would use but half of a symmetric grid.
        "target_settings": {"_input_0": {"quant_scheme": "affine"}},
    }
    fused = auto_fuse(model, example_input)
    return [
        {"op_types": ["Conv2d", "Linear"], "quant_dtype": f"int{bits}", "fuse_names": fused, **layers},
        {"op_types": ["Add"], "quant_dtype": "int8", "target_names": ["_input_0", "_input_1"]},
        {"op_names": ["stem.0", "head.2"], "quant_dtype": "int8", **layers},  # later entries override earlier ones
    ]


def with_names(model: nn.Module, example_input: Tensor) -> nn.Module:
    """The same layers and parameters, in a network whose functions are modules; in eval mode."""
    return functions_as_modules(model, example_input).eval()


def calibrate(model: nn.Module, data: Data, bits: int) -> PtqQuantizer:
    """Quantize by what a few batches show."""
    batches = data.train.images[:CALIBRATION_IMAGES].split(BATCH_SIZE)
    quantizer = PtqQuantizer(model, config_list(model, data.example_input, bits), calibration=batches)
    quantizer.compress()
    return quantizer


def train(model: nn.Module, data: Data, bits: int, epochs: int) -> QATQuantizer:
    """Quantize while the network is fine-tuned."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    evaluator = tersor.TorchEvaluator.from_loader(
        data.train,
        F.cross_entropy,
        optimizer,
        torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * len(data.train) + 1),
        scheduler_interval="step",
    )
    quantizer = QATQuantizer(model, config_list(model, data.example_input, bits), evaluator)
    quantizer.compress(max_epochs=epochs)
    return quantizer


def stored_bytes(model: nn.Module, calibration: CalibrationConfig) -> float:
    """What the parameters take: 4 bytes each, but for those that are quantized, which have a scale a channel, too."""
    total = 0.0
    for name, parameter in model.named_parameters():
        module, _, target = name.rpartition(".")
        own = calibration.get(module, {}).get(target)
        total += parameter.numel() * 4 if own is None else parameter.numel() * own["quant_bits"] / 8
        total += 0 if own is None else own["scale"].numel() * 4
    return total


def add_row(table: Table, name: str, reached: float, size: float) -> None:
    """One way of quantizing."""
    table.add_row(name, f"{reached:.2%}", f"{size / 1000:.0f} kB")


def main() -> None:
    """Quantize one network in three ways, compare, save and load again."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=60_000, help="train on so many")
    arguments.add_argument("--epochs", type=int, default=1, help="of training with few bits")
    arguments.add_argument("--bits", type=int, default=4, help="how few: 2 to 8")
    asked = arguments.parse_args()

    console = Console()
    data = load_data()
    x = data.example_input
    data.train = Batches(
        data.train.images[: asked.images], data.train.labels[: asked.images], BATCH_SIZE, shuffled=True
    )
    table = Table("", "accuracy", "parameters take", title="Residual network on MNIST")
    original = trained_model()
    add_row(table, "as it was trained", accuracy(original, data), stored_bytes(original, {}))
    network = with_names(original, x)
    console.print(tersor.plan(network, config_list(network, x, asked.bits), "quantization"))

    for name, quantize in {
        "8 bits, calibrated": lambda network: calibrate(network, data, bits=8),
        f"{asked.bits} bits, calibrated": lambda network: calibrate(network, data, asked.bits),
        f"{asked.bits} bits, trained": lambda network: train(network, data, asked.bits, asked.epochs),
    }.items():
        console.rule(name)
        torch.manual_seed(0)
        model = trained_model()
        network = with_names(model, x)
        quantizer = quantize(network)
        reached, outputs = accuracy(network, data), network(x)
        calibration = quantizer.get_calibration_config()
        quantizer.unwrap_model()  # the network and the model share their layers
        add_row(table, name, reached, stored_bytes(model, calibration))
    console.print(table)

    console.rule("Save, and load again")
    tersor.save(model, OUTPUT / "model")
    save_calibration(calibration, OUTPUT / "calibration.safetensors")
    network = with_names(tersor.load(build_model, OUTPUT / "model"), x)
    quantizer = PtqQuantizer(network, config_list(network, x, asked.bits))  # whichever quantizer found the scales
    quantizer.update_calibration_config(load_calibration(OUTPUT / "calibration.safetensors"))
    if not torch.equal(network(x), outputs):
        raise SystemExit("The outputs as loaded again are others.")
    console.print(f"{OUTPUT} holds the weights and the calibration; as loaded again, all outputs are equal.")


if __name__ == "__main__":
    main()
