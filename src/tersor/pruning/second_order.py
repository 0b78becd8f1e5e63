r"""Second-order one-shot pruning: choose what leaves a layer, and adjust the rest, so that its output changes least.

A layer with weight rows W and inputs x, of second moment :math:`M = \mathbb{E}[x x^\top]`, gets weights W'. Its output
then changes by :math:`\mathbb{E}\lVert (W - W') x \rVert^2 = \mathrm{tr}\,(W - W') M (W - W')^\top`, which is quadratic
with the Hessian 2M for every row. So the best adjustment, and the error that remains, have closed forms: optimal brain
surgeon (Hassibi, Stork, Wolff, ICNN 1993). :func:`sparsegpt` removes single weights or n:m patterns;
:mod:`tersor.pruning.reconstruction` removes whole groups of columns. Factors that M and W share leave all results as
they are, so the 2 is left out here.

Moments come from :class:`tersor.training.layer_inputs.SecondMoment`; all functions take one matrix, or several stacked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tersor.errors import InvalidValueError, MaskError
from tersor.training.damping import computable, inverse_factor


@torch.no_grad()
def sparsegpt(
    rows: Tensor,
    moment: Tensor,
    *,
    ratio: float | None = None,
    keep_of: tuple[int, int] | None = None,
    keep: Tensor | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    where: str = "",
) -> tuple[Tensor, Tensor]:
    r"""Remove weights column by column; after each, the columns to its right make up for what their row has lost.

    With U the upper Cholesky factor of :math:`(M + \lambda I)^{-1} = U^\top U`, column j costs
    :math:`(w_{ij} / U_{jj})^2` in row i, and a weight that leaves moves the rest of its row by
    :math:`-w_{ij} U_{j,j:} / U_{jj}`. One factor serves all rows, because each adjusts only what is still to come.
    Columns are taken in blocks: the mask of a block is chosen when the walk reaches it, and columns beyond it are
    adjusted once, by a matrix product. Takes O(columns³ + rows · columns²) operations.

    Paper: Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (ICML 2023).

    Args:
        rows: weights, shape (..., rows, columns). All leading dimensions (groups) share one ratio.
        moment: second moment of the inputs, shape (..., columns, columns).
        ratio: the share to remove, in [0, 1): exactly floor(ratio · elements), cheapest first in each block.
        keep_of: (n, m) keeps n of every m consecutive columns in each row; chosen when the walk reaches the m.
        keep: a mask of the rows' shape, True keeps: nothing is chosen, only adjusted. Exactly one of these three.
        block_size: columns of a block. With ``keep_of`` it is rounded down to a multiple of m.
        damping: see :func:`tersor.training.damping.damped_inverse`.
        where: the name of the layer, for messages.

    Returns:
        The mask (bool, True keeps) and the new weights, zero where masked, both of the rows' shape. The weights have
        the rows' type; the computation has the moment's, at least float32. In dead columns weights leave first, and
        those that stay are unchanged.

    Raises:
        InvalidValueError: settings that are out of range, or not exactly one of ``ratio``, ``keep_of`` and ``keep``.
        MaskError: ``keep`` does not have the rows' shape.
        NumericalError: weights or moment are not finite, or the moment is none.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0, 3.0]])
        >>> moment = torch.tensor([[1.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
        >>> sparsegpt(rows, moment, ratio=0.34, damping=0.0)
        (tensor([[False,  True,  True]]), tensor([[0.0000, 2.5000, 3.0000]]))
    """
    _check_settings(rows, ratio, keep_of, keep, block_size, where)
    columns, multiple = rows.shape[-1], 1 if keep_of is None else keep_of[1]
    height = rows.numel() // columns
    block_size = max(block_size // multiple, 1) * multiple
    factor = inverse_factor(moment, damping, where)
    weights = computable(rows, "the weight", where).to(factor.dtype, copy=True)
    mask = torch.ones_like(rows, dtype=torch.bool) if keep is None else keep.clone()
    # What a squared weight costs; nothing where its inputs are always zero.
    price = (moment.diagonal(dim1=-2, dim2=-1) > 0) / factor.diagonal(dim1=-2, dim2=-1).square()
    price = price.unsqueeze(-2)
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        block, chosen, cost = weights[..., first:last], mask[..., first:last], price[..., first:last]
        inside = factor[..., first:last, first:last]
        if ratio is not None:
            up_to = [math.floor(ratio * (height * end) + 1e-6) for end in (first, last)]
            count = up_to[1] - up_to[0]
            chosen &= ~_lowest((block.square() * cost).flatten(), count).view(block.shape)
        errors = torch.zeros_like(block)
        for column in range(last - first):
            if keep_of is not None and column % multiple == 0:
                ahead = slice(column, column + multiple)
                chosen[..., ahead] = ~_lowest(block[..., ahead].square() * cost[..., ahead], multiple - keep_of[0])
            error = block[..., column] / inside[..., column, column, None]
            errors[..., column] = error.masked_fill_(chosen[..., column], 0)
            block[..., column:].addcmul_(error.unsqueeze(-1), inside[..., None, column, column:], value=-1)
        weights[..., last:] -= errors @ factor[..., first:last, last:]
    return mask, (weights * mask).to(rows.dtype)


def _lowest(costs: Tensor, count: int) -> Tensor:
    """A mask of exactly the `count` lowest along the last dimension, of equal ones the first."""
    order = costs.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(costs, dtype=torch.bool).scatter_(-1, order, True)


def _check_settings(
    rows: Tensor,
    ratio: float | None,
    keep_of: tuple[int, int] | None,
    keep: Tensor | None,
    block_size: int,
    where: str,
) -> None:
    given = [name for name, value in (("ratio", ratio), ("keep_of", keep_of), ("keep", keep)) if value is not None]
    problem, remedy = "", ""
    if len(given) != 1:
        problem = f"{' and '.join(given) or 'nothing'} says what leaves"
        remedy = "Give exactly one of ratio, keep_of and keep."
    elif ratio is not None and not 0 <= ratio < 1:
        problem, remedy = f"ratio {ratio} is outside [0, 1)", "No layer is ever emptied."
    elif keep_of is not None and not 0 < keep_of[0] <= keep_of[1]:
        problem, remedy = f"{keep_of[0]} of {keep_of[1]} cannot be kept", "Give (n, m) with 0 < n <= m, such as (2, 4)."
    elif keep_of is not None and rows.shape[-1] % keep_of[1]:
        problem = f"{rows.shape[-1]} columns are no multiple of {keep_of[1]}"
        remedy = "Leave the layer out, or remove a ratio of it."
    elif block_size < 1:
        problem, remedy = f"block_size {block_size} is below 1", "128 suits most layers."
    if problem:
        raise InvalidValueError(problem, where=where, remedy=remedy)
    if keep is not None and (keep.shape != rows.shape or keep.dtype != torch.bool):
        raise MaskError(
            f"keep is of shape {tuple(keep.shape)} and {keep.dtype}", where=where, legal=(f"{tuple(rows.shape)}, bool",)
        )
