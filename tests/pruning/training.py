"""A small network, its data and an evaluator: the same ones each time they are made."""

import torch
from torch import nn
from torch.nn import functional as F

from tersor.training import TorchEvaluator
from tests.networks import randomize

BATCHES = 4
X = torch.randn(4 * BATCHES, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(4 * BATCHES) % 5
DATA = list(zip(X.split(4), Y.split(4), strict=True))


def network():
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    return randomize(nn.Sequential(*layers), seed=0)


def evaluator_of(model, lr=0.01, **kwargs):
    """Trains on the same batches in the same order; its metric is the loss."""
    return TorchEvaluator.from_loader(
        DATA,
        F.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        evaluating_func=lambda model: sum(F.cross_entropy(model(x), y).item() for x, y in DATA),
        dummy_input=X[:2],
        progress=False,
        **kwargs,
    )


def removed_of(pruner):
    return {of.target: of.removed for of in pruner.sparsity()}


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
