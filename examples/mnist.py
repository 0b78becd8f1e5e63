"""What the examples compress: a small residual network and MNIST, written as if Tersor did not exist."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pureml.datasets import MnistDataset
from torch import Tensor, nn
from torch.nn import functional as F

import tersor

LEARNING_RATE = 0.02
BATCH_SIZE = 256


class Residual(nn.Module):
    """Two convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images of ``inputs`` channels to images of ``outputs`` channels, smaller by the stride."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def build_model() -> nn.Module:
    """A residual network of 16, 32 and 64 channels for images of 1x28x28 and ten classes; 2.6 million MACs an image."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            stage1=Residual(16, 16),
            stage2=Residual(16, 32, stride=2),
            stage3=Residual(32, 64, stride=2),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
    )


@dataclass
class Batches:
    """A data loader over tensors that fit in memory: slicing them is much faster than collating single images."""

    images: Tensor
    labels: Tensor
    batch_size: int
    shuffled: bool

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels)) if self.shuffled else torch.arange(len(self.labels))
        for indices in order.split(self.batch_size):
            yield self.images[indices], self.labels[indices]


@dataclass
class Data:
    """Loaders of the 60,000 images for training and the 10,000 for testing, and an input to try a model on."""

    train: Batches
    test: Batches
    example_input: Tensor


def load_data() -> Data:
    """MNIST, from the package that carries it, with zero mean and unit variance."""

    def load(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
        with MnistDataset(split) as dataset:
            images = torch.as_tensor(dataset.X, dtype=torch.float32).unsqueeze(1) / 255
            return (images - 0.1307) / 0.3081, torch.as_tensor(dataset.y, dtype=torch.long)

    train, test = load("train"), load("test")
    return Data(Batches(*train, BATCH_SIZE, shuffled=True), Batches(*test, 1000, shuffled=False), test[0][:64])


def train(model: nn.Module, data: Data, epochs: int) -> None:
    """Train with AdamW and one cycle of the learning rate; the same serves to train and to fine-tune."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * len(data.train))
    model.train()
    for _ in range(epochs):
        for images, labels in data.train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(classify: Callable[[Tensor], Tensor], data: Data) -> float:
    """The share of the test images that a model in eval mode, or another function, classifies correctly."""
    hits = sum((classify(images).argmax(dim=1) == labels).sum().item() for images, labels in data.test)
    return hits / len(data.test.labels)


def trained_model(cache_dir: str | Path = "runs/mnist") -> nn.Module:
    """The network after two epochs: trained by the first call, then read from the checkpoint in ``cache_dir``."""
    if Path(cache_dir).exists():
        return tersor.load(build_model, cache_dir).eval()
    torch.manual_seed(0)
    model, data = build_model(), load_data()
    train(model, data, epochs=2)
    tersor.save(model, cache_dir, metadata={"accuracy": accuracy(model, data)})
    return model
