r"""Inverses of second moments, which are damped so that they exist.

Second-order pruning and quantization adjust what stays of a layer by the inverse of its inputs' second moment
(:class:`tersor.training.layer_inputs.SecondMoment`). All functions take one matrix, or several stacked.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from tersor.errors import InvalidValueError, NumericalError

_FIRST_DAMPING = 1e-6
"""Where a damping of 0 is raised to when it does not do."""


@torch.no_grad()
def damped_inverse(moment: Tensor, damping: float = 0.01, where: str = "") -> Tensor:
    r"""The inverse of a damped second moment, :math:`(M + \lambda I)^{-1}`, by Cholesky factors.

    λ is ``damping`` times the mean of the diagonal, over the columns whose inputs are ever other than zero. The others
    are dead: they get that mean as their diagonal, so they stay apart from all else. Where the matrix is singular in
    its precision, damping is raised tenfold, with a warning, until it can be inverted or λ has reached the mean.

    Args:
        moment: symmetric matrices, shape (..., columns, columns).
        damping: share of the mean diagonal, 0 or more. 0.01 suits most layers.
        where: the name of the layer, for messages.

    Returns:
        The inverse, float32 or wider.

    Raises:
        InvalidValueError: ``damping`` is negative.
        NumericalError: the moment is not finite, or no second moment at all: it has negative eigenvalues.

    Example:
        >>> damped_inverse(torch.tensor([[1.0, 1.0], [1.0, 2.0]]), damping=0.0)
        tensor([[ 2., -1.],
                [-1.,  1.]])
    """
    factor, _ = damped_cholesky(moment, damping, where)
    return torch.cholesky_inverse(factor)


def damped_cholesky(moment: Tensor, damping: float, where: str) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factor of a damped moment, and what damping added to its diagonal (..., columns).

    Arguments, errors and the treatment of dead columns are those of :func:`damped_inverse`.
    """
    if not damping >= 0:
        raise InvalidValueError(f"a damping of {damping} is below 0", where=where, remedy="0.01 suits most layers.")
    moment = computable(moment, "the second moment of the inputs", where)
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    mean = diagonal.clamp(min=0).sum(dim=-1, keepdim=True) / (~dead).sum(dim=-1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1)
    # What is left of a column's diagonal after all before it are accounted for. Less than rounding errors is nothing.
    least = 10 * torch.finfo(moment.dtype).eps
    reached = damping
    while True:
        added = mean * (reached + dead.to(moment.dtype))
        factor, failed = torch.linalg.cholesky_ex(moment + torch.diag_embed(added))
        left = factor.diagonal(dim1=-2, dim2=-1).square()
        if not failed.any() and not (left <= least * (diagonal + added)).any():
            break
        if reached >= 1:
            raise _not_invertible(moment, reached, where)
        reached = max(reached * 10, _FIRST_DAMPING)
    if reached > damping:
        layer = f"{where}: " if where else ""
        warnings.warn(f"{layer}the second moment is singular; damping raised from {damping} to {reached}", stacklevel=2)
    return factor, added


def inverse_factor(moment: Tensor, damping: float, where: str) -> Tensor:
    """The upper U with ``U.T @ U`` the damped inverse.

    With both dimensions reversed, a Cholesky factor of the moment is an upper R with ``moment = R @ R.T``, and U is its
    inverse. So the inverse itself, which would cost digits, is never formed.
    """
    reverse, _ = damped_cholesky(moment.flip(-2, -1), damping, where)
    identity = torch.eye(moment.shape[-1], dtype=reverse.dtype, device=reverse.device)
    return torch.linalg.solve_triangular(reverse.flip(-2, -1), identity.expand_as(reverse), upper=True)


def computable(x: Tensor, what: str, where: str) -> Tensor:
    """The tensor in float32 or wider.

    Raises:
        NumericalError: an element is infinite or not a number.
    """
    if not x.isfinite().all():
        raise NumericalError(
            f"{what} has {int((~x.isfinite()).sum())} elements that are infinite or not numbers",
            where=where,
            remedy="Look for overflow in the model (float16?) or in the calibration data.",
        )
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _not_invertible(moment: Tensor, damping: float, where: str) -> NumericalError:
    eigenvalues = torch.linalg.eigvalsh(moment.cpu().double())
    least, greatest = eigenvalues.amin().item(), eigenvalues.amax().item()
    condition = (eigenvalues.abs().amax(dim=-1) / eigenvalues.abs().amin(dim=-1)).amax().item()
    return NumericalError(
        f"the second moment of the inputs cannot be inverted with a damping of up to {damping:g}: its eigenvalues lie "
        f"between {least:.3g} and {greatest:.3g}, and its condition number is {condition:.3g}",
        where=where,
        remedy="Give more calibration samples, a larger damping, or float64 sums.",
    )
