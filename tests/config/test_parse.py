import copy
import math

import pytest
from torch import nn

from tersor.config import Granularity, IntDtype, parse_config_list
from tersor.errors import ConfigError, ConflictError, InvalidValueError, UnknownKeyError

CONV = {"op_types": ["Conv2d"]}
FC = {"op_names": ["fc"]}

# mode, the wrong entry, the error, its place after "config_list[1]", and what its text has: the value, the remedy
BAD_ENTRIES = [
    # keys
    ("pruning", CONV | {"sparse_ratoi": 0.5}, UnknownKeyError, "['sparse_ratoi']", ["Did you mean 'sparse_ratio'?"]),
    ("pruning", {"op_type": ["Conv2d"]}, UnknownKeyError, "['op_type']", ["Did you mean 'op_types'?"]),
    ("pruning", CONV | {"SPARSITY": 0.5}, UnknownKeyError, "['SPARSITY']", ["Did you mean 'sparsity'?"]),
    ("pruning", CONV | {"quant_dtype": "int8"}, UnknownKeyError, "['quant_dtype']", ["belongs to quantization"]),
    ("pruning", CONV | {"fuse_names": []}, UnknownKeyError, "['fuse_names']", ["belongs to quantization"]),
    ("quantization", CONV | {"sparsity": 0.5}, UnknownKeyError, "['sparsity']", ["belongs to pruning"]),
    ("distillation", CONV | {"lamda": 1}, UnknownKeyError, "['lamda']", ["Did you mean 'lambda'?"]),
    ("pruning", CONV | {3: 4}, UnknownKeyError, "[3]", ["3 is no key"]),
    ("pruning", CONV | {"index": 0}, UnknownKeyError, "['index']", ["Legal: op_names"]),
    # ratios
    ("pruning", CONV | {"sparse_ratio": 5.0}, InvalidValueError, "['sparse_ratio']", ["5.0", "from 0 to 1"]),
    ("pruning", CONV | {"sparse_ratio": -0.1}, InvalidValueError, "['sparse_ratio']", ["-0.1", "0.5 removes half"]),
    ("pruning", CONV | {"sparse_ratio": math.nan}, InvalidValueError, "['sparse_ratio']", ["nan", "from 0 to 1"]),
    ("pruning", CONV | {"sparse_ratio": "0.5"}, InvalidValueError, "['sparse_ratio']", ["'0.5'", "from 0 to 1"]),
    ("pruning", CONV | {"sparse_ratio": True}, InvalidValueError, "['sparse_ratio']", ["True", "from 0 to 1"]),
    ("pruning", CONV | {"sparse_threshold": math.inf}, InvalidValueError, "['sparse_threshold']", ["inf", "finite"]),
    ("pruning", CONV | {"sparse_ratio": 0.5, "sparse_threshold": 0.1}, ConflictError, "", ["Keep one of them"]),
    ("pruning", CONV | {"min_sparse_ratio": 0.9, "max_sparse_ratio": 0.5}, ConflictError, "", ["0.9", "0.5", "Swap"]),
    # other settings
    ("pruning", CONV | {"granularity": "out_chanel"}, InvalidValueError, "['granularity']", ["mean 'out_channel'?"]),
    ("pruning", CONV | {"granularity": [0, 4]}, InvalidValueError, "['granularity']", ["[0, 4]", "at least 1"]),
    ("pruning", CONV | {"apply_method": "multiply"}, InvalidValueError, "['apply_method']", ["'multiply'", "mul"]),
    ("pruning", CONV | {"apply_value": 0}, InvalidValueError, "['apply_value']", ["0 is", "below 0"]),
    ("pruning", CONV | {"apply_value": -math.inf}, InvalidValueError, "['apply_value']", ["-inf", "finite"]),
    ("pruning", CONV | {"internal_metric_block": 0}, InvalidValueError, "['internal_metric_block']", ["at least 1"]),
    ("pruning", CONV | {"global_group_id": ["a"]}, InvalidValueError, "['global_group_id']", ["['a']", "text"]),
    ("pruning", CONV | {"align": "conv1"}, InvalidValueError, "['align']", ["'conv1'", "module_name"]),
    ("pruning", CONV | {"align": {"dims": [0]}}, InvalidValueError, "['align']", ["'target_name' is missing"]),
    ("quantization", CONV | {"quant_dtype": "float8"}, InvalidValueError, "['quant_dtype']", ["'float8'", "int1"]),
    ("quantization", CONV | {"quant_scheme": "afine"}, InvalidValueError, "['quant_scheme']", ["mean 'affine'?"]),
    ("quantization", CONV | {"fuse_names": [["conv"]]}, InvalidValueError, "['fuse_names']", ["('conv',)", "three"]),
    ("quantization", CONV | {"quant_start_step": -1}, InvalidValueError, "['quant_start_step']", ["-1", "at least 0"]),
    ("distillation", CONV | {"lambda": -1}, InvalidValueError, "['lambda']", ["-1", "from 0"]),
    ("distillation", CONV | {"apply_method": "mae"}, InvalidValueError, "['apply_method']", ["'mae'", "mse, kl"]),
    ("distillation", CONV | {"target_names": ["weight"]}, InvalidValueError, "", ["'weight'", "_output_0"]),
    # selection
    ("pruning", {"sparse_ratio": 0.5}, InvalidValueError, "", ["selects nothing", "op_names"]),
    ("pruning", {"exclude_op_names": ["fc"]}, InvalidValueError, "", ["selects nothing", "op_names"]),
    ("pruning", {"op_names": []}, InvalidValueError, "['op_names']", ["empty", "leave the key out"]),
    ("pruning", {"op_names": [1]}, InvalidValueError, "['op_names']", ["1", "text"]),
    ("pruning", {"op_names": {"fc": 1}}, InvalidValueError, "['op_names']", ["{'fc': 1}", "a list of names"]),
    ("pruning", {"op_types": [int]}, InvalidValueError, "['op_types']", ["int", "torch.nn.Module"]),
    ("pruning", {"op_names_re": ["conv("]}, InvalidValueError, "['op_names_re']", ["'conv('", "position 4", "Escape"]),
    ("pruning", CONV | {"exclude_op_names_re": "["}, InvalidValueError, "['exclude_op_names_re']", ["'['", "Escape"]),
    ("pruning", FC | {"exclude": "yes"}, InvalidValueError, "['exclude']", ["'yes'", "True, False"]),
    ("pruning", FC | {"exclude": True, "sparse_ratio": 0.5}, ConflictError, "", ["'sparse_ratio'", "two entries"]),
    ("pruning", FC | {"exclude": True, "sparsity": 0.5}, ConflictError, "", ["'sparsity'", "two entries"]),
    # targets
    ("pruning", FC | {"target_names": []}, InvalidValueError, "['target_names']", ["empty"]),
    ("pruning", FC | {"target_settings": []}, InvalidValueError, "['target_settings']", ["[]", "mapping"]),
    ("pruning", FC | {"target_settings": {1: {}}}, InvalidValueError, "['target_settings']", ["1 names no target"]),
    (
        "pruning",
        FC | {"target_settings": {"weight": {"sparse_ratio": 2}}},
        InvalidValueError,
        "['target_settings']['weight']['sparse_ratio']",
        ["2 is no ratio"],
    ),
    (
        "pruning",
        FC | {"target_settings": {"weight": {"sparsity": 0.5}}},
        UnknownKeyError,
        "['target_settings']['weight']",
        ["'sparsity'", "sparse_ratio"],
    ),
    (
        "pruning",
        FC | {"target_settings": {"_input_": {}, "_input_0": {}}},
        ConflictError,
        "['target_settings']",
        ["'_input_0'", "Keep one"],
    ),
    (
        "pruning",
        FC | {"target_names": ["weight"], "target_settings": {"bias": {"sparse_ratio": 0.5}}},
        ConflictError,
        "",
        ["'bias'", "Add it to target_names"],
    ),
    # not even an entry
    ("pruning", "Conv2d", InvalidValueError, "", ["'Conv2d' is no mapping"]),
    ("pruning", None, InvalidValueError, "", ["None is no mapping"]),
]


