"""Inverses of damped moments, against numpy."""

import math
import warnings

import numpy as np
import pytest
import torch

from tersor.errors import NumericalError
from tersor.training.damping import damped_inverse


def correlated(samples: int, columns: int) -> torch.Tensor:
    """Inputs with a few directions that carry most, in float64."""
    hidden = torch.randn(samples, max(columns // 3, 1)).double()
    return hidden @ torch.randn(hidden.shape[1], columns).double() + 0.3 * torch.randn(samples, columns).double()


def moment_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def damped(moment: np.ndarray, damping: float = 0.01) -> np.ndarray:
    return moment + damping * np.mean(np.diag(moment)) * np.eye(len(moment))


def test_a_moment_that_is_not_finite():
    with pytest.raises(NumericalError, match=r"fc: the second moment of the inputs has 2 elements"):
        damped_inverse(torch.tensor([[1.0, math.inf], [math.inf, 1.0]]), where="fc")


def test_inverse():
    moments = torch.stack([moment_of(correlated(30, 6)) for _ in range(2)])
    expected = [np.linalg.inv(damped(moment, 0.05)) for moment in moments.numpy()]
    np.testing.assert_allclose(damped_inverse(moments, 0.05), np.stack(expected), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(damped_inverse(moments[0], 0.05), expected[0], rtol=1e-9, atol=1e-12)
    assert damped_inverse(moments.half()).dtype == torch.float32


def test_inverse_with_dead_columns():
    moment = torch.diag(torch.tensor([4.0, 0.0, 2.0])).double()
    inverse = damped_inverse(moment, damping=0.1)  # the mean of those alive is 3
    np.testing.assert_allclose(inverse, np.diag([1 / 4.3, 1 / 3.3, 1 / 2.3]), rtol=1e-12)
    torch.testing.assert_close(damped_inverse(torch.zeros(2, 2), damping=0.0), torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_of_a_singular_moment_is_raised_with_a_warning(dtype):
    moment = torch.ones(3, 3, dtype=dtype)
    with pytest.warns(UserWarning, match=r"fc: the second moment is singular; damping raised from 0.0 to 1e-0[56]"):
        inverse = damped_inverse(moment, damping=0.0, where="fc")
    assert inverse.isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse = damped_inverse(moment, damping=0.01)
    np.testing.assert_allclose(inverse, np.linalg.inv(np.ones((3, 3)) + 0.01 * np.eye(3)), rtol=1e-3)


def test_what_rounding_leaves_of_a_pivot_is_nothing():
    eps = torch.finfo(torch.float32).eps
    moment = torch.tensor([[1.0, 1.0], [1.0, 1.0 + eps]])
    assert torch.linalg.cholesky_ex(moment).info == 0
    with pytest.warns(UserWarning, match=r"damping raised from 0.0 to 1e-0[56]"):
        assert damped_inverse(moment, damping=0.0).abs().max() < 0.1 / eps


def test_inputs_of_very_different_scales_need_no_more_damping():
    scales = torch.logspace(-4, 4, 12).double()
    moment = (moment_of(correlated(100, 12)) * scales[:, None] * scales).float()
    inverse = damped_inverse(moment, damping=1e-9)
    expected = np.linalg.inv(damped(moment.double().numpy(), 1e-9))
    np.testing.assert_allclose(inverse, expected, rtol=0.02, atol=1e-3 * np.abs(expected).max())


def test_no_second_moment_at_all():
    moment = torch.tensor([[1.0, 4.0], [4.0, 1.0]])
    message = (
        r"fc: .*damping of up to 1: .*between -3 and 5, .*condition number is 1.67\. Give more calibration samples"
    )
    with pytest.raises(NumericalError, match=message):
        damped_inverse(moment, where="fc")
