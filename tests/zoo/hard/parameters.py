"""Norms, and parameters and buffers that are shared, bare, or computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class Normalized(nn.Module):
    """Two convolutions around the norm that a subclass names."""

    norm: nn.Module

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.norm(self.conv1(x))))))


class GroupNormalized(Normalized):
    """Statistics over groups of channels: whole groups, or as many of each, may go."""

    def __init__(self) -> None:
        super().__init__(nn.GroupNorm(4, 8))


class InstanceNormalized(Normalized):
    """Statistics of each channel alone, with parameters and running statistics."""

    def __init__(self) -> None:
        super().__init__(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))


class LocallyNormalized(Normalized):
    """Local response normalization: each channel is divided by its neighbours."""

    def __init__(self) -> None:
        super().__init__(nn.LocalResponseNorm(3))


class SpatiallyNormalized(Normalized):
    """A layer norm over channels and space at once, with a parameter for each position."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm((8, 8, 8)))


class NormalizedTokens(nn.Module):
    """Layer norm and RMS norm hold the width of the stream; the layers between them are free."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.norm1 = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 8)
        self.norm2 = nn.RMSNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.fc2(torch.tanh(self.fc1(self.norm1(x))))
        return self.head(self.norm2(x))


class NormalizedByHand(nn.Module):
    """An RMS norm and a layer norm that are written out in elementary operators."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.fc2 = nn.Linear(8, 10)
        self.fc3 = nn.Linear(10, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = self.fc3(torch.tanh(self.fc2(x)))
        return self.head((x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt())


class LayerScale(nn.Module):
    """ConvNeXt's block: channels last, a norm over them, and a scale that is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.dwconv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.pwconv1 = nn.Linear(8, 16)
        self.pwconv2 = nn.Linear(16, 8)
        self.gamma = nn.Parameter(torch.full((8,), 0.5))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class ReusedNorm(nn.Module):
    """One batch norm and one activation behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.bn(self.conv2(self.act(self.bn(self.conv1(x)))))))


class SharedLayer(nn.Module):
    """A layer that is called three times, on its own result among others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.other = nn.Conv2d(3, 8, 1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.shared(torch.relu(self.shared(torch.relu(self.stem(x))))))
        return self.head(y * torch.sigmoid(self.shared(self.other(x))))


class BareParameters(nn.Module):
    """A scale and a shift that no layer owns, and a token that is put before the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(1, 8, 1))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 17, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.scale * self.conv(x)).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(torch.relu(x))


class ChannelBuffers(nn.Module):
    """Statistics along the channels that are buffers, one of them not saved."""

    mean: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("mean", torch.randn(8, 1, 1))
        self.register_buffer("mask", torch.arange(8.0).view(1, 8, 1, 1) % 3, persistent=False)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x) - self.mean) * self.mask)


class FunctionalWeights(nn.Module):
    """Parameters are given to functions; there is no layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.b1 = nn.Parameter(torch.randn(8))
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.w2 = nn.Parameter(torch.randn(5, 8))
        self.b2 = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w1, self.b1, padding=1)
        x = F.batch_norm(x, None, None, self.gain, self.b1, training=True)
        return F.relu(x).mean((2, 3)) @ self.w2.T + self.b2


class StandardizedConv(nn.Conv2d):
    """Weight standardization: a subclass that computes with another weight than it holds."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (spread + 1e-5), self.bias)


class StandardizedWeights(nn.Module):
    """The statistics of each filter hold its inputs; its outputs are free."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = StandardizedConv(3, 8, 3, padding=1)
        self.conv2 = StandardizedConv(8, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))))


class WeightNormalized(nn.Module):
    """Weights that are computed from a direction and a length by a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = weight_norm(nn.Conv1d(3, 8, 3, padding=1))
        self.conv2 = weight_norm(nn.Conv1d(8, 6, 3, padding=1))
        self.head = nn.Conv1d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.relu(self.conv1(x)))))


class BilinearForms(nn.Module):
    """A parameter with two dimensions of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(6, 10)
        self.bilinear = nn.Bilinear(8, 10, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bilinear(torch.relu(self.left(x)), torch.tanh(self.right(x)))))


CASES: dict[type[nn.Module], tuple[int, ...]] = {
    **dict.fromkeys(
        (GroupNormalized, InstanceNormalized, LocallyNormalized, SpatiallyNormalized, LayerScale), (3, 8, 8)
    ),
    **dict.fromkeys((ReusedNorm, SharedLayer, ChannelBuffers, FunctionalWeights, StandardizedWeights), (3, 8, 8)),
    **dict.fromkeys((BareParameters, WeightNormalized), (3, 16)),
    **dict.fromkeys((NormalizedTokens, NormalizedByHand), (4, 6)),
    BilinearForms: (6,),
}
