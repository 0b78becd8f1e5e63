"""Layers that were made smaller and are no faster."""

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy import slower_layers, smaller
from tests.deploy.toy import TwoConvolutions


def test_layers_that_take_as_long_as_before_are_named(monkeypatch):
    milliseconds = {8: {"conv1": 1.0, "conv2": 2.0}, 6: {"conv1": 1.1, "conv2": 1.5}}
    monkeypatch.setattr(smaller, "_milliseconds", lambda model, *_: milliseconds[model.conv1.out_channels])
    assert slower_layers(TwoConvolutions(8), TwoConvolutions(6), torch.zeros(1, 1, 6, 6)) == (
        "conv1 has shape (6, 1, 3, 3) in place of (8, 1, 3, 3) and takes 1.100 ms in place of 1.000: "
        "widths in multiples of 16 or 32 may be faster (round_to).",
    )
    milliseconds[8]["conv1"] = milliseconds[6]["conv1"] = 0.001  # not worth a word
    assert slower_layers(TwoConvolutions(8), TwoConvolutions(6), torch.zeros(1, 1, 6, 6)) == ()


def test_nothing_is_run_where_nothing_is_smaller(monkeypatch):
    monkeypatch.setattr(smaller, "_milliseconds", None)
    assert slower_layers(TwoConvolutions(6), TwoConvolutions(6), torch.zeros(1, 1, 6, 6)) == ()


def test_the_engine_says_how_long_each_layer_takes():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    spent = smaller._milliseconds(net, torch.randn(64, 512), "onnxruntime", 1)
    assert list(spent) == ["0", "2"]
    assert spent["0"] > 3 * spent["2"] > 0  # 64 times the arithmetic
