"""Count, mean and squared deviations of channels, gathered batch by batch and process by process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.training.ranks import of_each_process


@dataclass(frozen=True)
class Moments:
    """What is known of the values of each channel.

    Attributes:
        count: values of one channel.
        mean: shape ``(channels,)``.
        squares: the sum of the squared deviations from the mean, shape ``(channels,)``.
    """

    count: int
    mean: Tensor
    squares: Tensor


def channel_moments(values: Tensor, dim: int) -> Moments:
    """The moments of each channel, in float32 at least.

    >>> channel_moments(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), dim=1)
    Moments(count=2, mean=tensor([2., 5.]), squares=tensor([2., 0.]))
    """
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32)).unsqueeze(0)
    others = [other for other in range(values.dim()) if other != dim + 1]
    variance, mean = torch.var_mean(values, dim=others, correction=0)
    count = values.numel() // values.shape[dim + 1]
    return Moments(count, mean, variance * count)


def merge_moments(first: Moments, second: Moments) -> Moments:
    r"""The moments of two sets of values together; not both are empty.

    With :math:`\delta` the difference of the means, the squares are
    :math:`S_1 + S_2 + \delta^2 n_1 n_2 / (n_1 + n_2)`. Unlike sums of squares, this loses no digits where the mean is
    large (Chan, Golub, LeVeque: Algorithms for Computing the Sample Variance, 1983).
    """
    count = first.count + second.count
    share = second.count / count
    between = second.mean - first.mean
    squares = first.squares + second.squares + between**2 * (first.count * share)
    return Moments(count, first.mean + between * share, squares)


def add_moments(moments: dict[str, Moments], name: str, new: Moments) -> None:
    """Take in more values of one name; none at all change nothing."""
    if new.count:  # an expert may get no token
        moments[name] = merge_moments(moments[name], new) if name in moments else new


def pooled_moments(moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """The moments over the values of all processes, in main memory."""
    mine = {name: Moments(found.count, found.mean.cpu(), found.squares.cpu()) for name, found in moments.items()}
    pooled: dict[str, Moments] = {}
    for others in of_each_process(mine):
        for name, found in others.items():
            add_moments(pooled, name, found)
    return pooled
