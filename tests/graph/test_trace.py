from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tersor.errors import TraceError
from tersor.graph.trace import concrete_trace
from tests.networks import IMAGE, IMAGE_NETWORKS, LiteralView, Tokens, randomize


@pytest.mark.parametrize("network", [*IMAGE_NETWORKS, LiteralView])
def test_the_graph_is_exact_at_another_batch_size(network):
    model = randomize(network())
    traced, fresh = concrete_trace(model, torch.randn(IMAGE)), torch.randn(5, *IMAGE[1:])
    assert torch.equal(traced(fresh), model(fresh))
    assert dict(traced.named_parameters()).items() == dict(model.named_parameters()).items()
    assert not traced.training


@dataclass
class Output:
    logits: torch.Tensor
    pair: tuple


class Odd(nn.Module):
    """Sizes in arithmetic, writes into views, attributes, constants, control flow, keywords, a dataclass."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, x, *, shift=None):
        batch, _, height, width = x.shape
        y = self.conv(x) * self.scale + torch.arange(width).float()
        if y.shape[-1] > 4:
            y[:, 0] = 0
        y = y if shift is None else y + shift["by"]
        z = y.view(batch, 2, -1, height * width).transpose(1, 2).reshape(x.size(0), -1)
        return Output(z, (y.mT, torch.zeros(batch * 2)))


def test_sizes_writes_constants_keywords_and_dataclasses():
    model = randomize(Odd())
    traced = concrete_trace(model, {"x": torch.randn(IMAGE), "shift": {"by": torch.ones(1)}})
    fresh, shift = torch.randn(7, *IMAGE[1:]), {"by": torch.full((1,), 0.5)}
    actual, expected = traced(fresh, shift), model(fresh, shift=shift)
    assert isinstance(actual, Output)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.pair[0], expected.pair[0])
    assert actual.pair[1].shape == (14,)


def test_tokens():
    model = randomize(Tokens())
    traced = concrete_trace(model, torch.tensor([[1, 2, 3]]))
    ids = torch.randint(0, 11, (4, 3))
    assert torch.equal(traced(ids), model(ids))


def test_own_leaf_types_stay_whole():
    class Inner(nn.Module):
        def forward(self, x):
            return x * 2

    model = nn.Sequential(Inner(), nn.ReLU())
    nodes = concrete_trace(model, torch.ones(1), leaf_types=(Inner,)).graph.nodes
    assert [node.target for node in nodes if node.op == "call_module"] == ["0", "1"]
    assert [node.op for node in concrete_trace(model, torch.ones(1)).graph.nodes].count("call_module") == 1


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    concrete_trace(model, torch.randn(4, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_wrong_inputs():
    with pytest.raises(TraceError, match=r"\(2, 5\)"):
        concrete_trace(nn.Sequential(nn.Linear(4, 2)), torch.zeros(2, 5))
