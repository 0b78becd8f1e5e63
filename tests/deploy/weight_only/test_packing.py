"""Integers in words of 32 bits, and scales by rows and groups."""

import pytest
import torch

from tersor.config import IntDtype
from tersor.deploy.stored import Stored
from tersor.deploy.weight_only.packing import Integers, pack
from tersor.errors import InvalidValueError


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 50])
def test_numbers_lie_one_after_another(bits, columns):
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns), dtype=torch.int8)
    words = pack(numbers, bits)
    assert words.dtype is torch.int32
    assert words.shape == (3, -(-columns * bits // 32))
    for row, packed in zip(numbers.tolist(), words.tolist(), strict=True):
        stream = sum((number + 2 ** (bits - 1)) << (place * bits) for place, number in enumerate(row))
        assert [word & 0xFFFFFFFF for word in packed] == [stream >> (32 * at) & 0xFFFFFFFF for at in range(len(packed))]


def stored(scale, zero_point, shape, dtype="int4", low=-8, high=7, scheme="affine"):
    said = {"quant_dtype": dtype, "quant_scheme": scheme, "quant_min": low, "quant_max": high}
    return Stored.of({**said, "scale": scale, "zero_point": zero_point}, "weight", shape)


@pytest.mark.parametrize(
    ("grid", "group"), [((), 64), ((4, 1), 64), ((4, 2), 32), ((2, 2), 32), ((2, 1), 64), ((1, 4), 16), ((1, 1), 64)]
)
def test_scales_of_any_grid_go_to_rows_and_groups(grid, group):
    weight = torch.randn(4, 64)
    scale, zero_point = torch.rand(grid) / 4 + 0.1, torch.randint(-3, 3, grid).float()
    integers = Integers.of(stored(scale, zero_point, weight.shape), weight, "weight")
    each = [own.expand(*grid) if grid else own.view(1, 1) for own in (scale, zero_point)]
    each = [own.repeat_interleave(4 // len(own), 0).repeat_interleave(64 // own.shape[1], 1) for own in each]
    numbers = (weight / each[0] + each[1]).round().clamp(-8, 7)
    assert integers.group == group
    assert integers.scale.shape == (4, 64 // group)
    assert float((integers.values() - (numbers - each[1]) * each[0]).abs().max()) < 1e-6


def test_blocks_of_more_rows_than_columns():
    weight = torch.randn(64, 64)
    integers = Integers.of(stored(torch.rand(1, 2) + 0.1, torch.zeros(1, 2), weight.shape), weight, "weight")
    assert (integers.group, integers.scale.shape) == (32, (64, 2))


def test_unsigned_numbers_are_the_same_values_as_signed_ones():
    weight = torch.randn(4, 64)
    own = Integers.of(stored(torch.tensor(0.2), torch.tensor(5.0), weight.shape, "uint4", 0, 15), weight, "weight")
    numbers, zero_point = own.signed()
    assert (int(numbers.min()), int(numbers.max())) == (-8, 7)
    assert torch.equal((numbers.float() - zero_point) * 0.2, own.values())


def test_symmetric_is_what_has_its_zero_in_the_middle():
    ones, zeros = torch.ones(2, 1), torch.zeros(2, 32)
    signed = Integers(IntDtype(4), zeros, ones, torch.zeros(2, 1))
    unsigned = Integers(IntDtype(4, signed=False), zeros, ones, torch.full((2, 1), 8))
    assert signed.is_symmetric
    assert unsigned.is_symmetric
    assert not Integers(IntDtype(4), zeros, ones, torch.ones(2, 1)).is_symmetric


@pytest.mark.parametrize(
    ("own", "shape", "match"),
    [
        (stored(torch.ones(1, 64), torch.zeros(1, 64), (4, 64)), (4, 64), "each of its columns has a scale"),
        (stored(torch.tensor(1.0), torch.tensor(0.0), (4, 8, 3)), (4, 8, 3), "3 dimensions"),
        (stored(torch.tensor(1.0), torch.tensor(0.0), (4, 8), "fp8_e4m3", -448, 448), (4, 8), "fp8_e4m3 is no type"),
    ],
)
def test_what_has_no_rows_of_groups_is_refused(own, shape, match):
    with pytest.raises(InvalidValueError, match=match):
        Integers.of(own, torch.randn(shape), "layer.weight")
