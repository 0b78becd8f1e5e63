"""A model and data that recipes in tests name: small enough to train in a blink."""

from types import SimpleNamespace

import torch
from torch import nn

from tersor.distillation import Distiller


class ToyNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def net():
    torch.manual_seed(0)
    return ToyNet()


def teacher():
    """With other weights than `net`."""
    torch.manual_seed(1)
    return ToyNet()


class Quiet(Distiller):
    """Draws everything to zero."""

    def distillation_loss(self, observed, batch):
        return sum(value.square().mean() for value in observed.values())


def brighter(batch, model):
    return model(batch[0] + 1)


def data():
    """Is the picture brighter than grey?"""
    x = torch.randn(48, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0).long()
    batches = list(zip(x.split(16), y.split(16), strict=True))
    return SimpleNamespace(train=batches[:2], test=batches[2:])


def interrupted_data():
    """Ctrl-C in the second pass over the data."""
    toy = data()
    toy.train = InterruptedLoader(toy.train)
    return toy


class InterruptedLoader:
    def __init__(self, batches, passes=2):
        self.batches = batches
        self.passes, self.last = 0, passes

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.passes += 1
        if self.passes > self.last:
            raise KeyboardInterrupt
        return iter(self.batches)


def three_layers():
    """Two hidden layers that are built alike."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 2))


def untested_data():
    return SimpleNamespace(train=data().train, test=None)


def chatty_net():
    print("building")
    return net()


def without_loaders():
    return SimpleNamespace(train=None, test=[])


def no_module():
    return {}


not_callable = 3
