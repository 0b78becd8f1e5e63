"""Scores against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tersor.errors import InvalidValueError
from tersor.pruning import scores
from tersor.pruning.scores import block_norm, geometric_median_distance, mean_over_members
from tersor.targets.granularity import Blocks

GEOMETRIES = [
    ((6, 4, 3, 3), (1, 4, 3, 3)),
    ((6, 4, 3, 3), (6, 1, 3, 3)),
    ((8, 12), (4, 4)),
    ((5, 3), (1, 1)),
    ((7,), (1,)),
]


def slow_norm(row: list[float], p: float) -> float:
    return max(map(abs, row)) if p == math.inf else sum(abs(value) ** p for value in row) ** (1 / p)


@pytest.mark.parametrize(("shape", "block"), GEOMETRIES)
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_block_norm(shape, block, p):
    blocks = Blocks(shape, block)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = block_norm(x, blocks, p)
    expected = [slow_norm(row, p) for row in blocks.split(x.double()).view(blocks.count, -1).tolist()]
    assert result.shape == blocks.grid
    torch.testing.assert_close(
        result.flatten().double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1, 2])
def test_norm_of_half_types_neither_overflows_nor_rounds(dtype, p):
    x = torch.full((2, 4096), 100.0, dtype=dtype)
    result = block_norm(x, Blocks((2, 4096), (1, 4096)), p)
    assert result.dtype == torch.float32
    assert result.flatten().tolist() == [100.0 * 4096 ** (1 / p)] * 2


def test_norm_of_a_parameter_and_of_a_scalar():
    weight = torch.nn.Parameter(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    norm = block_norm(weight, Blocks((2, 2), (1, 2)), 2)
    assert norm.tolist() == [[5.0], [1.0]]
    assert not norm.requires_grad
    assert block_norm(torch.tensor(-2.0), Blocks((), ()), 1).item() == 2.0


def slow_distances(rows: list[list[float]]) -> list[float]:
    return [sum(math.dist(row, other) for other in rows) for row in rows]


@pytest.mark.parametrize("chunk", [1, 20, 1 << 22])
@pytest.mark.parametrize(("shape", "block"), GEOMETRIES)
def test_geometric_median_distance(shape, block, chunk, monkeypatch):
    monkeypatch.setattr(scores, "_CHUNK", chunk)
    blocks = Blocks(shape, block)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = geometric_median_distance(x, blocks)
    rows = blocks.split(x.double()).view(blocks.count, -1).tolist()
    assert result.shape == blocks.grid
    torch.testing.assert_close(result.flatten(), torch.tensor(slow_distances(rows), dtype=torch.float64))


def test_distances_survive_a_common_offset():
    offset = 1000 + torch.randn(6, 50, generator=torch.Generator().manual_seed(2)) * 1e-3
    result = geometric_median_distance(offset, Blocks((6, 50), (1, 50))).flatten()
    expected = torch.tensor(slow_distances(offset.double().tolist()), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


def test_distance_of_equal_filters_is_zero():
    result = geometric_median_distance(torch.full((4, 9), 0.1), Blocks((4, 9), (1, 9)))
    assert result.abs().max() < 1e-7


def test_distance_needs_two_blocks():
    with pytest.raises(InvalidValueError, match=r"\(1, 9\) is one block.*smaller blocks"):
        geometric_median_distance(torch.ones(1, 9), Blocks((1, 9), (1, 9)))


def test_mean_over_members():
    grids = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 8.0]]), torch.tensor([5.0, 2.0], dtype=torch.float64)]
    mean = mean_over_members(grids)
    assert mean.dtype == torch.float64
    assert mean.tolist() == [3.0, 4.0]
    assert grids[0].tolist() == [[1.0], [2.0]]
    assert mean_over_members([torch.tensor([60000.0, 1.0]).half()] * 2).tolist() == [60000.0, 1.0]
