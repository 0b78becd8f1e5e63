"""Numbers as text."""

import pytest

from tersor.analysis import Metric, si


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (999.4, "", "999"),
        (999_999, "", "1.00 M"),
        (12_345, "", "12.3 k"),
        (123_456, "B", "123 kB"),
        (17, "B", "17 B"),
        (9.999e-4, "s", "1.00 ms"),
        (9.4e-5, "s", "94.0 µs"),
        (1500.0, "s", "1500 s"),
        (5e16, "", "50000 T"),
        (float("nan"), "", "n/a"),
    ],
)
def test_three_digits_and_a_prefix(value, unit, text):
    assert si(value, unit) == text


@pytest.mark.parametrize(
    ("metric", "change"),
    [
        (Metric("macs", "MACs", 10, 10, "", 1.0), "unchanged"),
        (Metric("macs", "MACs", 10, 0, "", 0.0), "n/a"),
        (Metric("macs", "MACs", 0, 9, "", float("inf")), "n/a"),
        (Metric("size", "Size", 100, 5, "B", 0.05), "20.0x smaller"),
        (Metric("perplexity", "Perplexity", 37.5, 38.25, "score", 1.02), "+0.75"),
    ],
)
def test_change_in_words(metric, change):
    assert metric.change == change
