"""Schedules within one training run, and in rounds that are resumed."""

import io
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import CheckpointError, ConflictError, InvalidValueError, SpeedupError, TrainingError
from tersor.pruning import (
    ADMMPruner,
    AGPPruner,
    L1NormPruner,
    LevelPruner,
    LinearPruner,
    LotteryTicketPruner,
    TaylorPruner,
)
from tersor.speedup import ModelSpeedup
from tersor.targets.dependency import auto_set_dependency_group_ids
from tersor.training import TorchEvaluator
from tests.networks import Upsampling, randomize
from tests.pruning.training import BATCHES, DATA, X, equal, evaluator_of, network, removed_of, values
from tests.test_compressor import ToyDistiller, ToyQuantizer

CHANNELS = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]
ELEMENTS = [{"op_names": ["0", "3"], "sparse_ratio": 0.8}]
INNER = {
    "l1": lambda model, evaluator: L1NormPruner(model, CHANNELS, evaluator),
    "taylor": lambda model, evaluator: TaylorPruner(model, CHANNELS, evaluator, 2),
}


def formula(schedule, ratio, times, total):
    if schedule is LinearPruner:
        return ratio * times / total
    if schedule is AGPPruner:
        return ratio * (1 - (1 - times / total) ** 3)
    return 1 - (1 - ratio) ** (times / total)


@pytest.fixture
def pruner():
    pruner = L1NormPruner(network(), CHANNELS)
    yield pruner
    pruner.unwrap_model()


