"""What a config list comes to, as rows, words, JSON and a table."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

import tersor
from tersor.errors import ConflictError, InvalidValueError, TraceError, UnmatchedError
from tersor.graph import groups
from tests.networks import IMAGE, Plain, Residual, Tokens, randomize

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


def rows_of(config_list, model=None, mode="pruning", x=X):
    plan = tersor.plan(model or Plain(), config_list, mode, x)
    return {(row.module, row.target): row for row in plan.rows}


def test_rows_say_what_happens_to_each_target():
    plan = tersor.plan(Residual(), CONV, example_inputs=X)
    weights = [(row.module, row.type, row.blocks, row.removes) for row in plan.rows if row.target == "weight"]
    assert weights == [
        ("stem", "Conv2d", 8, 4),
        ("conv1", "Conv2d", 10, 5),
        ("conv2", "Conv2d", 8, 4),
        ("conv3", "Conv2d", 12, 6),
        ("project", "Conv2d", 12, 6),
    ]
    assert {row.action for row in plan.rows} == {"prune", "align"}
    assert {row.reason for row in plan.rows if row.target == "bias"} == {"follows weight"}
    assert plan.skipped == dict.fromkeys(["bn", "bn1", "bn2", "fc"], "no entry selects it")


@pytest.mark.parametrize(
    ("settings", "action", "removes", "reason"),
    [
        ({"sparse_ratio": 0.5}, "prune", 4, ""),
        ({"sparse_ratio": 0.29}, "prune", 2, ""),
        ({"sparse_ratio": 0.1}, "nothing", 0, "0.1 of 8 blocks is less than one"),
        ({"sparse_ratio": 0}, "nothing", 0, "0 of 8 blocks is less than one"),
        ({"sparse_ratio": 0.75, "max_sparse_ratio": 0.5}, "prune", 4, ""),
        ({"sparse_ratio": 0.25, "min_sparse_ratio": 0.5}, "prune", 4, ""),
        ({"min_sparse_ratio": 0.5}, "prune", 4, ""),
        ({"sparse_ratio": 0.4, "internal_metric_block": 2}, "prune", 2, ""),
        ({"sparse_ratio": 0.2, "internal_metric_block": 4}, "nothing", 0, "0.2 of 2 blocks is less than one"),
        ({"sparse_ratio": 0.5, "granularity": [2, -1, -1, -1]}, "prune", 2, ""),
        ({"sparse_ratio": 0.5, "global_group_id": 1}, "prune", None, ""),
        ({"sparse_threshold": 0.5}, "prune", None, ""),
        ({"max_sparse_ratio": 0.5}, "nothing", 0, "no sparse_ratio, sparse_threshold or sparse_pattern is set"),
        ({"sparse_ratio": 0.5, "granularity": [-1, -1, -1, -1]}, "nothing", 0, "is a single block"),
    ],
)
def test_what_is_removed_and_why_not(settings, action, removes, reason):
    row = rows_of([{"op_names": ["0"], **settings}])["0", "weight"]
    assert (row.action, row.removes) == (action, removes)
    assert row.reason.startswith(reason)
    assert bool(row.reason) == bool(reason)


def test_the_plan_is_what_the_pruner_does():
    for settings in (
        {"sparse_ratio": 0.4, "internal_metric_block": 2},
        {"sparse_ratio": 0.75, "max_sparse_ratio": 0.5},
    ):
        config_list = [{"op_names": ["0"], **settings}]
        pruner = tersor.pruning.L1NormPruner(randomize(Plain()), config_list, example_inputs=X)
        pruner.compress()
        assert pruner.sparsity()[0].removed == pruner.plan.rows[0].removes
        pruner.unwrap_model()


def test_a_dependency_group_is_bounded_by_all_its_members():
    group = {"sparse_ratio": 0.5, "dependency_group_id": "stream"}
    config_list = [
        {"op_names": ["stem"], **group, "max_sparse_ratio": 0.25},
        {"op_names": ["conv2"], **group},
        {"op_names": ["conv1"], "sparse_ratio": 0.5, "global_group_id": "rest"},
    ]
    rows = rows_of(config_list, Residual())
    assert [(rows[name, "weight"].removes, rows[name, "weight"].group) for name in ("stem", "conv1", "conv2")] == [
        (2, "stream"),
        (None, "rest"),
        (2, "stream"),
    ]


def test_what_cannot_leave_is_named_with_the_reason():
    rows = rows_of([{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert (rows["7", "weight"].action, rows["7", "weight"].removes) == ("prune", 3)
    assert (rows["9", "weight"].action, rows["9", "weight"].reason) == ("nothing", "is the model's own output")
    in_channels = rows_of([{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": "in_channel"}])["0", "weight"]
    assert in_channels.action == "nothing"
    assert "model's input" in in_channels.reason


def test_single_elements_can_always_be_zero():
    for granularity in ([1], [1, 1]):
        config_list = [{"op_names": ["9"], "sparse_ratio": 0.5, "granularity": granularity}]
        assert rows_of(config_list)["9", "weight"].removes == 17


def test_other_modes():
    quantized = rows_of([{"op_names": ["0"], "quant_dtype": "int4"}], mode="quantization")
    assert {target: row.action for (_, target), row in quantized.items()} == dict.fromkeys(
        ["_input_0", "weight", "_output_0"], "quantize"
    )
    assert quantized["0", "weight"].setting["quant_dtype"] == "int4"
    assert rows_of([{"op_names": ["0"]}], mode="distillation")["0", "_output_0"].action == "distil"


def test_nothing_is_touched():
    model, config_list = randomize(Plain()).train(), copy.deepcopy(CONV)
    before = copy.deepcopy(model.state_dict())
    tersor.plan(model, config_list, example_inputs=X)
    assert config_list == CONV
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_explain():
    plan = tersor.plan(Residual(), tersor.auto_set_dependency_group_ids(Residual(), CONV, X), example_inputs=X)
    stem = plan.explain("stem").splitlines()
    assert stem[:3] == [
        "stem:",
        "  weight: prune, 4 of 8 blocks leave, group dependency_0",
        "  bias: align (follows weight)",
    ]
    assert stem[3].startswith("  weight dim 0 lives and dies with stem.bias dim 0, bn.weight dim 0")
    assert "conv2.weight dim 0" in stem[3]
    assert stem[4].startswith("  weight dim 1 stays: it is summed with the model's input")
    assert len(stem) == 5
    norm = plan.explain("bn1").splitlines()
    assert norm[:2] == ["bn1:", "  not selected: no entry selects it"]
    assert norm[2].startswith("  weight dim 0 lives and dies with conv1.weight dim 0")
    assert len(norm) == 3
    assert "weight dim 0 stays: it is the model's own output" in plan.explain("fc")
    with pytest.raises(UnmatchedError, match=r"conv4: .*Did you mean 'conv\d'"):
        plan.explain("conv4")


def test_explain_without_example_inputs():
    plan = tersor.plan(nn.Linear(4, 8), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert plan.explain("").splitlines() == [
        "(the model itself):",
        "  weight: prune, 4 of 8 blocks leave",
        "  bias: align (follows weight)",
        "  coupling unknown: give example_inputs to see what depends on it",
    ]


def test_explain_in_quantization_says_the_types_and_nothing_of_removal():
    config_list = [{"op_names": ["conv1"], "target_names": ["weight"], "quant_dtype": "int4", "quant_scheme": "affine"}]
    plan = tersor.plan(Residual(), config_list, "quantization", X)
    assert plan.explain("conv1").splitlines() == [
        "conv1:",
        "  weight: quantize, quant_dtype=int4, quant_scheme=affine",
    ]


def test_json_holds_all():
    config_list = [
        *CONV,
        {"op_names": ["project"], "sparse_threshold": 0.5, "granularity": [[2], "back", -1]},
        {"op_names": ["bn"], "target_settings": {"weight": {"align": {"target_name": "bias", "dims": 0}}, "bias": {}}},
    ]
    config_list[2]["target_settings"]["bias"] = {"align": {"module_name": "stem", "target_name": "weight", "dims": [0]}}
    plan = tersor.plan(Residual(), config_list, example_inputs=X)
    document = json.loads(plan.to_json())
    assert document == plan.to_dict()
    assert document["mode"] == "pruning"
    assert document["skipped"] == dict.fromkeys(["bn1", "bn2", "fc"], "no entry selects it")
    assert [(row["module"], row["target"]) for row in document["targets"]] == [
        (row.module, row.target) for row in plan.rows
    ]
    project = next(row for row in document["targets"] if (row["module"], row["target"]) == ("project", "weight"))
    assert project["setting"] == {"sparse_threshold": 0.5, "granularity": [[2], "back", -1], "apply_method": "mul"}
    norm = {row["target"]: row["reason"] for row in document["targets"] if row["module"] == "bn"}
    assert norm == {"weight": "follows bias", "bias": "follows stem.weight"}


def shown(plan, width=80):
    text = io.StringIO()
    Console(file=text, width=width).print(plan)
    return text.getvalue().splitlines()


def test_the_table_fits_eighty_columns():
    grouped = tersor.auto_set_dependency_group_ids(Residual(), [*CONV, {"op_names": ["fc"], "sparse_ratio": 0.5}], X)
    lines = shown(tersor.plan(Residual(), grouped, example_inputs=X))
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["target", "action", "setting", "group", "reason"]
    (stem,) = [line for line in lines if line.startswith("stem")]
    assert stem.split() == ["stem.weight,", "prune", "4", "of", "8", "sparse_ratio=0.5", "dependency_0"]
    assert "granularity" not in "".join(lines)
    assert "apply_method" not in "".join(lines)
    assert lines[-2].split() == ["bn,", "bn1,", "bn2", "nothing", "no", "entry"]


def test_the_table_shows_what_is_not_the_default():
    config_list = [
        {"op_names": ["0"], "sparse_ratio": 0.5, "granularity": [2, -1, -1, -1]},
        {"op_names": ["7"], "sparse_threshold": 0.25, "apply_method": "bypass"},
    ]
    text = "\n".join(shown(tersor.plan(Plain(), config_list), width=120))
    assert "granularity=[2, -1, -1, -1]" in text
    assert "apply_method=bypass" in text
    assert "group" not in text.splitlines()[1]
    quantized = shown(tersor.plan(Plain(), [{"op_names": ["0"], "quant_dtype": "int8"}], "quantization"))
    assert [line.split()[:3] for line in quantized[3:6]] == [
        [f"0.{target}", "quantize", "quant_dtype=int8"] for target in ("_input_0", "weight", "_output_0")
    ]


def test_markup_in_names_is_text():
    model = nn.ModuleDict({"[red]": nn.Linear(2, 4)})
    assert "[red].weight" in "\n".join(shown(tersor.plan(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])))


def test_a_known_coupling_saves_a_run():
    model = Plain()
    found = groups(model, X)
    plan = tersor.plan(model, CONV, example_inputs=found)
    assert plan.coupling is found
    with pytest.raises(TraceError, match="another model"):
        tersor.plan(Residual(), CONV, example_inputs=found)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (
            {"granularity": [3, -1, -1, -1]},
            InvalidValueError,
            r"config_list\[0\]\['granularity'\] on 0\.weight: .*divide",
        ),
        ({"granularity": [1] * 5}, InvalidValueError, r"on 0\.weight: .*more dimensions"),
        ({"target_names": ["weight", "_input_"]}, ConflictError, r"config_list\[0\] on 0\._input_0: .*set align"),
    ],
)
def test_a_setting_that_does_not_fit_names_the_place(config, error, words):
    with pytest.raises(error, match=words):
        tersor.plan(Plain(), [{"op_names": ["0"], "sparse_ratio": 0.5, **config}])


def test_a_list_from_a_file_is_named_in_errors(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- {op_names: ['0'], sparse_ratio: 0.5, granularity: [3, -1, -1, -1]}")
    with pytest.raises(InvalidValueError, match=r"list\.yaml: config_list\[0\]\['granularity'\] on 0\.weight"):
        tersor.plan(Plain(), path)
    path.write_text("- {op_names: ['0'], sparse_ratio: 0.5}")
    assert tersor.plan(Plain(), path).rows == tersor.plan(Plain(), [{"op_names": ["0"], "sparse_ratio": 0.5}]).rows


def test_keyword_inputs():
    plan = tersor.plan(
        Tokens(), [{"op_names": ["fc1"], "sparse_ratio": 0.5}], example_inputs={"ids": torch.randint(0, 11, (2, 4))}
    )
    assert plan.rows[0].removes == 5