@pytest.mark.parametrize(("mode", "entry", "error", "place", "texts"), BAD_ENTRIES)
def test_bad_entries(mode, entry, error, place, texts):
    good = {"op_names": ["fc"]}
    with pytest.raises(ConfigError) as caught:
        parse_config_list([good, entry], mode)
    assert type(caught.value) is error
    assert caught.value.where == f"config_list[1]{place}"
    for text in texts:
        assert text in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("config_list", "mode", "error", "texts"),
    [
        ([], "pruning", InvalidValueError, ["config_list", "empty", "Add an entry"]),
        (CONV, "pruning", InvalidValueError, ["no list", "Put the entry into a list"]),
        (3, "pruning", InvalidValueError, ["3 is no list"]),
        ([CONV], "prunning", InvalidValueError, ["'prunning'", "Did you mean 'pruning'?"]),
    ],
)
def test_bad_lists(config_list, mode, error, texts):
    with pytest.raises(error) as caught:
        parse_config_list(config_list, mode)
    for text in texts:
        assert text in str(caught.value)


def test_all_keys_of_pruning():
    (entry,) = parse_config_list(
        [
            {
                "op_names": ["conv1"],
                "op_names_re": ["layer.*"],
                "op_types": ["Conv2d", nn.Linear],
                "exclude_op_names": ["layer2"],
                "exclude_op_names_re": [],
                "exclude_op_types": [nn.Conv1d],
                "target_names": ["weight", "_input_", "_input_0", "_output_key"],
                "target_settings": {"_input_": {"align": {"target_name": "weight", "dims": [1]}}},
                "sparse_ratio": 1,
                "max_sparse_ratio": 0.9,
                "min_sparse_ratio": 0,
                "global_group_id": 7,
                "dependency_group_id": "a",
                "granularity": [4, 4],
                "internal_metric_block": 2,
                "apply_method": "add",
            }
        ],
        "pruning",
    )
    assert entry.op_types == ("Conv2d", nn.Linear)
    assert entry.exclude_op_names_re == ()
    assert entry.target_names == ("weight", "_input_0", "_output_key")
    assert entry.target_settings["_input_0"].align.dims == (1,)
    assert entry.settings.given() == {
        "sparse_ratio": 1.0,
        "max_sparse_ratio": 0.9,
        "min_sparse_ratio": 0.0,
        "global_group_id": "7",
        "dependency_group_id": "a",
        "granularity": Granularity((4, 4)),
        "internal_metric_block": 2,
        "apply_method": "add",
    }


