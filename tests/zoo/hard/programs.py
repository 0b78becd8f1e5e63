"""What Python lets a model do with its arguments, its results, its layers and its sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass
class Prediction:
    """What :class:`DictToDataclass` returns."""

    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class DictToDataclass(nn.Module):
    """One dict goes in, with a tensor that is not read; a dataclass with a missing field comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, batch: dict[str, Tensor]) -> Prediction:
        hidden = torch.relu(self.fc((self.conv(batch["image"]) * batch["mask"]).mean((2, 3))))
        return Prediction(self.head(hidden), hidden)


class Pair(NamedTuple):
    """What :class:`KeywordOnly` returns."""

    mean: Tensor
    scale: Tensor


class KeywordOnly(nn.Module):
    """Keyword-only arguments with a default, layers called by keyword, and a named tuple as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.mean = nn.Linear(8, 5)
        self.scale = nn.Linear(8, 5)

    def forward(self, *, x: Tensor, gain: Tensor, shift: Tensor | None = None, power: int = 2) -> Pair:
        hidden = torch.relu(self.fc(input=x)) * gain
        hidden = hidden if shift is None else hidden + shift
        return Pair(mean=self.mean(hidden), scale=F.softplus(input=self.scale(input=hidden)) ** power)


class ListInput(nn.Module):
    """A list of maps of several resolutions, each with its own layer, as a detection head takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (3, 4))
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.boxes = nn.Conv2d(8, 4, 1)
        self.scores = nn.Conv2d(8, 1, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        towers = [self.tower(torch.relu(layer(x))) for layer, x in zip(self.enter, maps, strict=True)]
        scores = torch.cat([self.scores(x).flatten(1) for x in towers], 1)
        return [self.boxes(x) for x in towers], {"scores": scores}


class ShapeBranch(nn.Module):
    """Branches on shapes, types, flags and a dictionary of functions; an assertion and an f-string of sizes."""

    def __init__(self, act: str = "gelu") -> None:
        super().__init__()
        self.act = {"relu": F.relu, "gelu": F.gelu}[act]
        self.depth = 2
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(self.depth))
        self.project = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        assert x.shape[1] == 3, f"{tuple(x.shape)} is no batch of images"
        x = self.conv(x if scale is None else x * scale)
        for index in range(self.depth):
            y = self.act(self.layers[index](x))
            x = x + y if x.shape == y.shape else y
        if x.size(1) != self.head.in_features:
            x = self.project(x)
        while x.shape[-1] > 3:
            x = F.avg_pool2d(x, 2)
        return self.head(x.flatten(2).mean(-1) if isinstance(x, Tensor) and not self.training else x.mean((2, 3)))


class IntermediateFeatures(nn.Module):
    """The results are maps from within, in an ordered dict; the layers after the last one are not used."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict(
            {
                "stem": nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
                "layer1": nn.Conv2d(6, 8, 3, stride=2, padding=1),
                "layer2": nn.Conv2d(8, 10, 3, stride=2, padding=1),
                "layer3": nn.Conv2d(10, 12, 3, padding=1),
            }
        )
        self.returned = {"layer1": "low", "layer2": "high"}

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        features: OrderedDict[str, Tensor] = OrderedDict()
        for name, layer in self.body.items():
            x = torch.relu(layer(x))
            if name in self.returned:
                features[self.returned[name]] = x
            if len(features) == len(self.returned):
                break
        return features


class NestedContainers(nn.Module):
    """Layers in lists in dicts in sequences, identities between them, and two of them in a plain list besides."""

    def __init__(self) -> None:
        super().__init__()
        block = OrderedDict(conv=nn.Conv2d(8, 8, 1), norm=nn.Identity(), act=nn.Hardswish(), drop=nn.Dropout(0.1))
        self.stages = nn.ModuleDict(
            {
                "first": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Identity(), nn.Sequential()),
                "second": nn.ModuleList([nn.Sequential(block), nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])]),
            }
        )
        self.shortcut = nn.Identity()
        self.head = nn.Sequential(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Sequential(nn.Linear(8, 5)))
        self.order = [self.stages["second"][0], self.stages["second"][1][0]]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages["first"](x)
        for layer in self.order:
            x = self.shortcut(x) + layer(x)
        return self.head(x)


class NeverUsed(nn.Module):
    """A layer that is never called, one whose result is dropped, and one that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.unused = nn.Conv2d(8, 8, 1)
        self.dropped = nn.Conv2d(8, 6, 1)
        self.auxiliary = nn.Linear(8, 5)
        self.missing = None
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.conv(x))
        self.dropped(x)
        x = x.mean((2, 3))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


