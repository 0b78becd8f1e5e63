import pytest
import torch
from torch import nn

from tersor.config import Align, Granularity, IntDtype, parse_config_list
from tersor.errors import ConfigError, ConflictError, UnmatchedError
from tersor.targets import resolve_targets


class Model(nn.Module):
    """The model of the specification of NNI 2.x."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout2d(0.25)
        self.dropout2 = nn.Dropout2d(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)


class Layers(nn.Module):
    """The two layers of its arithmetic: 500 and 1000 parameters."""

    def __init__(self):
        super().__init__()
        self.layer_1 = nn.Linear(25, 20)
        self.layer_2 = nn.Linear(50, 20)


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return Model()


def resolve(model, config_list, mode="pruning"):
    return resolve_targets(model, parse_config_list(config_list, mode), mode)


def by_name(resolution):
    return {(target.module_name, target.target_name): target.spec for target in resolution.targets}


def removed(resolution):
    return {t.module_name: t.spec.sparse_ratio * getattr(t.module, t.target_name).numel() for t in resolution.targets}


# The five config lists of the specification of NNI 2.x


@pytest.mark.parametrize(
    ("config_list", "reason"),
    [
        ([{"op_types": ["Conv2d"]}, {"op_names": ["fc1"]}], "no entry selects it"),
        ([{"op_types": ["Conv2d", "Linear"]}, {"exclude": True, "op_names": ["fc2"]}], "excluded by config_list[1]"),
    ],
)
def test_nni_2_where_to_compress(model, config_list, reason):
    resolution = resolve(model, config_list)
    assert list(by_name(resolution)) == [(n, t) for n in ("conv1", "conv2", "fc1") for t in ("weight", "bias")]
    assert {spec.sparse_ratio for spec in by_name(resolution).values()} == {None}
    assert resolution.skipped == {"fc2": reason}


def test_nni_2_pruning(model):
    resolution = resolve(
        model,
        [{"op_types": ["Conv2d"], "total_sparsity": 0.5}, {"op_names": ["fc1"], "total_sparsity": 0.8}],
    )
    specs = by_name(resolution)
    assert {name: spec.sparse_ratio for name, spec in specs.items()} == {
        ("conv1", "weight"): 0.5,
        ("conv2", "weight"): 0.5,
        ("fc1", "weight"): 0.8,
    }
    groups = [spec.global_group_id for spec in specs.values()]
    assert groups[0] == groups[1] != groups[2]
    assert None not in groups


@pytest.mark.parametrize(
    "fc1",
    [
        {"op_names": ["fc1"], "quant_types": ["input", "weight"], "quant_bits": {"input": 8, "weight": 8}},
        {"op_names": ["fc1"], "quant_types": "weight", "quant_bits": 8},
    ],
)
def test_nni_2_quantization(model, fc1):
    convs = {"op_types": ["Conv2d"], "quant_types": ["input", "weight"], "quant_bits": {"input": 8, "weight": 8}}
    specs = by_name(resolve(model, [convs, fc1], "quantization"))
    assert list(specs) == [(n, t) for n in ("conv1", "conv2", "fc1") for t in ("_input_0", "weight")]
    assert {spec.quant_dtype for spec in specs.values()} == {IntDtype(8)}


@pytest.mark.parametrize("key", ["sparsity", "sparsity_per_layer"])
def test_nni_2_arithmetic_of_each_layer(key):
    resolution = resolve(Layers(), [{"op_types": ["Linear"], key: 0.8}])
    assert removed(resolution) == {"layer_1": 400, "layer_2": 800}


def test_nni_2_arithmetic_of_all_layers():
    resolution = resolve(Layers(), [{"op_types": ["Linear"], "total_sparsity": 0.8, "max_sparsity_per_layer": 0.9}])
    assert sum(removed(resolution).values()) == 1200
    assert len({target.spec.global_group_id for target in resolution.targets}) == 1
    at_most = {t.module_name: t.spec.max_sparse_ratio * t.module.weight.numel() for t in resolution.targets}
    assert at_most == {"layer_1": 450, "layer_2": 900}


def test_nni_2_default_types_and_partial_names():
    model = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1), "act": nn.ReLU(), "drop": nn.Dropout(), "conv_b": nn.LSTM(1, 1)})
    quantized = resolve(model, [{"op_types": ["default"], "quant_types": ["weight", "output"]}], "quantization")
    assert list(by_name(quantized)) == [
        ("conv", "_input_0"),
        ("conv", "weight"),
        ("conv", "_output_0"),
        ("act", "_output_0"),
    ]
    pruned = resolve(model, [{"op_partial_names": ["conv"], "op_types": ["default"], "sparsity": 0.5}])
    assert list(by_name(pruned)) == [("conv", "weight")]


# Settings


def test_defaults_then_shorthand_then_target_settings(model):
    specs = by_name(
        resolve(
            model,
            [
                {
                    "op_names": ["conv1"],
                    "sparse_ratio": 0.5,
                    "granularity": "out_channel",
                    "target_settings": {"weight": {"sparse_ratio": 0.7}, "_input_": {"apply_method": "add"}},
                }
            ],
        )
    )
    weight, bias, features = specs["conv1", "weight"], specs["conv1", "bias"], specs["conv1", "_input_0"]
    assert (weight.sparse_ratio, weight.granularity, weight.apply_method) == (
        0.7,
        Granularity(name="out_channel"),
        "mul",
    )
    assert (bias.sparse_ratio, bias.align) == (None, Align(target_name="weight", dims=(0,)))
    assert bias.granularity == Granularity(name="default")
    assert (features.sparse_ratio, features.apply_method, features.apply_value) == (0.5, "add", -1000.0)


def test_a_target_may_leave_its_source(model):
    settings = {"bias": {"sparse_ratio": 0.25}, "weight": {"sparse_threshold": 0.1}}
    specs = by_name(resolve(model, [{"op_names": ["fc1"], "sparse_ratio": 0.5, "target_settings": settings}]))
    assert (specs["fc1", "bias"].sparse_ratio, specs["fc1", "bias"].align) == (0.25, None)
    assert (specs["fc1", "weight"].sparse_ratio, specs["fc1", "weight"].sparse_threshold) == (None, 0.1)


def test_later_entries_override_earlier_ones_wholly(model):
    resolution = resolve(
        model,
        [
            {"op_types": ["Conv2d"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.6, "granularity": "out_channel"},
            {"op_names": ["conv2"], "sparse_ratio": 0.8, "target_names": ["weight"]},
            {"op_names": ["conv1"], "exclude": True},
            {"op_names": ["conv1"], "sparsity": 0.3},
        ],
    )
    specs = by_name(resolution)
    assert list(specs) == [("conv1", "weight"), ("conv2", "weight"), ("conv2", "bias")]
    conv2 = specs["conv2", "weight"]
    assert (conv2.sparse_ratio, conv2.max_sparse_ratio, conv2.granularity.name) == (0.8, None, "default")
    assert specs["conv1", "weight"].sparse_ratio == 0.3
    assert [target.entry_index for target in resolution.targets if target.target_name == "weight"] == [3, 1]


def test_modules_that_are_skipped_say_why():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in "abcd"} | {"lstm": nn.LSTM(2, 2), "act": nn.ReLU()})
    resolution = resolve(
        model,
        [
            {"op_names_re": ["[abl]"], "exclude_op_names": ["b"], "sparse_ratio": 0.5},
            {"op_names": ["c"]},
            {"op_names": ["c"], "exclude": True},
        ],
    )
    assert [target.module_name for target in resolution.targets] == ["a", "a"]
    assert resolution.skipped == {
        "b": "left out by the exclude_ keys of config_list[0]",
        "c": "excluded by config_list[2]",
        "d": "no entry selects it",
        "lstm": "config_list[0] selects it, but none of its tensors is a target",
    }


# Targets


def test_parameters_that_are_none_are_no_targets():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1))
    by_default = resolve(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    named = resolve(model, [{"op_types": ["Conv2d"], "target_names": ["weight", "bias"]}])
    expected = [("0", "weight"), ("1", "weight"), ("1", "bias")]
    assert list(by_name(by_default)) == list(by_name(named)) == expected


def test_any_parameter_and_buffer_can_be_named():
    model = nn.Sequential(nn.LSTM(2, 2), nn.BatchNorm1d(2))
    lstm = {"op_types": ["LSTM"], "target_names": ["weight_ih_l0", "_output_"], "sparse_ratio": 0.5}
    norm = {"op_names": ["1"], "target_names": ["running_mean"], "sparse_ratio": 0.25}
    ratios = {name: spec.sparse_ratio for name, spec in by_name(resolve(model, [lstm, norm])).items()}
    assert ratios == {("0", "weight_ih_l0"): 0.5, ("0", "_output_0"): 0.5, ("1", "running_mean"): 0.25}


def test_a_bias_that_cannot_follow_its_weight_is_no_default():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 1), nn.ConvTranspose2d(4, 6, 1, groups=2))
    assert list(by_name(resolve(model, [{"op_types": ["ConvTranspose2d"], "sparse_ratio": 0.5}]))) == [
        ("0", "weight"),
        ("0", "bias"),
        ("1", "weight"),
    ]


def test_chained_aligns():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    align = {"align": {"module_name": "0", "target_name": "weight", "dims": [0]}}
    specs = by_name(
        resolve(
            model,
            [{"op_names": ["0"], "sparse_ratio": 0.5}, {"op_names": ["1"], "target_settings": {"weight": align}}],
        )
    )
    assert specs["1", "weight"].align.module_name == "0"
    assert specs["1", "bias"].align == Align(target_name="weight", dims=(0,))


def test_a_shared_module_is_one_target():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared})
    for name in model:
        resolution = resolve(model, [{"op_names": [name], "sparsity": 0.5}])
        assert [target.module_name for target in resolution.targets] == ["encoder"]
        assert resolution.skipped == {}


def test_distillation_takes_any_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    entries = [{"op_names": ["1"], "lambda": 0.5}, {"op_types": ["Linear"], "target_names": ["_input_"], "link": "0"}]
    specs = by_name(resolve(model, entries, "distillation"))
    assert {name: (spec.lambda_, spec.link, spec.apply_method) for name, spec in specs.items()} == {
        ("0", "_input_0"): (1.0, ("0",), None),
        ("1", "_output_0"): (0.5, "auto", None),
    }


FC = {"op_names": ["fc1"]}
WEIGHT_OF_CONV1 = {"module_name": "conv1", "target_name": "weight"}


def aligned(**align):
    return {"target_names": ["weight"], "target_settings": {"weight": {"align": WEIGHT_OF_CONV1 | align}}}


@pytest.mark.parametrize(
    ("mode", "entry", "error", "place", "texts"),
    [
        ("pruning", FC | {"target_names": ["wieght"]}, UnmatchedError, "", ["'wieght'", "Did you mean 'weight'?"]),
        ("pruning", FC | {"target_settings": {"gain": {}}}, UnmatchedError, "", ["'gain'", "weight, bias, _input_"]),
        ("pruning", {"op_names": ["dropout1"]}, UnmatchedError, "", ["Dropout2d", "PruningSetting.register(Dropout2d"]),
        ("pruning", {"op_types": ["Dropout2d"]}, UnmatchedError, "", ["'dropout1'", "target_names"]),
        ("pruning", {"op_names_re": ["drop"]}, UnmatchedError, "", ["2 modules", "PruningSetting.register"]),
        ("pruning", {"op_names": ["dropout1"], "sparsity": 0.5}, UnmatchedError, "", ["'weight'"]),
        (
            "pruning",
            FC | {"target_names": ["bias"], "sparse_ratio": 0.5},
            ConflictError,
            "['sparse_ratio']",
            ["bias", "Put it into target_settings"],
        ),
        ("pruning", FC | {"target_names": ["bias"]}, ConflictError, "['align'] of fc1.bias", ["no target", "Select"]),
        ("pruning", FC | aligned(dims=[0]), ConflictError, "['align'] of fc1.weight", ["(32,)", "(128, 9216)"]),
        ("pruning", FC | aligned(dims=[7]), ConflictError, "['align'] of fc1.weight", ["[7]", "(32, 1, 3, 3)"]),
        (
            "pruning",
            FC | aligned(dims=[0], module_name="conv"),
            UnmatchedError,
            "['align'] of fc1.weight",
            ["'conv'", "Did you mean 'conv"],
        ),
        (
            "pruning",
            FC | aligned(dims=[0], module_name="fc1"),
            ConflictError,
            "['align'] of fc1.weight",
            ["from itself", "Break the circle"],
        ),
        (
            "pruning",
            FC | {"sparse_ratio": 0.5, "global_group_id": "a"},
            ConflictError,
            "",
            ["0.5", "0.25 from config_list[0]", "one ratio"],
        ),
        (
            "pruning",
            FC | {"max_sparse_ratio": 0.5, "target_settings": {"weight": {"min_sparse_ratio": 0.9}}},
            ConflictError,
            "",
            ["0.9", "0.5"],
        ),
        (
            "quantization",
            FC | {"fuse_names": [("fc1", "bn")]},
            UnmatchedError,
            "['fuse_names']",
            ["'bn'", "no module"],
        ),
        (
            "quantization",
            FC | {"fuse_names": [("conv2", "fc1")]},
            ConflictError,
            "['fuse_names']",
            ["'conv2'", "op_names"],
        ),
    ],
)
def test_bad_entries(model, mode, entry, error, place, texts):
    first = {"op_names": ["conv1"]}
    if mode == "pruning":
        first |= {"sparse_ratio": 0.25, "global_group_id": "a"}
    with pytest.raises(ConfigError) as caught:
        resolve(model, [first, entry], mode)
    assert type(caught.value) is error
    assert caught.value.where == f"config_list[1]{place}"
    for text in texts:
        assert text in str(caught.value)


def test_the_model_is_not_touched():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    before, modules = {key: value.clone() for key, value in model.state_dict().items()}, list(model.modules())
    resolve(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert list(model.modules()) == modules
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_align_to_the_second_name_of_a_shared_module_is_to_its_first():
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "n": nn.BatchNorm1d(3)})
    model["b"] = model["a"]
    align = {"module_name": "b", "target_name": "weight", "dims": [0]}
    entries = parse_config_list(
        [
            {"op_names": ["a"], "sparse_ratio": 0.5},
            {"op_names": ["n"], "target_names": ["weight"], "target_settings": {"weight": {"align": align}}},
        ],
        "pruning",
    )
    (norm,) = [target for target in resolve_targets(model, entries, "pruning").targets if target.module_name == "n"]
    assert norm.spec.align.module_name == "a"