@pytest.mark.parametrize("schedule_class", [LinearPruner, AGPPruner, LotteryTicketPruner])
def test_one_run_follows_the_formula(schedule_class):
    """A count at every step: it changes exactly at the intervals, to the floor of the formula's ratio."""
    model = network()
    evaluator = evaluator_of(model)
    schedule = schedule_class(LevelPruner(model, ELEMENTS, evaluator), 3, 4)
    seen, numel = [], model[0].weight.numel()
    step = evaluator._training_step
    evaluator._training_step = lambda batch, model: (
        seen.append(int((model[0].weight == 0).sum())),
        step(batch, model),
    )[1]
    schedule.compress(max_steps=14)
    schedule.unwrap_model()
    expected = [int(formula(schedule_class, 0.8, of, 4) * numel + 1e-6) for of in range(5)]
    assert seen == [expected[min(number // 3, 4)] for number in range(14)]


def test_the_initial_ratio_of_agp_is_free():
    schedule = AGPPruner(LevelPruner(network(), ELEMENTS), total_times=4, initial_ratio=0.4)
    found = [schedule.ratio_at(0.8, times) for times in range(1, 5)]
    np.testing.assert_allclose(found, [0.8 - 0.4 * (1 - t / 4) ** 3 for t in range(1, 5)])
    assert schedule.ratio_at(0.3, 1) == 0.3
    schedule.unwrap_model()


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("schedule_class", [LinearPruner, AGPPruner, LotteryTicketPruner])
def test_the_last_pruning_is_exact(schedule_class, inner):
    for length in ({"max_steps": 9}, {"max_epochs": 1}):
        model = network()
        interval = 2 if "max_steps" in length else None
        schedule = schedule_class(INNER[inner](model, evaluator_of(model)), interval, 3)
        schedule.compress(**length)
        assert removed_of(schedule) == {"0.weight": 4, "3.weight": 3}
        schedule.unwrap_model()


def test_thresholds_grow_too():
    model = network()
    threshold = float(model[0].weight.detach().abs().flatten(1).sum(1).max()) * 0.999
    config_list = [{"op_names": ["0"], "sparse_threshold": threshold}]
    schedule = LinearPruner(L1NormPruner(model, config_list, example_inputs=X[:2]), total_times=4)
    counts = []
    norms = model[0].weight.detach().abs().flatten(1).sum(1)
    original = schedule.prune_now
    schedule.prune_now = lambda left=None: (original(left), counts.append(removed_of(schedule)["0.weight"]))
    schedule.compress()
    assert counts == [int((norms < threshold * of / 4).sum()) for of in range(1, 5)]
    schedule.unwrap_model()


def test_fused_with_a_quantizer_and_a_distiller():
    for interval, length in ((1, {"max_steps": 5}), (None, {"max_epochs": 1})):
        model = network()
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator_of(model)), interval, 3)
        quantizer = ToyQuantizer.from_compressor(schedule, [{"op_names": ["0"], "target_names": ["weight"]}])
        distiller = ToyDistiller.from_compressor(quantizer, [{"op_names": ["0"]}])
        distiller.compress(**length)
        assert removed_of(schedule) == {"0.weight": 4, "3.weight": 3}
        assert len(distiller.seen) == (5 if interval else 3 * BATCHES)
        kept = schedule.get_masks()["0"]["weight"]
        assert not model[0].weight[~kept].any()
        assert model[0].weight[kept].all()  # the toy's grid has no zero
        schedule.unwrap_model()


def test_it_can_be_made_of_a_fused_pruner():
    model = network()
    first = LevelPruner(model, [{"op_names": ["6"], "sparse_ratio": 0.5}], evaluator_of(model))
    schedule = AGPPruner(L1NormPruner.from_compressor(first, CHANNELS), 2, 2)
    schedule.compress(max_steps=4)
    assert removed_of(schedule) == {"0.weight": 4, "3.weight": 3}
    assert int((~schedule.get_masks()["6"]["weight"]).sum()) == model[6].weight.numel() // 2
    first.unwrap_model()


class TestRounds:
    def test_each_prunes_trains_with_fresh_optimizers_and_evaluates(self):
        model = network()
        evaluator = evaluator_of(model)
        states = []
        train = evaluator.train
        evaluator.train = lambda *args, **kwargs: (
            states.append(len(evaluator.state_dict()["optimizers"][0]["state"])),
            train(*args, **kwargs),
        )[1]
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=3)
        schedule.compress(max_steps=2)
        assert states == [0, 0, 0]
        # Of 8 and 6 channels a third, two thirds and all of one half: 1 + 1, 2 + 2, 4 + 3 of 14.
        assert [round(of.removed * 14) for of in schedule.rounds] == [2, 4, 7]
        assert schedule.rounds[-1].metric == evaluator.evaluate(model)
        schedule.unwrap_model()

    @pytest.mark.parametrize(("best", "number"), [("latest", 3), ("maximize", 1), ("minimize", 2)])
    def test_the_best_is_returned(self, best, number):
        model = network()
        evaluator = evaluator_of(model)
        metrics, seen = iter([0.9, 0.3, 0.5]), []
        evaluator._evaluating_func = lambda model: (seen.append(values(model)), next(metrics))[1]
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=3, best=best)
        returned, masks = schedule.compress(max_steps=2)
        assert returned is model
        assert equal(seen[number - 1], values(model))
        assert int((~masks["0"]["bias"]).sum()) == [1, 2, 4][number - 1]
        schedule.unwrap_model()

    @pytest.mark.parametrize("best", ["latest", "maximize"])
    def test_the_best_is_there_also_when_a_later_one_fails(self, best):
        model = network()
        evaluator = evaluator_of(model)
        seen = []
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=4, best=best)
        evaluator._evaluating_func = lambda model: (seen.append(values(model)), 1 / (3 - len(seen)))[1]
        with pytest.raises(ZeroDivisionError):
            schedule.compress(max_steps=2)
        assert equal(seen[1], values(model))
        assert [of.number for of in schedule.rounds] == [1, 2]
        schedule.unwrap_model()

    @pytest.mark.parametrize("inner", INNER)
    @pytest.mark.parametrize("best", ["latest", "maximize", "minimize"])
    def test_real_speedup_in_between(self, inner, best):
        model = network()
        schedule = AGPPruner(INNER[inner](model, evaluator_of(model)), total_times=3, speedup=ModelSpeedup, best=best)
        small, masks = schedule.compress(max_epochs=1)
        metrics = [of.metric for of in schedule.rounds]
        expected = {"latest": 2, "maximize": int(np.argmax(metrics)), "minimize": int(np.argmin(metrics))}[best]
        removed = round(schedule.rounds[expected].removed * 14)
        assert small[0].weight.shape[0] + small[3].weight.shape[0] == 14 - removed
        assert (small is model) == (expected == 2)
        assert schedule.rounds[-1].removed == 0.5
        assert masks == {}
        assert evaluator_of(small).evaluate(small) == pytest.approx(metrics[expected], rel=1e-6)
        schedule.unwrap_model()

    def test_a_global_group_reaches_its_ratio_also_when_the_model_gets_small(self):
        model = network()
        config_list = [{"op_names": ["0", "3"], "sparse_ratio": 0.5, "global_group_id": "all"}]
        pruner = L1NormPruner(model, config_list, example_inputs=X[:2])
        LinearPruner(pruner, total_times=3, speedup=ModelSpeedup).compress()
        # A channel of the first weighs 27 elements, one of the second 72 at first: half of 648 is 324.
        left = model[0].weight.shape[0] * 27 + model[3].weight.shape[0] * 72
        assert 648 - 324 <= left < 648 - 324 + 72
        pruner.unwrap_model()

    @pytest.mark.parametrize("killed", [1, 2, 3])
    @pytest.mark.parametrize(
        "make",
        [
            lambda pruner, **kwargs: LinearPruner(pruner, total_times=3, best="maximize", **kwargs),
            lambda pruner, **kwargs: AGPPruner(pruner, total_times=3, speedup=ModelSpeedup, best="minimize", **kwargs),
            lambda pruner, **kwargs: LotteryTicketPruner(pruner, total_times=3, rewind_steps=2, **kwargs),
        ],
        ids=["linear", "agp-small", "lottery"],
    )
    def test_a_killed_run_goes_on_with_the_same_result(self, make, killed, tmp_path):
        def run(folder, dies_at=None):
            model = network()
            evaluator = evaluator_of(model)
            order = DATA.copy()
            shuffled = lambda: [order[of] for of in torch.randperm(len(order)).tolist()]  # noqa: E731
            evaluator._loop._loader = type("Loader", (), {"__iter__": lambda self: iter(shuffled())})()
            evaluate, calls = evaluator.evaluate, []

            def evaluate_or_die(model):
                calls.append(None)
                if len(calls) == dies_at:
                    raise KeyboardInterrupt
                return evaluate(model)

            evaluator.evaluate = evaluate_or_die
            schedule = make(TaylorPruner(model, CHANNELS, evaluator, 2), log_dir=folder)
            try:
                small, _ = schedule.compress(max_epochs=1)
                return values(small), schedule.rounds
            finally:
                schedule.unwrap_model()

        torch.manual_seed(3)
        expected, rounds = run(tmp_path / "whole")
        torch.manual_seed(3)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", killed)
        torch.manual_seed(99 if killed > 1 else 3)  # nothing is known before the first round is over
        found, again = run(tmp_path / "killed")
        assert again == rounds
        assert equal(expected, found)

    def test_a_finished_run_is_only_read(self, tmp_path):
        model = network()
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator_of(model)), total_times=2, log_dir=tmp_path)
        schedule.compress(max_steps=2)
        expected = values(model)
        schedule.unwrap_model()
        model = network()
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator_of(model)), total_times=2, log_dir=tmp_path)
        schedule.compress(max_steps=2)
        assert equal(expected, values(model))
        schedule.unwrap_model()

    def test_a_log_of_another_run_is_refused(self, tmp_path):
        for total in (2, 3):
            model = network()
            pruner = L1NormPruner(model, CHANNELS, evaluator_of(model))
            schedule = LinearPruner(pruner, total_times=total, log_dir=tmp_path)
            if total == 2:
                schedule.compress(max_steps=2)
            else:
                with pytest.raises(
                    CheckpointError, match=r"LinearPruner\.total_times \(2, and 3 here\)\. Give another log_dir"
                ):
                    schedule.compress(max_steps=2)
            schedule.unwrap_model()


