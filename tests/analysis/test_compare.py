"""Comparison of two models: every figure, both ways out."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from tersor.analysis import compare, file_size, peak_memory
from tersor.errors import InvalidValueError


def network(width):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(width * 4, 2))


WIDE, NARROW, INPUTS = network(16), network(4), torch.zeros(2, 1, 4, 4)


@pytest.fixture(scope="module")
def comparison():
    return compare(WIDE, NARROW, INPUTS, accuracy=(0.9, 0.88), batch_sizes=(1, 4), repeats=5)


def test_figures(comparison):
    assert (comparison.before.macs, comparison.after.macs) == (16 * 4 * 9 + 16 * 4 * 2, 4 * 4 * 9 + 4 * 4 * 2)
    assert comparison.before.parameters == 16 * 9 + 16 + 64 * 2 + 2
    assert comparison.after.file_size == file_size(NARROW)
    assert comparison.before.peak_memory == peak_memory(WIDE, INPUTS)
    assert list(comparison.after.latency) == [1, 4]
    assert len(comparison.after.latency[4].times) == 5


def test_ratios(comparison):
    assert comparison.ratio("macs") == 0.25
    assert comparison.ratio("accuracy") == pytest.approx(0.88 / 0.9)
    assert comparison.ratio("latency") == comparison.ratio("latency@1") == comparison.latency_ratio(1).median
    with pytest.raises(InvalidValueError, match="Did you mean 'macs'"):
        comparison.ratio("mac")


def test_table_and_notes(comparison):
    console = Console(width=120, file=io.StringIO())
    console.print(comparison)
    text = console.file.getvalue()
    for part in ("MACs per sample", "4.00x fewer", "Latency, batch 4", "90.00 %", "-2.00 points", "0 has 4"):
        assert part in text


def test_dictionary_is_ready_for_json(comparison):
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert data["ratios"]["macs"] == 0.25
    assert data["before"]["latency"]["4"]["rounds"] == 5
    assert [layer["kept"] for layer in data["layers"]] == [0.25, 34 / 130]
    assert data["environment"]["PyTorch"] == torch.__version__


def test_a_model_without_macs_has_ratios_that_json_can_hold():
    model = nn.BatchNorm1d(2)
    comparison = compare(model, nn.Linear(2, 2), torch.zeros(2, 2), repeats=1)
    assert compare(model, model, torch.zeros(2, 2), repeats=1).ratio("macs") == 1.0
    assert comparison.ratio("macs") == float("inf")
    assert json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["ratios"]["macs"] is None


def test_modes_and_fast_path_are_restored():
    fastpath = torch.backends.mha.get_fastpath_enabled()
    WIDE.train()
    compare(WIDE, NARROW.eval(), INPUTS, repeats=1)
    assert (WIDE.training, NARROW.training) == (True, False)
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_latency_is_measured_with_the_attention_fast_path_as_the_user_has_it():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(torch.backends.mha.get_fastpath_enabled())
            return x + 1

    compare(Spy(), Spy(), torch.zeros(1), repeats=1)
    assert set(seen[-2:]) == {True}


@pytest.mark.parametrize("accuracy", [(0.9,), (0.9, 0.8, 0.7), {"before": 0.9}, ("high", "low")])
def test_accuracy_that_is_not_two_numbers(accuracy):
    with pytest.raises(InvalidValueError, match="are not two numbers"):
        compare(WIDE, NARROW, INPUTS, accuracy=accuracy)


def test_batch_size_that_is_none():
    with pytest.raises(InvalidValueError, match="0 is no batch size"):
        compare(WIDE, NARROW, INPUTS, batch_sizes=(0,))
