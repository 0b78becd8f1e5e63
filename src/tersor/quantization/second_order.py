r"""Second-order quantization of weights: round one column, and let those that follow make up for it.

A layer with weight rows W and inputs x, of second moment :math:`M = \mathbb{E}[x x^\top]`, gets rounded weights W'. Its
output then changes by :math:`\mathbb{E}\lVert (W - W') x \rVert^2 = \mathrm{tr}\,(W - W') M (W - W')^\top`. Rounding
each weight to the nearest value makes :math:`\lVert W - W' \rVert` least, not this; where inputs are correlated, errors
of one column can cancel those of another.

Moments come from :class:`tersor.training.layer_inputs.SecondMoment`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from tersor.errors import InvalidValueError, MaskError
from tersor.quantization.format import Format
from tersor.training.damping import computable, inverse_factor

Fit: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The scales and zero points of blocks: their elements, shape (..., n), to twice shape (...)."""


_FACTOR_EACH_ROW = 2 * 10**12
"""Rows times columns³, up to which each row may have a factor of its own."""
_FACTORS_AT_ONCE = 2**25
"""Elements of all factors that are in memory together."""


class Rounded(NamedTuple):
    """What is left of a weight.

    Attributes:
        rows: values on the grid of their scales, of the shape and type of the weight.
        scale: one for each group of columns, shape (..., rows, columns / group size); what was given, if it was.
        zero_point: of the same shape.
    """

    rows: Tensor
    scale: Tensor
    zero_point: Tensor


@torch.no_grad()
def gptq(
    rows: Tensor,
    moment: Tensor,
    form: Format,
    *,
    group_size: int | None = None,
    fit: Fit | None = None,
    fixed: tuple[Tensor, Tensor] | None = None,
    keep: Tensor | None = None,
    act_order: bool = False,
    block_size: int = 128,
    damping: float = 0.01,
    where: str = "",
) -> Rounded:
    r"""Round weights column by column; after each, the columns to its right make up for what it has lost.

    With U the upper Cholesky factor of :math:`(M + \lambda I)^{-1} = U^\top U`, a column that is rounded from
    :math:`w_j` to :math:`q_j` moves those behind it by :math:`-(w_j - q_j)\, U_{j,j+1:} / U_{jj}`: of all values that
    they could take, these change the output least. One factor serves all rows, because each adjusts only what is still
    to come. Columns beyond a block are adjusted once, by a matrix product. Takes O(columns³ + rows · columns²)
    operations.

    Masked weights are zero already and make up for nothing. So where masks differ from row to row, each row gets a
    factor of its own, over the columns that it keeps. On matrices for which this would take too long (rows · columns³
    above 2·10¹², a minute of one core), one factor has to do: a masked weight then takes part until the walk reaches
    it, and is "rounded" to zero there, which gives up about half of the gain.

    Papers: Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers (ICLR 2023); masks: Frantar, Alistarh: SparseGPT (ICML 2023), section 3.5.

    Args:
        rows: weights, shape (..., rows, columns).
        moment: second moment of the inputs, shape (..., columns, columns).
        form: what is rounded to.
        group_size: how many consecutive columns of a row share a scale; all of a row by default. The scale of a group
            is taken from its weights as they are when the walk reaches it.
        fit: how scales follow from the elements of groups, shape (..., n); from least and greatest by default.
        fixed: scales and zero points from elsewhere, which broadcast against the rows, in the place of all that.
        keep: a mask of the rows' shape, True keeps; the others are zero in the result.
        act_order: take the columns of the largest inputs first, while all others can still make up for them. The
            columns of a group are then reached at different times, so its scale is that of the original weights. Groups
            stay consecutive columns, so that a kernel needs no index.
        block_size: columns of a block; rounded down to whole groups.
        damping: see :func:`tersor.training.damping.damped_inverse`.
        where: the name of the layer, for messages.

    Returns:
        The weights with their scales. The computation has the moment's type, at least float32. Weights of dead columns,
        whose inputs are always zero, are rounded to the nearest.

    Raises:
        InvalidValueError: groups that do not fill a row, a block or damping out of range.
        MaskError: ``keep`` does not have the rows' shape.
        NumericalError: weights or moment are not finite, or the moment is none.

    Example:
        >>> from tersor.config import IntDtype
        >>> rows = torch.tensor([[0.6, 0.6, 1.0]])
        >>> moment = torch.tensor([[2.0, 1.9, 0.0], [1.9, 2.0, 0.0], [0.0, 0.0, 1.0]])
        >>> int2 = Format(IntDtype(2), "symmetric", low=-1, high=1)
        >>> gptq(rows, moment, int2, damping=0.0).rows  # to the nearest: 1, 1, 1
        tensor([[1., 0., 1.]])
    """
    _check(rows, group_size, keep, block_size, where)
    rows = rows if keep is None else rows * keep
    fit = fit or least_to_greatest(form)
    walk = _Walk(form, group_size or rows.shape[-1], fit, act_order, block_size, damping, where)
    if keep is None:
        return walk.run(rows, moment, fixed, None)
    if bool((keep == keep.any(dim=-2, keepdim=True) & keep.any(dim=-1, keepdim=True)).all()):
        return walk.run(rows, _without(moment, keep.any(dim=-2)), fixed, None)
    if keep.numel() * rows.shape[-1] ** 2 > _FACTOR_EACH_ROW:
        return walk.run(rows, moment, fixed, keep)
    return _row_by_row(walk, rows, moment, fixed, keep)


