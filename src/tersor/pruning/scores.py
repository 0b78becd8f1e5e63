"""What a block is worth: scores from values. Higher lives.

The functions take tensors and return one score for each block, in the shape of the grid (see
`tersor.targets.granularity`). None of them records gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.errors import InvalidValueError
from tersor.targets.granularity import Blocks

_CHUNK = 1 << 22
"""Elements of the float64 work arrays of `geometric_median_distance` (32 MiB each)."""


@torch.no_grad()
def block_norm(x: Tensor, blocks: Blocks, p: float) -> Tensor:
    r"""The p-norm of each block, :math:`(\sum_i |x_i|^p)^{1/p}`.

    With p = 1 on filters this is the criterion of "Pruning Filters for Efficient ConvNets" (Li et al., ICLR 2017); on
    single elements it is the magnitude.

    Args:
        x: floating point values of shape ``blocks.shape``. Narrow types are accumulated in float32, which sums beyond
            float16's greatest value, 65,504.
        blocks: how ``x`` is cut.
        p: order of the norm, above 0; ``inf`` is the greatest magnitude.

    Returns:
        Scores of shape ``blocks.grid``, float32 or wider.

    Example:
        >>> block_norm(torch.tensor([[3.0, -4.0], [0.0, 1.0]]), Blocks((2, 2), (1, 2)), p=2)
        tensor([[5.],
                [1.]])
    """
    return torch.linalg.vector_norm(blocks.tiles(x), ord=p, dim=blocks.inside, dtype=_accumulator(x))


@torch.no_grad()
def geometric_median_distance(x: Tensor, blocks: Blocks) -> Tensor:
    r"""The sum of the distances of a block to all others, :math:`\sum_j \|x_i - x_j\|_2`.

    A block near the geometric median of all blocks is the easiest to replace by the others: "Filter Pruning via
    Geometric Median for Deep Convolutional Neural Networks Acceleration" (He et al., CVPR 2019).

    Distances come from inner products, :math:`\|a - b\|^2 = \|a\|^2 + \|b\|^2 - 2ab`. The cancellation is harmless in
    float64 and after the mean block is taken off: a distance is wrong by at most about 1e-8 of the two norms. The
    work arrays stay small, however large ``x`` is.

    Args:
        x: values of shape ``blocks.shape``.
        blocks: how ``x`` is cut; at least two blocks.

    Returns:
        Scores of shape ``blocks.grid``, float64.

    Raises:
        InvalidValueError: there is only one block, and so no distance.

    Example:
        >>> geometric_median_distance(torch.tensor([[0.0], [1.0], [5.0]]), Blocks((3, 1), (1, 1))).flatten()
        tensor([6., 5., 9.], dtype=torch.float64)
    """
    count = blocks.count
    if count < 2:
        raise InvalidValueError(
            f"a tensor of shape {tuple(blocks.shape)} is one block, with no other to measure a distance to.",
            where="granularity",
            remedy="Choose smaller blocks, or score by a norm.",
        )
    rows = blocks.split(x).view(count, blocks.block_numel)
    step = max(1, _CHUNK // count)
    sums = []
    for first in range(0, count, step):
        chosen = slice(first, first + step)
        squares = torch.zeros(min(step, count - first), count, dtype=torch.float64, device=x.device)
        for columns in rows.split(step, dim=1):
            centred = columns.double()
            centred = centred - centred.mean(dim=0)
            norms = centred.square().sum(dim=1)
            squares += norms[chosen, None] + norms
            squares.addmm_(centred[chosen], centred.T, alpha=-2)
        sums.append(squares.clamp_(min=0).sqrt_().sum(dim=1))
    return torch.cat(sums).view(blocks.grid)


@torch.no_grad()
def mean_over_members(scores: Sequence[Tensor]) -> Tensor:
    """The mean score of each position over the targets of a dependency group, which live and die together.

    Args:
        scores: one grid of scores a member; the grids may differ in shape, but have equally many blocks.

    Returns:
        Flat scores on the first member's device, float32 or wider.

    Example:
        >>> mean_over_members([torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 6.0]])])
        tensor([2., 4.])
    """
    assert len({score.numel() for score in scores}) == 1
    first = scores[0]
    mean = first.flatten().to(_accumulator(first))
    for score in scores[1:]:
        mean = mean + score.flatten().to(mean.device)
    return mean / len(scores) if len(scores) > 1 else mean


def _accumulator(x: Tensor) -> torch.dtype:
    """The type of x, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
