import pytest

from tersor.config import IntDtype, parse_config_list
from tersor.errors import ConfigError, ConflictError, InvalidValueError

CONV = {"op_types": ["Conv2d"]}


@pytest.mark.parametrize("key", ["sparsity", "sparsity_per_layer"])
def test_a_sparsity_is_a_ratio_of_the_weight_alone(key):
    (entry,) = parse_config_list([CONV | {key: 0.8}], "pruning")
    assert entry.settings.given() == {"sparse_ratio": 0.8}
    assert entry.target_names == ("weight",)


def test_a_total_sparsity_is_a_group_of_its_own():
    first, second = parse_config_list(
        [CONV | {"total_sparsity": 0.8, "max_sparsity_per_layer": 0.9}, CONV | {"total_sparsity": 0.8}], "pruning"
    )
    assert (first.settings.sparse_ratio, first.settings.max_sparse_ratio) == (0.8, 0.9)
    assert first.settings.global_group_id != second.settings.global_group_id


def test_keys_of_both_versions_mix():
    legacy, new = parse_config_list(
        [CONV | {"sparsity": 0.5, "dependency_group_id": "a", "target_names": ["bias"]}, CONV | {"sparse_ratio": 0.5}],
        "pruning",
    )
    assert legacy.target_names == ("bias",)
    assert legacy.settings.given() == {"sparse_ratio": 0.5, "dependency_group_id": "a"}
    assert new.target_names is None


@pytest.mark.parametrize(
    ("types", "bits", "dtypes", "implied"),
    [
        (["input", "weight"], {"input": 8, "weight": 4}, {"_input_0": 8, "weight": 4}, ()),
        ("weight", 4, {"_input_0": 4, "weight": 4}, ("_input_0",)),
        ("weight", {"weight": 4}, {"_input_0": 4, "weight": 4}, ("_input_0",)),
        ("input", {"input": 4, "weight": 8}, {"_input_0": 4, "weight": 8}, ("weight",)),
        (["output"], 6, {"_output_0": 6}, ()),
        (["output", "weight"], None, {"_input_0": 8, "weight": 8, "_output_0": 8}, ("_input_0",)),
    ],
)
def test_weight_and_input_go_together(types, bits, dtypes, implied):
    keys = {"quant_types": types, "quant_start_step": 5} | ({} if bits is None else {"quant_bits": bits})
    (entry,) = parse_config_list([CONV | keys], "quantization")
    assert entry.target_names == tuple(dtypes)
    assert {name: spec.quant_dtype for name, spec in entry.target_settings.items()} == {
        name: IntDtype(width) for name, width in dtypes.items()
    }
    assert entry.implied_targets == implied
    assert entry.quant_start_step == 5


@pytest.mark.parametrize(
    ("mode", "keys", "error", "place", "text"),
    [
        ("pruning", {"sparsity": 5}, InvalidValueError, "['sparsity']", "5 is no ratio"),
        ("pruning", {"total_sparsity": "x"}, InvalidValueError, "['total_sparsity']", "'x' is no ratio"),
        ("pruning", {"max_sparsity_per_layer": 2}, InvalidValueError, "['max_sparsity_per_layer']", "2 is no ratio"),
        ("pruning", {"sparsity": 0.5, "sparse_ratio": 0.5}, ConflictError, "", "'sparse_ratio' and 'sparsity'"),
        ("pruning", {"sparsity": 0.5, "sparsity_per_layer": 0.5}, ConflictError, "", "'sparsity_per_layer'"),
        ("pruning", {"sparsity": 0.5, "total_sparsity": 0.5}, ConflictError, "", "'total_sparsity'"),
        ("pruning", {"total_sparsity": 0.5, "global_group_id": "a"}, ConflictError, "", "'global_group_id'"),
        ("pruning", {"max_sparsity_per_layer": 1, "max_sparse_ratio": 1}, ConflictError, "", "'max_sparse_ratio'"),
        ("pruning", {"sparsity": 0.5, "exclude": True}, ConflictError, "", "two entries"),
        ("quantization", {"quant_types": "wight"}, InvalidValueError, "['quant_types']", "Did you mean 'weight'?"),
        ("quantization", {"quant_types": 8}, InvalidValueError, "['quant_types']", "8 is no list"),
        ("quantization", {"quant_bits": 8}, ConflictError, "", "without 'quant_types'"),
        ("quantization", {"quant_types": "weight", "quant_bits": 99}, InvalidValueError, "['quant_bits']", "99"),
        (
            "quantization",
            {"quant_types": "weight", "quant_bits": {"weight": 99}},
            InvalidValueError,
            "['quant_bits']['weight']",
            "99",
        ),
        (
            "quantization",
            {"quant_types": "weight", "quant_bits": {"weight": 8, "output": 8}},
            InvalidValueError,
            "['quant_bits']",
            "'output'",
        ),
        (
            "quantization",
            {"quant_types": ["weight", "output"], "quant_bits": {"weight": 8}},
            InvalidValueError,
            "['quant_bits']",
            "Add {'output': 8}",
        ),
        ("quantization", {"quant_types": "weight", "quant_dtype": 8}, ConflictError, "", "'quant_dtype'"),
        ("quantization", {"quant_types": "weight", "target_names": ["weight"]}, ConflictError, "", "'target_names'"),
    ],
)
def test_bad_entries(mode, keys, error, place, text):
    with pytest.raises(ConfigError) as caught:
        parse_config_list([CONV | keys], mode)
    assert type(caught.value) is error
    assert caught.value.where == f"config_list[0]{place}"
    assert text in str(caught.value)
