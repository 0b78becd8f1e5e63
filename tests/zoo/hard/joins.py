"""Values that part and meet: chunks, splits, slices, concatenations, shortcuts and pyramids."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitShuffle(nn.Module):
    """ShuffleNet V2's block: one half of the channels passes by, both are joined and interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for _ in range(2):
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, self.branch(right)), dim=1)
            x = x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(x)


class CrossStage(nn.Module):
    """YOLO's C2f: chunk, a chain of bottlenecks with shortcuts, and a join of everything that was made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1 = nn.Conv2d(3, 16, 1)
        self.m = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.cv2 = nn.Conv2d(32, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(F.silu(self.cv1(x)).chunk(2, 1))
        parts.extend(parts[-1] + F.silu(layer(parts[-1])) for layer in self.m)
        parts = [parts[0], parts[1], parts[2], parts[3]]
        return self.head(F.silu(self.cv2(torch.cat(parts, 1))))


class UnequalSplit(nn.Module):
    """Sizes of parts stand in the code as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.left = nn.Conv2d(6, 8, 1)
        self.right = nn.Conv2d(10, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(torch.relu(self.conv(x)), [6, 10], dim=1)
        return self.head(self.left(left) * torch.sigmoid(self.right(right)))


class LiteralSlices(nn.Module):
    """Channels are taken by numbers in the code, a part of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.first = nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(torch.cat([self.first(x[:, :8]), self.last(x.narrow(1, 4, 8))], 1))


class RepeatedChannels(nn.Module):
    """Each channel is read more than once: repeated, interleaved and expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        pooled = y.mean((2, 3), keepdim=True).expand_as(y)
        return self.head(self.wide(x) + y.repeat(1, 2, 1, 1) * pooled.repeat_interleave(2, 1))


class PaddedShortcut(nn.Module):
    """The parameter-free shortcut of ResNet for CIFAR: zeros are put around the channels, with literal counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(torch.relu(shortcut + self.bn(self.conv2(x))))


class DenseConcatenation(nn.Module):
    """DenseNet's block: a residual stream that grows by concatenation, with a batch norm over the join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3, padding=1)) for width in (8, 12, 16)
        )
        self.mix = nn.Conv2d(20, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(torch.relu(first + self.mix(x)))


class StackedBranches(nn.Module):
    """Selective kernels: branches are stacked in a new dimension and weighted by a softmax over it."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, 8, size, padding=size // 2) for size in (1, 3))
        self.squeeze = nn.Linear(8, 6)
        self.select = nn.Linear(6, 16)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        stack = torch.stack([torch.relu(branch(x)) for branch in self.branches], dim=1)
        weight = self.select(torch.relu(self.squeeze(stack.sum(1).mean((2, 3))))).view(len(x), 2, -1, 1, 1)
        return self.head((stack * weight.softmax(1)).sum(1))


class InPlaceWrites(nn.Module):
    """The result is allocated first and written part by part."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 10, 3, padding=1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x).relu_(), self.right(x).relu_()
        joined = x.new_zeros(len(x), left.shape[1] + right.shape[1], *x.shape[2:])
        joined[:, : left.shape[1]] = left
        joined[:, left.shape[1] :] = right
        joined *= 0.5
        return self.head(joined)


class FeaturePyramid(nn.Module):
    """A top-down path: laterals, nearest upsampling to the size of another map, and a sum at each level."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((3, 6), (6, 8), (8, 12)))
        self.lateral = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (6, 8, 12))
        self.smooth = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.down:
            x = torch.relu(layer(x))
            maps.append(x)
        levels = [layer(x) for layer, x in zip(self.lateral, maps, strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
        return [layer(x) for layer, x in zip(self.smooth, levels, strict=True)]


class UNet(nn.Module):
    """Down, up through bilinear upsampling and a transposed convolution, and joins with earlier maps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 10, 3, padding=1)
        self.up = nn.ConvTranspose2d(10, 8, 2, stride=2)
        self.merge = nn.Conv2d(16, 6, 3, padding=1)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.enter(x))
        b = torch.relu(self.down(F.max_pool2d(a, 2)))
        c = torch.relu(self.deep(F.avg_pool2d(b, 2)))
        b = torch.relu(self.merge(torch.cat([b, self.up(c)], 1)))
        b = F.interpolate(b, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(torch.cat([a, b], 1))


CASES = dict.fromkeys(
    (
        SplitShuffle,
        CrossStage,
        UnequalSplit,
        LiteralSlices,
        RepeatedChannels,
        PaddedShortcut,
        DenseConcatenation,
        StackedBranches,
        InPlaceWrites,
        FeaturePyramid,
        UNet,
    ),
    (3, 8, 8),
)
