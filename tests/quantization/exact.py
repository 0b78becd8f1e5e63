"""A network with something between two convolutions, and a check that no bit depends on the factors moved in it."""

import torch
from torch import nn

from tersor.quantization.scaling import find_scaling


class Between(nn.Module):
    """A convolution, something, and a convolution that reads it."""

    def __init__(self, function, channels=8):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(channels, 4, 3, padding=1)
        self.function = function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def check_exact(model, x, seed=0):
    """Scaling by powers of two only moves exponents: the outputs are the same, bit for bit."""
    model.eval()
    scaling = find_scaling(model, x)
    with torch.no_grad():
        before = model(x)
        scaling.apply(2.0 ** torch.randint(-3, 4, (scaling.count,), generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(model(x), before)
    return scaling
