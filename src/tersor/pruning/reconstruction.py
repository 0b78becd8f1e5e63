r"""Structured second-order pruning: whole groups of columns leave a layer, and least squares adjusts the rest.

A group of columns G is what an input channel, an attention head or a neuron of the layer before brings in. When it
leaves, and the other columns make up for it as well as they can, the output's error grows by

.. math:: \Delta_G = \mathrm{tr}\, W_G \left[(H^{-1})_{GG}\right]^{-1} W_G^\top, \quad H = M + \lambda I,

with M the second moment of the inputs. For single columns this is optimal brain surgeon (Hassibi, Stork, Wolff, ICNN
1993); for groups, removed one at a time, Optimal Brain Compression (Frantar, Singh, Alistarh, NeurIPS 2022) and ZipLM
(Kurtic, Frantar, Alistarh, NeurIPS 2023).

The functions take one matrix; those of a grouped convolution are independent of each other. Where the layer has a bias
that may follow, give the covariance in place of the second moment, and add :func:`bias_shift` to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tersor.errors import InvalidValueError, MaskError
from tersor.training.damping import computable, damped_cholesky, damped_inverse


@torch.no_grad()
def group_saliency(
    rows: Tensor, moment: Tensor, group_of_column: Tensor, *, damping: float = 0.01, where: str = ""
) -> Tensor:
    r"""The error that the removal of each group alone would bring: the :math:`\Delta_G` above, for every G.

    In units of the squared output, summed over rows, a mean over samples; comparable between layers only after division
    by each one's own scale. With damping it counts :math:`\lambda \lVert W - W' \rVert^2` as well.

    Args:
        rows: weights, shape (rows, columns).
        moment: second moment (or covariance) of the inputs, shape (columns, columns).
        group_of_column: the number of each column's group, from 0 without gaps; -1 where a column always stays.
        damping: see :func:`tersor.training.damping.damped_inverse`.
        where: the name of the layer, for messages.

    Returns:
        One saliency a group, in the moment's type, at least float32.

    Raises:
        InvalidValueError: ``group_of_column`` does not number the columns so.
        NumericalError: weights or moment are not finite, or the moment is none.

    Example:
        >>> rows, moment = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> group_saliency(rows, moment, torch.tensor([0, 1]), damping=0.0)  # 1² · (1 - 1²/2) and 2² · (2 - 1²/1)
        tensor([0.5000, 4.0000])
    """
    members = _members(group_of_column, rows.shape[1], where)
    inverse = damped_inverse(moment, damping, where)
    return _saliencies(inverse, _gram(rows, moment, inverse.dtype, where), members)


@torch.no_grad()
def greedy_removal(
    rows: Tensor, moment: Tensor, group_of_column: Tensor, count: int, *, damping: float = 0.01, where: str = ""
) -> tuple[Tensor, Tensor]:
    r"""Remove groups one at a time, always the one of least saliency once the others have made up for those before it.

    Two channels that carry the same are each free to leave, but not both: only removal one at a time sees that. The
    groups that leave first are the same whatever ``count`` is, so one run ranks them for every ratio, and the sum of
    the first saliencies is the whole error of their removal.

    After group G the inverse becomes :math:`H^{-1} - H^{-1}_{:G} (H^{-1}_{GG})^{-1} H^{-1}_{G:}`, and
    :math:`W - W_G (H^{-1}_{GG})^{-1} H^{-1}_{G:}` the weights. Saliencies need only :math:`W^\top W`, so that
    is updated in their place: a removal takes O(columns² · size of the group) operations, all of them O(columns³),
    whatever the number of rows. It is done in float64, as hundreds of updates add up their rounding errors.

    Args:
        rows: weights, shape (rows, columns).
        moment: second moment (or covariance) of the inputs, shape (columns, columns).
        group_of_column: as in :func:`group_saliency`.
        count: how many groups to remove.
        damping: see :func:`tersor.training.damping.damped_inverse`.
        where: the name of the layer, for messages.

    Returns:
        The groups in the order of their removal, and the saliency of each when it was removed (float64); both of length
        ``count``.

    Raises:
        InvalidValueError: as for :func:`group_saliency`, or there are fewer groups than ``count``.
        NumericalError: weights or moment are not finite, or the moment is none.

    Example:
        >>> twins_and_another = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
        >>> order, saliency = greedy_removal(torch.ones(1, 3), twins_and_another, torch.arange(3), 2, damping=1e-9)
        >>> order.tolist(), saliency.round(decimals=6).tolist()
        ([0, 2], [0.0, 0.5])
    """
    members = _members(group_of_column, rows.shape[1], where)
    groups = sum(len(numbers) for numbers, _ in members)
    if not 0 <= count <= groups:
        raise InvalidValueError(f"{count} of {groups} groups cannot be removed", where=where)
    inverse = damped_inverse(moment.double(), damping, where)
    gram = _gram(rows, moment, inverse.dtype, where)
    order = torch.empty(count, dtype=torch.long, device=inverse.device)
    costs = inverse.new_empty(count)
    for step in range(count):
        saliency = _saliencies(inverse, gram, members).index_fill_(0, order[:step], torch.inf)
        group = saliency.argmin()
        order[step], costs[step] = group, saliency[group]
        leaving = (group_of_column == group).nonzero().flatten()
        follow = torch.linalg.solve(inverse[leaving][:, leaving], inverse[leaving])
        inverse.addmm_(inverse[:, leaving], follow, alpha=-1)
        lost = gram[leaving]
        gram.addmm_(follow.T, lost - lost[:, leaving] @ follow, alpha=-1).addmm_(lost.T, follow, alpha=-1)
        # What has left is exactly zero, and keeps a block that can be inverted.
        inverse[leaving], inverse[:, leaving], inverse[leaving, leaving] = 0, 0, 1
        gram[leaving], gram[:, leaving] = 0, 0
    return order, costs


@torch.no_grad()
def reconstruct(
    rows: Tensor,
    moment: Tensor,
    keep_columns: Tensor,
    *,
    cross: Tensor | None = None,
    damping: float = 0.01,
    where: str = "",
) -> Tensor:
    r"""The weights on the columns S that stay that come nearest to the whole layer's output: least squares.

    Minimises :math:`\mathbb{E}\lVert W x - W' \hat x \rVert^2 + \lambda \lVert W - W' \rVert^2` over W' that is zero
    outside S: :math:`W'_S = (W C_{:S} + \lambda W_S)(M_{SS} + \lambda I)^{-1}`, with :math:`M = \mathbb{E}[\hat x
    \hat x^\top]` and :math:`C = \mathbb{E}[x \hat x^\top]`. Damping draws towards the weights as they were: where
    nothing leaves and no inputs have changed, nothing changes, and columns of dead inputs stay as they are.

    Args:
        rows: weights, shape (rows, columns).
        moment: second moment (or covariance) of the inputs that the new weights will meet, shape (columns, columns).
        keep_columns: bool of shape (columns,), True stays.
        cross: second moment (or covariance) of the inputs in the original model with those that ``moment`` is of, where
            pruned layers before this one have changed them; of the same shape.
        damping: see :func:`tersor.training.damping.damped_inverse`; the mean is over the columns that stay.
        where: the name of the layer, for messages.

    Returns:
        The new weights, of the rows' shape and type.

    Raises:
        MaskError: ``keep_columns`` is no mask of the columns.
        NumericalError: weights or moments are not finite, or the moment is none.

    Example:
        >>> moment = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
        >>> reconstruct(torch.tensor([[1.0, 2.0]]), moment, torch.tensor([False, True]), damping=0.0)
        tensor([[0.0000, 2.5000]])
    """
    if keep_columns.shape != rows.shape[1:] or keep_columns.dtype != torch.bool:
        raise MaskError(
            f"keep_columns is of shape {tuple(keep_columns.shape)} and {keep_columns.dtype}",
            where=where,
            legal=(f"({rows.shape[1]},), bool",),
        )
    factor, added = damped_cholesky(moment[keep_columns][:, keep_columns], damping, where)
    weights = computable(rows, "the weight", where).to(factor.dtype)
    across = moment if cross is None else computable(cross, "the second moment across the two models", where)
    target = weights @ across[:, keep_columns].to(factor.dtype) + weights[:, keep_columns] * added
    result = torch.zeros_like(rows)
    result[:, keep_columns] = torch.cholesky_solve(target.T, factor).T.to(rows.dtype)
    return result


@torch.no_grad()
def bias_shift(rows: Tensor, new_rows: Tensor, mean: Tensor, new_mean: Tensor | None = None) -> Tensor:
    r"""What to add to the bias so that outputs keep their means: :math:`W \bar x - W' \bar{\hat x}`.

    Together with :func:`reconstruct` on covariances this is least squares with an intercept.

    Args:
        rows: the weights before, shape (..., rows, columns).
        new_rows: the weights after.
        mean: the mean of the inputs of ``rows``, shape (..., columns).
        new_mean: the mean of the inputs of ``new_rows``; ``mean`` where it is None.

    Returns:
        Shape (..., rows), float32 or wider.

    Example:
        >>> bias_shift(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.5]]), mean=torch.tensor([4.0, 2.0]))
        tensor([3.])
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, mean.dtype), torch.float32)
    before, after = mean.to(dtype), (mean if new_mean is None else new_mean).to(dtype)
    return (rows.to(dtype) @ before.unsqueeze(-1) - new_rows.to(dtype) @ after.unsqueeze(-1)).squeeze(-1)