class TestLottery:
    @pytest.mark.parametrize("rewind", [0, 3])
    def test_what_stays_goes_back_to_the_beginning(self, rewind):
        model, plain = network(), network()
        evaluator_of(plain).train(plain, max_steps=rewind) if rewind else None
        schedule = LotteryTicketPruner(
            L1NormPruner(model, CHANNELS, evaluator_of(model)), total_times=2, rewind_steps=rewind
        )
        weights = []
        pruning = schedule.after_pruning
        schedule.after_pruning = lambda: (pruning(), weights.append(values(model)))[1]
        schedule.compress(max_epochs=1)
        schedule.unwrap_model()
        for found in weights:
            torch.testing.assert_close(found["0.parametrizations.weight.original"], plain[0].weight.detach())
        assert len(weights) == 2

    def test_the_whole_network_is_trained_before_the_first_pruning(self):
        model, plain = network(), network()
        evaluator_of(plain).train(plain, max_epochs=1)
        expected = plain[0].weight.detach().abs().flatten(1).sum(1).argsort()[:4]
        schedule = LotteryTicketPruner(L1NormPruner(model, CHANNELS, evaluator_of(model)), total_times=1)
        _, masks = schedule.compress(max_epochs=1)
        assert set((~masks["0"]["bias"]).nonzero().flatten().tolist()) == set(expected.tolist())
        schedule.unwrap_model()

    def test_the_weights_may_stay(self):
        model = network()
        schedule = LotteryTicketPruner(
            L1NormPruner(model, CHANNELS, evaluator_of(model)), total_times=2, reset_weight=False
        )
        before, pruning, moved = network()[0].weight.detach(), schedule.after_pruning, []
        schedule.after_pruning = lambda: (
            pruning(),
            moved.append(not torch.equal(before, schedule.pruner.collect()["0.weight"])),
        )
        schedule.compress(max_epochs=1)
        schedule.unwrap_model()
        assert moved == [True, True]


class TestRefusals:
    def test_a_run_that_is_too_short(self):
        model = network()
        schedule = AGPPruner(L1NormPruner(model, CHANNELS, evaluator_of(model)), 5, 4)
        with pytest.raises(TrainingError, match="4 times 5 steps are 20, and 19 are given"):
            schedule.compress(max_steps=19)
        with pytest.raises(TrainingError, match="ended after 0 of 4 prunings"):
            schedule.compress(max_epochs=1)
        schedule.unwrap_model()

    def test_settings_of_rounds_within_one_run(self, pruner):
        with pytest.raises(ConflictError, match="interval_steps: speedup, log_dir and best belong to rounds"):
            LinearPruner(pruner, 5, 4, best="maximize")

    @pytest.mark.parametrize(("name", "value"), [("interval_steps", 0), ("total_times", -1), ("total_times", True)])
    def test_numbers(self, pruner, name, value):
        with pytest.raises(InvalidValueError, match=f"{name}: {value!r} is no positive int"):
            LinearPruner(pruner, **{name: value})

    def test_an_unknown_best(self, pruner):
        with pytest.raises(InvalidValueError, match="'highest' is unknown"):
            LinearPruner(pruner, best="highest")

    def test_the_best_without_a_metric(self):
        model = network()
        evaluator = evaluator_of(model)
        evaluator._evaluating_func = None
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=2, best="maximize")
        with pytest.raises(TrainingError, match="best: no round can be called best without a metric"):
            schedule.compress(max_steps=1)
        schedule.unwrap_model()

    def test_two_schedules(self):
        pruner = L1NormPruner(network(), CHANNELS)
        schedule = LinearPruner(pruner)
        with pytest.raises(ConflictError, match="LinearPruner has a schedule of its own"):
            AGPPruner(schedule)
        other = LevelPruner.from_compressor(schedule, [{"op_names": ["6"], "sparse_ratio": 0.5}])
        with pytest.raises(ConflictError, match="is fused with it, and one of both prunes in rounds"):
            AGPPruner(other)
        with pytest.raises(ConflictError, match=r"LinearPruner\(L1NormPruner\.from_compressor"):
            LinearPruner.from_compressor(schedule, CHANNELS)
        schedule.unwrap_model()

    def test_a_ticket_by_threshold(self):
        pruner = L1NormPruner(network(), [{"op_names": ["0"], "sparse_threshold": 0.5}])
        with pytest.raises(ConflictError, match=r"0\.weight: a ticket is found by shares"):
            LotteryTicketPruner(pruner)
        pruner.unwrap_model()

    def test_a_ticket_without_training(self):
        schedule = LotteryTicketPruner(L1NormPruner(network(), CHANNELS))
        with pytest.raises(TrainingError, match="a ticket is what training finds"):
            schedule.compress()
        schedule.unwrap_model()

    def test_a_fused_quantizer_cannot_follow_a_small_model(self):
        model = network()
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator_of(model)), total_times=2, speedup=ModelSpeedup)
        ToyQuantizer.from_compressor(schedule, [{"op_names": ["0"], "target_names": ["weight"]}])
        with pytest.raises(ConflictError, match="ToyQuantizer cannot follow"):
            schedule.compress(max_steps=1)
        schedule.unwrap_model()

    def test_a_model_that_only_a_graph_makes_small(self):
        class Graph:
            def __init__(self, model, dummy_input, masks):
                self.model = model

            def speedup_model(self):
                return network()

        schedule = LinearPruner(L1NormPruner(network(), CHANNELS, example_inputs=X[:2]), total_times=2, speedup=Graph)
        with pytest.raises(SpeedupError, match="only a graph"):
            schedule.compress()
        schedule.unwrap_model()


class TestSmallBetweenRounds:
    def test_thresholds_are_no_shares_of_what_is_left(self):
        model = network()
        norms = model[0].weight.detach().abs().flatten(1).sum(1)
        threshold = float(norms.sort().values[4]) + 1e-4
        pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_threshold": threshold}], example_inputs=X[:2])
        schedule = LinearPruner(pruner, total_times=4, speedup=ModelSpeedup)
        schedule.compress()
        expected = [int((norms < threshold * of / 4).sum()) for of in range(1, 5)]
        assert [of.removed * 8 for of in schedule.rounds] == expected
        schedule.unwrap_model()

    def test_greatest_ratios_are_of_the_whole(self):
        config_list = [{"op_names": ["0"], "sparse_ratio": 0.75, "max_sparse_ratio": 0.5}]
        schedule = LinearPruner(
            L1NormPruner(network(), config_list, example_inputs=X[:2]), total_times=4, speedup=ModelSpeedup
        )
        schedule.compress()
        assert [of.removed * 8 for of in schedule.rounds] == [1, 3, 4, 4]
        schedule.unwrap_model()

    def test_a_round_may_remove_nothing(self):
        model = network()
        schedule = LinearPruner(
            L1NormPruner(model, CHANNELS, example_inputs=X[:2]), total_times=10, speedup=ModelSpeedup
        )
        schedule.compress()
        expected = [int(0.05 * of * 8 + 1e-6) + int(0.05 * of * 6 + 1e-6) for of in range(1, 11)]
        assert [round(of.removed * 14) for of in schedule.rounds] == expected
        schedule.unwrap_model()

    def test_the_last_channel_stays(self):
        model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        config_list = [{"op_names": ["0", "2"], "sparse_ratio": 0.67}]
        schedule = AGPPruner(
            L1NormPruner(model, config_list, example_inputs=torch.ones(2, 4)), total_times=5, speedup=ModelSpeedup
        )
        small, _ = schedule.compress()
        assert (small[0].weight.shape, small[2].weight.shape) == ((1, 4), (1, 1))
        schedule.unwrap_model()

    def test_single_elements_are_refused(self):
        pruner = LevelPruner(network(), ELEMENTS, example_inputs=X[:2])
        with pytest.raises(ConflictError, match=r"speedup: .*0\.weight: a model gets small by whole channels"):
            LinearPruner(pruner, speedup=ModelSpeedup)
        pruner.unwrap_model()

    def test_what_is_masked_and_cannot_be_cut_is_said(self):
        """Two convolutions that are added lose the same channels, unless they decide each for itself."""
        shapes = {}
        for together in (False, True):
            model, x = randomize(Upsampling()), torch.randn(2, 3, 8, 8)
            config_list = [{"op_names": ["skip", "up"], "sparse_ratio": 0.5}]
            if together:
                config_list = auto_set_dependency_group_ids(model, config_list, x)
            pruner = L1NormPruner(model, config_list, example_inputs=x)
            schedule = LinearPruner(pruner, total_times=1, speedup=ModelSpeedup)
            with (
                nullcontext()
                if together
                else pytest.warns(UserWarning, match="not cut: up.weight .1., skip.weight .1.")
            ):
                schedule.compress()
            schedule.unwrap_model()
            shapes[together] = len(model.skip.weight)
        assert shapes[True] == 3 < shapes[False]

    def test_functions_that_accumulate_and_an_optimizer_with_moments(self):
        model = network()

        def training_func(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
            model.train()
            for number, batch in enumerate(DATA):
                training_step(batch, model).backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=False)

        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        evaluator = TorchEvaluator(
            training_func, optimizer, lambda batch, model: F.cross_entropy(model(batch[0]), batch[1]), dummy_input=X[:2]
        )
        schedule = LinearPruner(TaylorPruner(model, CHANNELS, evaluator, 2), total_times=3, speedup=ModelSpeedup)
        schedule.compress(max_epochs=1)
        assert [round(of.removed * 14) for of in schedule.rounds] == [2, 4, 7]
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == parameter.shape
            assert state["step"] == 2  # of the last round alone
        schedule.unwrap_model()


