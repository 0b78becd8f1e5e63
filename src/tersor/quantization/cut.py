"""How a target is cut into the blocks that share a scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.config import Granularity
from tersor.config.values import is_activation
from tersor.errors import ConfigError, InvalidValueError
from tersor.targets.channels import activation_channel_dim, channel_dims
from tersor.targets.granularity import Blocks, block_of
from tersor.targets.resolve import TargetConfig

_RANKS = range(65)
"""Tensors have at most 64 dimensions."""


@dataclass(frozen=True)
class Cut:
    """The blocks of a target that share a scale; those of an input or output follow its shape from call to call.

    Attributes:
        where: what errors call the target.
        granularity: a block; None where the whole tensor is one.
        dims: output and input channel dimension of a tensor of each rank.

    >>> cut = Cut("fc.weight", Granularity.parse([1, 2]), ((0, 1),) * 3)
    >>> x = torch.arange(8.0).view(2, 4)
    >>> cut.rows(x).shape, cut.spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), x.shape)
    (torch.Size([2, 2, 2]), tensor([[1., 1., 2., 2.],
            [3., 3., 4., 4.]]))
    """

    where: str
    granularity: Granularity | None
    dims: tuple[tuple[int | None, int | None], ...]

    @classmethod
    def of(cls, target: TargetConfig, granularity: Granularity | None) -> Cut:
        """How a target is cut.

        Args:
            target: says what its channels are.
            granularity: None for the whole tensor.
        """
        module, name = target.module, target.target_name
        where = f"{target.where}['granularity'] on {f'{target.module_name}.' if target.module_name else ''}{name}"
        if is_activation(name):
            found = [activation_channel_dim(module, rank) for rank in _RANKS]
            dims = [(1 if rank in (2, 4, 5) else rank - 1) if dim is None else dim for rank, dim in enumerate(found)]
            return cls(where, granularity, tuple((dim, dim) for dim in dims))
        return cls(where, granularity, tuple(channel_dims(module, name, rank) for rank in _RANKS))

    def blocks(self, shape: torch.Size) -> Blocks | None:
        """The blocks of a tensor of this shape; None where it is one.

        Raises:
            ConfigError: the granularity does not fit it.
        """
        if self.granularity is None:
            return None
        out_dim, in_dim = self.dims[len(shape)] if len(shape) < len(self.dims) else (0, 1)
        try:
            block = block_of(self.granularity, shape, out_dim=out_dim, in_dim=in_dim, channel_dim=out_dim)
            return Blocks(tuple(shape), block)
        except ConfigError as error:
            raise type(error)(error.what, where=self.where, legal=error.legal, remedy=error.remedy) from None

    def grid(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the scales of a tensor of this shape; () where it has one."""
        blocks = self.blocks(shape)
        return () if blocks is None else blocks.grid

    def check(self, shape: torch.Size, scales: torch.Size, where: str, remedy: str) -> None:
        """Refuse a tensor of a shape that has other blocks than there are scales for.

        Raises:
            InvalidValueError: naming both.
        """
        grid = self.grid(shape)
        if grid != scales:
            raise InvalidValueError(
                f"there are scales for {tuple(scales)} blocks, and a value of shape {tuple(shape)} has {grid}",
                where=where,
                remedy=remedy,
            )

    def rows(self, x: Tensor) -> Tensor:
        """The elements of each block in a row: shape (*grid, elements of a block)."""
        blocks = self.blocks(x.shape)
        return x.reshape(-1) if blocks is None else blocks.split(x)

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest element of each block, of the grid's shape, float32 at least.

        Blocks that are whole along dimensions are reduced where they lie: in the order of memory, and without a copy.

        >>> Cut("", None, ()).extremes(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        (tensor(-2.), tensor(3.))
        """
        blocks, dtype = self.blocks(x.shape), torch.promote_types(x.dtype, torch.float32)
        if blocks is None:
            return amin(x).to(dtype), x.amax().to(dtype)
        sizes = list(zip(x.shape, blocks.block, strict=True))
        whole = tuple(dim for dim, (size, part) in enumerate(sizes) if size == part)
        if whole and all(part in (1, size) for size, part in sizes):
            return amin(x, whole, keepdim=True).to(dtype), x.amax(whole, keepdim=True).to(dtype)
        rows = blocks.split(x)
        return rows.amin(-1).to(dtype), rows.amax(-1).to(dtype)

    def spread(self, per_block: Tensor, shape: torch.Size) -> Tensor:
        """One value a block, in a shape that broadcasts against a tensor of this shape."""
        blocks = self.blocks(shape)
        return per_block if blocks is None else blocks.expand_compact(per_block)


def amin(x: Tensor, dim: tuple[int, ...] = (), *, keepdim: bool = False) -> Tensor:
    """As ``x.amin``; the compiler computes what it is taken of again in the backward pass, rather than to keep it.

    It knows that of ``amax``, and not of ``amin`` (torch 2.13), after which all that is near is kept; bools among it
    are slow on CPU.
    """
    return -(-x).amax(dim, keepdim) if torch.compiler.is_compiling() else x.amin(dim, keepdim)
