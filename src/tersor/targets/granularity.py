"""Blocks: how a tensor is cut into the pieces that live and die, or share a scale, together.

A granularity is what the user writes (``"out_channel"``, ``[4, 4]``, ``[1, -1, -1, -1]``); a block is what it comes to
on one tensor: a size along each dimension. The blocks tile the tensor; their positions form the *grid*, and whatever
is decided per block (a score, a mask, a scale) is a tensor of the grid's shape.

Example:
    >>> blocks = Blocks(shape=(4, 6), block=(2, 6))
    >>> blocks.grid, blocks.count, blocks.block_numel
    ((2, 1), 2, 12)
    >>> blocks.expand(torch.tensor([[True], [False]])).sum(dim=1)
    tensor([6, 6, 0, 0])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.config.specs import Granularity
from tersor.errors import InvalidValueError


def block_of(
    granularity: Granularity,
    shape: Sequence[int],
    *,
    out_dim: int | None,
    in_dim: int | None,
    channel_dim: int | None = 1,
) -> tuple[int, ...]:
    """The size of one block along each dimension of a tensor.

    Args:
        granularity: a name (``"out_channel"``, ``"in_channel"``, ``"per_channel"``), or a block, in which -1 is a whole
            dimension and which is padded with ``fill`` to as many dimensions as the tensor has.
        shape: the shape of the tensor.
        out_dim: the dimension of the tensor that holds output channels, None where it has none.
        in_dim: likewise for input channels.
        channel_dim: the dimension of the channels of an input or output, for ``"per_channel"``.

    Raises:
        InvalidValueError: the block does not divide the shape or has more dimensions; the tensor lacks the named
            channels; or the name is ``"default"``, which depends on the algorithm and is the caller's to resolve.

    Example:
        >>> block_of(Granularity.parse("out_channel"), (32, 16, 3, 3), out_dim=0, in_dim=1)
        (1, 16, 3, 3)
        >>> block_of(Granularity.parse([4, 4]), (2, 8, 8), out_dim=0, in_dim=1)
        (1, 4, 4)
    """
    shape = tuple(shape)
    if granularity.name is None:
        block = _padded(granularity, shape)
    else:
        dims = {"out_channel": out_dim, "in_channel": in_dim, "per_channel": channel_dim}
        if granularity.name not in dims:
            raise InvalidValueError(
                f"{granularity.name!r} does not say which dimensions of a tensor of shape {shape} belong to a block.",
                where="granularity",
                legal=dims,
                remedy="Resolve the default, which depends on the algorithm and the type of module, first.",
            )
        dim = dims[granularity.name]
        if dim is None or not -len(shape) <= dim < len(shape):
            raise InvalidValueError(
                f"a tensor of shape {shape} has no dimension for {granularity.name!r}.",
                where="granularity",
                remedy=f"Give a block of up to {len(shape)} sizes instead, such as {[1] * len(shape)}.",
            )
        sizes = list(shape)
        sizes[dim] = 1
        block = tuple(sizes)
    return Blocks(shape, block).block


def _padded(granularity: Granularity, shape: tuple[int, ...]) -> tuple[int, ...]:
    missing = len(shape) - len(granularity.block)
    if missing < 0:
        raise InvalidValueError(
            f"block {granularity.block} has more dimensions than a tensor of shape {shape}.",
            where="granularity",
            remedy=f"Give at most {len(shape)} sizes.",
        )
    padding = (granularity.fill,) * missing
    block = padding + granularity.block if granularity.pad == "front" else granularity.block + padding
    return tuple(whole if size == -1 else size for size, whole in zip(block, shape, strict=True))


@dataclass(frozen=True)
class Blocks:
    """A tensor's shape cut into equal blocks.

    Args:
        shape: the shape of the tensor.
        block: the size of one block along each dimension; each divides the size of its dimension.

    Raises:
        InvalidValueError: a block that does not divide, or a tensor without elements.
    """

    shape: tuple[int, ...]
    block: tuple[int, ...]

    def __post_init__(self) -> None:
        if 0 in self.shape:
            raise InvalidValueError(f"a tensor of shape {tuple(self.shape)} has no elements.", where="granularity")
        for dim, (size, part) in enumerate(zip(self.shape, self.block, strict=True)):
            if part < 1 or size % part:
                raise InvalidValueError(
                    f"block {self.block} does not divide a tensor of shape {tuple(self.shape)}: "
                    f"dimension {dim} of size {size} cannot be cut into parts of {part}.",
                    where="granularity",
                    legal=(-1, *(divisor for divisor in range(1, size + 1) if size % divisor == 0)),
                )

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of blocks along each dimension."""
        return tuple(size // part for size, part in zip(self.shape, self.block, strict=True))

    @property
    def count(self) -> int:
        """The number of blocks."""
        return math.prod(self.grid)

    @property
    def block_numel(self) -> int:
        """The number of elements in one block."""
        return math.prod(self.block)

    @property
    def undivided(self) -> tuple[int, ...]:
        """The dimensions along which a block is whole."""
        return tuple(dim for dim, count in enumerate(self.grid) if count == 1)

    def of(self, shape: Sequence[int]) -> Blocks:
        """The same blocks of a tensor that has other sizes along dimensions that are not divided.

        >>> Blocks((1, 5, 8), (1, 5, 2)).of((3, 7, 8))
        Blocks(shape=(3, 7, 8), block=(3, 7, 2))
        """
        block = (whole if count == 1 else part for whole, count, part in zip(shape, self.grid, self.block, strict=True))
        return Blocks(tuple(shape), tuple(block))

    def tiles(self, x: Tensor) -> Tensor:
        """A view of shape (grid[0], block[0], grid[1], block[1], ...); reduced over `inside`, it has the grid's."""
        assert x.shape == torch.Size(self.shape), f"{tuple(x.shape)} is not {self.shape}"
        return x.view([size for pair in zip(self.grid, self.block, strict=True) for size in pair])

    @property
    def inside(self) -> tuple[int, ...]:
        """The dimensions of `tiles` that run inside a block."""
        return tuple(range(1, 2 * len(self.shape), 2))

    def split(self, x: Tensor) -> Tensor:
        """The elements of each block in a row: shape (*grid, block_numel); a view where the memory layout allows it."""
        return self._by_block(x).reshape(*self.grid, self.block_numel)

    def join(self, rows: Tensor) -> Tensor:
        """The inverse of `split`: a new tensor of the whole shape.

        Args:
            rows: the elements of each block in a row, with as many elements as the tensor, in any shape.
        """
        whole = rows.new_empty(self.shape)
        view = self._by_block(whole)
        view.copy_(rows.reshape(view.shape))
        return whole

    def _by_block(self, x: Tensor) -> Tensor:
        """A view of shape (*grid, *block)."""
        across = tuple(range(0, 2 * len(self.shape), 2))
        return self.tiles(x).permute(across + self.inside)

    def expand_compact(self, grid: Tensor) -> Tensor:
        """One value per block, in a shape that broadcasts to the tensor's.

        A dimension that is one block has size 1. Memory is needed only where a dimension has several blocks of more
        than one element: along it values are repeated.

        Args:
            grid: a tensor of the shape of the grid.
        """
        repeats = [part if count > 1 else 1 for count, part in zip(self.grid, self.block, strict=True)]
        tiles = grid.reshape([size for count in self.grid for size in (count, 1)])
        tiles = tiles.expand([size for pair in zip(self.grid, repeats, strict=True) for size in pair])
        return tiles.reshape([count * repeat for count, repeat in zip(self.grid, repeats, strict=True)])

    def expand(self, grid: Tensor) -> Tensor:
        """One value per block at the tensor's full shape: `expand_compact`, broadcast without further memory."""
        return self.expand_compact(grid).expand(self.shape)
