import torch
from torch import nn

from tersor.graph.trace import concrete_trace


class Mixed(nn.Module):
    """Autocast inside autocast, one of them off."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = self.fc(y)
            with torch.autocast("cpu", enabled=False):
                y = self.fc(y.float())
        return self.fc(y), z


def test_autocast_is_entered_and_left_as_in_the_model():
    model = Mixed()
    traced, fresh = concrete_trace(model, torch.randn(2, 4)), torch.randn(3, 4)
    actual, expected = traced(fresh), model(fresh)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert actual[1].dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(traced(fresh)[0], model(fresh)[0])


class Stopped(nn.Module):
    """A frozen part, as decorator and as block, and a custom gradient."""

    def __init__(self):
        super().__init__()
        self.frozen, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    @torch.no_grad()
    def features(self, x):
        return self.frozen(x) * 2

    def forward(self, x):
        y = self.features(x)
        with torch.no_grad():
            scale = self.first(x).abs().mean()
            with torch.enable_grad():
                z = self.second(y)
        return Double.apply(self.first(y * scale) + z)


class Double(torch.autograd.Function):
    """Twice its input."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_gradients_stop_where_the_model_stops_them():
    model, fresh = Stopped(), torch.randn(3, 4)
    traced = concrete_trace(model, torch.randn(2, 4))
    model(fresh).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    traced(fresh).sum().backward()
    assert expected["frozen.weight"] is None
    assert model.frozen.weight.grad is None
    for name, parameter in model.named_parameters():
        assert expected[name] is parameter.grad is None or torch.equal(expected[name], parameter.grad)


class Force(nn.Module):
    """A gradient in the forward, for which it switches gradients on."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.fc(x).pow(2).sum(), x)
        return -gradient


def test_gradients_are_there_where_the_model_asks_for_them():
    model, fresh = Force(), torch.randn(3, 4)
    traced = concrete_trace(model, torch.randn(2, 4))
    with torch.no_grad():
        assert torch.equal(traced(fresh), model(fresh))
        assert not torch.is_grad_enabled()
