import pytest
import torch

from tersor.config import FloatDtype, IntDtype, parse_dtype
from tersor.errors import InvalidValueError


@pytest.mark.parametrize(
    ("written", "bits", "signed"),
    [
        ("int8", 8, True),
        ("uint4", 4, False),
        (8, 8, True),
        ("uint1", 1, False),
        ("int1", 1, True),
        (IntDtype(3), 3, True),
    ],
)
def test_reads_names_and_widths(written, bits, signed):
    assert IntDtype.parse(written) == IntDtype(bits, signed)


@pytest.mark.parametrize("dtype", [IntDtype(8), IntDtype(4, signed=False)])
def test_reads_back_what_it_writes(dtype):
    assert IntDtype.parse(dtype.as_config()) == dtype


@pytest.mark.parametrize("wrong", ["int0", "int33", "uint0", "float8", "8", 0, -8, True, 8.0, None, [8]])
def test_refuses_all_else(wrong):
    with pytest.raises(InvalidValueError, match="no quantized data type") as caught:
        IntDtype.parse(wrong)
    assert repr(wrong) in str(caught.value)
    assert "int1 to int32" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "dtype", "largest"),
    [
        ("fp8_e4m3", FloatDtype(4, 3), 448),
        ("fp8_e5m2", FloatDtype(5, 2), 57344),
        (torch.float8_e4m3fn, FloatDtype(4, 3), 448),
    ],
)
def test_reads_floating_point_types(written, dtype, largest):
    assert parse_dtype(written) == parse_dtype(dtype.as_config()) == dtype
    assert dtype.largest == largest
    assert dtype.bits == 8


def test_reads_integer_types_too():
    assert parse_dtype("int4") == parse_dtype(4) == IntDtype(4)


def test_a_misspelt_type_is_told_the_nearest():
    with pytest.raises(InvalidValueError, match=r"'fp8_e4m2' is no quantized.*fp8_e4m3"):
        parse_dtype("fp8_e4m2")
