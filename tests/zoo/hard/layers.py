"""Convolutions of every kind, gates, activations, and heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolutions2d(nn.Module):
    """Plain, depthwise, depthwise with a multiplier, and grouped with another number of channels going out."""

    dims = 2

    def __init__(self) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.dims - 1]
        self.stem = conv(3, 8, 3, padding=1)
        self.depthwise = conv(8, 8, 3, padding=1, groups=8)
        self.bn = norm(8)
        self.multiply = conv(8, 16, 3, stride=2, padding=1, groups=8)
        self.grouped = conv(16, 24, 3, padding=2, dilation=2, groups=4)
        self.head = conv(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + torch.relu(self.bn(self.depthwise(x)))
        return self.head(torch.relu(self.grouped(torch.relu(self.multiply(x)))))


class Convolutions1d(Convolutions2d):
    """The same over time."""

    dims = 1


class Convolutions3d(Convolutions2d):
    """The same over space and time."""

    dims = 3


class Transposed2d(nn.Module):
    """Transposed convolutions: their weight holds inputs first; plain, depthwise and grouped."""

    dims = 2

    def __init__(self) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.dims - 1]
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[self.dims - 1]
        self.stem = conv(3, 8, 3, stride=2, padding=1)
        self.up = transposed(8, 12, 2, stride=2)
        self.depthwise = transposed(12, 12, 3, padding=1, groups=12)
        self.grouped = transposed(12, 8, 3, stride=2, padding=1, output_padding=1, groups=4)
        self.skip = conv(3, 8, 1)
        self.head = conv(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.depthwise(torch.relu(self.up(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.grouped(y)[(..., *(slice(None, None, 2),) * self.dims)] + self.skip(x)))


class Transposed1d(Transposed2d):
    """The same over time."""

    dims = 1


class Transposed3d(Transposed2d):
    """The same over space and time."""

    dims = 3


class GroupedBottleneck(nn.Module):
    """ResNeXt's block: what is pruned before a grouped convolution need not fill its groups equally."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.conv1 = nn.Conv2d(12, 16, 1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 12, 1)
        self.bn3 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.relu(x + self.bn3(self.conv3(y))).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    """A gate whose sigmoid is not zero for a channel that is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.SiLU(), nn.Conv2d(4, 12, 1), nn.Hardsigmoid()
        )
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.conv(x)))
        return self.head(x * self.se(x))


class EfficientChannelAttention(nn.Module):
    """A convolution runs along the channels themselves, so that each depends on its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.across = nn.Conv1d(1, 1, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        gate = self.across(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return self.head(torch.relu(self.conv2(x * torch.sigmoid(gate))))


class SpatialAttention(nn.Module):
    """CBAM's map: mean and maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.spatial = nn.Conv2d(2, 1, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        gate = self.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1))
        return self.head(torch.relu(self.conv2(x * torch.sigmoid(gate))))


class PReLUs(nn.Module):
    """A slope for each channel, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.act1 = nn.PReLU(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.act2 = nn.PReLU()
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.conv2(self.act1(self.conv1(x)))))


class GatedLinear(nn.Module):
    """GLU: the first half of the channels is gated by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.glu = nn.GLU(dim=1)
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.fc(self.glu(self.conv(x)).mean((2, 3)))))


class ConcatenatedRelu(nn.Module):
    """Each channel appears twice, with either sign, before a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(self.bn(F.relu(torch.cat([x, -x], 1))))


class SoftChannels(nn.Module):
    """A softmax over the channels in the middle of the network: what is left must not be renormalized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(self.conv1(x).softmax(1))))


class PaddedBias(nn.Module):
    """A removed channel carries its bias, which zero padding of the consumer turns into a border."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 5, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.sigmoid(self.conv2(F.elu(self.conv1(x)))))


class OneLogit(nn.Module):
    """A head with a single output, whose dimension is squeezed away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))).squeeze(-1)


CASES: dict[type[nn.Module], tuple[int, ...]] = {
    **dict.fromkeys((Convolutions1d, Transposed1d), (3, 16)),
    **dict.fromkeys((Convolutions2d, Transposed2d), (3, 8, 8)),
    **dict.fromkeys((Convolutions3d, Transposed3d), (3, 6, 6, 6)),
    **dict.fromkeys(
        (
            GroupedBottleneck,
            SqueezeExcitation,
            EfficientChannelAttention,
            SpatialAttention,
            PReLUs,
            GatedLinear,
            ConcatenatedRelu,
            SoftChannels,
            PaddedBias,
            OneLogit,
        ),
        (3, 8, 8),
    ),
}
