"""SmoothQuant: the paper's factors, an unchanged function, and less error where channels are loud."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import InvalidValueError, NumericalError
from tersor.quantization.smooth import SmoothQuantizer, smoothing
from tersor.testing.processes import in_two_processes, why_not_two
from tests.networks import randomize
from tests.quantization.outliers import RoundToNearest, block, decibels, llama, tokens

CONFIG = [{"op_types": ["Linear"], "target_names": ["_input_0", "weight"]}]
DYNAMIC = [
    {"op_types": ["Linear"], "target_names": ["weight"]},
    {"op_types": ["Linear"], "target_names": ["_input_0"], "dynamic": True, "granularity": [-1]},
]


def quantized(kind, model, config, data, **options):
    quantizer = kind(model, config, calibration=data, **options)
    quantizer.compress()
    return quantizer


@torch.no_grad()
def outputs(model, data):
    return torch.cat([torch.as_tensor(getattr(out, "logits", out)).flatten() for out in map(model, data)])


def test_factors_are_the_papers():
    generator = np.random.default_rng(0)
    activations, weights = generator.random(9) * 100, generator.random(9)
    for alpha in (0.0, 0.3, 1.0):
        expected = activations**alpha / weights ** (1 - alpha)
        actual = smoothing(torch.from_numpy(activations), torch.from_numpy(weights), alpha)
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)
    assert smoothing(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0]), 0.5).tolist() == [1, 1]


def test_the_norm_takes_what_its_readers_are_multiplied_by():
    model, data = block(), tokens()
    before = copy.deepcopy(model).double()
    quantizer = quantized(SmoothQuantizer, model, [{**CONFIG[0], "observer": "minmax"}], data)
    with torch.no_grad():
        seen = before.norm(torch.cat(data).double()).reshape(-1, 16).numpy()
    weights = np.concatenate([before.gate.weight.detach().numpy(), before.up.weight.detach().numpy()])
    s = np.sqrt(np.abs(seen).max(0)) / np.sqrt(np.abs(weights).max(0))
    scales = quantizer.get_calibration_config()
    for name in ("gate", "up"):
        assert scales[name]["_input_0"]["scale"].item() == pytest.approx(np.abs(seen / s).max() / 127, rel=1e-5)
        rows = np.abs(getattr(before, name).weight.detach().numpy() * s).max(1)
        if name == "gate":  # the other's rows are divided by what the next layer takes
            np.testing.assert_allclose(scales[name]["weight"]["scale"].flatten(), rows / 127, rtol=1e-5)
    assert [str(group) for group in quantizer.moved] == [
        "16 channels: norm.weight, norm.bias -> gate.weight, up.weight",
        "24 channels: up.weight, up.bias -> down.weight",
    ]
    assert quantizer.refused == {}
    quantizer.unwrap_model()
    s = torch.from_numpy(s)
    for name, by in (("norm.weight", 1 / s), ("norm.bias", 1 / s), ("gate.weight", s)):
        wanted = before.get_parameter(name) * by
        torch.testing.assert_close(model.get_parameter(name).double(), wanted, rtol=1e-5, atol=1e-9)
    fresh = tokens(seed=9)
    assert decibels(outputs(model, fresh), outputs(before, [x.double() for x in fresh])) > 110


@pytest.mark.parametrize("config", [CONFIG, DYNAMIC], ids=["static", "dynamic"])
def test_loud_channels_cost_less(config):
    fresh = tokens(seed=5)
    expected = outputs(block(), fresh)
    plain = RoundToNearest(block(), CONFIG, calibration=tokens())
    plain.compress()
    smooth = quantized(SmoothQuantizer, block(), config, tokens())
    gained = decibels(outputs(smooth.model, fresh), expected) - decibels(outputs(plain.model, fresh), expected)
    plain.unwrap_model()
    smooth.unwrap_model()
    assert gained > 6


def test_dynamic_inputs_are_rounded_by_the_range_of_each_token():
    model, data = nn.Sequential(nn.Linear(6, 4)), tokens(6)
    quantizer = quantized(SmoothQuantizer, model, DYNAMIC, data)
    weight, bias, x = model[0].weight.detach(), model[0].bias.detach(), data[0][0] * torch.logspace(-2, 2, 8)[:, None]
    rows = [
        torch.fake_quantize_per_tensor_affine(row, (row.abs().max() / 127).item(), 0, -127, 127) @ weight.T + bias
        for row in x
    ]
    torch.testing.assert_close(model(x[None])[0].detach(), torch.stack(rows))
    calibration = quantizer.get_calibration_config()
    assert calibration["0"]["_input_0"]["dynamic"] is True
    assert quantizer.refused == {"0.weight": "is an input of the model"}
    fresh = SmoothQuantizer(copy.deepcopy(quantizer.unwrap_model()), DYNAMIC)
    fresh.update_calibration_config(calibration)
    torch.testing.assert_close(fresh.model(x[None])[0].detach(), torch.stack(rows))
    fresh.unwrap_model()


def test_the_best_alpha_of_a_list_is_each_groups_own():
    candidates = (0.1, 0.5, 0.9)
    model, data = block(), tokens(batches=1)
    before = copy.deepcopy(model)
    quantizer = quantized(SmoothQuantizer, model, CONFIG, data, alpha=candidates)
    quantizer.unwrap_model()
    with torch.no_grad():
        x = before.norm(data[0]).reshape(-1, 16)
        errors = []
        for alpha in candidates:
            weights = torch.cat([before.gate.weight, before.up.weight])
            s = x.abs().amax(0) ** alpha / weights.abs().amax(0) ** (1 - alpha)
            smooth = x / s
            smooth = torch.fake_quantize_per_tensor_affine(smooth, (smooth.abs().max() / 127).item(), 0, -127, 127)
            scaled = weights * s
            rows, zeros = scaled.abs().amax(1) / 127, torch.zeros(len(scaled), dtype=torch.int32)
            scaled = torch.fake_quantize_per_channel_affine(scaled, rows, zeros, 0, -127, 127)
            errors.append(float((smooth @ scaled.T - x @ weights.T).square().sum()))
    assert quantizer.alphas[0] == candidates[int(np.argmin(errors))]
    assert len(quantizer.alphas) == 2


def test_convolutions():
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten()))
    with torch.no_grad():
        model[0].weight[0] *= 50
        model[2].weight[:4, 0] /= 50
    before, data = copy.deepcopy(model), [torch.randn(4, 3, 8, 8)]
    config = [{"op_names": ["2"], "target_names": ["_input_0", "weight"]}]
    quantizer = quantized(SmoothQuantizer, model, config, data, alpha=[0.25, 0.75])
    smooth = decibels(outputs(model, data), outputs(before, data))
    assert [str(group) for group in quantizer.moved] == ["8 channels: 0.weight, 0.bias -> 2.weight"]
    quantizer.unwrap_model()
    plain = quantized(RoundToNearest, copy.deepcopy(before), config, data)
    assert smooth > decibels(outputs(plain.model, data), outputs(before, data)) + 6
    plain.unwrap_model()


def test_a_transformer():
    data = list(torch.randint(50, (3, 4, 9)))
    expected, config = outputs(llama(), data), [*CONFIG, {"op_names": ["lm_head"], "exclude": True}]
    plain = quantized(RoundToNearest, llama(), config, data)
    smooth = quantized(SmoothQuantizer, llama(), config, data)
    assert len(smooth.moved) == 8
    gained = decibels(outputs(smooth.model, data), expected) - decibels(outputs(plain.model, data), expected)
    for quantizer in (plain, smooth):
        quantizer.unwrap_model()
    assert decibels(outputs(smooth.model, data), expected) > 90
    assert gained > 6


def test_what_takes_no_factor_is_named():
    model = randomize(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)))
    before = copy.deepcopy(model)
    quantizer = quantized(SmoothQuantizer, model, CONFIG, [torch.randn(8, 4)])
    assert quantizer.moved == ()
    assert quantizer.refused == {
        "0.weight": "is an input of the model",
        "2.weight": "passes gelu, which does not commute with a factor",
    }
    quantizer.unwrap_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_calibrating_again_starts_from_the_weights_as_they_are():
    model, data = block(), tokens()
    quantizer = quantized(SmoothQuantizer, model, CONFIG, data)
    assert float(quantizer.factors[1].max()) > 1.5
    quantizer.finish()
    # What is read by the last layer is smooth already; the weights before it have changed with it.
    torch.testing.assert_close(quantizer.factors[1], torch.ones(24, dtype=torch.float64), rtol=1e-4, atol=0)
    quantizer.unwrap_model()


@pytest.mark.parametrize("alpha", [1.5, [], [0.5, -1]])
def test_an_alpha_out_of_range(alpha):
    with pytest.raises(InvalidValueError, match="alpha"):
        SmoothQuantizer(block(), CONFIG, alpha=alpha)


def test_nothing_to_run_the_model_on():
    quantizer = SmoothQuantizer(block(), CONFIG)
    with pytest.raises(InvalidValueError, match="Give example_inputs, or calibration batches"):
        quantizer.compress()
    quantizer.unwrap_model()


def test_values_that_are_no_numbers_change_nothing():
    model = block()
    before = copy.deepcopy(model)
    quantizer = SmoothQuantizer(model, CONFIG, calibration=[torch.full((1, 2, 16), torch.nan)])
    with pytest.raises(
        NumericalError, match=r"gate\.weight: the input has 16 elements that are infinite or not numbers"
    ):
        quantizer.compress()
    quantizer.unwrap_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_move_what_one_would_with_all_the_data():
    data = tokens(batches=4)

    def work(rank):
        quantizer = quantized(SmoothQuantizer, block(), CONFIG, data[rank::2], example_inputs=data[0])
        scale = quantizer.get_calibration_config()["gate"]["_input_0"]["scale"]
        quantizer.unwrap_model()
        return {"norm": quantizer.factors[0], "up": quantizer.factors[1], "scale": scale}

    alone = quantized(SmoothQuantizer, block(), CONFIG, data)
    alone.unwrap_model()
    for found in in_two_processes(work):
        torch.testing.assert_close(found["norm"], alone.factors[0], rtol=0, atol=0)
        torch.testing.assert_close(found["up"], alone.factors[1], rtol=0, atol=0)
        assert found["scale"] == alone.get_calibration_config()["gate"]["_input_0"]["scale"]
