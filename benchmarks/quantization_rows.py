"""What ``benchmarks.quantization`` compares; a quantizer of Tersor gets a row there by a line in `QUANTIZERS`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.mnist import Batches

Classify = Callable[[Tensor], Tensor]
"""From images to logits."""


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network to quantize, and the data that a quantizer may look at.

    Attributes:
        model: the network.
        ends: its first and its last layer.
        calibration: the images for calibration.
        batch_size: how many of them at a time.
        seed: of what is random.
        train: the images to train on; None where there are none.
        learning_rate: of that training, at its highest.
    """

    model: nn.Module
    ends: tuple[str, str]
    calibration: Tensor
    batch_size: int
    seed: int
    train: Batches | None = None
    learning_rate: float = 0.0

    @property
    def steps(self) -> int:
        """How long the training is."""
        return 0 if self.train is None else len(self.train)

    def copy(self) -> nn.Module:
        """A copy of the network; also starts the random numbers of the seed."""
        torch.manual_seed(self.seed)
        return copy.deepcopy(self.model)

    def batches(self) -> list[Tensor]:
        """The images for calibration, in batches."""
        return list(self.calibration.split(self.batch_size))

    def training(self) -> Batches:
        """The batches to train on, in the order of the seed.

        Raises:
            ValueError: there are none.
        """
        if self.train is None:
            raise ValueError("there is nothing to train this network on")
        torch.manual_seed(self.seed)
        return self.train


@dataclass(frozen=True)
class Bits:
    """How many bits weights and inputs of the layers between the first and the last have."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"{self.weights}/{self.activations}"


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        quantize: returns the quantized network in eval mode, or what computes as it does.
        says: what was run, for the reader of the results.
        bits: of the layers between; the first and the last have 8. None for a network that is not quantized.
        trains: it fine-tunes the weights on training images; else the images for calibration are all that it sees.
    """

    quantize: Callable[[Task], Classify]
    says: str
    bits: Bits | None
    trains: bool


def optimizer_of(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """The same for all rows that train."""
    return torch.optim.AdamW(model.parameters(), task.learning_rate)


def schedule_of(optimizer: torch.optim.Optimizer, task: Task) -> torch.optim.lr_scheduler.OneCycleLR:
    """One cycle, the same for all rows that train."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, task.learning_rate, total_steps=task.steps + 1)


def norms(model: nn.Module) -> list[tuple[str, str]]:
    """Convolutions with their batch norms, which stand right behind them in the networks here.

    >>> norms(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3)))
    [('0', '1')]
    """
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, _NEIGHBOURS)]
    return [
        (name, behind)
        for (name, module), (behind, norm) in pairwise(modules)
        if isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    ]


_NEIGHBOURS = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Linear)


def _float(task: Task) -> Classify:
    return task.copy().eval()


def _tuned(task: Task) -> Classify:
    """Fine-tuned as the rows that train are, but not quantized."""
    model = task.copy().train()
    optimizer = optimizer_of(model, task)
    schedule = schedule_of(optimizer, task)
    for images, labels in task.training():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


QUANTIZERS: dict[str, Method] = {
    "fp32": Method(_float, "the network as it was trained", None, trains=False),
    "fp32, fine-tuned": Method(_tuned, "fine-tuned as the rows that train, without quantization", None, trains=True),
}
