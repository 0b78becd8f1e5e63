"""The command line: what it prints where, and its exit codes."""

import json
import sys
from importlib.metadata import version

import pytest
import yaml
from typer.testing import CliRunner

from tersor.checkpoint import save
from tersor.cli import app
from tersor.errors import ConfigError
from tests.recipe import toy

TOY = "tests.recipe.toy:net"


@pytest.fixture
def call(monkeypatch):
    """Run the command line; give back its result."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path):
    def write(**parts):
        whole = {
            "model": TOY,
            "data": "tests.recipe.toy:data",
            "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
            "output": {"directory": str(tmp_path / "run")},
            **parts,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(whole))
        return path

    return write


def test_run_prints_the_comparison_and_narrates_elsewhere(call, recipe):
    result = call("run", recipe())
    assert result.exit_code == 0
    assert "MACs per sample" in result.stdout
    assert "epoch 1" not in result.stdout
    assert "epoch 1" in result.stderr


def test_json_is_all_that_is_on_stdout_even_if_the_model_chats(call, recipe):
    result = call("run", recipe(model="tests.recipe.toy:chatty_net"), "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["comparison"]["after"]["macs"] == 6488
    assert "building" in result.stderr


def test_plan_touches_nothing(call, recipe, tmp_path):
    result = call("plan", recipe())
    assert result.exit_code == 0
    assert "conv2" in result.stdout
    assert not (tmp_path / "run").exists()
    document = json.loads(call("plan", recipe(), "--json").stdout)
    assert {row["module"]: row["removes"] for row in document["targets"] if row["target"] == "weight"} == {
        "conv1": 4,
        "conv2": 4,
    }
    assert "lives and dies with" in call("plan", recipe(), "--explain", "conv1").stdout


def test_compare_import_path_and_checkpoint(call, recipe, tmp_path):
    call("run", recipe())
    checkpoint = tmp_path / "run" / "checkpoint"
    shape = ("--example-shape", "2,1,6,6", "--batch-size", 3, "--report", tmp_path / "page")
    document = json.loads(call("compare", TOY, checkpoint, *shape, "--json").stdout)
    assert document["ratios"]["macs"] == 6488 / 23344
    assert list(document["after"]["latency"]) == ["3"]
    assert (tmp_path / "page" / "report.html").is_file()
    with_recipe = call("compare", checkpoint, checkpoint, "--recipe", recipe(), "--json")
    assert json.loads(with_recipe.stdout)["ratios"]["macs"] == 1.0


def test_inspect_layers_and_groups(call, recipe):
    assert json.loads(call("inspect", TOY, "--json").stdout)["parameters"] == 698
    assert json.loads(call("inspect", TOY, "--example-shape", "1x1x6x6", "--json").stdout)["macs"] == 23344
    groups = call("inspect", TOY, "--groups", "--recipe", recipe())
    assert "conv2.weight dim 1 [0:8] read" in groups.stdout


def test_plan_says_in_words_what_the_table_cannot(call, recipe):
    path = recipe(
        pruning={
            "pruner": "TaylorPruner",
            "arguments": {"training_steps": 2},
            "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
            "schedule": {"total_times": 2, "speedup": True, "best": "maximize"},
        }
    )
    text = call("plan", path).stdout
    assert "TaylorPruner(training_steps=2). Removes the blocks" in text
    assert "It trains 2 steps first, which are then undone." in text
    # 0.5 (1 - (1/2)^3), and all
    assert "the model of the highest metric is kept. Of a ratio of 0.5 it reaches 0.438, 0.5." in text
    words = json.loads(call("plan", path, "--json").stdout)["words"]
    assert list(words) == ["pruner", "schedule", "fine-tuning"]
    assert words["fine-tuning"] == "1 epoch, 2 steps in each round, with SGD at learning rate 0.01 (constant)"


@pytest.mark.usefixtures("unwrapped")
class TestFused:
    @pytest.fixture
    def fused(self, recipe):
        return recipe(
            pruning={
                "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}],
                "schedule": {"interval_steps": 1, "total_times": 2},
            },
            quantization=[{"op_types": ["Conv2d"], "target_names": ["weight"], "quant_dtype": "int8"}],
            distillation={"distiller": "LogitDistiller", "teacher": {"build": "tests.recipe.toy:teacher"}},
        )

    def test_plan_shows_each_of_them_and_what_happens_when(self, call, fused):
        text = call("plan", fused).stdout
        assert "after step 2" in text
        assert "prunes, 0.5 -> 0.5" in text
        document = json.loads(call("plan", fused, "--json").stdout)
        titles = ["AGPPruner(L1NormPruner)", "QATQuantizer", "LogitDistiller"]
        assert [own["compressor"] for own in document["plans"]] == titles
        assert len(document["timeline"]["events"]) == 4
        words = document["words"]
        assert list(words) == ["pruner", "schedule", "quantizer", "distiller", "teacher", "training"]
        assert words["schedule"].startswith("AGPPruner prunes 2 times, every 1 step of the fine-tuning.")
        assert "temperature=4.0). Draws the student's answers to the teacher's" in words["distiller"]
        assert words["teacher"] == "tests.recipe.toy:teacher"
        why = call("plan", fused, "--explain", "conv1").stdout
        assert "int8" in why
        assert "lives and dies with" in why

    def test_run_leaves_what_is_deployed_as_it_was_quantized(self, call, fused, tmp_path):
        document = json.loads(call("run", fused, "--json").stdout)
        assert document["comparison"]["after"]["macs"] == 6488
        assert document["fused"]["fallbacks"] == []
        assert (tmp_path / "run" / "checkpoint" / "calibration.safetensors").is_file()
        again = json.loads(call("run", fused, "--json").stdout)
        assert again["comparison"]["after"]["accuracy"] == document["comparison"]["after"]["accuracy"]


def test_plan_says_how_single_weights_are_pruned(call, recipe):
    path = recipe(
        pruning={"pruner": "WandaPruner", "config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
        recovery={"bias": True, "batches": 1},
        fine_tuning={"epochs": 0},
    )
    document = json.loads(call("plan", path, "--json").stdout)
    # rows of 9 lose 4, and of 72 lose 36
    assert {row["module"]: row["removes"] for row in document["targets"] if row["target"] == "weight"} == {
        "conv1": 8 * 4,
        "conv2": 8 * 36,
    }
    assert document["words"]["calibration"] == "on 8 batches of the training data"
    assert document["words"]["recovery"] == "batch norms are measured anew and biases are corrected, over 1 batch"
    assert document["words"]["fine-tuning"] == "none"


def test_pruners_are_listed(call):
    text = call("pruners").stdout
    assert "TaylorPruner" in text
    assert "training_steps=100" in text
    document = json.loads(call("pruners", "--json").stdout)
    assert {"calibration data"} <= {need for own in document["pruners"] for need in own["needs"]}
    assert [own["name"] for own in document["schedules"]] == ["AGPPruner", "LinearPruner", "LotteryTicketPruner"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
        (("inspect", "tests.recipe.toy:nte"), "Did you mean 'net'?"),
        (("inspect", TOY, "--groups"), "no example inputs. Give --example-shape 8,3,224,224, or --recipe."),
        (("inspect", TOY, "--example-shape", "1,a"), "--example-shape: '1,a' is no shape"),
        (("inspect", TOY, "--example-shape", "1,3,6,6"), "ToyNet cannot run on the example inputs"),
        (("compare", TOY, "nowhere", "--example-shape", "1,1,6,6"), "nowhere: is no checkpoint"),
    ],
)
def test_error_is_one_clear_line_and_exit_code_1(call, arguments, message):
    result = call(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_checkpoint_without_code_names_what_was_saved(call, tmp_path):
    save(toy.net(), tmp_path / "a")
    result = call("inspect", tmp_path / "a")
    assert result.exit_code == 1
    assert "is a checkpoint of tests.recipe.toy.ToyNet, whose code is not known" in result.stderr
    assert call("inspect", tmp_path / "a", "--build", TOY).exit_code == 0


def test_unknown_key_names_file_key_and_remedy(call, recipe):
    result = call("run", recipe(fine_tunning={"epochs": 1}))
    assert result.exit_code == 1
    assert "recipe.yaml: 'fine_tunning' is no key here." in result.stderr
    assert "Did you mean 'fine_tuning'?" in result.stderr


def test_traceback_on_demand(call):
    result = call("inspect", "tests.recipe.toy:nte", "--traceback")
    assert result.exit_code == 1
    assert isinstance(result.exception, ConfigError)


def test_wrong_usage_is_exit_code_2(call):
    assert call("run").exit_code == 2
    assert call("runn", "recipe.yaml").exit_code == 2


def test_interruption_is_exit_code_130_and_says_what_is_left(call, recipe, tmp_path):
    result = call("run", recipe(data="tests.recipe.toy:interrupted_data", fine_tuning={"epochs": 9}))
    assert result.exit_code == 130
    assert "holds the last whole checkpoint" in result.stderr
    assert call("inspect", tmp_path / "run" / "checkpoint", "--build", TOY).exit_code == 0


def test_version(call):
    assert call("--version").stdout == f"tersor {version('tersor')}\n"
