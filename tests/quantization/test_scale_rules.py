"""Which operators pass a factor on: what is found is what scaling by powers of two leaves bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.quantization.exact import Between, X, check_exact


def in_place(x):
    x += x.clone()
    return x.mul_(0.5).relu_()


def through_cat(x):
    a, b = x.chunk(2, 1)
    return torch.cat([b, F.pad(a, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]], 1)


PASSED = {
    "relu": torch.relu,
    "relu in place": nn.ReLU(inplace=True),
    "leaky": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(8),
    "clamp at 0": lambda x: x.clamp(min=0),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "mean pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive": nn.AdaptiveAvgPool2d(3),
    "dropout": nn.Dropout(0.5),
    "identity": nn.Identity(),
    "zero padding": lambda x: F.pad(F.pad(x, (1, 2, 1, 2)).relu(), (-1, 0, 0, 0)),
    "reflection": nn.ReflectionPad2d(2),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "numbers": lambda x: 2 * x / 3 - x * 0.5 + 0,
    "permuted": lambda x: x.permute(0, 2, 3, 1).flip(-1).contiguous().permute(0, 3, 1, 2),
    "in place": in_place,
    "cat": through_cat,
    "gate": lambda x: x * torch.sigmoid(torch.ones_like(x)),
    "norm of itself": lambda x: x.double().float() + x.mean((2, 3), keepdim=True) - x.amax(3, keepdim=True).abs(),
    "index": lambda x: x[:, torch.arange(7, -1, -1)],
}


@pytest.mark.parametrize("name", PASSED)
def test_passes_every_channel(name):
    scaling = check_exact(Between(PASSED[name]), X)
    assert scaling.count == 8
    assert [[k.name for k in kernels] for kernels in (scaling.groups[0].writers, scaling.groups[0].readers)] == [
        ["first.weight", "first.bias"],
        ["second.weight"],
    ]


REFUSED = {
    "gelu": (F.gelu, "gelu"),
    "relu6": (nn.ReLU6(), "relu6"),
    "silu": (nn.SiLU(inplace=True), "silu"),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "clamp": (lambda x: x.clamp(-1, 1), "clamp"),
    "softmax": (nn.Softmax(1), "softmax"),
    "square": (lambda x: x**2, "a power"),
    "constant": (lambda x: x + 1, "add"),
    "tensor": (lambda x: x + torch.ones(8, 1, 1), "what no layer writes"),
    "inverse": (lambda x: 1 / (x.abs() + x.abs()), "an inverse"),
    "padding with ones": (lambda x: F.pad(x, (1, 1), value=1.0), "pad"),
    "decision": (lambda x: x if x.sum() > 0 else -x, "gt"),
    "operator": (torch.ops.aten.sigmoid, "sigmoid"),
    "item": (lambda x: x * x.mean().item(), "item"),
    "group norm": (nn.GroupNorm(2, 8, affine=False), "group_norm"),
    "square of itself": (lambda x: x * x, "multiplied by another layer's output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_reason(name):
    function, reason = REFUSED[name]
    scaling = check_exact(Between(function), X)
    assert scaling.count == 0
    assert reason in scaling.refused["second.weight"]
    assert scaling.refused["first.weight"] == "is an input of the model"


def test_pixels_made_of_channels_share_a_factor():
    scaling = check_exact(Between(nn.PixelShuffle(2), channels=2), X)
    writer = scaling.groups[0].writers[0]
    assert writer.outputs.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_sum_over_channels_shares_one_factor():
    scaling = check_exact(Between(lambda x: x.sum(1, keepdim=True), channels=1), X)
    assert scaling.count == 1
