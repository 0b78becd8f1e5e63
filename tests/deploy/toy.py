"""A model and data that deployments in tests name: two convolutions, of which every engine has kernels in int8."""

from types import SimpleNamespace

import torch
from torch import nn


class TwoConvolutions(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x):
        return self.conv2(torch.relu(self.bn1(self.conv1(x)))).mean((2, 3))


def net():
    torch.manual_seed(0)
    model = TwoConvolutions()
    # A norm that does something, so that folding it changes weights.
    with torch.no_grad():
        model.bn1.running_var.uniform_(0.02, 0.05)
        model.bn1.running_mean.normal_(0, 0.1)
    return model


def data():
    x = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = net().eval()(x).argmax(1)  # so that its accuracy is 1
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return SimpleNamespace(train=batches[:2], test=batches[2:])


def failing_data():
    raise FileNotFoundError("pictures.npz")


def empty_data():
    return SimpleNamespace(train=[], test=None)


class Attention(nn.Module):
    """Two products with a weight, and two of two values."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 8)

    def forward(self, x):
        scores = torch.matmul(self.query(x), x.transpose(1, 2)).softmax(-1)
        return torch.matmul(scores, self.value(x))
