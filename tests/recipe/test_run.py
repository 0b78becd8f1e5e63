"""A whole run on a toy."""

import io
from unittest import mock

import onnxruntime
import onnxscript  # noqa: F401 - slow to import, as are the next two, which is no test's fault
import pytest
import torch
import torch._dynamo
from rich.console import Console

from tersor.checkpoint import load, read_architecture, save
from tersor.errors import CheckpointError, MissingExtraError
from tersor.recipe import Recipe, kept, run_recipe
from tests.recipe import toy


@pytest.fixture
def recipe(tmp_path):
    def make(data="tests.recipe.toy:data", tuning=None, pruning=None, recovery=None, **output):
        return Recipe.parse(
            {
                "model": "tests.recipe.toy:net",
                "data": data,
                "pruning": {"config_list": [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], **(pruning or {})},
                "recovery": recovery,
                "fine_tuning": tuning or {"epochs": 2},
                "output": {"directory": str(tmp_path / "run"), **output},
            }
        )

    return make


def test_run_leaves_a_small_model_that_was_saved_and_measured(recipe, tmp_path):
    text = io.StringIO()
    result = run_recipe(recipe(batch_sizes=[1, 4]), console=Console(file=text, width=200))
    assert result.model.conv2.weight.shape == (4, 4, 3, 3)
    assert [report.error < 1e-5 for report in result.speedups] == [True]
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


def test_masks_of_single_weights_stay_as_zeros(recipe):
    text = io.StringIO()
    result = run_recipe(recipe(pruning={"pruner": "WandaPruner"}), console=Console(file=text, width=200))
    kept = result.model.conv2.weight.detach()
    assert [(row == 0).sum().item() for row in kept.flatten(1)] == [36] * 8  # half of 8 x 3 x 3 in each row
    assert result.comparison.ratio("macs") == 1.0
    assert "nothing to cut" in text.getvalue()


@pytest.mark.parametrize(
    "pruning",
    [
        {"schedule": {"pruner": "LinearPruner", "interval_steps": 2, "total_times": 2}},
        {"pruner": "MovementPruner", "arguments": {"warmup_step": 1, "cooldown_begin_step": 3}},
        {"pruner": "SlimPruner", "arguments": {"training_steps": 2}},
    ],
    ids=lambda pruning: pruning.get("pruner", "LinearPruner"),
)
def test_pruning_while_training_leaves_a_checkpoint_of_every_epoch(recipe, tmp_path, pruning):
    saved = []
    text = io.StringIO()

    def spy(model, directory, metadata):
        saved.append((metadata.get("epoch"), model.conv1.out_channels))
        return save(model, directory, metadata=metadata)

    with mock.patch("tersor.recipe.runner.save", spy):
        result = run_recipe(recipe(pruning=pruning), console=Console(file=text, width=200))
    assert saved[-1] == (None, 4)
    assert [epoch for epoch, _ in saved] == [1, 2, None]
    assert result.rounds == ()
    assert result.comparison.after.macs == 6488


def test_saving_in_between_changes_nothing(recipe):
    pruning = {"pruner": "MovementPruner", "arguments": {"warmup_step": 1, "cooldown_begin_step": 3}}
    one, other = (
        run_recipe(recipe(pruning=pruning, checkpoint=checkpoint), console=Console(file=io.StringIO()))
        for checkpoint in (True, False)
    )
    for mine, its in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_recovery_measures_what_is_left(recipe):
    result = run_recipe(
        recipe(tuning={"epochs": 0}, recovery={"bias": True, "batches": 2}), console=Console(file=io.StringIO())
    )
    x = torch.cat([images for images, _ in toy.data().train])
    inputs = result.model.conv1(x).detach().double().movedim(1, 0).flatten(1)
    norm = result.model.bn1
    assert torch.allclose(norm.running_mean.double(), inputs.mean(1), atol=1e-6)
    assert torch.allclose(norm.running_var.double(), inputs.var(1), atol=1e-6)
    # What the last layer gives has the mean that it had before.
    assert torch.allclose(result.model.eval()(x).mean(0), toy.net().eval()(x).mean(0), atol=1e-5)


class TestRounds:
    SCHEDULE = {"total_times": 3, "initial_ratio": 0.25}

    @pytest.mark.parametrize("speedup", [False, True])
    def test_rounds_end_in_one_small_model(self, recipe, tmp_path, speedup):
        text = io.StringIO()
        pruning = {
            "pruner": "TaylorPruner",
            "arguments": {"training_steps": 2},
            "schedule": {**self.SCHEDULE, "speedup": speedup},
        }
        result = run_recipe(recipe(pruning=pruning), console=Console(file=text, width=200))
        assert len(result.speedups) == (3 if speedup else 1)
        assert result.model.conv2.weight.shape == (4, 4, 3, 3)
        assert result.comparison.after.macs == 6488
        assert [(of.number, of.removed) for of in result.rounds][-1] == (3, 0.5)
        assert {own.target: (own.blocks, own.removed) for own in result.sparsity} == {
            "conv1.weight": (8, 4),
            "conv2.weight": (8, 4),
        }
        # conv2 keeps 4 x 4 of 8 x 8 kernels, conv1 4 of 8
        assert [own.elements for own in result.sparsity] == [0.5, 0.75]
        assert "round 3 of 3 is kept, 50% of the blocks removed" in text.getvalue()
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "report.html"]
        assert len(read_architecture(tmp_path / "run" / "checkpoint").metadata["rounds"]) == 3

    def test_best_round_is_the_one_that_is_saved(self, recipe, tmp_path, monkeypatch):
        scores = iter([0.5, 0.7, 0.9, 0.6, 0.8])  # before, three rounds, after
        monkeypatch.setattr("tersor.training.evaluation.accuracy", lambda outputs, targets: next(scores))
        schedule = {**self.SCHEDULE, "pruner": "LinearPruner", "speedup": True, "best": "maximize"}
        del schedule["initial_ratio"]
        result = run_recipe(recipe(pruning={"schedule": schedule}), console=Console(file=io.StringIO()))
        assert [of.metric for of in result.rounds] == [0.7, 0.9, 0.6]
        # A third of 8 is 2, two thirds of 0.5 of what was there at first
        assert [own.blocks - own.removed for own in result.sparsity] == [6, 6]
        assert load(toy.net, tmp_path / "run" / "checkpoint").conv1.out_channels == 6

    @pytest.mark.parametrize("speedup", [False, True])
    def test_killed_run_goes_on_with_the_same_result(self, recipe, tmp_path, monkeypatch, speedup):
        asked = recipe(pruning={"schedule": {**self.SCHEDULE, "speedup": speedup}})
        whole = run_recipe(asked, console=Console(file=io.StringIO()))
        text = io.StringIO()
        with monkeypatch.context() as patched:
            interrupted = toy.data()
            interrupted.train = toy.InterruptedLoader(interrupted.train, passes=6)  # inputs, two a round, one more
            patched.setattr(toy, "data", lambda: interrupted)
            with pytest.raises(KeyboardInterrupt):
                run_recipe(asked, console=Console(file=text, width=200))
        assert "rounds holds the rounds so far, and the same command goes on" in text.getvalue()
        text = io.StringIO()
        again = run_recipe(asked, console=Console(file=text, width=200))
        assert "resume" in text.getvalue()
        assert "round 1" not in text.getvalue()
        assert again.rounds == whole.rounds
        assert len(again.speedups) == len(whole.speedups)
        for mine, its in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(mine, its)
        assert not (tmp_path / "run" / "rounds").exists()

    def test_rounds_of_another_recipe_are_refused(self, recipe, tmp_path):
        asked = recipe(pruning={"schedule": self.SCHEDULE})
        folder = tmp_path / "run" / "rounds"
        assert not kept.begin(asked, folder, "rounds.pt")
        (folder / "rounds.pt").touch()
        assert kept.begin(asked, folder, "rounds.pt")
        assert kept.begin(recipe(pruning={"schedule": self.SCHEDULE}, batch_sizes=[1]), folder, "rounds.pt")
        with pytest.raises(CheckpointError, match=r"a recipe with another fine_tuning\..*Delete the folder"):
            run_recipe(
                recipe(pruning={"schedule": self.SCHEDULE}, tuning={"epochs": 1, "learning_rate": 0.5}),
                console=Console(file=io.StringIO()),
            )


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
