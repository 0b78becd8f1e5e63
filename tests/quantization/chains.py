"""Layers of every kind with a batch norm behind them."""

import torch
from torch import nn

from tests.networks import randomize

HEADS = {
    "linear": lambda: nn.Linear(4, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv2d without bias": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "conv2d in groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "transposed 1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed 2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
    "transposed in groups": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    "transposed 3d": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def batch(head, dtype=torch.float64):
    return torch.randn(3, 4, *(5,) * (head.weight.dim() - 2), dtype=dtype)


def chain(head, affine=True, activation=None):
    """The head and its norm, all values random, the scales of two channels zero and negative; float64, eval mode."""
    norm = NORMS[head.weight.dim()](channels(head), affine=affine)
    model = randomize(nn.Sequential(head, norm, *([activation] if activation else []))).double()
    if affine:
        with torch.no_grad():
            norm.weight[:2] = torch.tensor([0.0, -0.7])
    return model


def channels(head):
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels
