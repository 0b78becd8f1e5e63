"""A whole run on a toy."""

import io

import onnxruntime
import onnxscript  # noqa: F401 - slow to import, as are the next two, which is no test's fault
import pytest
import torch
import torch._dynamo
from rich.console import Console

from tersor.checkpoint import load, read_architecture
from tersor.errors import MissingExtraError
from tersor.recipe import Recipe, run_recipe
from tests.recipe import toy


@pytest.fixture
def recipe(tmp_path):
    def make(data="tests.recipe.toy:data", tuning=None, **output):
        return Recipe.parse(
            {
                "model": "tests.recipe.toy:net",
                "data": data,
                "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]},
                "fine_tuning": tuning or {"epochs": 2},
                "output": {"directory": str(tmp_path / "run"), **output},
            }
        )

    return make


def test_run_leaves_a_small_model_that_was_saved_and_measured(recipe, tmp_path):
    text = io.StringIO()
    result = run_recipe(recipe(batch_sizes=[1, 4]), console=Console(file=text, width=200))
    assert result.model.conv2.weight.shape == (4, 4, 3, 3)
    assert result.speedup.error < 1e-5
    # 36 positions x (4 x 1 x 9 + 4 x 4 x 9) of the convolutions and 4 x 2 of the last layer, of 36 x (72 + 576) + 16
    assert (result.comparison.after.macs, result.comparison.before.macs) == (6488, 23344)
    assert list(result.comparison.after.latency) == [1, 4]
    assert {target.target: target.removed for target in result.sparsity} == {"conv1.weight": 4, "conv2.weight": 4}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "report.html"]
    loaded = load(toy.net, tmp_path / "run" / "checkpoint").eval()
    x = torch.randn(3, 1, 6, 6)
    assert torch.equal(loaded(x), result.model.eval()(x))
    metadata = read_architecture(tmp_path / "run" / "checkpoint").metadata
    assert metadata["finished"] is True
    assert metadata["accuracy"]["after"] == result.comparison.after.accuracy
    assert Recipe.parse(metadata["recipe"]) == recipe(batch_sizes=[1, 4])
    stages = [line.split("  ")[0] for line in text.getvalue().splitlines()]
    assert stages == list(result.seconds)
    assert stages[0] == "build"
    assert "epoch 2" in stages


def test_run_is_reproducible(recipe):
    first, second = (run_recipe(recipe(), console=Console(file=io.StringIO())) for _ in range(2))
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_steps_are_limited_over_all_epochs_and_outputs_can_be_left_out(recipe, tmp_path):
    text = io.StringIO()
    tuning = {"epochs": 5, "max_steps": 3}
    run_recipe(recipe(tuning=tuning, checkpoint=False, report=False), console=Console(file=text))
    assert text.getvalue().count("epoch") == 2
    assert "3 steps" in text.getvalue()
    assert not (tmp_path / "run").exists()


def test_interrupted_run_leaves_the_last_whole_checkpoint(recipe, tmp_path):
    text = io.StringIO()
    interrupted = recipe("tests.recipe.toy:interrupted_data", {"epochs": 9})
    with pytest.raises(KeyboardInterrupt):
        run_recipe(interrupted, console=Console(file=text, width=300))
    assert f"interrupted  {tmp_path / 'run' / 'checkpoint'} holds the last whole checkpoint" in text.getvalue()
    metadata = read_architecture(tmp_path / "run" / "checkpoint").metadata
    assert (metadata["finished"], metadata["epoch"]) == (False, 1)
    assert load(toy.net, tmp_path / "run" / "checkpoint")(torch.randn(2, 1, 6, 6)).shape == (2, 2)


def test_missing_onnx_is_said_before_anything_runs(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = io.StringIO()
    with pytest.raises(MissingExtraError, match=r"tersor\[onnx\]"):
        run_recipe(recipe(onnx=True), console=Console(file=text))
    assert text.getvalue() == ""


class TestExport:
    @pytest.fixture(autouse=True)
    def leaves_nothing_behind(self):
        """In place of the fixture for all tests: torch.export leaves hooks on modules of its own."""

    def test_exported_model_runs_elsewhere(self, recipe, tmp_path):
        result = run_recipe(recipe(onnx=True, report=False), console=Console(file=io.StringIO()))
        assert result.onnx_error < 1e-5
        session = onnxruntime.InferenceSession(tmp_path / "run" / "model.onnx")
        x = torch.randn(5, 1, 6, 6)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), result.model.eval()(x).detach())
