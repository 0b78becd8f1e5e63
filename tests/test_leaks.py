"""The fixture that every other test runs under must itself catch what it promises."""

import copy
import timeit

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.leaks import no_leaks


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Switch off the fixture of this name: the tests here leave something behind on purpose."""


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_what_is_taken_away_again_is_no_leak():
    layer = nn.Linear(2, 2)
    with no_leaks():
        handle = layer.register_forward_hook(lambda *_: None)
        parametrize.register_parametrization(layer, "weight", Double())
        handle.remove()
        parametrize.remove_parametrizations(layer, "weight")
        with torch.no_grad():
            layer(torch.ones(1, 2))
    assert not parametrize.is_parametrized(layer)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hook_is_caught_though_its_module_is_out_of_reach(register):
    with pytest.raises(AssertionError, match=r"left behind: the hook <function .*out_of_reach"), no_leaks():
        getattr(nn.Sequential(nn.Linear(2, 2))[0], register)(lambda *_: None)


def test_parametrization_is_caught_on_a_copy():
    layer = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="a parametrization of 'weight' on a ParametrizedLinear"), no_leaks():
        parametrize.register_parametrization(copy.deepcopy(layer), "weight", Double())


def test_changed_setting_is_caught():
    try:
        with pytest.raises(AssertionError, match=r"default dtype: torch\.float32 -> torch\.float64"), no_leaks():
            torch.set_default_dtype(torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def test_watching_costs_less_than_a_millisecond():
    def watch():
        with no_leaks():
            pass

    assert min(timeit.repeat(watch, number=10, repeat=5)) / 10 < 1e-3
