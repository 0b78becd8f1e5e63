"""Values that move: views, windows, shuffles, flattening, and sizes that stand in the code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SteppedSlices(nn.Module):
    """Even and odd channels are added: strided views tie each channel to its neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(x[:, ::2] + x[:, 1::2])


class AsStrided(nn.Module):
    """Overlapping frames are cut out of a signal by its strides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        batch, channel, time = x.stride()
        frames = x.as_strided((*x.shape[:2], 4, 6), (batch, channel, 3 * time, time))
        return self.head(frames)


class WindowPartition(nn.Module):
    """Windows of a feature map are mixed by a layer and put back, in the layout of Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Linear(8, 12)
        self.reduce = nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        batch, height, width, channels = x.shape
        windows = x.view(batch, height // 4, 4, width // 4, 4, channels).transpose(2, 3).reshape(-1, 16, channels)
        windows = self.reduce(F.gelu(self.expand(windows)))
        windows = windows.view(batch, height // 4, width // 4, 4, 4, channels).transpose(2, 3)
        return self.head(x + windows.reshape(batch, height, width, channels))


class ShiftedMap(nn.Module):
    """A map is rolled, flipped and padded in space, which leaves channels where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x)).roll((1, -2), (2, 3)).flip(3)
        return self.head(torch.relu(self.conv2(F.pad(x, (1, 1, 1, 1), mode="reflect"))))


class ChannelShuffle(nn.Module):
    """Grouped convolutions with ShuffleNet's shuffle between them: groups and positions must stay rectangular."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.groups = groups
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 16, 1, groups=groups)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.conv2 = nn.Conv2d(16, 16, 1, groups=groups)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.conv1(x))
        batch, channels, height, width = y.shape
        y = y.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        y = self.depthwise(y.reshape(batch, channels, height, width))
        return self.head(torch.relu(x + self.conv2(y)))


class IndexedChannels(nn.Module):
    """Channels are put into another order by an index that is a buffer."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("order", torch.tensor([3, 1, 4, 0, 5, 7, 2, 6]))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        return self.head(x + self.depthwise(x[:, self.order]))


class PixelShuffles(nn.Module):
    """Blocks of channels become space and space becomes blocks of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.PixelShuffle(2)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.down = nn.PixelUnshuffle(2)
        self.head = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.conv2(self.up(torch.relu(self.conv1(x)))))))


class FocusSlices(nn.Module):
    """YOLO's Focus on a hidden map: four shifted halves of the resolution are joined along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.focus = nn.Conv2d(24, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return self.head(torch.relu(self.focus(x)))


class UnfoldedPatches(nn.Module):
    """A convolution by hand: patches are unfolded, multiplied by a linear layer and folded back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.linear = nn.Linear(54, 8)
        self.back = nn.Linear(8, 24)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(torch.relu(self.conv(x)), 3, padding=1).transpose(1, 2)
        tokens = torch.relu(self.linear(patches)).transpose(1, 2).unflatten(2, x.shape[2:])
        tokens = self.back(tokens[:, :, ::2, ::2].flatten(2).transpose(1, 2))
        return self.head(F.fold(tokens.transpose(1, 2), tuple(x.shape[2:]), 2, stride=2))


class FlattenedMap(nn.Module):
    """VGG's head: a pooled map is flattened, so that each channel is a block of the linear layer's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


class LiteralView(nn.Module):
    """The flattened size stands in the code as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(32, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), 2)
        return self.fc2(torch.relu(self.fc1(x.view(-1, 8 * 2 * 2))))


class LiteralReshapes(nn.Module):
    """Numbers on both sides: a vector becomes a map and a map becomes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 128)
        self.conv = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, z: Tensor) -> Tensor:
        x = torch.relu(self.fc(z)).reshape(-1, 8, 4, 4)
        return self.head(torch.relu(self.conv(x)).reshape(-1, 6, 64).transpose(1, 2))


class Maxout(nn.Module):
    """Pairs of neighbouring channels compete."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).unflatten(1, (-1, 2)).amax(2))


CASES: dict[type[nn.Module], tuple[int, ...]] = {
    **dict.fromkeys(
        (
            SteppedSlices,
            WindowPartition,
            ShiftedMap,
            ChannelShuffle,
            IndexedChannels,
            PixelShuffles,
            FocusSlices,
            UnfoldedPatches,
            FlattenedMap,
            Maxout,
        ),
        (3, 8, 8),
    ),
    AsStrided: (2, 16),
    LiteralView: (1, 14, 14),
    LiteralReshapes: (7,),
}
