import json

import pytest

from tersor.config import Align, DistillationSpec, Granularity, IntDtype, PruningSpec, QuantizationSpec
from tersor.config.specs import Pattern
from tersor.errors import ConflictError, InvalidValueError, UnknownKeyError


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("out_channel", Granularity(name="out_channel")),
        ([4, 4], Granularity((4, 4))),
        ((1, -1, -1, -1), Granularity((1, -1, -1, -1))),
        ([[1], "back", -1], Granularity((1,), "back", -1)),
        ([[2, 2], "back"], Granularity((2, 2), "back", 1)),
        ([[2, 2]], Granularity((2, 2))),
    ],
)
def test_granularity_has_every_form_of_nni(written, expected):
    assert Granularity.parse(written) == expected
    assert Granularity.parse(expected.as_config()) == expected


@pytest.mark.parametrize(
    "wrong",
    ["out_chanel", [], [0, 4], [-2], [1.5], [True], [[4], "middle"], [[4], "back", 2], [[4], "back", 1, 1], [[]], 4],
)
def test_granularity_refuses_all_else(wrong):
    with pytest.raises(InvalidValueError, match="no granularity") as caught:
        Granularity.parse(wrong)
    assert "out_channel" in caught.value.legal


@pytest.mark.parametrize(("written", "expected"), [(0, 0.0), (1, 1.0), (0.25, 0.25)])
def test_ratios_may_be_integers(written, expected):
    ratio = PruningSpec.parse({"sparse_ratio": written}).sparse_ratio
    assert ratio == expected
    assert isinstance(ratio, float)


@pytest.mark.parametrize("wrong", [5.0, -0.1, float("nan"), float("inf"), True, "0.5", [0.5], 1 + 1e-9])
@pytest.mark.parametrize("key", ["sparse_ratio", "min_sparse_ratio", "max_sparse_ratio"])
def test_what_is_no_ratio(key, wrong):
    with pytest.raises(InvalidValueError, match="is no ratio") as caught:
        PruningSpec.parse({key: wrong}, "here")
    assert caught.value.where == f"here['{key}']"
    assert repr(wrong) in str(caught.value)


def test_nested_places_are_named():
    with pytest.raises(InvalidValueError) as caught:
        PruningSpec.parse({"align": {"target_name": "weight", "dims": [0, -1]}}, "config_list[1]")
    assert caught.value.where == "config_list[1]['align']['dims']"
    with pytest.raises(UnknownKeyError, match="Did you mean 'module_name'"):
        PruningSpec.parse({"align": {"target_name": "weight", "dims": [0], "module": "conv"}})


def test_given_keeps_what_was_set_to_none():
    spec = PruningSpec.parse({"sparse_ratio": None, "granularity": "default"})
    assert spec.given() == {"sparse_ratio": None, "granularity": Granularity(name="default")}


def test_layers_override_and_rivals_unset_each_other():
    align = {"align": Align.parse({"target_name": "weight", "dims": 0}), "apply_method": "mul"}
    merged = PruningSpec.layered(align, {"sparse_ratio": 0.5}, {"apply_method": "add"})
    assert (merged.align, merged.sparse_ratio, merged.apply_method) == (None, 0.5, "add")
    assert PruningSpec.layered(align, {"max_sparse_ratio": 0.5}).align == Align(target_name="weight", dims=(0,))


def test_layers_are_checked_together():
    with pytest.raises(ConflictError, match=r"min_sparse_ratio 0.9 is above max_sparse_ratio 0.5"):
        PruningSpec.layered({"max_sparse_ratio": 0.5}, {"min_sparse_ratio": 0.9}, where="config_list[0]")


@pytest.mark.parametrize(
    "spec",
    [
        PruningSpec.parse(
            {
                "sparse_ratio": 0.5,
                "granularity": [[1], "back", -1],
                "global_group_id": 3,
                "apply_method": "add",
                "apply_value": -30,
            }
        ),
        PruningSpec.parse({"align": {"module_name": "conv", "target_name": "_output_", "dims": [1]}}),
        QuantizationSpec.parse({"quant_dtype": "uint4", "quant_scheme": "affine", "granularity": "per_channel"}),
        DistillationSpec.parse({"lambda": 2, "link": ["a", "b"], "apply_method": "kl"}),
    ],
)
def test_specs_go_through_json(spec):
    assert type(spec).parse(json.loads(json.dumps(spec.as_config()))) == spec


def test_values_have_one_form():
    assert QuantizationSpec.parse({"quant_dtype": 4}).quant_dtype == IntDtype(4)
    assert DistillationSpec.parse({"link": "layer1"}).link == ("layer1",)
    assert DistillationSpec.parse({"link": "auto"}).link == "auto"
    assert PruningSpec.parse({"align": {"target_name": "_input_", "dims": [0]}}).align == Align(
        target_name="_input_0", dims=(0,)
    )
    assert PruningSpec.parse({}).apply_value == -1000.0


def test_specs_are_frozen():
    spec = PruningSpec.parse({"sparse_ratio": 0.5})
    with pytest.raises(ValueError, match="frozen"):
        spec.sparse_ratio = 0.6


@pytest.mark.parametrize(
    ("written", "stays", "of", "ratio"), [("2:4", 2, 4, 0.5), ("1:4", 1, 4, 0.75), ("04:16", 4, 16, 0.75)]
)
def test_patterns_have_a_ratio(written, stays, of, ratio):
    spec = PruningSpec.parse({"sparse_pattern": written})
    assert (spec.sparse_pattern.keep, spec.sparse_pattern.of, spec.ratio) == (stays, of, ratio)
    assert PruningSpec.parse(json.loads(json.dumps(spec.as_config()))) == spec
    assert spec.as_config() == {"sparse_pattern": f"{stays}:{of}"}


@pytest.mark.parametrize(
    "wrong", ["4:2", "2:2", "0:4", "2:", ":4", "2", "2:4:8", "-2:4", "2.0:4", "²:4", 2, (2, 4), None, ""]
)
def test_what_is_no_pattern(wrong):
    with pytest.raises(InvalidValueError, match=r"is no pattern\. Legal: N:M with 0 < N < M") as caught:
        Pattern.parse(wrong)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        {"sparse_ratio": 0.5},
        {"sparse_threshold": 0.5},
        {"align": {"target_name": "weight", "dims": [0]}},
        {"balance_granularity": [1, 4]},
        {"internal_metric_block": 2},
        {"global_group_id": 1},
        {"min_sparse_ratio": 0.75},
        {"max_sparse_ratio": 0.25},
    ],
)
def test_a_pattern_alone_says_how_many_leave(other):
    """A budget of a group or a bound would leave other numbers, with which no kernel for 2:4 runs."""
    with pytest.raises(ConflictError, match=next(iter(other))):
        PruningSpec.parse({"sparse_pattern": "2:4", **other})


def test_a_pattern_unsets_its_rivals_below():
    merged = PruningSpec.layered({"sparse_ratio": 0.5}, {"sparse_pattern": "2:4"})
    assert (merged.sparse_ratio, merged.ratio, merged.as_config()) == (None, 0.5, {"sparse_pattern": "2:4"})
    merged = PruningSpec.layered({"sparse_pattern": "2:4"}, {"sparse_ratio": 0.25})
    assert (merged.sparse_pattern, merged.ratio) == (None, 0.25)


def test_parts_are_balanced_in_one_way():
    with pytest.raises(ConflictError, match="'balance_granularity' and 'internal_metric_block' both say"):
        PruningSpec.parse({"sparse_ratio": 0.5, "balance_granularity": [1, 4], "internal_metric_block": 2})