def test_keys_of_quantization_and_distillation():
    (quantized,) = parse_config_list(
        [CONV | {"quant_dtype": "int4", "quant_start_step": 10, "fuse_names": [("conv", "bn", "relu")]}], "quantization"
    )
    assert quantized.settings.quant_dtype == IntDtype(4)
    assert (quantized.quant_start_step, quantized.fuse_names) == (10, (("conv", "bn", "relu"),))
    (distilled,) = parse_config_list([CONV | {"lambda": 1, "link": "auto", "apply_method": "kl"}], "distillation")
    assert (distilled.settings.lambda_, distilled.settings.link, distilled.settings.apply_method) == (1.0, "auto", "kl")


def test_one_name_stands_for_a_list_of_one():
    (entry,) = parse_config_list([{"op_names": "conv1", "op_types": nn.Conv2d, "target_names": "weight"}], "pruning")
    assert (entry.op_names, entry.op_types, entry.target_names) == (("conv1",), (nn.Conv2d,), ("weight",))


def test_none_means_not_set():
    (entry,) = parse_config_list([CONV | {"op_names": None, "target_names": None, "sparse_ratio": None}], "pruning")
    assert (entry.op_names, entry.target_names, entry.settings.sparse_ratio) == (None, None, None)


def test_the_callers_list_is_neither_changed_nor_kept():
    config_list = [{"op_names": ["a"], "sparsity": 0.5, "op_types": [nn.Linear]}]
    before = copy.deepcopy(config_list)
    (entry,) = parse_config_list(config_list, "pruning")
    assert config_list == before
    config_list[0]["op_names"].append("b")
    assert entry.as_config() == before[0]
    entry.as_config()["op_names"].append("c")
    assert entry.as_config() == before[0]


def test_parsed_entries_pass_through():
    entries = parse_config_list([CONV, FC], "pruning")
    assert parse_config_list(entries, "pruning") == entries
    with pytest.raises(ConflictError, match="an entry for pruning stands in a list for quantization"):
        parse_config_list(entries, "quantization")
