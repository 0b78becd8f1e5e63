"""Removal of groups of columns, against least squares on the inputs themselves in float64."""

import math

import numpy as np
import pytest
import torch

from tersor.errors import InvalidValueError, MaskError, NumericalError
from tersor.pruning.reconstruction import bias_shift, greedy_removal, group_saliency, reconstruct
from tersor.training.layer_inputs import SecondMoment

GROUPS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1, 4])


def inputs(samples: int = 60, columns: int = 9) -> torch.Tensor:
    hidden = torch.randn(samples, 4).double()
    return hidden @ torch.randn(4, columns).double() + 0.5 * torch.randn(samples, columns).double() + 1


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def without(x: torch.Tensor, rows: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The best weights on the columns kept, and the squared error of the output, by least squares on samples."""
    target = x @ rows.T
    weights = torch.zeros_like(rows)
    weights[:, keep] = torch.linalg.lstsq(x[:, keep], target).solution.T
    return weights, ((target - x @ weights.T) ** 2).sum().item() / len(x)


def kept(*removed: int) -> torch.Tensor:
    return ~torch.isin(GROUPS, torch.tensor(removed))


@pytest.mark.parametrize("removed", [(), (0,), (1, 3), (0, 2, 4)])
def test_reconstruction_is_least_squares(removed):
    x, rows = inputs(), torch.randn(5, 9).double()
    result = reconstruct(rows, moment_of(x), kept(*removed), damping=0.0)
    torch.testing.assert_close(result, without(x, rows, kept(*removed))[0])
    assert result[:, ~kept(*removed)].count_nonzero() == 0


def test_reconstruction_on_changed_inputs():
    x = inputs()
    changed, rows, keep = x + 0.3 * inputs(), torch.randn(5, 9).double(), kept(1)
    cross, moment = SecondMoment.zeros(1, 9), SecondMoment.zeros(1, 9)
    cross.add(x.unsqueeze(0), changed.unsqueeze(0))
    moment.add(changed.unsqueeze(0))
    result = reconstruct(rows, moment.matrix[0], keep, cross=cross.matrix[0], damping=0.0)
    expected = torch.linalg.lstsq(changed[:, keep], x @ rows.T).solution.T
    torch.testing.assert_close(result[:, keep], expected)


@pytest.mark.parametrize("changes", [False, True])
def test_reconstruction_with_intercept(changes):
    x, rows, keep = inputs(), torch.randn(5, 9).double(), kept(0, 3)
    changed = x + 0.3 * inputs() if changes else x
    cross, moment = SecondMoment.zeros(1, 9), SecondMoment.zeros(1, 9)
    cross.add(x.unsqueeze(0), changed.unsqueeze(0))
    moment.add(changed.unsqueeze(0))
    result = reconstruct(rows, moment.covariance[0], keep, cross=cross.covariance[0], damping=0.0)
    shift = bias_shift(rows, result, cross.x_mean[0], cross.y_mean[0])
    with_one = torch.cat([changed[:, keep], torch.ones(len(x), 1).double()], dim=1)
    expected = torch.linalg.lstsq(with_one, x @ rows.T).solution.T
    torch.testing.assert_close(result[:, keep], expected[:, :-1])
    torch.testing.assert_close(shift, expected[:, -1])


def test_damping_is_ridge_around_the_weights():
    x, rows, keep = inputs(), torch.randn(5, 9).double(), kept(1)
    moment = moment_of(x)
    ridge = 0.1 * moment.diagonal()[keep].mean()
    result = reconstruct(rows, moment, keep, damping=0.1)
    # The same as least squares with one more sample a column, that asks for the weight as it was.
    more = torch.cat([x, (len(x) * ridge).sqrt() * torch.eye(9).double()])
    target = more @ rows.T
    expected = torch.linalg.lstsq(more[:, keep], target).solution.T
    torch.testing.assert_close(result[:, keep], expected)
    torch.testing.assert_close(reconstruct(rows, moment, kept(), damping=0.5), rows)


def test_dead_columns_stay_as_they_are():
    x, rows = inputs(), torch.randn(5, 9).double()
    x[:, 6] = 0
    result = reconstruct(rows, moment_of(x), kept(0), damping=0.0)
    alive = torch.arange(9) != 6
    torch.testing.assert_close(result[:, alive], without(x[:, alive], rows[:, alive], kept(0)[alive])[0])
    torch.testing.assert_close(result[:, 6], rows[:, 6])


def test_nothing_kept_and_half_weights():
    rows = torch.randn(5, 9)
    assert torch.equal(reconstruct(rows, moment_of(inputs()), torch.zeros(9, dtype=torch.bool)), torch.zeros(5, 9))
    moment = moment_of(inputs()).float()
    result = reconstruct(rows.half(), moment, kept(1))
    assert result.dtype == torch.float16
    assert torch.equal(result, reconstruct(rows.half().float(), moment, kept(1)).half())


def test_saliency_is_the_error_that_removal_brings():
    x, rows = inputs(), torch.randn(5, 9).double()
    saliency = group_saliency(rows, moment_of(x), GROUPS, damping=0.0)
    expected = [without(x, rows, kept(group))[1] for group in range(5)]
    torch.testing.assert_close(saliency, torch.tensor(expected, dtype=torch.float64))


def test_saliency_with_damping_counts_the_ridge():
    x, rows = inputs(), torch.randn(5, 9).double()
    moment = moment_of(x)
    ridge = 0.1 * moment.diagonal().mean()
    more = torch.cat([x, (len(x) * ridge).sqrt() * torch.eye(9).double()])
    expected = [without(more, rows, kept(group))[1] * len(more) / len(x) for group in range(5)]
    saliency = group_saliency(rows, moment, GROUPS, damping=0.1)
    torch.testing.assert_close(saliency, torch.tensor(expected, dtype=torch.float64))


def test_saliency_of_all_columns_is_the_whole_output():
    x, rows = inputs(), torch.randn(5, 9).double()
    saliency = group_saliency(rows, moment_of(x), torch.zeros(9, dtype=torch.long), damping=0.0)
    np.testing.assert_allclose(saliency, [((x @ rows.T) ** 2).sum().item() / len(x)])


def test_columns_that_always_stay_and_dead_columns():
    x, rows = inputs(), torch.randn(5, 9).double()
    x[:, [6, 8]] = 0
    groups = torch.where(torch.arange(9) == 3, -1, torch.tensor([0, 0, 1, 0, 2, 2, 3, 1, 2]))
    saliency = group_saliency(rows, moment_of(x), groups, damping=0.0)
    alive = [0, 1, 2, 3, 4, 5, 7]
    expected = [without(x[:, alive], rows[:, alive], groups[alive] != group)[1] for group in range(3)]
    np.testing.assert_allclose(saliency, [*expected, 0.0], atol=1e-12)
    order, _ = greedy_removal(rows, moment_of(x), groups, 4, damping=0.0)
    assert order[0] == 3
    assert sorted(order.tolist()) == [0, 1, 2, 3]


def test_greedy_removal_is_step_by_step_least_squares():
    x, rows = inputs(), torch.randn(5, 9).double()
    order, saliency = greedy_removal(rows, moment_of(x), GROUPS, 5, damping=0.0)
    gone: list[int] = []
    before = 0.0
    for group, cost in zip(order.tolist(), saliency.tolist(), strict=True):
        errors = {other: without(x, rows, kept(*gone, other))[1] for other in range(5) if other not in gone}
        assert group == min(errors, key=errors.__getitem__)
        assert cost == pytest.approx(errors[group] - before)
        gone.append(group)
        before = errors[group]
    shorter, costs = greedy_removal(rows, moment_of(x), GROUPS, 2, damping=0.0)
    assert shorter.tolist() == gone[:2]
    torch.testing.assert_close(costs, saliency[:2])
    assert greedy_removal(rows, moment_of(x), GROUPS, 0)[0].tolist() == []


def test_greedy_removal_takes_one_of_two_twins():
    x, rows = inputs(columns=6), torch.tensor([[3.0, 3.0, 0.1, 0.1, 0.1, 0.1]]).double()
    x[:, 1] = x[:, 0]
    moment = moment_of(x)
    alone = group_saliency(rows, moment, torch.arange(6), damping=1e-9)
    assert set(alone.argsort()[:2].tolist()) == {0, 1}
    order, _ = greedy_removal(rows, moment, torch.arange(6), 4, damping=1e-9)
    assert len({0, 1} & set(order.tolist())) == 1


def test_hundreds_of_removals_keep_their_digits():
    x, rows = torch.randn(400, 30).double() @ torch.randn(30, 200).double(), torch.randn(20, 200).double()
    x += 0.1 * torch.randn(400, 200).double()
    order, saliency = greedy_removal(rows.float(), moment_of(x).float(), torch.arange(200), 190, damping=1e-6)
    keep = ~torch.isin(torch.arange(200), order)
    assert saliency.sum().item() == pytest.approx(without(x, rows, keep)[1], rel=1e-3)


def test_arguments_are_unchanged():
    rows, moment = torch.randn(5, 9).double(), moment_of(inputs())
    copies = rows.clone(), moment.clone()
    group_saliency(rows, moment, GROUPS)
    greedy_removal(rows, moment, GROUPS, 4)
    reconstruct(rows, moment, kept(1))
    assert torch.equal(rows, copies[0])
    assert torch.equal(moment, copies[1])


def test_what_is_refused():
    rows, moment = torch.randn(2, 3), torch.eye(3)
    with pytest.raises(InvalidValueError, match="fc: no column is of group 1"):
        group_saliency(rows, moment, torch.tensor([0, 2, 2]), where="fc")
    with pytest.raises(InvalidValueError, match=r"shape \(2,\)\. Legal: \(3,\)"):
        group_saliency(rows, moment, torch.tensor([0, 1]))
    with pytest.raises(InvalidValueError, match="fc: 3 of 2 groups cannot be removed"):
        greedy_removal(rows, moment, torch.tensor([0, 1, 1]), 3, where="fc")
    with pytest.raises(MaskError, match=r"keep_columns is of shape \(3,\) and torch.float32"):
        reconstruct(rows, moment, torch.ones(3))
    with pytest.raises(NumericalError, match="fc: the weight has 1 elements"):
        group_saliency(torch.tensor([[1.0, 2.0, math.inf]]), moment, torch.arange(3), where="fc")
    with pytest.raises(NumericalError, match="fc: the second moment of the inputs"):
        greedy_removal(rows, moment - 3, torch.arange(3), 1, where="fc")
    with pytest.raises(NumericalError, match="across the two models"):
        reconstruct(rows, moment, torch.ones(3, dtype=torch.bool), cross=moment * math.nan)
