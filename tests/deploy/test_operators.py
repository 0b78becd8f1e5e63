"""The operators of a program against the arithmetic of the simulation."""

import pytest
import torch

from tersor.config import IntDtype, parse_dtype
from tersor.deploy.operators import choose, dequantize, quantize, storage_type
from tersor.quantization import Format

KINDS = [
    ("int2", "symmetric"), ("int4", "affine"), ("uint4", "affine"), ("int8", "symmetric"), ("uint8", "affine"),
    ("int12", "symmetric"), ("int16", "affine"), ("uint16", "affine"), ("int24", "symmetric"), ("int32", "affine"),
    ("uint32", "affine"), ("fp8_e4m3", "symmetric"), ("fp8_e5m2", "symmetric"),
]  # fmt: skip


def form_of(kind, scheme):
    from tersor.config import QuantizationSpec

    return Format.of(QuantizationSpec(quant_dtype=kind, quant_scheme=scheme))


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_simulation(kind, scheme, dtype):
    form, x = form_of(kind, scheme), torch.randn(7, 12).to(dtype)
    scale, zero_point = form.scale_and_zero_point(x.amin() / 2, x.amax() / 2)  # some are clipped
    held = zero_point.double().to(storage_type(form.dtype))
    q = quantize(x, scale, held, kind, form.low, form.high)
    assert q.dtype is storage_type(form.dtype)
    values = dequantize(q, scale, held, kind)
    assert torch.equal(values.to(dtype), form.simulate(x, scale, zero_point))


def test_every_type_is_held():
    for bits in range(1, 33):
        for signed in (True, False):
            held = torch.iinfo(storage_type(IntDtype(bits, signed)))
            least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            assert held.min <= least
            assert held.max >= most


def test_signs_have_no_zero():
    x = torch.tensor([-2.0, -0.1, 0.0, 0.3])
    q = quantize(x, torch.tensor(0.5), torch.tensor(0, dtype=torch.int8), "int1", -1, 1)
    assert q.tolist() == [-1, -1, 1, 1]
    assert dequantize(q, torch.tensor(0.5), torch.tensor(0, dtype=torch.int8), "int1").tolist() == [
        -0.5,
        -0.5,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_chosen_scales_hold_each_row(axis):
    x, form = torch.randn(4, 6), form_of("uint8", "affine")
    scale, zero_point = choose(x, "uint8", "affine", 0, 255, axis, None if axis is None else x.shape[axis])
    block = None if axis is None else x.shape[axis]
    values = dequantize(
        quantize(x, scale, zero_point, "uint8", 0, 255, axis, block), scale, zero_point, "uint8", axis, block
    )
    widest = x.amax() - x.amin() if axis is None else (x.amax(axis) - x.amin(axis)).max()
    assert float((values - x).abs().max()) <= float(widest.clamp(min=float(x.abs().max()))) / 255
    assert form.dtype == parse_dtype("uint8")


def test_compilers_take_them_for_what_they_are():
    scale, zero_point = torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.tersor.quantize.default, (torch.randn(3), scale, zero_point, "uint8", 0.0, 255.0))
    torch.library.opcheck(
        torch.ops.tersor.dequantize.default, (torch.tensor([1, 2], dtype=torch.uint8), scale, zero_point, "uint8")
    )
    torch.library.opcheck(
        torch.ops.tersor.choose.default, (torch.randn(2, 3), "int8", "symmetric", -127.0, 127.0, 1, 3)
    )
