"""What the benchmark of quantizers measures, and what it measures it on."""

import math

import pytest
import torch
from torch import nn

from benchmarks import efficientnet
from benchmarks.quantization import chosen, figures
from benchmarks.quantization_rows import Bits, Task, layers_and_inputs, norms, signs


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(2, 2)
    )


def task():
    return Task(network(), ("0", "5"), torch.zeros(6, 1, 5, 5), 4, 0)


def test_figures_are_shares_of_images_and_noise_against_signal():
    exact = torch.tensor([[3.0, 0.0], [0.0, 4.0], [2.0, 1.0]])
    answered = exact + torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    found = figures(exact, answered, torch.tensor([0, 0, -1]))
    assert found["accuracy"] == 0.5  # the third label is not known
    assert found["agreement"] == pytest.approx(2 / 3)
    assert found["snr_db"] == round(10 * math.log10(30 / 4), 2)


def test_the_first_and_the_last_layer_have_eight_bits():
    entries = layers_and_inputs(Bits(4, 2))(network(), task())
    widths = {
        name: tuple(entry["target_settings"][target]["quant_dtype"] for target in ("weight", "_input_0"))
        for entry in entries
        for name in entry["op_names"]
    }
    assert widths == {"3": ("int4", "uint2"), "0": ("int8", "uint8"), "5": ("int8", "uint8")}


def test_images_have_both_signs_where_no_zero_point_moves():
    entries = layers_and_inputs(Bits(4, 4), inputs={})(network(), task())
    first = next(entry for entry in entries if entry["op_names"] == ["0"])
    assert first["target_settings"]["_input_0"] == {"quant_dtype": "int8"}


def test_signs_stand_before_the_activation_function():
    assert norms(network()) == [("0", "1")]
    assert [entry["op_names"] for entry in signs(network(), task())] == [["3"], ["1"]]


def test_rows_that_train_need_something_to_train_on(monkeypatch):
    monkeypatch.setattr("benchmarks.quantization.trained", lambda _: network())
    assert "LSQ, 4 bits" in chosen("digits", None)
    assert "LSQ, 4 bits" not in chosen("efficientnet_lite0", None)
    assert chosen("digits", ["PTQ, 4 b*"]) == ["PTQ, 4 bits", "PTQ, 4 bits, mse"]


def test_nothing_is_calibrated_and_tested_on(monkeypatch):
    from PIL import Image

    photographs = [(Image.new("RGB", (300, 400), (shade, shade, shade)), shade) for shade in range(0, 250, 50)]
    monkeypatch.setattr(efficientnet, "photographs", lambda: photographs)
    tested = []
    for calibration, images, labels in efficientnet.halves(0):
        shades = lambda values: set((values[:, 0, 0, 0] * 128 + 127).round().int().tolist())  # noqa: E731
        assert images.shape[1:] == calibration.shape[1:] == (3, 224, 224)
        assert shades(images) == set(labels.tolist())
        assert not shades(images) & shades(calibration)
        tested += labels.tolist()
    assert sorted(tested) == sorted(6 * [0, 50, 100, 150, 200])
