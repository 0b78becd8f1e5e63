"""Each note appears exactly when its reason holds."""

import pytest

from tersor.analysis import Layer, LayerChange, Ratio, Uncounted
from tersor.analysis.notes import notes_on


def layer(name, width, sparsity=0.0):
    return Layer(name, "Linear", (width, 4), width, 4 * width, 4 * width, sparsity)


def change(name, before, after, sparsity=0.0):
    return LayerChange(name, layer(name, before), layer(name, after, sparsity))


FASTER = Ratio(0.5, 0.4, 0.6)


def notes(changes, uncounted=(), macs_ratio=0.5, ratio=FASTER):
    return list(notes_on(changes, uncounted, macs_ratio=macs_ratio, latency_ratios={64: ratio}))


def test_nothing_to_say():
    assert notes([change("fc", 16, 8)]) == []
    assert notes([change("fc", 10, 10), change("hidden", 16, 8)]) == []


def test_uneven_widths_are_named_and_the_rest_counted():
    (note,) = notes([change(f"fc{i}", 16, 10 + i) for i in range(6)])
    assert note.endswith("fc0 has 10, fc1 has 11, fc2 has 12, fc3 has 13, and 2 more.")


@pytest.mark.parametrize(("macs_ratio", "high", "noted"), [(0.5, 1.02, True), (0.5, 0.99, False), (1.0, 1.02, False)])
def test_latency_that_is_not_lower(macs_ratio, high, noted):
    found = notes([change("fc", 16, 8)], macs_ratio=macs_ratio, ratio=Ratio(0.97, 0.9, high))
    assert [note[:36] for note in found] == ["At batch 64 the latency is not measu"] * noted


def test_operators_that_both_models_lack_are_named_once():
    missing = Uncounted("aten.sort", "head", 3)
    (note,) = notes([change("fc", 16, 8)], uncounted=[missing, missing])
    assert note == "MACs are incomplete: no formula counts aten.sort (3x)."


def test_zeros_at_the_old_shape():
    (note,) = notes([change("fc", 16, 16, sparsity=0.5)])
    assert note.endswith("fc 50 %.")


def test_nothing_was_compressed():
    (note,) = notes([change("fc", 16, 16)], macs_ratio=1.0)
    assert note.startswith("All layers have their old shape")
