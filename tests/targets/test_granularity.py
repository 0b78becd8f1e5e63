"""Block geometry against NumPy indexing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tersor.config.specs import Granularity
from tersor.errors import InvalidValueError
from tersor.targets.granularity import Blocks, block_of

CONV = (32, 16, 3, 3)


@pytest.mark.parametrize(
    ("granularity", "shape", "dims", "expected"),
    [
        ("out_channel", CONV, {"out_dim": 0, "in_dim": 1}, (1, 16, 3, 3)),
        ("in_channel", CONV, {"out_dim": 0, "in_dim": 1}, (32, 1, 3, 3)),
        ("out_channel", (16, 32, 3, 3), {"out_dim": 1, "in_dim": 0}, (16, 1, 3, 3)),  # a transposed convolution
        ("out_channel", (32,), {"out_dim": 0, "in_dim": None}, (1,)),
        ("per_channel", (8, 64, 7, 7), {"out_dim": None, "in_dim": None}, (8, 1, 7, 7)),
        ("per_channel", (8, 50, 64), {"out_dim": None, "in_dim": None, "channel_dim": -1}, (8, 50, 1)),
        ([4, 4], (2, 8, 8), {"out_dim": 0, "in_dim": 1}, (1, 4, 4)),
        ([4, 4], (8, 8), {"out_dim": 0, "in_dim": 1}, (4, 4)),
        ([1, -1, -1, -1], CONV, {"out_dim": 0, "in_dim": 1}, (1, 16, 3, 3)),
        ([[1], "back", -1], CONV, {"out_dim": 0, "in_dim": 1}, (1, 16, 3, 3)),
        ([[2], "front", -1], (6, 4), {"out_dim": 0, "in_dim": 1}, (6, 2)),
        ([[8, 8], "back", 1], CONV, {"out_dim": 0, "in_dim": 1}, (8, 8, 1, 1)),
    ],
)
def test_block_of(granularity, shape, dims, expected):
    assert block_of(Granularity.parse(granularity), shape, **dims) == expected


@pytest.mark.parametrize(
    ("granularity", "shape", "dims", "message"),
    [
        ([5, 1], (8, 8), {"out_dim": 0, "in_dim": 1}, r"\(8, 8\).*parts of 5\. Legal: -1, 1, 2, 4, 8\."),
        (
            [4, 4, 4],
            (8, 8),
            {"out_dim": 0, "in_dim": 1},
            r"\(4, 4, 4\) has more dimensions than .* \(8, 8\)\. Give at most 2",
        ),
        ("in_channel", (8,), {"out_dim": 0, "in_dim": None}, r"shape \(8,\) has no dimension for 'in_channel'.*\[1\]"),
        ("per_channel", (8,), {"out_dim": 0, "in_dim": None}, r"shape \(8,\) has no dimension for 'per_channel'"),
        ("default", (8, 8), {"out_dim": 0, "in_dim": 1}, r"'default' .*\(8, 8\).*Resolve the default"),
        ([[1], "back", -1], (0, 8), {"out_dim": 0, "in_dim": 1}, r"shape \(0, 8\) has no elements"),
    ],
)
def test_block_of_rejects(granularity, shape, dims, message):
    with pytest.raises(InvalidValueError, match=message):
        block_of(Granularity.parse(granularity), shape, **dims)


GEOMETRIES = [
    ((), ()),
    ((6,), (1,)),
    ((6,), (3,)),
    ((4, 6), (1, 6)),
    ((4, 6), (4, 1)),
    ((4, 6), (2, 3)),
    ((2, 4, 6), (1, 2, 6)),
    ((4, 2, 3, 3), (1, 2, 3, 3)),
    ((4, 2, 3, 3), (2, 1, 1, 3)),
]


@pytest.mark.parametrize(("shape", "block"), GEOMETRIES)
def test_split_and_expand_agree_with_slicing(shape, block):
    blocks = Blocks(shape, block)
    x = torch.arange(math.prod(shape)).reshape(shape)
    values = torch.arange(blocks.count).reshape(blocks.grid)
    rows, full = blocks.split(x), blocks.expand(values)
    assert blocks.count * blocks.block_numel == x.numel()
    assert rows.shape == (*blocks.grid, blocks.block_numel)
    assert full.shape == shape
    for position in itertools.product(*(range(count) for count in blocks.grid)):
        where = tuple(slice(i * size, (i + 1) * size) for i, size in zip(position, block, strict=True))
        assert rows[position].tolist() == x[where].flatten().tolist()
        assert (full[where] == values[position]).all()


def test_split_of_filters_is_a_view():
    x = torch.randn(4, 2, 3, 3)
    rows = Blocks((4, 2, 3, 3), (1, 2, 3, 3)).split(x)
    assert rows.shape == (4, 1, 1, 1, 18)
    assert rows.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tiles_is_a_view_of_any_layout(layout):
    x = torch.randn(4, 2, 6, 6).to(memory_format=layout)
    blocks = Blocks((4, 2, 6, 6), (1, 2, 3, 3))
    assert blocks.tiles(x).data_ptr() == x.data_ptr()
    torch.testing.assert_close(blocks.tiles(x).sum(dim=blocks.inside)[1, 0, 1, 0], x[1, :, 3:, :3].sum())


@pytest.mark.parametrize(
    ("shape", "block", "compact"),
    [
        ((4, 2, 3, 3), (1, 2, 3, 3), (4, 1, 1, 1)),
        ((4, 2, 3, 3), (4, 1, 3, 3), (1, 2, 1, 1)),
        ((4, 6), (1, 1), (4, 6)),
        ((4, 6), (4, 6), (1, 1)),
    ],
)
def test_channel_masks_expand_without_memory(shape, block, compact):
    blocks = Blocks(shape, block)
    grid = torch.rand(blocks.grid) > 0.5
    assert blocks.expand_compact(grid).shape == compact
    assert blocks.expand(grid).shape == shape
    assert blocks.expand(grid).untyped_storage().data_ptr() == grid.untyped_storage().data_ptr()


def test_only_the_dimension_of_wide_blocks_is_repeated():
    compact = Blocks((8, 6, 5), (2, 6, 5)).expand_compact(torch.arange(4.0))
    assert compact.shape == (8, 1, 1)
    assert compact.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("block", [(1, 4), (2, 6), (4, 1), (1, 1), (4, 12)])
def test_join_is_the_inverse_of_split(block):
    blocks, x = Blocks((4, 12), block), torch.arange(48.0).view(4, 12)
    assert torch.equal(blocks.join(blocks.split(x)), x)
    assert torch.equal(blocks.join(blocks.split(x).flatten()), x)
