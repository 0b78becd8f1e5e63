"""What a calibration says in the words of the operators."""

import pytest
import torch

from tersor.deploy.stored import Stored
from tersor.errors import CheckpointError


def said(scale, zero_point=None, kind="int8", low=-127, high=127, **more):
    scale = torch.as_tensor(scale)
    zero_point = torch.zeros_like(scale) if zero_point is None else torch.as_tensor(zero_point)
    ends = {"quant_min": low, "quant_max": high}
    return {"scale": scale, "zero_point": zero_point, "quant_dtype": kind, "quant_scheme": "symmetric", **ends, **more}


def test_numbers_and_values():
    stored = Stored.of(said(0.5, 3.0, "uint4", 0, 15), "fc.weight", (2, 3))
    values = torch.tensor([[-9.0, -1.5, 0.0], [0.3, 1.0, 9.0]])
    numbers = stored.numbers(values)
    assert numbers.tolist() == [[0, 0, 3], [4, 5, 15]]
    assert stored.values(numbers).tolist() == [[-1.5, -1.5, 0.0], [0.5, 1.0, 6.0]]


@pytest.mark.parametrize(
    ("grid", "shape", "axis", "block"),
    [((), (4, 6), None, None), ((1, 1), (4, 6), None, None), ((4, 1), (4, 6), 0, None), ((1, 6), (4, 6), 1, None),
     ((4, 2), (4, 6), 1, 3), ((2, 6), (4, 6), 0, 2), ((2, 1), (4, 6), 1, 6), ((4, 1, 1, 1), (4, 2, 3, 3), 0, None)],
)  # fmt: skip
def test_one_axis(grid, shape, axis, block):
    scale = torch.rand(grid) + 0.1
    stored = Stored.of(said(scale, low=-1e4, high=1e4, kind="int16"), "fc.weight", shape)
    assert (stored.axis, stored.block) == (axis, block)
    values = torch.randn(shape)
    full = scale
    for dim, size in enumerate(shape if scale.dim() else ()):
        full = full.repeat_interleave(size // full.shape[dim], dim)
    assert torch.equal(stored.numbers(values), (values * (1 / full)).round().to(torch.int16))
    assert torch.equal(stored.values(stored.numbers(values)), (values * (1 / full)).round() * full)


def test_half_zero_points_become_whole_ones():
    stored = Stored.of(said(2 / 3, 1.5, "uint2", 0, 3), "fc.weight", (4,))
    values = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0])
    assert (stored.kind, stored.low, stored.high) == ("int3", -3, 3)
    assert stored.numbers(values).tolist() == [-3, -1, 1, 3]
    assert stored.numbers(torch.zeros(1)).tolist() == [0]  # masked
    torch.testing.assert_close(stored.values(stored.numbers(values)), values)


def test_signs():
    stored = Stored.of(said(0.25, 0.0, "int1", -1, 1), "fc.weight", (3,))
    assert stored.numbers(torch.tensor([0.25, -0.25, 0.0])).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (said([[0.1], [0.1], [0.1]]), r"scales of shape \(3, 1\) do not fit a value of shape \(4, 6\)"),
        (said([0.1, 0.1, 0.1, 0.1]), "do not fit"),
        (said(-1.0), "a scale is negative, or not finite"),
        (said(float("nan")), "not finite"),
        (said(1.0, 300.0), "zero point in its calibration cannot be stored. Legal: -127 to 127"),
        (said(torch.ones(4, 1), 0.0), r"scales of shape \(4, 1\) and zero points of shape \(\)"),
        ({"quant_dtype": "int8"}, r"there is no '\w+' in its calibration"),
    ],
)
def test_what_is_no_calibration_of_it(wrong, message):
    with pytest.raises(CheckpointError, match=rf"fc\.weight: .*{message}"):
        Stored.of(wrong, "fc.weight", (4, 6))


def test_inputs_cut_along_several_dimensions_are_refused():
    with pytest.raises(CheckpointError, match=r"fc\._input_0: scales of shape \(2, 3\), along several dimensions"):
        Stored.of(said(torch.ones(2, 3)), "fc._input_0")
    blocks = {**said(1.0), "dynamic": True, "granularity": [-1, 4]}
    with pytest.raises(CheckpointError, match="dynamic scales in blocks"):
        Stored.of(blocks, "fc._input_0")
