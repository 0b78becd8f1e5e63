"""LSQ+: gradients against the paper's formulas in float64 and PyTorch's own kernel, and where step and offset begin.

What it shares with LSQ (crashes, masks, ties, compiling, processes) is in ``test_lsq.py``.
"""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.config import IntDtype
from tersor.quantization import LsqPlusQuantizer
from tersor.quantization.format import Format
from tersor.quantization.learned_step import lsq_plus
from tersor.quantization.lsq_plus import closest_grid, grid_between, three_sigma

INPUT = [{"op_types": ["Linear"], "target_names": ["_input_0"], "quant_dtype": "int4"}]
AFFINE = Format(IntDtype(4), "affine", -8, 7)


@pytest.fixture
def made():
    """Makes quantizers whose models are given back at the end."""
    quantizers = []

    def make(*args, **kwargs):
        quantizers.append(LsqPlusQuantizer(*args, **kwargs))
        return quantizers[-1]

    yield make
    for quantizer in quantizers:
        quantizer.unwrap_model()


def train(model, quantizer, batches, loss):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for x in batches:
        optimizer.zero_grad()
        loss(model(x)).backward()
        quantizer.before_step()
        optimizer.step()
        quantizer.after_step()


@pytest.mark.parametrize("rows", [1, 3])
def test_values_and_gradients_are_the_papers(rows):
    """The paper's offset is -s z: it takes gradients where a value is clipped, and the zero point -s times those."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 90, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(rows, 90, generator=generator, dtype=torch.float64)
    scale = torch.tensor([[0.2], [0.3], [0.5]], dtype=torch.float64)[:rows].requires_grad_()
    zero_point = torch.tensor([[-3.3], [0.2], [-9.9]], dtype=torch.float64)[:rows].requires_grad_()
    out = lsq_plus(x, scale, zero_point, -8, 7, gradient_scale=0.5)
    out.backward(upstream)
    v, s, g = (each.detach().numpy() for each in (x, scale, upstream))
    z = np.array([[-3.0], [0.0], [-8.0]])[:rows]
    beta = -s * z
    shifted = (v - beta) / s
    level = np.round(np.clip(shifted, -8, 7))
    np.testing.assert_allclose(out.detach().numpy(), level * s + beta, rtol=1e-10, atol=1e-12)
    inside = (shifted > -8) & (shifted < 7)
    by_beta = (g * ~inside).sum(1, keepdims=True)
    # with beta = -s z the step moves the offset too: d/ds = (paper's) + (d/d beta) * (-z)
    papers = (g * np.where(inside, level - shifted, level)).sum(1, keepdims=True)
    np.testing.assert_allclose(x.grad.numpy(), g * inside, rtol=1e-12)
    np.testing.assert_allclose(zero_point.grad.numpy(), 0.5 * by_beta * -s, rtol=1e-10)
    np.testing.assert_allclose(scale.grad.numpy(), 0.5 * (papers - by_beta * z), rtol=1e-9)


def test_values_and_gradients_are_those_of_pytorchs_kernel():
    """But for the half step beyond each end, where the paper clips and the kernel still rounds."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    x = x[((x / 0.3 + 5).abs() > 0.6) & ((x / 0.3 - 2).abs() > 0.6)]
    results = []
    for function in (
        lambda x, s, z: lsq_plus(x, s, z, -4, 3, gradient_scale=0.5),
        lambda x, s, z: torch._fake_quantize_learnable_per_tensor_affine(x, s, z, -4, 3, 0.5),
    ):
        own, step = x.clone().requires_grad_(), torch.full((1,), 0.3).requires_grad_()
        zero_point = torch.full((1,), 1.2).requires_grad_()
        out = function(own, step, zero_point)
        out.square().sum().backward()
        results.append((out.detach(), own.grad, step.grad, zero_point.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_weights_begin_at_three_standard_deviations(made):
    layer = nn.Linear(50, 2)
    quantizer = made(layer, [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int4"}])
    quantizer.start()
    w = layer.parametrizations.weight.original.detach().double().numpy()
    mean, deviation = w.mean(1), w.std(1)
    expected = np.maximum(np.abs(mean - 3 * deviation), np.abs(mean + 3 * deviation)) / 2**3
    config = quantizer.get_calibration_config()[""]["weight"]
    np.testing.assert_allclose(config["scale"][:, 0].numpy(), expected, rtol=1e-5)
    assert not config["zero_point"].any()
    pruned = torch.cat([torch.from_numpy(w), torch.zeros(2, 50)], dim=1)
    scale, _ = three_sigma(pruned, Format(IntDtype(4), "symmetric", -8, 7))
    np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-5)


def test_an_affine_weight_has_an_offset(made):
    layer = nn.Linear(50, 2)
    nn.init.uniform_(layer.weight, 1.0, 2.0)
    config = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int4", "quant_scheme": "affine"}]
    quantizer = made(layer, config)
    quantizer.start()
    found = quantizer.get_calibration_config()[""]["weight"]
    w = layer.parametrizations.weight.original.detach()
    expected = (w.mean(1) + 3 * w.std(1, correction=0)) / 15
    torch.testing.assert_close(found["scale"][:, 0], expected)
    assert found["zero_point"].flatten().tolist() == [-8, -8]


def test_inputs_begin_at_the_least_squared_error(made):
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 2), torch.nn.functional.silu(torch.randn(640, 8))
    x[0, 0] = 12.0
    quantizer = made(layer, INPUT)
    quantizer.start()
    train(layer, quantizer, [x], torch.sum)
    config = quantizer.get_calibration_config()[""]["_input_0"]
    assert config["quant_scheme"] == "affine"

    def error(scale, zero_point):
        quantized = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -8, 7)
        return (quantized - x).square().sum().item()

    tried = []
    for share in np.arange(1, 41) / 40:
        low, high = x.min().item() * share, x.max().item() * share
        scale = (high - low) / 15
        tried.append(error(scale, round(-8 - low / scale)))
    assert error(config["scale"].item(), int(config["zero_point"])) == pytest.approx(min(tried), rel=1e-5)
    assert min(tried) < 0.9 * tried[-1]


def test_of_many_values_some_are_looked_at():
    rows = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    scale, zero_point = closest_grid(rows, AFFINE)
    small, _ = closest_grid(rows[:90_000], AFFINE)
    assert scale.item() == pytest.approx(small.item(), rel=0.1)
    assert abs(zero_point.item() + 0.5) < 2


def test_nothing_but_zeros_has_a_grid():
    zeros = torch.zeros(2, 5)
    for scale, zero_point in (
        closest_grid(zeros, AFFINE),
        three_sigma(zeros, AFFINE),
        grid_between(*zeros.T[:2], AFFINE),
    ):
        assert scale.tolist() == [1, 1]
        assert zero_point.tolist() == [-8, -8]


def test_zero_points_stay_within_the_levels_and_are_learned(made):
    layer, x = nn.Linear(4, 1, bias=False), torch.randn(32, 4).abs()
    quantizer = made(layer, INPUT, learning_rate=0.1)
    nn.init.ones_(layer.weight)
    quantizer.start()
    train(layer, quantizer, [x] * 3, torch.sum)  # draws values down: the zero point up
    first = quantizer.get_calibration_config()[""]["_input_0"]["zero_point"]
    train(layer, quantizer, [x] * 60, torch.sum)
    assert -8 <= int(first) < int(quantizer.get_calibration_config()[""]["_input_0"]["zero_point"]) <= 7
    _, transform = quantizer.transforms()[0]
    assert transform.zero_point().item() == pytest.approx(7)
    train(layer, quantizer, [x] * 60, lambda out: -out.sum())
    assert transform.zero_point().item() == pytest.approx(-8)
    assert transform.scale() > 0


def test_symmetric_inputs_where_they_are_asked_for(made):
    layer = nn.Linear(4, 2)
    quantizer = made(layer, [{**INPUT[0], "quant_scheme": "symmetric"}])
    quantizer.start()
    train(layer, quantizer, [torch.randn(5, 4)], torch.sum)
    config = quantizer.get_calibration_config()[""]["_input_0"]
    assert (config["quant_scheme"], int(config["zero_point"])) == ("symmetric", 0)
