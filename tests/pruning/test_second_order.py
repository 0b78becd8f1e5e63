"""Second-order pruning of weights, against the paper's column loop in numpy and against least squares."""

import math

import numpy as np
import pytest
import torch

from tersor.errors import InvalidValueError, MaskError, NumericalError
from tersor.pruning.second_order import sparsegpt


def correlated(samples: int, columns: int) -> torch.Tensor:
    """Inputs with a few directions that carry most, in float64."""
    hidden = torch.randn(samples, max(columns // 3, 1)).double()
    return hidden @ torch.randn(hidden.shape[1], columns).double() + 0.3 * torch.randn(samples, columns).double()


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def error_of(change: torch.Tensor, moment: torch.Tensor) -> float:
    return torch.trace(change @ moment @ change.T).item()


def plain_sparsegpt(rows, moment, *, ratio=None, keep_of=None, keep=None, block_size=128, damping=0.01):
    """Algorithm 1 of the paper, column by column, row by row, with an inverse of its own for each step."""
    w, hessian = rows.numpy().copy(), 2 * moment.numpy()
    height, width = w.shape
    hessian = hessian + damping * np.mean(np.diag(hessian)) * np.eye(width)
    inverses = [np.linalg.inv(hessian[j:, j:]) for j in range(width)]
    mask = np.ones_like(w, dtype=bool) if keep is None else keep.numpy().copy()
    for j in range(width):
        if ratio is not None and j % block_size == 0:
            end = min(j + block_size, width)
            count = math.floor(ratio * height * end + 1e-6) - math.floor(ratio * height * j + 1e-6)
            costs = {(i, c): w[i, c] ** 2 / inverses[c][0, 0] for i in range(height) for c in range(j, end)}
            for place in sorted(costs, key=costs.__getitem__)[:count]:
                mask[place] = False
        if keep_of is not None and j % keep_of[1] == 0:
            for i in range(height):
                group = range(j, j + keep_of[1])
                for c in sorted(group, key=lambda c: w[i, c] ** 2 / inverses[c][0, 0])[: keep_of[1] - keep_of[0]]:
                    mask[i, c] = False
        for i in range(height):
            if not mask[i, j]:
                w[i, j:] -= w[i, j] / inverses[j][0, 0] * inverses[j][0]
    return mask, w * mask


@pytest.mark.parametrize("block_size", [1, 4, 5, 128])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_ratio_is_the_papers_loop(ratio, block_size):
    rows, moment = torch.randn(7, 13).double(), moment_of(correlated(40, 13))
    mask, result = sparsegpt(rows, moment, ratio=ratio, block_size=block_size)
    expected_mask, expected = plain_sparsegpt(rows, moment, ratio=ratio, block_size=block_size)
    assert mask.tolist() == expected_mask.tolist()
    np.testing.assert_allclose(result, expected, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 4, 6, 10, 128])
@pytest.mark.parametrize("keep_of", [(2, 4), (1, 4), (1, 2), (4, 4)])
def test_n_of_m_is_the_papers_loop(keep_of, block_size):
    rows, moment = torch.randn(6, 16).double(), moment_of(correlated(40, 16))
    mask, result = sparsegpt(rows, moment, keep_of=keep_of, block_size=block_size)
    expected_mask, expected = plain_sparsegpt(rows, moment, keep_of=keep_of)
    assert mask.tolist() == expected_mask.tolist()
    assert (mask.view(6, -1, keep_of[1]).sum(dim=2) == keep_of[0]).all()
    np.testing.assert_allclose(result, expected, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_given_mask_is_the_papers_loop(block_size):
    rows, moment, keep = torch.randn(6, 12).double(), moment_of(correlated(40, 12)), torch.rand(6, 12) < 0.6
    mask, result = sparsegpt(rows, moment, keep=keep, block_size=block_size, damping=0.1)
    assert torch.equal(mask, keep)
    np.testing.assert_allclose(result, plain_sparsegpt(rows, moment, keep=keep, damping=0.1)[1], atol=1e-10)


def test_columns_that_leave_first_are_exact_least_squares():
    x, rows = correlated(60, 9), torch.randn(5, 9).double()
    keep = torch.zeros(5, 9, dtype=torch.bool)
    keep[:, 4:] = True
    _, result = sparsegpt(rows, moment_of(x), keep=keep, block_size=3, damping=0.0)
    expected = torch.linalg.lstsq(x[:, 4:], x @ rows.T).solution.T
    torch.testing.assert_close(result[:, 4:], expected)
    assert result[:, :4].count_nonzero() == 0


def test_errors_are_ordered_on_correlated_inputs():
    x, rows = correlated(300, 48).float(), torch.randn(32, 48)
    moment = moment_of(x)
    mask, result = sparsegpt(rows, moment, ratio=0.5, block_size=16)
    order = rows.abs().flatten().argsort()[: rows.numel() // 2]
    by_magnitude = rows.flatten().index_fill(0, order, 0).view_as(rows)
    best = torch.zeros_like(rows)
    for row, kept in enumerate(mask):
        best[row, kept] = torch.linalg.lstsq(x[:, kept], x @ rows[row]).solution
    errors = [error_of(rows - other, moment) for other in (best, result, rows * mask, by_magnitude)]
    assert errors[0] < errors[1] < 0.5 * errors[3]
    assert errors[1] < errors[2]


@pytest.mark.parametrize(("shape", "block_size"), [((3, 7), 4), ((5, 130), 128), ((1, 11), 3), ((4, 3, 10), 4)])
@pytest.mark.parametrize("ratio", [0.1, 0.29, 0.57, 0.999])
def test_ratio_is_exact(shape, block_size, ratio):
    rows = torch.randn(shape).double()
    mask, result = sparsegpt(rows, torch.eye(shape[-1]).double(), ratio=ratio, block_size=block_size)
    assert (~mask).sum().item() == math.floor(ratio * rows.numel() + 1e-6)
    assert result[~mask].count_nonzero() == 0


def test_ratio_is_a_decimal_fraction():
    assert 0.29 * 100 < 29  # in binary
    mask, _ = sparsegpt(torch.randn(10, 10), torch.eye(10), ratio=0.29)
    assert (~mask).sum().item() == 29


def test_equal_weights_leave_in_order():
    mask, _ = sparsegpt(torch.ones(2, 4), torch.eye(4), ratio=0.25)
    assert mask.tolist() == [[False, False, True, True], [True, True, True, True]]


def test_groups_share_a_ratio_and_have_a_moment_each():
    rows, moments = torch.randn(3, 4, 8).double(), torch.stack([moment_of(correlated(30, 8)) for _ in range(3)])
    mask, result = sparsegpt(rows, moments, ratio=0.5, block_size=8)
    for group in range(3):
        _, alone = sparsegpt(rows[group], moments[group], keep=mask[group])
        torch.testing.assert_close(result[group], alone)
    # Without a block to come, what leaves is what costs least over all groups.
    factors = [np.linalg.cholesky(np.linalg.inv(damped(moment))).T for moment in moments.numpy()]
    costs = np.stack([rows[g].numpy() ** 2 / np.diag(factors[g]) ** 2 for g in range(3)])
    assert costs[~mask.numpy()].max() < costs[mask.numpy()].min()


def damped(moment: np.ndarray, damping: float = 0.01) -> np.ndarray:
    return moment + damping * np.mean(np.diag(moment)) * np.eye(len(moment))


def test_fewer_samples_than_columns():
    x, rows = correlated(10, 40).float(), torch.randn(16, 40)
    moment = moment_of(x)
    mask, result = sparsegpt(rows, moment, ratio=0.5, block_size=8)
    order = rows.abs().flatten().argsort()[: rows.numel() // 2]
    by_magnitude = rows.flatten().index_fill(0, order, 0).view_as(rows)
    assert error_of(rows - result, moment) < 0.5 * error_of(rows - by_magnitude, moment)
    np.testing.assert_allclose(
        result, plain_sparsegpt(rows.double(), moment.double(), keep=mask)[1], atol=2e-3 * rows.abs().max().item()
    )


def test_dead_columns_leave_first_and_change_nothing_else():
    x, rows = correlated(40, 8), torch.randn(5, 8).double()
    x[:, [2, 5]] = 0
    moment = moment_of(x)
    mask, result = sparsegpt(rows, moment, ratio=0.25)
    assert (~mask).nonzero()[:, 1].tolist() == [2, 5] * 5
    assert torch.equal(result[mask], rows[mask])
    mask, result = sparsegpt(rows, moment, ratio=0.1)
    assert torch.equal(result, rows * mask)
    mask, result = sparsegpt(rows, moment, ratio=0.6)
    alive = [0, 1, 3, 4, 6, 7]
    _, without = sparsegpt(rows[:, alive], moment[alive][:, alive], keep=mask[:, alive])
    torch.testing.assert_close(result[:, alive], without)


def test_all_columns_dead():
    mask, result = sparsegpt(torch.ones(2, 4), torch.zeros(4, 4), keep_of=(2, 4))
    assert mask.sum(dim=1).tolist() == [2, 2]
    assert result.sum().item() == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_computed_in_float32(dtype):
    rows, moment = torch.randn(6, 12).to(dtype), moment_of(correlated(40, 12)).float()
    mask, result = sparsegpt(rows, moment, ratio=0.5)
    wide_mask, wide = sparsegpt(rows.float(), moment, ratio=0.5)
    assert result.dtype == dtype
    assert torch.equal(mask, wide_mask)
    assert torch.equal(result, wide.to(dtype))


def test_arguments_are_unchanged():
    rows, moment, keep = torch.randn(4, 6), moment_of(correlated(20, 6)).float(), torch.rand(4, 6) < 0.5
    copies = rows.clone(), moment.clone(), keep.clone()
    sparsegpt(rows, moment, keep=keep)
    sparsegpt(rows, moment, ratio=0.5)
    assert all(torch.equal(a, b) for a, b in zip((rows, moment, keep), copies, strict=True))
    parameter = torch.nn.Parameter(rows)
    assert not sparsegpt(parameter, moment, ratio=0.5)[1].requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing says what leaves.*exactly one"),
        ({"ratio": 0.5, "keep_of": (2, 4)}, "ratio and keep_of says what leaves"),
        ({"ratio": 1.0}, r"ratio 1.0 is outside \[0, 1\)"),
        ({"ratio": -0.1}, r"ratio -0.1 is outside"),
        ({"ratio": math.nan}, r"ratio nan is outside"),
        ({"keep_of": (0, 4)}, "0 of 4 cannot be kept"),
        ({"keep_of": (5, 4)}, "5 of 4 cannot be kept"),
        ({"keep_of": (2, 5)}, "8 columns are no multiple of 5"),
        ({"ratio": 0.5, "block_size": 0}, "block_size 0"),
        ({"ratio": 0.5, "damping": -1.0}, "damping of -1.0 is below 0"),
        ({"ratio": 0.5, "damping": math.nan}, "damping of nan"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InvalidValueError, match=f"^fc: .*{message}"):
        sparsegpt(torch.ones(2, 8), torch.eye(8), where="fc", **settings)


@pytest.mark.parametrize("keep", [torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 8)])
def test_masks_that_do_not_fit(keep):
    with pytest.raises(MaskError, match=r"keep is of shape .*Legal: \(2, 8\), bool"):
        sparsegpt(torch.ones(2, 8), torch.eye(8), keep=keep)


def test_numbers_that_are_not_finite():
    with pytest.raises(NumericalError, match=r"fc: the weight has 1 elements"):
        sparsegpt(torch.tensor([[1.0, math.nan]]), torch.eye(2), ratio=0.5, where="fc")