class SizeArithmetic(nn.Module):
    """Sizes are multiplied, divided, compared and built into new tensors, and are the last use of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        batch, channels, height, width = y.size()
        tokens = y.view(batch, channels, height * width).transpose(1, 2)
        grid = torch.linspace(0, 1, height * width).view(1, -1, 1).expand(batch, -1, channels)
        tokens = self.fc(tokens * (1 + grid) * (height // 2))
        other = self.conv(x * 2)
        return self.head(tokens.sum(1) / (other.numel() / other.size(0) / other.shape[1]))


class ScaledByWidth(nn.Module):
    """The number of channels is a number in the computation: a small model must go on computing with the old one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fc1(x))
        x = self.fc2(x * x.shape[-1] ** -0.5)
        return self.head(torch.tanh(x / x.size(1)))


class DerivedWidths(nn.Module):
    """Widths are integers of the module, some derived from others; layers of several blocks read them."""

    def __init__(self, width: int = 8, expansion: float = 1.5) -> None:
        super().__init__()
        self.in_planes = width
        self.hidden = int(width * expansion)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.expand = nn.Conv2d(width, 2 * self.hidden, 1)
        self.fc = nn.Linear(self.hidden * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.expand(x)
        y = torch.relu(y[:, : self.hidden]) * torch.sigmoid(y[:, self.hidden :])
        return self.fc(F.adaptive_avg_pool2d(y, 2).view(x.size(0), self.hidden * 4))


class Recomputed(nn.Module):
    """Blocks under activation checkpointing, with hooks that change what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 5)
        self.enter.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Any:
        x = self.enter(x)
        return self.head(x + checkpoint(self.block, x, use_reentrant=False))


class RecursiveTree(nn.Module):
    """A module that contains modules of its own class, which call each other by methods other than forward."""

    def __init__(self, depth: int = 2, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.children_ = nn.ModuleList(RecursiveTree(depth - 1, width) for _ in range(2 if depth else 0))
        self.join = nn.Conv2d(2 * width, width, 1) if depth else nn.Identity()

    def grow(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.join(torch.cat([child.grow(x) for child in self.children_], 1)) if self.children_ else x

    def forward(self, x: Tensor) -> Tensor:
        return self.grow(x)


class Siamese(nn.Module):
    """One encoder for two inputs, whose results are compared: a distance over the features is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.encoder(left), self.encoder(right)
        return F.cosine_similarity(a, b), (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).norm(dim=-1)


class ComplexSpectrum(nn.Module):
    """A Fourier transform over time, a complex parameter along the channels, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(2, 8, 3, padding=1)
        self.filter = nn.Parameter(torch.randn(8, 5, 2))
        self.head = nn.Conv1d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.enter(x))
        spectrum = torch.fft.rfft(x, dim=-1) * torch.view_as_complex(self.filter)
        return self.head(x + torch.fft.irfft(spectrum, n=x.shape[-1], dim=-1))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))


def image_and_mask() -> tuple[dict[str, Tensor]]:
    return ({"image": draw(3, 8, 8), "mask": draw(1, 8, 8, seed=1), "index": torch.arange(2)},)


IMAGE = (3, 8, 8)
CASES: dict[type[nn.Module], tuple[int, ...] | tuple[tuple[int, ...], ...] | Callable[[], Any]] = {
    **dict.fromkeys((ShapeBranch, IntermediateFeatures, NestedContainers, NeverUsed, SizeArithmetic), IMAGE),
    DerivedWidths: IMAGE,
    ScaledByWidth: (6,),
    Recomputed: (6,),
    RecursiveTree: (8, 6, 6),
    Siamese: ((6,), (6,)),
    ComplexSpectrum: (2, 8),
    DictToDataclass: image_and_mask,
    KeywordOnly: lambda: {"x": draw(4, 6), "gain": draw(4, 1)},
    ListInput: lambda: ([draw(3, 8, 8), draw(4, 4, 4)],),
}
