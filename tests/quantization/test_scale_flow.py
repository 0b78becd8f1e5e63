"""How parameters are used decides which factors they take."""

import pytest
import torch
from torch import nn

from tests.quantization.exact import Between, X, check_exact


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_code_that_torch_does_not_show_is_refused():
    script = torch.jit.trace(lambda x: x.sigmoid(), (torch.zeros(2, 8, 8, 8),))
    scaling = check_exact(Between(script), X)
    assert scaling.count == 0


def test_a_scale_that_is_written_out_is_a_writer():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(6))
            self.fc = nn.Linear(6, 2)

        def forward(self, x):
            return self.fc(self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))

    scaling = check_exact(Scaled(), torch.randn(3, 6))
    assert str(scaling.groups[0]) == "6 channels: scale -> fc.weight"


def test_a_shared_layer_shares_its_factors():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.a(x).relu()) + self.head(self.b(x).relu())

    scaling = check_exact(Twice(), torch.randn(5, 3))
    assert str(scaling.groups[0]) == "4 channels: a.weight, a.bias, b.weight, b.bias -> head.weight"


def test_a_weight_that_is_used_otherwise_takes_no_factor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.norm(self.embed(ids)))

    scaling = check_exact(Tied(), torch.tensor([[1, 2, 3]]))
    assert scaling.count == 0
    assert "used by something else" in scaling.refused["embed.weight"]


def test_a_computed_weight_is_left_alone():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    assert check_exact(net, torch.randn(5, 3)).count == 0
    nn.utils.parametrize.remove_parametrizations(net[2], "weight")
    assert check_exact(net, torch.randn(5, 3)).count == 4
