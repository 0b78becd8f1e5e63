"""The mathematics of AdaRound, against the paper's formulas in float64 and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from tersor.config import IntDtype
from tersor.errors import InvalidValueError
from tersor.quantization.format import Format
from tersor.quantization.learned_rounding import (
    RoundingSettings,
    adaround,
    inverse_step_up,
    regularizer,
    soft_quantized,
    step_up,
)
from tersor.testing.processes import in_two_processes, why_not_two

ZERO = torch.tensor(0.0)


def symmetric(bits):
    return Format(IntDtype(bits), "symmetric", 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def affine(bits):
    return Format(IntDtype(bits, signed=False), "affine", 0, 2**bits - 1)


def correlated(samples, columns):
    hidden = torch.randn(samples, columns // 3) @ torch.randn(columns // 3, columns)
    return hidden + 0.3 * torch.randn(samples, columns)


def error_of(rows, x, y):
    return float((x.double() @ rows.double().mT - y.double()).square().sum())


def test_the_rectified_sigmoid():
    v = torch.linspace(-8, 8, 101).double()
    expected = np.clip(1.2 / (1 + np.exp(-v.numpy())) - 0.1, 0, 1)
    np.testing.assert_allclose(step_up(v), expected, atol=1e-15)
    assert step_up(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]  # reached, and not only approached


def test_its_inverse():
    h = torch.linspace(0, 1, 51).double()
    torch.testing.assert_close(step_up(inverse_step_up(h)), h)


def test_the_gradient_of_the_rectified_sigmoid():
    v = torch.tensor([-4.0, -1.0, 0.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    step_up(v).sum().backward()
    s = 1 / (1 + np.exp(-v.detach().numpy()))
    np.testing.assert_allclose(v.grad, 1.2 * s * (1 - s) * (np.abs(v.detach().numpy()) < 3))


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_the_regularizer_and_its_gradient(beta):
    h = torch.tensor([0.0, 0.1, 0.45, 0.8, 1.0], dtype=torch.float64, requires_grad=True)
    cost = regularizer(h, beta)
    cost.backward()
    d = 2 * h.detach().numpy() - 1
    assert cost.item() == pytest.approx(np.sum(1 - np.abs(d) ** beta))
    np.testing.assert_allclose(h.grad, -2 * beta * np.sign(d) * np.abs(d) ** (beta - 1))


def test_the_soft_weight():
    w, scale = torch.randn(3, 5).double(), torch.rand(3, 1).double() + 0.2
    lower, h = (w / scale).floor(), torch.rand(3, 5).double()
    expected = scale.numpy() * (np.clip(np.floor(w.numpy() / scale.numpy()) + h.numpy() + 3, 0, 7) - 3)
    np.testing.assert_allclose(soft_quantized(lower, h, scale, torch.tensor(3.0), affine(3)), expected, atol=1e-12)


@pytest.mark.parametrize("form", [symmetric(3), affine(3)], ids=str)
def test_without_a_step_up_or_down_it_is_the_format(form):
    """Up where the nearest is above: what is simulated."""
    w = torch.randn(3, 5)
    scale, zero_point = form.scale_and_zero_point(w.amin(1, keepdim=True), 0.7 * w.amax(1, keepdim=True))
    lower, steps = (w * (1 / scale)).floor(), w * (1 / scale)
    soft = soft_quantized(lower, steps.round() - lower, scale, zero_point, form)
    assert torch.equal(soft, form.simulate(w, scale, zero_point))


def test_the_gradient_of_the_reconstruction_by_finite_differences():
    w, x, scale = torch.randn(2, 4).double(), torch.randn(6, 4).double(), torch.tensor(0.4).double()
    lower, y = (w / scale).floor(), torch.randn(6, 2).double()

    def loss(v):
        soft = soft_quantized(lower, step_up(v), scale, ZERO, symmetric(3))
        return (x @ soft.mT - y).square().sum() + 0.3 * regularizer(step_up(v), 4.0)

    v = inverse_step_up(w / scale - lower).requires_grad_()
    assert torch.autograd.gradcheck(loss, v)
    loss(v).backward()
    soft = soft_quantized(lower, step_up(v.detach()), scale, ZERO, symmetric(3))
    level, h = lower + step_up(v.detach()), step_up(v.detach())
    slope = 1.2 * torch.sigmoid(v.detach()) * (1 - torch.sigmoid(v.detach()))
    inside, d = (level > -3) & (level < 3), 2 * h - 1
    of_weight = 2 * (x @ soft.mT - y).mT @ x * scale * inside
    expected = (of_weight - 0.3 * 8 * d.sign() * d.abs() ** 3) * slope
    torch.testing.assert_close(v.grad, expected)


class TestLearning:
    def test_beta_falls_after_the_warm_start(self):
        settings = RoundingSettings(iterations=10, warm_start=0.2, beta=(20.0, 6.0))
        betas = [settings.beta_at(step) for step in range(10)]
        assert betas == [None, None, 20, 18, 16, 14, 12, 10, 8, 6]

    def test_one_step(self):
        assert RoundingSettings(iterations=1, warm_start=0.0).beta_at(0) == 20

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"iterations": 0}, "iterations: 0 is no number of steps"),
            ({"batch_size": 1.5}, "batch_size: 1.5 is no number of samples"),
            ({"warm_start": 1.1}, "warm_start: "),
            ({"learning_rate": -1}, "learning_rate: "),
            ({"regular_scale": math.nan}, "regular_scale: "),
        ],
    )
    def test_numbers_out_of_range(self, settings, message):
        with pytest.raises(InvalidValueError, match=message):
            RoundingSettings(**settings)


@pytest.mark.parametrize("form", [symmetric(3), affine(2)], ids=str)
def test_it_comes_near_the_best_of_all_roundings(form):
    x, rows = correlated(64, 8), torch.randn(40, 8)
    scale, zero_point = form.scale_and_zero_point(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
    y, lower, best = x @ rows.mT, (rows * (1 / scale)).floor(), torch.full((40,), torch.inf)
    for up in itertools.product([0.0, 1.0], repeat=8):
        one = soft_quantized(lower, torch.tensor(up), scale, zero_point, form)
        best = torch.minimum(best, (x @ one.mT - y).square().sum(0))
    result = adaround(rows[None], x[None], y[None], form, (scale, zero_point), settings=RoundingSettings(300, 64))[0]
    nearest = error_of(form.simulate(rows, scale, zero_point), x, y)
    assert best.sum() < 0.4 * nearest  # there is something to win
    assert nearest - error_of(result, x, y) > 0.65 * (nearest - best.sum())
    levels = result / scale + zero_point
    torch.testing.assert_close(levels, levels.round())
    assert ((levels.round() >= form.low) & (levels.round() <= form.high)).all()
    assert ((result - rows).abs() <= scale * 1.0001).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_size_of_inputs_does_not_matter(size):
    x, rows = correlated(256, 24), torch.randn(8, 24)
    scale = rows.abs().amax(1, keepdim=True) / 7
    result = adaround(
        rows[None],
        size * x[None],
        size * (x @ rows.mT)[None],
        symmetric(4),
        (scale, ZERO),
        settings=RoundingSettings(300),
    )[0]
    nearest = error_of(symmetric(4).simulate(rows, scale, ZERO), x, x @ rows.mT)
    assert 10 * math.log10(nearest / error_of(result, x, x @ rows.mT)) > 3


def test_masked_weights_stay_zero_and_the_others_know():
    x, rows, keep = correlated(256, 24), torch.randn(8, 24), torch.rand(8, 24) < 0.6
    scale, y = rows.abs().amax(1, keepdim=True) / 7, x @ (rows * keep).mT
    settings = {"settings": RoundingSettings(300)}
    result = adaround(rows[None], x[None], y[None], symmetric(4), (scale, ZERO), keep=keep[None], **settings)[0]
    assert result[~keep].count_nonzero() == 0
    nearest = symmetric(4).simulate(rows * keep, scale, ZERO)
    assert error_of(result, x, y) < 0.6 * error_of(nearest, x, y)


def test_what_is_exact_stays():
    rows, x = torch.tensor([[[1.0, -3.0]]]), torch.randn(1, 16, 2)
    assert torch.equal(adaround(rows, x, x @ rows.mT, symmetric(3), (torch.tensor(1.0), ZERO)), rows)


def test_groups_are_learned_each_by_its_inputs():
    x, rows = torch.stack([correlated(128, 9), correlated(128, 9)]), torch.randn(2, 4, 9)
    scale, y = rows.abs().amax(2, keepdim=True) / 3, x @ rows.mT
    result = adaround(rows, x, y, symmetric(3), (scale, ZERO), settings=RoundingSettings(300))
    for group in range(2):
        nearest = symmetric(3).simulate(rows[group], scale[group], ZERO)
        assert error_of(result[group], x[group], y[group]) < 0.75 * error_of(nearest, x[group], y[group])


def test_a_seed_gives_the_same_and_arguments_are_unchanged():
    x, rows = correlated(64, 12).half(), torch.randn(1, 4, 12).half()
    scale, y = rows.abs().amax(2, keepdim=True).float() / 3, (x.float() @ rows[0].float().mT)[None]
    copies = x.clone(), rows.clone(), scale.clone(), y.clone()
    state = torch.get_rng_state()
    made = [
        adaround(rows, x[None].float(), y, symmetric(3), (scale, ZERO), settings=RoundingSettings(30), seed=3)
        for _ in range(2)
    ]
    assert torch.equal(*made)
    assert made[0].dtype == torch.float16
    assert not made[0].requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip((x, rows, scale, y), copies, strict=True))


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_learn_the_same_from_all_samples():
    x, rows = correlated(128, 12), torch.randn(1, 4, 12)
    scale = rows.abs().amax(2, keepdim=True) / 3

    def work(rank):
        own = x[rank::2][None]
        return {"rows": adaround(rows, own, own @ rows.mT, symmetric(3), (scale, ZERO), settings=RoundingSettings(100))}

    first, second = in_two_processes(work)
    assert torch.equal(first["rows"], second["rows"])