def _gram(rows: Tensor, moment: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """W^T W. Weights of dead columns count for nothing, whatever they are."""
    weights = computable(rows, "the weight", where).to(dtype) * (moment.diagonal() > 0)
    return weights.T @ weights


def _members(group_of_column: Tensor, columns: int, where: str) -> list[tuple[Tensor, Tensor]]:
    """For each size of group: the groups' numbers (n,) and their columns (n, size)."""
    if group_of_column.shape != (columns,):
        raise InvalidValueError(
            f"group_of_column is of shape {tuple(group_of_column.shape)}", where=where, legal=(f"({columns},)",)
        )
    always = int((group_of_column < 0).sum())
    sizes = torch.bincount(group_of_column[group_of_column >= 0])
    if not sizes.all():
        raise InvalidValueError(
            f"no column is of group {int((sizes == 0).nonzero()[0])}",
            where=where,
            remedy="Number the groups from 0 without gaps.",
        )
    order = group_of_column.argsort(stable=True)[always:]
    starts = sizes.cumsum(0) - sizes
    members: list[tuple[Tensor, Tensor]] = []
    for size in sizes.unique():
        numbers = (sizes == size).nonzero().flatten()
        members.append((numbers, order[starts[numbers, None] + torch.arange(int(size), device=order.device)]))
    return members


def _saliencies(inverse: Tensor, gram: Tensor, members: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The trace of (H^-1_GG)^-1 (W^T W)_GG for each group."""
    saliency = inverse.new_zeros(sum(len(numbers) for numbers, _ in members))
    for numbers, columns in members:
        square = columns[:, :, None], columns[:, None, :]
        traces = torch.linalg.solve(inverse[square], gram[square]).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        saliency[numbers] = traces.clamp(min=0)
    return saliency
