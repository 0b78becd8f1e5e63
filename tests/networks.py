"""Small networks, one for each way in which layers depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Plain(nn.Sequential):
    """Convolutions, batch norm and a classifier behind a flatten: 3 -> 8 -> 6 -> (6 * 4 * 4) -> 5."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(96, 7),
            nn.Sigmoid(),
            nn.Linear(7, 5),
        )


class Residual(nn.Module):
    """Two blocks on one stream of 8 channels; the second widens to 12 through a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 10, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, padding=1)
        self.project = nn.Conv2d(8, 12, 1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        x = torch.relu(self.conv3(x) + self.project(x))
        return self.fc(x.mean((2, 3)))


class Dense(nn.Module):
    """Each layer reads all earlier ones, joined along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(10, 5, 3, padding=1)
        self.last = nn.BatchNorm2d(15)
        self.fc = nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv0(x)
        b = self.conv1(torch.relu(self.norm(a)))
        c = self.conv2(torch.cat([a, b], 1))
        return self.fc(torch.relu(self.last(torch.cat([a, b, c], 1))).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and grouped convolutions and a squeeze-excitation gate, whose sigmoid is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.bn = nn.BatchNorm2d(12)
        self.squeeze = nn.Conv2d(12, 4, 1)
        self.excite = nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.bn(self.depthwise(self.expand(x))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.project(x * gate)
        return self.head(torch.relu(self.grouped(x)))


class Upsampling(nn.Module):
    """Down, up through a transposed convolution, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.skip = nn.Conv2d(3, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(torch.relu(self.down(x))) + self.skip(x)))


class Tokens(nn.Module):
    """Linear layers over tokens, an embedding, and a layer norm that holds its width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fc1 = nn.Linear(6, 10)
        self.fc2 = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.out(self.norm(x + self.fc2(nn.functional.gelu(self.fc1(x)))))


class LiteralView(nn.Module):
    """A size that stands in the code as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(128, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 4)
        return self.fc(x.view(-1, 128))


IMAGE = (2, 3, 8, 8)
IMAGE_NETWORKS = (Plain, Residual, Dense, Separable, Upsampling)


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and statistic, so that no shift is zero by accident; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()
