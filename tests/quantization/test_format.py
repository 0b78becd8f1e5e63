"""The arithmetic of formats, against numpy in float64 and against PyTorch's kernels."""

import numpy as np
import pytest
import torch

from tersor.config import QuantizationSpec
from tersor.errors import ConflictError, InvalidValueError
from tersor.quantization import Format


def form_of(**keys):
    return Format.of(QuantizationSpec.parse(keys))


@pytest.mark.parametrize(
    ("keys", "low", "high"),
    [
        ({"quant_dtype": "int8"}, -127, 127),
        ({"quant_dtype": "int8", "quant_scheme": "affine"}, -128, 127),
        ({"quant_dtype": "int8", "quant_range": "full"}, -128, 127),
        ({"quant_dtype": "int8", "quant_scheme": "affine", "quant_range": "narrow"}, -127, 127),
        ({"quant_dtype": "int2"}, -1, 1),
        ({"quant_dtype": "uint1"}, 0, 1),
        ({"quant_dtype": "uint16"}, 0, 65535),
        ({"quant_dtype": "fp8_e4m3"}, -448, 448),
    ],
)
def test_ranges(keys, low, high):
    form = form_of(**keys)
    assert (form.low, form.high) == (low, high)


@pytest.mark.parametrize("dtype", ["int2", "int4", "int8", "int16", "uint2", "uint4", "uint8", "uint16"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("reach", [(-3.0, 5.0), (0.5, 4.0), (-2.0, -1.0), (0.0, 0.0)])
def test_simulation_is_the_formula_and_the_kernel(dtype, scheme, reach):
    form = form_of(quant_dtype=dtype, quant_scheme=scheme)
    low, high = (torch.tensor(value) for value in reach)
    scale, zero_point = form.scale_and_zero_point(low, high)
    width = form.high - form.low
    if scheme == "symmetric":
        expected = max(map(abs, reach)) / (width / 2)
        assert zero_point == (form.low + form.high + 1) // 2
    else:
        expected = (max(reach[1], 0) - min(reach[0], 0)) / width
        assert form.low <= zero_point <= form.high
        assert zero_point == zero_point.round()
    assert scale.item() == pytest.approx(expected or 1.0, rel=1e-6)
    x = torch.linspace(-6, 6, 1001)
    kernel = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), int(form.low), int(form.high))
    assert torch.equal(form.simulate(x, scale, zero_point), kernel)
    steps, zero = x.double().numpy() / scale.double().item(), zero_point.item()
    stored = np.clip(np.round(steps) + zero, form.low, form.high)
    decided = np.abs(steps - np.floor(steps) - 0.5) > 1e-2  # where no rounding error tips the balance
    np.testing.assert_array_equal(form.quantize(x, scale, zero_point).double().numpy()[decided], stored[decided])


def test_zero_stays_zero_in_affine_formats():
    form = form_of(quant_dtype="uint4", quant_scheme="affine")
    scale, zero_point = form.scale_and_zero_point(torch.tensor([0.7, -0.3]), torch.tensor([2.1, 5.0]))
    assert form.simulate(torch.zeros(2), scale, zero_point).tolist() == [0, 0]


def test_blocks_have_scales_of_their_own():
    form = form_of(quant_dtype="int8")
    weight = torch.randn(5, 7)
    scale, zero_point = form.scale_and_zero_point(*weight.aminmax(dim=1))
    kernel = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -127, 127)
    assert torch.equal(form.simulate(weight, scale[:, None], zero_point[:, None]), kernel)
    assert ((weight - kernel).abs().amax(1) <= scale / 2 * 1.0001).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_floating_point_types_are_torchs(name):
    form = form_of(quant_dtype=name)
    x = torch.randn(1000) * 3
    scale, zero_point = form.scale_and_zero_point(*x.aminmax())
    assert zero_point == 0
    assert scale.item() == pytest.approx(x.abs().max().item() / form.high)
    cast = (x * (1 / scale)).to(form.dtype.torch_dtype).float() * scale
    assert torch.equal(form.simulate(x, scale, zero_point), cast)
    assert form.simulate(10 * x.abs().max(), scale, zero_point) == form.high * scale


def test_gradients_go_straight_through_inside_the_range():
    form = form_of(quant_dtype="int4")
    x = torch.tensor([-8.0, -7.4, -7.0, 0.3, 7.4, 7.6], requires_grad=True)
    (form.simulate(x, torch.tensor(1.0), torch.tensor(0.0)) * torch.arange(1.0, 7.0)).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_computed_in_float32_or_wider(dtype):
    form, x = form_of(quant_dtype="int8"), torch.randn(100).to(dtype)
    scale, zero_point = form.scale_and_zero_point(*x.aminmax())
    assert scale.dtype is torch.float32
    result = form.simulate(x, scale, zero_point)
    assert result.dtype is dtype
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    exact = form.dequantize(form.quantize(x.to(wide), scale, zero_point), scale, zero_point).to(dtype)
    assert torch.equal(result, exact)


def test_a_type_without_a_range_is_refused():
    with pytest.raises(InvalidValueError, match=r"int1 holds -1 and 1 .*BNNQuantizer"):
        form_of(quant_dtype="int1")


def test_a_floating_point_type_has_no_zero_point():
    with pytest.raises(ConflictError, match="fp8_e4m3 has no zero point"):
        form_of(quant_dtype="fp8_e4m3", quant_scheme="affine")
