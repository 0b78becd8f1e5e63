"""GPTQ's walk, against the paper's column loop in numpy."""

import math

import numpy as np
import pytest
import torch

from tersor.config import IntDtype
from tersor.errors import InvalidValueError, MaskError, NumericalError
from tersor.quantization import second_order
from tersor.quantization.format import Format
from tersor.quantization.second_order import gptq


def correlated(samples: int, columns: int) -> torch.Tensor:
    """Inputs with a few directions that carry most, in float64."""
    hidden = torch.randn(samples, max(columns // 3, 1)).double()
    return hidden @ torch.randn(hidden.shape[1], columns).double() + 0.3 * torch.randn(samples, columns).double()


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def error_of(change: torch.Tensor, moment: torch.Tensor) -> float:
    return torch.trace(change.double() @ moment.double() @ change.double().T).item()


def symmetric(bits: int) -> Format:
    return Format(IntDtype(bits), "symmetric", 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def affine(bits: int) -> Format:
    return Format(IntDtype(bits, signed=False), "affine", 0, 2**bits - 1)


def scale_of(w, scheme, low, high):
    """Scale and zero point of a group of one row."""
    if scheme == "symmetric":
        return float(np.float32(max(abs(w)) / ((high - low) / 2) or 1.0)), 0.0
    least, greatest = min(w.min(), 0), max(w.max(), 0)
    scale = float(np.float32((greatest - least) / (high - low) or 1.0))
    return scale, low - np.round(least / scale)


def plain_gptq(rows, moment, form, *, group_size=None, keep=None, act_order=False, damping=0.01, shared=True):
    """The paper's loop: column by column, row by row, with an inverse of its own over what is left at each step.

    Masked weights are rounded to zero, where an inverse is shared by all rows; else they are left out.
    """
    if not shared:
        parts = []
        for row, own in zip(rows, keep, strict=True):
            settings = {"keep": own[None], "act_order": act_order, "damping": damping, "group_size": group_size}
            parts.append(plain_gptq(row[None], moment * own * own[:, None], form, **settings))
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))
    w, scheme, low, high = rows.numpy().copy(), form.scheme, form.low, form.high
    keep = np.ones_like(w, dtype=bool) if keep is None else keep.numpy()
    w *= keep
    height, width = w.shape
    group_size = group_size or width
    hessian = 2 * moment.numpy()
    diagonal = np.diag(hessian)
    alive = diagonal > 0
    hessian = hessian + np.diag(np.where(alive, damping, 1 + damping) * diagonal[alive].mean())
    walk = sorted(range(width), key=lambda c: -diagonal[c]) if act_order else list(range(width))
    groups = [range(first, first + group_size) for first in range(0, width, group_size)]
    scales = {(i, g): scale_of(w[i, group], scheme, low, high) for i in range(height) for g, group in enumerate(groups)}
    levels = np.zeros_like(w)
    for step, c in enumerate(walk):
        left = walk[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        for i in range(height):
            g = c // group_size
            if not act_order and c % group_size == 0:
                scales[i, g] = scale_of(w[i, groups[g]] * keep[i, groups[g]], scheme, low, high)
            scale, zero_point = scales[i, g]
            levels[i, c] = np.clip(np.round(w[i, c] / scale) + zero_point, low, high) if keep[i, c] else zero_point
            error = w[i, c] - scale * (levels[i, c] - zero_point)
            w[i, left] -= error / inverse[0, 0] * inverse[0]
            w[i, c] = scale * (levels[i, c] - zero_point)
    return w, np.array([[scales[i, g][0] for g in range(len(groups))] for i in range(height)])


@pytest.mark.parametrize("form", [symmetric(3), symmetric(4), affine(4), affine(2)], ids=str)
@pytest.mark.parametrize("group_size", [None, 3, 6])
@pytest.mark.parametrize("block_size", [1, 5, 6, 128])
def test_it_is_the_papers_loop(form, group_size, block_size):
    rows, moment = torch.randn(7, 12).double(), moment_of(correlated(40, 12))
    result, scale, zero_point = gptq(rows, moment, form, group_size=group_size, block_size=block_size)
    expected, scales = plain_gptq(rows, moment, form, group_size=group_size)
    np.testing.assert_allclose(result, expected, atol=1e-10)
    np.testing.assert_allclose(scale, scales, atol=1e-12)
    levels = result / scale.repeat_interleave(12 // scale.shape[1], 1)
    np.testing.assert_allclose(levels, levels.round(), atol=1e-9)
    assert (zero_point == 0).all() == (form.scheme == "symmetric")


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_columns_of_the_largest_inputs_first(group_size, block_size):
    rows, moment = torch.randn(7, 12).double(), moment_of(correlated(40, 12))
    settings = {"group_size": group_size, "act_order": True}
    result, scale, _ = gptq(rows, moment, symmetric(3), block_size=block_size, **settings)
    expected, scales = plain_gptq(rows, moment, symmetric(3), **settings)
    np.testing.assert_allclose(result, expected, atol=1e-10)
    np.testing.assert_allclose(scale, scales, atol=1e-12)
    original = rows.unflatten(1, (-1, group_size or 12)).abs().amax(2) / 3
    torch.testing.assert_close(scale, original.float())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("form", [symmetric(3), affine(3)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_masked_weights_stay_zero(shared, form, group_size, act_order, monkeypatch):
    monkeypatch.setattr(second_order, "_FACTOR_EACH_ROW", 0 if shared else 1e9)
    monkeypatch.setattr(second_order, "_FACTORS_AT_ONCE", 300)  # two rows
    rows, moment, keep = torch.randn(7, 12).double(), moment_of(correlated(40, 12)), torch.rand(7, 12) < 0.5
    settings = {"group_size": group_size, "keep": keep, "act_order": act_order}
    result = gptq(rows, moment, form, block_size=4, **settings)
    expected, scales = plain_gptq(rows, moment, form, shared=shared, **settings)
    np.testing.assert_allclose(result.rows, expected, atol=1e-10)
    np.testing.assert_allclose(result.scale, scales, atol=1e-12)
    assert result.rows[~keep].count_nonzero() == 0


def test_fixed_scales_and_masks_of_several_groups():
    rows, keep = torch.randn(2, 4, 8).double(), torch.rand(2, 4, 8) < 0.5
    moments = torch.stack([moment_of(correlated(30, 8)) for _ in range(2)])
    fixed = torch.rand(2, 4, 1).double() + 0.1, torch.zeros(2, 4, 1)
    result = gptq(rows, moments, symmetric(3), fixed=fixed, keep=keep)
    assert result.scale is fixed[0]
    assert result.zero_point is fixed[1]
    for group in range(2):
        for row in range(4):
            own = keep[group, row]
            alone = rows[group, row, own][None], moments[group][own][:, own]
            scales = fixed[0][group, row], fixed[1][group, row]
            torch.testing.assert_close(result.rows[group, row, own], gptq(*alone, symmetric(3), fixed=scales).rows[0])


def test_masked_rows_and_columns_need_one_factor(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(second_order, "_row_by_row", refuse)
    rows, moment, keep = torch.randn(6, 8).double(), moment_of(correlated(30, 8)), torch.ones(6, 8, dtype=torch.bool)
    keep[2], keep[:, [1, 5]] = False, False
    alive = [0, 2, 3, 4, 6, 7]
    result = gptq(rows, moment, symmetric(3), keep=keep).rows
    without = gptq(rows[:, alive], moment[alive][:, alive], symmetric(3)).rows
    without[2] = 0
    torch.testing.assert_close(result[:, alive], without)
    assert result[:, [1, 5]].count_nonzero() == 0


def test_a_mask_costs_less_than_masking_afterwards():
    moment, keep = moment_of(correlated(200, 24)), torch.rand(32, 24) < 0.5
    rows = torch.randn(32, 24).double() * keep
    result = gptq(rows, moment, symmetric(4), keep=keep).rows
    afterwards = gptq(rows, moment, symmetric(4)).rows * keep
    nearest = symmetric(4).simulate(rows, rows.abs().amax(1, keepdim=True) / 7, torch.zeros(()))
    errors = [error_of(rows - other, moment) for other in (result, afterwards, nearest)]
    assert errors[0] < 0.75 * min(errors[1:])


@pytest.mark.parametrize(("bits", "decibels"), [(2, 3.0), (3, 4.0), (4, 4.0)])
def test_less_is_lost_than_by_rounding_to_the_nearest(bits, decibels):
    rows, moment = torch.randn(32, 48), moment_of(correlated(300, 48)).float()
    form = symmetric(bits)
    scale = rows.abs().amax(1, keepdim=True) / form.high
    nearest = error_of(rows - form.simulate(rows, scale, torch.zeros(())), moment)
    plain, ordered = (error_of(rows - gptq(rows, moment, form, act_order=a).rows, moment) for a in (False, True))
    assert 10 * math.log10(nearest / plain) > decibels
    assert 10 * math.log10(nearest / ordered) > decibels


def test_without_correlation_it_is_the_nearest():
    rows = torch.randn(6, 9)
    result, scale, zero_point = gptq(rows, torch.diag(torch.rand(9) + 0.1), affine(3))
    least, greatest = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    torch.testing.assert_close(scale.squeeze(1), (greatest - least) / 7)
    q = torch.fake_quantize_per_channel_affine(rows, scale.squeeze(1), zero_point.squeeze(1).int(), 0, 0, 7)
    torch.testing.assert_close(result, q)


def test_scales_from_elsewhere():
    rows, moment = torch.randn(5, 8).double(), moment_of(correlated(30, 8))
    fixed = torch.tensor(0.25, dtype=torch.float64), torch.tensor(0.0)
    result, scale, zero_point = gptq(rows, moment, symmetric(4), fixed=fixed)
    assert (scale, zero_point) == fixed
    same = gptq(rows, moment, symmetric(4), fit=lambda blocks: (torch.full(blocks.shape[:-1], 0.25), torch.zeros(1)))
    assert torch.equal(result, same.rows)
    assert torch.equal(result * 4, (result * 4).round())


def test_scales_by_another_rule_for_each_group():
    rows, moment, seen = torch.randn(5, 8).double(), moment_of(correlated(30, 8)), []

    def half(blocks):
        seen.append(blocks.shape)
        return blocks.abs().amax(-1) / 14, torch.zeros(blocks.shape[:-1])

    _, scale, _ = gptq(rows, moment, symmetric(4), group_size=4, fit=half)
    assert seen == [(5, 2, 4), (5, 4), (5, 4)]
    torch.testing.assert_close(scale[:, 0], rows[:, :4].abs().amax(1) / 14)


def test_groups_of_a_layer_have_a_moment_and_an_order_each():
    rows, moments = torch.randn(3, 4, 8).double(), torch.stack([moment_of(correlated(30, 8)) for _ in range(3)])
    for settings in ({}, {"act_order": True, "group_size": 4}, {"group_size": 2}):
        result, scale, _ = gptq(rows, moments, symmetric(3), **settings)
        for group in range(3):
            alone = gptq(rows[group], moments[group], symmetric(3), **settings)
            torch.testing.assert_close(result[group], alone.rows)
            torch.testing.assert_close(scale[group], alone.scale)


def test_dead_columns_are_rounded_by_themselves():
    x, rows = correlated(40, 8), torch.randn(5, 8).double()
    x[:, [2, 5]] = 0
    fixed = torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.0)
    moment, alive = moment_of(x), [0, 1, 3, 4, 6, 7]
    result = gptq(rows, moment, symmetric(6), fixed=fixed).rows
    torch.testing.assert_close(result[:, [2, 5]], (rows[:, [2, 5]] / 0.2).round() * 0.2)
    without = gptq(rows[:, alive], moment[alive][:, alive], symmetric(6), fixed=fixed).rows
    torch.testing.assert_close(result[:, alive], without)


def test_fewer_samples_than_columns():
    rows, moment = torch.randn(16, 40), moment_of(correlated(10, 40)).float()
    result = gptq(rows, moment, symmetric(4)).rows
    nearest = symmetric(4).simulate(rows, rows.abs().amax(1, keepdim=True) / 7, torch.zeros(()))
    assert error_of(rows - result, moment) < 0.25 * error_of(rows - nearest, moment)


def test_damping_is_raised_where_it_must_be():
    rows, moment = torch.randn(4, 12), moment_of(correlated(3, 12)).float()
    with pytest.warns(UserWarning, match=r"fc: the second moment is singular; damping raised from 0\.0"):
        result = gptq(rows, moment, symmetric(4), damping=0.0, where="fc").rows
    assert result.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_computed_in_float32(dtype):
    rows, moment = torch.randn(6, 12).to(dtype), moment_of(correlated(40, 12)).float()
    result, wide = gptq(rows, moment, symmetric(4)), gptq(rows.float(), moment, symmetric(4))
    assert result.rows.dtype == dtype
    assert torch.equal(result.rows, wide.rows.to(dtype))
    assert torch.equal(result.scale, wide.scale)


def test_arguments_are_unchanged():
    rows, moment, keep = torch.randn(4, 6), moment_of(correlated(20, 6)).float(), torch.rand(4, 6) < 0.5
    fixed = torch.full((4, 1), 0.3), torch.zeros(4, 1)
    copies = rows.clone(), moment.clone(), keep.clone(), fixed[0].clone()
    gptq(rows, moment, symmetric(4), keep=keep, group_size=3)
    gptq(rows, moment, symmetric(4), fixed=fixed, act_order=True)
    assert all(torch.equal(a, b) for a, b in zip((rows, moment, keep, fixed[0]), copies, strict=True))
    assert not gptq(torch.nn.Parameter(rows), moment, symmetric(4)).rows.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 3}, "groups of 3 do not fill a row of 8 columns"),
        ({"group_size": 0}, "groups of 0"),
        ({"block_size": 0}, "block_size 0"),
        ({"damping": -1.0}, "damping of -1.0 is below 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InvalidValueError, match=f"^fc: .*{message}"):
        gptq(torch.ones(2, 8), torch.eye(8), symmetric(4), where="fc", **settings)


@pytest.mark.parametrize("keep", [torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 8)])
def test_masks_that_do_not_fit(keep):
    with pytest.raises(MaskError, match=r"keep is of shape .*Legal: \(2, 8\), bool"):
        gptq(torch.ones(2, 8), torch.eye(8), symmetric(4), keep=keep)


def test_numbers_that_are_not_finite():
    with pytest.raises(NumericalError, match=r"fc: the weight has 1 elements"):
        gptq(torch.tensor([[1.0, math.nan]]), torch.eye(2), symmetric(4), where="fc")
