"""The loop that everybody writes by hand, which each evaluator must agree with."""

import copy

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from tersor.distillation import DynamicLayerwiseDistiller
from tersor.pruning import AGPPruner, L1NormPruner
from tersor.quantization import LsqQuantizer

X = torch.linspace(-1, 1, 30).reshape(10, 3).sin()
Y = X.square().sum(dim=1, keepdim=True)
DATA = TensorDataset(X, Y)
SIZE = 4  # batches of 4, 4 and 2


def loader():
    return DataLoader(DATA, batch_size=SIZE)


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


class Hooks:
    """Writes down what is called, gradients and weights; doubles the loss; changes weights like a clipping."""

    def __init__(self, model, scale=2.0):
        self.calls, self.batches, self.gradients, self.weights = [], [], [], []
        self.model, self.scale = model, scale

    def loss(self, loss, batch):
        self.calls.append("loss")
        self.batches.append(batch)
        return loss * self.scale

    def before_step(self):
        self.calls.append("before")
        self.gradients.append([p.grad.detach().clone() for p in self.model.parameters()])
        self.weights.append([p.detach().clone() for p in self.model.parameters()])

    @torch.no_grad()
    def after_step(self):
        self.calls.append("after")
        for parameter in self.model.parameters():
            parameter.clamp_(-0.5, 0.5)


def by_hand(
    *, steps=None, epochs=None, accumulate=1, rest="own", hooks=False, clip=None, lr=0.1, model=None, optimizer=None
):
    """Train by hand; the number of steps, the model and what `Hooks` would have seen.

    Args:
        rest: how the loss is divided in the last step of an epoch: by its "own" number of batches, or as always.
    """
    model = Net() if model is None else model
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    seen = Hooks(model, scale=2.0 if hooks else 1.0)
    made = passed = 0
    while made != steps and passed != epochs:
        batches = list(loader())
        while batches and made != steps:
            part, batches = batches[:accumulate], batches[accumulate:]
            optimizer.zero_grad()
            for x, y in part:
                loss = seen.loss(mse_loss(model(x), y), (x, y))
                (loss / (len(part) if rest == "own" else accumulate)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            seen.before_step()
            optimizer.step()
            made += 1
            if hooks:
                seen.after_step()
        passed += not batches
    return made, model, seen


def assert_same(model, expected, **tolerance):
    for value, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, **(tolerance or {"rtol": 0, "atol": 0}))


def assert_agrees(hooks, expected, accumulate=1):
    """The same gradients and weights at each step, and each hook once."""
    assert hooks.calls.count("before") == hooks.calls.count("after") == len(expected.gradients)
    assert hooks.calls.count("loss") == expected.calls.count("loss")
    for own, other in zip(hooks.gradients + hooks.weights, expected.gradients + expected.weights, strict=True):
        for value, wanted in zip(own, other, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)


def assert_no_hook(optimizer):
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


LIMITS = [
    ({"max_epochs": 2}, 6, 2),
    ({"max_steps": 1}, 1, 0),
    ({"max_steps": 5}, 5, 1),
    ({"max_steps": 6}, 6, 2),
    ({"max_steps": 5, "max_epochs": 1}, 3, 1),
    ({"max_steps": 2, "max_epochs": 9}, 2, 0),
]


def fused(model, example_inputs):
    """A schedule, learned steps and a teacher on the `net` of a model; the quantizer, and the last of them."""
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.5)
    pruner = L1NormPruner(model, [{"op_names": ["net.0"], "sparse_ratio": 0.5}], example_inputs=example_inputs)
    schedule = AGPPruner(pruner, interval_steps=2, total_times=3)
    int8 = [{"op_types": ["Linear"], "target_names": ["weight", "_input_"], "quant_dtype": "int8"}]
    quantizer = LsqQuantizer.from_compressor(schedule, int8)
    distilled = [{"op_names": ["net.0"], "lambda": 0.1}]
    return quantizer, DynamicLayerwiseDistiller.from_compressor(quantizer, distilled, teacher)