class TestBest:
    @pytest.mark.parametrize(
        ("metrics", "best", "number"),
        [
            ([math.nan, 0.5, 0.9, 0.7], "maximize", 3),
            ([0.5, math.nan, 0.4, math.nan], "maximize", 1),
            ([0.5, math.nan, 0.4, math.nan], "minimize", 3),
            ([math.nan] * 4, "maximize", 4),
            ([0.5, 0.9, 0.9, 0.1], "maximize", 3),
        ],
    )
    def test_nan_is_never_better(self, metrics, best, number):
        model = network()
        evaluator, values_of = evaluator_of(model), iter(metrics)
        evaluator._evaluating_func = lambda model: next(values_of)
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=4, best=best)
        schedule.compress(max_steps=1)
        assert removed_of(schedule)["0.weight"] == number
        schedule.unwrap_model()


class TestGoingOn:
    def test_optimizers_begin_anew_also_behind_steps_that_are_kept(self):
        """ADMM's steps stay; a schedule of learning rates that ends with the round does not notice them."""
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=BATCHES)
        evaluator = TorchEvaluator.from_loader(
            DATA, F.cross_entropy, optimizer, scheduler, scheduler_interval="step", dummy_input=X[:2]
        )
        schedule = LinearPruner(ADMMPruner(model, CHANNELS, evaluator, 1, 2), total_times=2)
        schedule.compress(max_epochs=1)
        assert scheduler.last_epoch == BATCHES
        schedule.unwrap_model()

    def test_a_second_run_is_refused(self):
        for interrupted in (False, True):
            model = network()
            evaluator = evaluator_of(model)
            if interrupted:
                evaluator._evaluating_func = interrupt
            schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=2)
            with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
                schedule.compress(max_steps=1)
            with pytest.raises(TrainingError, match="the rounds have been run"):
                schedule.compress(max_steps=1)
            schedule.unwrap_model()

    @pytest.mark.parametrize("phase", ["training", "evaluation"])
    @pytest.mark.parametrize("speedup", [None, ModelSpeedup])
    def test_an_interrupt_leaves_the_best_so_far(self, phase, speedup):
        model = network()
        evaluator = evaluator_of(model)
        seen, evaluate, train = [], evaluator.evaluate, evaluator.train

        def evaluated(model):
            metric = evaluate(model)
            if phase == "evaluation" and len(seen) == 2:
                raise KeyboardInterrupt
            seen.append(model(X).detach())
            return metric

        def trained(model, *args, **kwargs):
            result = train(model, *args, **kwargs)
            if phase == "training" and len(seen) == 2:
                raise KeyboardInterrupt
            return result

        evaluator.evaluate, evaluator.train = evaluated, trained
        schedule = LinearPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=4, speedup=speedup)
        with pytest.raises(KeyboardInterrupt):
            schedule.compress(max_steps=2)
        best, _ = schedule.result()
        torch.testing.assert_close(best(X), seen[1])
        schedule.unwrap_model()

    @pytest.mark.parametrize(
        ("key", "change"),
        [
            ("best", {"best": "maximize"}),
            ("speedup", {"speedup": ModelSpeedup}),
            (r"TaylorPruner\.training_steps \(2, and 3 here\)", {"training_steps": 3}),
            (r"0\.weight", {"ratio": 0.25}),
            (r"max_steps \(1, and 2 here\)", {"max_steps": 2}),
        ],
    )
    def test_a_log_is_of_one_setting(self, key, change, tmp_path):
        def run(*, training_steps=2, ratio=0.5, max_steps=1, **kwargs):
            model = network()
            config_list = [{"op_names": ["0", "3"], "sparse_ratio": ratio}]
            pruner = TaylorPruner(model, config_list, evaluator_of(model), training_steps)
            schedule = LinearPruner(pruner, total_times=2, log_dir=tmp_path, **kwargs)
            try:
                schedule.compress(max_steps=max_steps)
            finally:
                schedule.unwrap_model()

        run()
        with pytest.raises(CheckpointError, match=rf"which differs in {key}"):
            run(**change)


def interrupt(model):
    raise KeyboardInterrupt


class TestThroughTheSchedule:
    def test_masks_and_plan_are_the_pruners(self):
        model = network()
        pruner = L1NormPruner(model, CHANNELS, example_inputs=X[:2])
        schedule = LinearPruner(pruner, total_times=2)
        masks = schedule.generate_masks()
        assert {name: int((~of["weight"]).flatten(1).all(1).sum()) for name, of in masks.items()} == {"0": 4, "3": 3}
        assert removed_of(schedule) == removed_of(pruner)
        assert schedule.plan is pruner.plan
        mask = torch.ones(8, 3, 3, 3)
        mask[2] = 0
        schedule.update_masks({"0": {"weight": mask}})
        assert torch.equal(pruner.get_masks()["0"]["weight"], mask.bool())
        schedule.unwrap_model()

    def test_what_watches_training_is_gathered(self):
        model = network()
        schedule = LinearPruner(TaylorPruner(model, CHANNELS, evaluator_of(model), 2), total_times=2)
        with pytest.raises(TrainingError, match="has not watched any step"):
            schedule.generate_masks()
        schedule.gather()
        assert schedule.generate_masks()["0"]["bias"].sum() == 4
        schedule.unwrap_model()


class TestLoopsOfOnesOwn:
    @pytest.mark.parametrize("schedule_class", [LinearPruner, LotteryTicketPruner])
    def test_a_killed_one_goes_on(self, schedule_class):
        """Five of eight steps, everything saved and built anew, the other three: the same as eight at once."""

        def made():
            model = network().train()
            pruner = TaylorPruner(model, CHANNELS, training_steps=2, example_inputs=X[:2])
            return model, schedule_class(pruner, 3, 2), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

        def steps(model, schedule, optimizer, numbers):
            for number in numbers:
                x, y = DATA[number % BATCHES]
                optimizer.zero_grad()
                schedule.loss(F.cross_entropy(model(x), y)).backward()
                schedule.before_step()
                optimizer.step()
                schedule.step()

        results = []
        for killed in (None, 1, 3, 5):
            model, schedule, optimizer = made()
            schedule.start()
            steps(model, schedule, optimizer, range(killed or 8))
            if killed:
                file = io.BytesIO()
                torch.save([of.state_dict() for of in (schedule, model, optimizer)], file)
                schedule.unwrap_model()
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                model, schedule, optimizer = made()
                for item, state in zip((schedule, model, optimizer), saved, strict=True):
                    item.load_state_dict(state)
                steps(model, schedule, optimizer, range(killed, 8))
            schedule.finish()
            assert removed_of(schedule) == {"0.weight": 4, "3.weight": 3}
            schedule.unwrap_model()
            results.append(values(model))
        assert all(equal(results[0], of) for of in results[1:])

    def test_rounds_are_refused(self):
        schedule = LinearPruner(L1NormPruner(network(), CHANNELS, example_inputs=X[:2]), total_times=2)
        schedule.start()
        schedule.step()
        with pytest.raises(TrainingError, match=r"nothing has been pruned: rounds are run by compress\(\)"):
            schedule.finish()
        schedule.unwrap_model()

    def test_an_interval_too_short_to_watch(self):
        pruner = TaylorPruner(network(), CHANNELS, training_steps=5, example_inputs=X[:2])
        with pytest.raises(ConflictError, match="TaylorPruner watches 5 steps before it prunes, and an interval has 4"):
            LinearPruner(pruner, 4, 2)
        pruner.unwrap_model()


class TestTickets:
    def test_a_round_is_a_training_from_the_beginning(self):
        """The initial network under the first round's masks, trained as usual: the same weights and statistics."""
        model, plain = network(), network()
        evaluator = evaluator_of(model)
        evaluate, seen = evaluator.evaluate, []
        evaluator.evaluate = lambda model: (seen.append((schedule.get_masks(), values(model))), evaluate(model))[1]
        schedule = LotteryTicketPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=2)
        schedule.compress(max_epochs=2)
        schedule.unwrap_model()
        masks, trained = seen[0]
        pruner = L1NormPruner(plain, CHANNELS, evaluator_of(plain))
        pruner.update_masks(masks)
        pruner.evaluator.train(plain, max_epochs=2)
        assert equal(trained, values(plain))
        pruner.unwrap_model()

    def test_a_beginning_behind_the_first_pruning_is_refused(self):
        pruner = L1NormPruner(network(), CHANNELS, example_inputs=X[:2])
        with pytest.raises(ConflictError, match="rewind_steps: the weights cannot go back to step 4"):
            LotteryTicketPruner(pruner, 2, 2, rewind_steps=4)
        pruner.unwrap_model()

    def test_a_round_is_what_was_left_where_the_weights_go_back_to(self):
        """A schedule of learning rates for one training is enough for each round; each ends where the first did."""
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=BATCHES)
        rates = []
        evaluator = TorchEvaluator.from_loader(
            DATA, F.cross_entropy, optimizer, scheduler, scheduler_interval="step", dummy_input=X[:2]
        )
        optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
        schedule = LotteryTicketPruner(L1NormPruner(model, CHANNELS, evaluator), total_times=2, rewind_steps=1)
        schedule.compress(max_epochs=1)
        schedule.unwrap_model()
        assert len(rates) == BATCHES + 2 * (BATCHES - 1)
        assert rates[BATCHES:] == rates[1:BATCHES] * 2
