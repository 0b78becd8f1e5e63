"""The conformance suite passes on modules that are right and fails on those that are not."""

import pytest
import torch
from torch import nn

from tersor.errors import VerificationError
from tersor.graph import rules
from tersor.testing import PropagationRuleTestCase

TESTS = [name for name in vars(PropagationRuleTestCase) if name.startswith("test_")]


class TestConvolutions(PropagationRuleTestCase):
    def module(self):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def inputs(self):
        return torch.randn(2, 3, 6, 6)


class Block(nn.Module):
    """Attention and a feed-forward network on a residual stream, without layer norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.forward1, self.forward2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.forward2(self.forward1(x).relu()))


class TestAttention(PropagationRuleTestCase):
    def module(self):
        return Block()

    def inputs(self):
        return torch.randn(2, 4, 5)


class TestHeadsAlone(PropagationRuleTestCase):
    """The stream is the model's own output, so only heads and hidden features leave."""

    def module(self):
        return nn.TransformerEncoderLayer(8, 4, 12, dropout=0, batch_first=True)

    def inputs(self):
        return torch.randn(2, 4, 8)


class TestGroupNorm(PropagationRuleTestCase):
    def module(self):
        return nn.Sequential(nn.Conv1d(3, 8, 3), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv1d(8, 4, 1))

    def inputs(self):
        return torch.randn(2, 3, 7)


class Turn(nn.Module):
    """Each channel has a rotation of its own."""

    def __init__(self, channels):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(channels, 2, 2))

    def forward(self, x):
        return torch.linalg.matrix_exp(self.turn) @ x


def turn(call):
    channels = call.labels("x").get(1)
    call.join(channels, call.labels("turn").get(0), "is turned")
    return {} if channels is None else {1: channels}


class TurnCase(PropagationRuleTestCase):
    """The example of the suite's docstring; not collected, but run below under several rules."""

    def module(self):
        return nn.Sequential(nn.Conv2d(3, 8, 1), Turn(8), nn.Conv2d(8, 4, 1))

    def inputs(self):
        return torch.randn(2, 3, 2, 6)


@pytest.mark.parametrize("test", TESTS)
def test_a_rule_of_ones_own(test, monkeypatch):
    monkeypatch.setitem(rules.CUSTOM_MODULES, Turn, turn)
    case = TurnCase()
    getattr(case, test)()
    assert all(shrunk.small[1].turn.shape == (4, 2, 2) for shrunk in case.cases())


def test_without_a_rule_nothing_is_removed():
    with pytest.raises(AssertionError, match="still there; without a rule: linalg_matrix_exp"):
        TurnCase().test_something_is_removed()


def forgets(call):
    return call.labels("x")


def freezes(call):
    call.freeze(call.labels("x"), "is mixed")
    return {}


class Backwards(nn.Module):
    """The same channels in another order."""

    def forward(self, x):
        return x.flip(1)


class BackwardsCase(TurnCase):
    def module(self):
        return nn.Sequential(nn.Conv2d(3, 8, 1), Backwards(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize(("case", "kind"), [(TurnCase, Turn), (BackwardsCase, Backwards)])
def test_a_rule_that_is_wrong_is_found(case, kind, monkeypatch):
    monkeypatch.setitem(rules.CUSTOM_MODULES, kind, forgets)
    with pytest.raises(VerificationError, match=r"^1 .*the small model does not compute"):
        case().test_small_equals_masked()


def test_a_rule_that_freezes_says_why(monkeypatch):
    monkeypatch.setitem(rules.CUSTOM_MODULES, Turn, freezes)
    with pytest.raises(AssertionError, match="is mixed"):
        TurnCase().test_something_is_removed()


class Approximate(PropagationRuleTestCase):
    """A module that is not the same twice."""

    def module(self):
        return nn.Sequential(nn.Conv2d(3, 8, 1), Noise(), nn.Conv2d(8, 4, 1))

    def inputs(self):
        return torch.randn(2, 3, 2, 6)


class Noise(nn.Module):
    """Less than what the speedup tolerates."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 4e-5 * (self.calls % 2))


def test_the_suite_is_stricter_than_the_speedup():
    with pytest.raises(AssertionError, match=r"outputs differ by [2-5].*e-05 of the largest"):
        Approximate().test_small_equals_masked()
    loose = Approximate()
    loose.tolerance = 1e-3
    loose.test_small_equals_masked()


def test_a_suite_without_a_module_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        PropagationRuleTestCase()