class _Walk(NamedTuple):
    """The settings of :func:`gptq`, and the walk itself."""

    form: Format
    group_size: int
    fit: Fit
    act_order: bool
    block_size: int
    damping: float
    where: str

    def run(self, rows: Tensor, moment: Tensor, fixed: tuple[Tensor, Tensor] | None, keep: Tensor | None) -> Rounded:
        """Walk through the columns; what is not to be kept is zero when the walk has passed it."""
        columns, group_size = rows.shape[-1], self.group_size
        weights = computable(rows, "the weight", self.where).to(
            torch.promote_types(moment.dtype, torch.float32), copy=True
        )
        scale, zero_point = fixed or self.fit(weights.unflatten(-1, (-1, group_size)))
        result = (scale, zero_point) if fixed else (scale.clone(), zero_point.clone())
        scales = [_spread(each, weights) for each in result]  # one for each weight, whatever the order
        order = None
        if self.act_order:
            order = moment.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
            moment = _taken(_taken(moment, order).mT, order)
            weights, keep = _taken(weights, order), None if keep is None else _taken(keep, order)
            scales = [_taken(each, order) for each in scales]
        moving = fixed is None and order is None and group_size < columns
        block_size = max(self.block_size // group_size, 1) * group_size if moving else self.block_size
        factor = inverse_factor(moment, self.damping, self.where)
        for first in range(0, columns, block_size):
            last = min(first + block_size, columns)
            errors = torch.zeros_like(weights[..., first:last])
            for column in range(first, last):
                if moving and column % group_size == 0:
                    group = slice(column, column + group_size)
                    now = self.fit(weights[..., group] if keep is None else weights[..., group] * keep[..., group])
                    for own, spread, new in zip(result, scales, now, strict=True):
                        own[..., column // group_size] = new
                        spread[..., group] = new.unsqueeze(-1)
                before = weights[..., column].clone()
                rounded = self.form.simulate(before, scales[0][..., column], scales[1][..., column])
                weights[..., column] = rounded if keep is None else rounded * keep[..., column]
                error = (before - weights[..., column]) / factor[..., column, column, None]
                errors[..., column - first] = error
                behind = slice(column + 1, last)
                weights[..., behind].addcmul_(error.unsqueeze(-1), factor[..., None, column, behind], value=-1)
            weights[..., last:] -= errors @ factor[..., first:last, last:]
        weights = weights if order is None else _taken(weights, order.argsort(dim=-1))
        return Rounded(weights.to(rows.dtype), *result)


def _row_by_row(
    walk: _Walk, rows: Tensor, moment: Tensor, fixed: tuple[Tensor, Tensor] | None, keep: Tensor
) -> Rounded:
    """Each row with a factor over the columns that it keeps, as if it were a matrix of its own."""
    at_once = max(_FACTORS_AT_ONCE * rows.shape[-2] // (keep.numel() * rows.shape[-1]), 1)
    parts: list[Rounded] = []
    for first in range(0, rows.shape[-2], at_once):
        own = slice(first, first + at_once)
        given = None if fixed is None else (each.expand_as(rows)[..., own, None, :] for each in fixed)
        moments = _without(moment.unsqueeze(-3), keep[..., own, :])
        parts.append(
            walk.run(rows[..., own, None, :], moments, None if given is None else (next(given), next(given)), None)
        )
    whole = (torch.cat(part, dim=-3).squeeze(-2) for part in zip(*parts, strict=True))
    return Rounded(next(whole), *(fixed or tuple(whole)))


def _without(moment: Tensor, keep: Tensor) -> Tensor:
    """The moment with columns that are not kept as good as dead: what is zero there stays zero."""
    return moment * keep.unsqueeze(-1) * keep.unsqueeze(-2)


def least_to_greatest(form: Format) -> Fit:
    """Scales by which nothing is clipped.

    >>> from tersor.config import IntDtype
    >>> fit = least_to_greatest(Format(IntDtype(2), "symmetric", low=-1, high=1))
    >>> fit(torch.tensor([[0.5, -2.0], [1.0, 0.0]]))[0]
    tensor([2., 1.])
    """
    return lambda blocks: form.scale_and_zero_point(blocks.amin(dim=-1), blocks.amax(dim=-1))


def _spread(of_groups: Tensor, weights: Tensor) -> Tensor:
    """A number of each weight from what broadcasts against the weights, or from one of each group of columns."""
    columns, groups = weights.shape[-1], of_groups.shape[-1] if of_groups.dim() else 1
    if groups not in (1, columns):
        of_groups = of_groups.repeat_interleave(columns // groups, -1)
    return of_groups.to(weights.dtype).expand_as(weights).clone()


def _taken(rows: Tensor, order: Tensor) -> Tensor:
    """Columns in another order, which each of the stacked matrices has for itself."""
    return rows.gather(-1, order.unsqueeze(-2).expand_as(rows))


def _check(rows: Tensor, group_size: int | None, keep: Tensor | None, block_size: int, where: str) -> None:
    if group_size is not None and (group_size < 1 or rows.shape[-1] % group_size):
        raise InvalidValueError(
            f"groups of {group_size} do not fill a row of {rows.shape[-1]} columns",
            where=where,
            remedy="Give a divisor, or None for one scale a row.",
        )
    if block_size < 1:
        raise InvalidValueError(f"block_size {block_size} is below 1", where=where, remedy="128 suits most layers.")
    if keep is not None and (keep.shape != rows.shape or keep.dtype != torch.bool):
        raise MaskError(
            f"keep is of shape {tuple(keep.shape)} and {keep.dtype}", where=where, legal=(f"{tuple(rows.shape)}, bool",)
        )
