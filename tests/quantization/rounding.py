"""Networks whose weights are rounded, data whose features are correlated, and rounding to the nearest by hand."""

import copy
import math

import torch
from torch import Tensor, nn

from tests.networks import randomize

GENERATOR = torch.Generator().manual_seed(0)


def _correlated(samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, 6, generator=generator) @ torch.randn(6, 12, generator=GENERATOR.manual_seed(0))
    return x + 0.1 * torch.randn(samples, 12, generator=generator)


X, FRESH = _correlated(256), _correlated(500)
BATCHES = list(X.split(64))
IMAGES = nn.functional.avg_pool2d(torch.randn(192, 4, 10, 10, generator=GENERATOR), 3, 1) * 3
MORE_IMAGES = nn.functional.avg_pool2d(torch.randn(64, 4, 10, 10, generator=GENERATOR), 3, 1) * 3


def config(bits: int, **keys: object) -> list[dict[str, object]]:
    """The weights of all linear layers and convolutions that a model has."""
    return [{"op_names_re": [r"\d+"], "target_names": ["weight"], "quant_dtype": f"int{bits}", **keys}]


def mlp() -> nn.Sequential:
    """Three linear layers."""
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return randomize(model, 0)


def convolutions() -> nn.Sequential:
    """A plain convolution, a grouped and a depthwise one, and a linear layer."""
    layers = (nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU())
    return randomize(nn.Sequential(*layers, nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 4)), 0)


def trained() -> nn.Sequential:
    """A network that has learned to tell sums of a few features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer, goals = torch.optim.Adam(model.parameters(), lr=1e-2), torch.tanh(X[:, :4] + X[:, 4:8] * X[:, 8:])
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), goals).backward()
        optimizer.step()
    return model.eval()


def nearest(model: nn.Module, bits: int) -> nn.Module:
    """A copy with all weights rounded to the nearest, one scale for each output channel."""
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            rows = module.weight.detach().flatten(1)
            scale = rows.abs().amax(1) / (2 ** (bits - 1) - 1)
            zeros = torch.zeros(len(rows))
            high = 2 ** (bits - 1) - 1
            module.weight.data = torch.fake_quantize_per_channel_affine(
                module.weight.detach(), scale, zeros, 0, -high, high
            )
    return rounded


@torch.no_grad()
def decibels(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """The ratio of what the original gives to what the model is off by."""
    expected = original(x)
    return 10 * math.log10(expected.square().sum() / (model(x) - expected).square().sum())
