import pytest

from tersor.config import IntDtype
from tersor.errors import InvalidValueError


@pytest.mark.parametrize(
    ("written", "bits", "signed"),
    [("int8", 8, True), ("uint4", 4, False), (8, 8, True), ("uint1", 1, False), (IntDtype(3), 3, True)],
)
def test_reads_names_and_widths(written, bits, signed):
    assert IntDtype.parse(written) == IntDtype(bits, signed)


@pytest.mark.parametrize("dtype", [IntDtype(8), IntDtype(4, signed=False)])
def test_reads_back_what_it_writes(dtype):
    assert IntDtype.parse(dtype.as_config()) == dtype


@pytest.mark.parametrize("wrong", ["int1", "int33", "uint0", "float8", "8", 0, -8, True, 8.0, None, [8]])
def test_refuses_all_else(wrong):
    with pytest.raises(InvalidValueError, match="no quantized data type") as caught:
        IntDtype.parse(wrong)
    assert repr(wrong) in str(caught.value)
    assert "int2 to int32" in str(caught.value)
