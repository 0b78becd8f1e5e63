"""Moments of channels against numpy."""

import numpy as np
import torch

from tersor.training.moments import channel_moments, merge_moments


def test_moments_lose_no_digits_where_the_mean_is_large():
    values = torch.randn(60, 3, dtype=torch.float64) + 1e7
    merged = merge_moments(channel_moments(values[:50], 1), channel_moments(values[50:], 1))
    assert merged.count == 60
    np.testing.assert_allclose(merged.mean.numpy(), values.numpy().mean(0), rtol=1e-15)
    np.testing.assert_allclose(merged.squares.numpy(), values.numpy().var(0) * 60, rtol=1e-8)
