"""Pruners that watch training: nothing is left behind, whatever training does, and what was seen is not seen twice."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import TrainingError
from tersor.pruning import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    ADMMPruner,
    LinearPruner,
    TaylorPruner,
)
from tersor.pruning.taylor import squared_change
from tersor.training import TorchEvaluator
from tests.pruning.training import BATCHES, DATA, X, equal, evaluator_of, network, values

WEIGHTS = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]
OUTPUT = [{"op_names": ["2"], "target_names": ["_output_0"], "sparse_ratio": 0.5}]
WATCHING = {
    "taylor": (TaylorPruner, OUTPUT),
    "mean": (ActivationMeanRankPruner, WEIGHTS),
    "apoz": (ActivationAPoZRankPruner, OUTPUT),
}
LEARNING = {**WATCHING, "taylor-weights": (TaylorPruner, WEIGHTS), "admm": (ADMMPruner, WEIGHTS)}


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def watching(model):
    return [hook for hook in hooks_of(model) if "watch_activation" in getattr(hook, "__qualname__", "")]


def evaluator_with(training_func, model, lr=0.01):
    return TorchEvaluator(
        training_func,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        lambda batch, model: F.cross_entropy(model(batch[0]), batch[1]),
        dummy_input=X[:2],
        progress=False,
    )


def loop(model, pruner, batches, optimizer):
    for x, y in batches:
        optimizer.zero_grad()
        pruner.loss(F.cross_entropy(model(x), y)).backward()
        pruner.before_step()
        optimizer.step()
        pruner.step()


class Broken(Exception):
    pass


def breaking(at):
    """A training function that raises once some steps are made."""

    def training_func(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
        for step in range(100):
            optimizer.zero_grad()
            training_step(DATA[step % BATCHES], model).backward()
            if step == at:
                raise Broken
            optimizer.step()

    return training_func


@pytest.mark.parametrize("kind", LEARNING)
class TestErrorsInsideTraining:
    def test_all_is_put_back_and_nothing_left(self, kind):
        pruner_class, config_list = LEARNING[kind]
        model = network()
        evaluator = evaluator_with(breaking(2), model)
        kwargs = {"restores": True} if kind == "admm" else {}
        pruner = pruner_class(model, config_list, evaluator, training_steps=5, **kwargs)
        before, hooks = values(model), len(hooks_of(model))
        with pytest.raises(Broken):
            pruner.compress()
        assert equal(before, values(model))
        assert len(hooks_of(model)) == hooks
        assert evaluator.state_dict()["optimizers"][0]["state"] == {}
        assert pruner.get_masks() == {}
        pruner.unwrap_model()

    def test_also_within_the_interval_of_a_schedule(self, kind):
        pruner_class, config_list = LEARNING[kind]
        model = network()
        kwargs = {"iterations": 1} if kind == "admm" else {}
        pruner = pruner_class(model, config_list, evaluator_with(breaking(2), model), training_steps=3, **kwargs)
        hooks = len(hooks_of(model))
        with pytest.raises(Broken):
            LinearPruner(pruner, 3, 2).compress(max_steps=6)
        assert len(hooks_of(model)) == hooks
        pruner.unwrap_model()


@pytest.mark.parametrize("kind", LEARNING)
class TestLoopsOfOnesOwn:
    def test_one_that_is_too_short_is_refused(self, kind):
        pruner_class, config_list = LEARNING[kind]
        model = network()
        kwargs = {"iterations": 1} if kind == "admm" else {}
        pruner = pruner_class(model, config_list, training_steps=3, example_inputs=X[:2], **kwargs)
        pruner.start()
        loop(model, pruner, DATA[:2], torch.optim.SGD(model.parameters(), lr=0.01))
        with pytest.raises(TrainingError, match="finish: the training ended after 2 of 3 steps"):
            pruner.finish()
        pruner.unwrap_model()

    def test_one_that_is_given_up_leaves_no_hooks(self, kind):
        pruner_class, config_list = LEARNING[kind]
        model = network()
        pruner = pruner_class(model, config_list, training_steps=3, example_inputs=X[:2])
        pruner.start()
        assert bool(watching(model)) == (kind in WATCHING)
        pruner.unwrap_model()
        assert hooks_of(model) == []

    def test_one_that_is_begun_twice_sees_nothing_twice(self, kind):
        pruner_class, config_list = LEARNING[kind]
        found = []
        for starts in (1, 3):
            model = network()
            pruner = pruner_class(model, config_list, training_steps=4, example_inputs=X[:2])
            for _ in range(starts):
                pruner.start()
                loop(model, pruner, DATA[:2], torch.optim.SGD(model.parameters(), lr=0.0))
            assert len(watching(model)) == len([1 for _ in config_list[0]["op_names"] if kind in WATCHING])
            # Batch norm's running statistics say nothing in train mode, and all else is as it was at the beginning.
            found.append(copy.deepcopy(pruner.own_state().get("sums", {})))
            pruner.unwrap_model()
        assert found[0].keys() == found[1].keys()
        for name, total in found[0].items():
            torch.testing.assert_close(total, found[1][name])

    def test_a_killed_one_goes_on(self, kind):
        """Two of four steps, everything saved and built anew, the other two: the same as four at once."""
        pruner_class, config_list = LEARNING[kind]
        kwargs = {"iterations": 2, "training_steps": 2} if kind == "admm" else {"training_steps": 4}

        def made():
            model = network()
            pruner = pruner_class(model, config_list, example_inputs=X[:2], **kwargs)
            return model, pruner, torch.optim.SGD(model.parameters(), lr=0.05)

        results = []
        for killed in (False, True):
            model, pruner, optimizer = made()
            pruner.start()
            loop(model, pruner, DATA[:2], optimizer)
            if killed:
                file = io.BytesIO()
                torch.save((pruner.state_dict(), model.state_dict(), optimizer.state_dict()), file)
                pruner.unwrap_model()
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                model, pruner, optimizer = made()
                for item, state in zip((pruner, model, optimizer), saved, strict=True):
                    item.load_state_dict(state)
            loop(model, pruner, DATA[2:], optimizer)
            pruner.finish()
            results.append((pruner.get_masks(), values(pruner.unwrap_model())))
            assert hooks_of(model) == []
        (masks, weights), (again, same) = results
        assert equal(weights, same)
        for module, targets in masks.items():
            assert equal(targets, again[module])


@pytest.mark.parametrize("kind", [kind for kind in LEARNING if kind != "admm"])
def test_masks_without_anything_seen_are_refused(kind):
    pruner_class, config_list = LEARNING[kind]
    pruner = pruner_class(network(), config_list, training_steps=3, example_inputs=X[:2])
    with pytest.raises(TrainingError, match=r"has not watched any step.*gather\(\) before generate_masks"):
        pruner.generate_masks()
    pruner.unwrap_model()


def test_a_watch_that_is_cut_short_is_averaged_over_what_it_saw():
    """A schedule may ask before all steps are seen: the mean is still a mean."""
    model = network()
    pruner = TaylorPruner(model, WEIGHTS, evaluator_of(model, lr=0.0), 100)
    pruner.watch()
    weight = model[0].parametrizations.weight.original
    squares = torch.zeros(weight.shape, dtype=torch.float64)
    model.train()
    for x, y in DATA[:3]:
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), weight)
        squares += (grad.double() * weight.detach().double()).square() / 3
        weight.grad = grad
        model[3].parametrizations.weight.original.grad = torch.ones(6, 8, 3, 3)
        pruner.on_gradients()
        pruner.on_step()
    torch.testing.assert_close(pruner.collect()["0.weight"].double(), squares, rtol=1e-4, atol=1e-12)
    pruner.unwrap_model()


@pytest.mark.parametrize("config_list", [WEIGHTS, OUTPUT])
def test_no_graph_is_kept_where_gradients_have_one(config_list):
    model = network()
    pruner = TaylorPruner(model, config_list, training_steps=2, example_inputs=X[:2])
    pruner.watch()
    loss = F.cross_entropy(model(X[:4]), torch.arange(4))
    inputs = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter, grad in zip(inputs, torch.autograd.grad(loss, inputs, create_graph=True), strict=True):
        parameter.grad = grad
    pruner.before_step()
    assert pruner._sums
    assert not any(total.requires_grad for total in pruner._sums.values())
    pruner.unwrap_model()


def test_positions_of_an_output_of_changing_size_are_refused_by_its_name():
    model = network()[:5]
    config_list = [{**OUTPUT[0], "granularity": [1, 1, 1, 1]}]
    pruner = ActivationMeanRankPruner(model, config_list, training_steps=2, example_inputs=X[:2])
    pruner.start()
    model(X[:2])
    with pytest.raises(TrainingError, match=r"2\._output_0: .*\(8, 6, 6\) in one batch and \(8, 5, 6\) in another"):
        model(X[:2, :, :7])
    pruner.unwrap_model()


def test_half_precision_does_not_lose_small_products():
    value, grad = torch.tensor([2e-4], dtype=torch.float16), torch.tensor([3e-4], dtype=torch.float16)
    assert (value * grad).square().item() == 0
    assert squared_change(value, grad).item() == pytest.approx((2e-4 * 3e-4) ** 2, rel=1e-2)


class TestTrainingFunctions:
    def test_gradient_accumulation(self):
        """The importance is of the accumulated gradients, a step being what the optimizer makes."""
        model = network()

        def training_func(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
            model.train()
            while True:
                optimizer.zero_grad()
                for batch in DATA:
                    (training_step(batch, model) / BATCHES).backward()
                optimizer.step()

        exact = copy.deepcopy(model).train().double()
        sum(F.cross_entropy(exact(x.double()), y) for x, y in DATA).div(BATCHES).backward()
        expected = (exact[0].weight.grad * exact[0].weight).square().flatten(1).sum(1)
        pruner = TaylorPruner(model, WEIGHTS, evaluator_with(training_func, model, lr=0.0), 3)
        pruner.gather()
        found = pruner.importance()["0.weight"].flatten().double()
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-9)
        pruner.unwrap_model()

    @pytest.mark.parametrize("config_list", [WEIGHTS, OUTPUT])
    def test_autocast(self, config_list):
        found = []
        for enabled in (False, True):
            model = network()

            def training_func(model, optimizer, training_step, *_, enabled=enabled):
                model.train()
                for batch in DATA:
                    optimizer.zero_grad()
                    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                        loss = training_step(batch, model)
                    loss.backward()
                    optimizer.step()

            pruner = TaylorPruner(model, config_list, evaluator_with(training_func, model, lr=0.0), BATCHES)
            pruner.gather()
            found.append(torch.cat([own.flatten() for own in pruner.importance().values()]))
            pruner.unwrap_model()
        assert found[1].dtype == torch.float32
        torch.testing.assert_close(found[1], found[0], rtol=0.1, atol=1e-3 * float(found[0].max()))

    def test_recurrent_and_tied_weights(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.lstm, self.out = nn.Embedding(9, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 9)
                self.out.weight = self.embed.weight

            def forward(self, ids):
                return self.out(self.lstm(self.embed(ids))[0]).flatten(0, 1)

        torch.manual_seed(0)
        model, ids = Net(), torch.randint(9, (4, 5))
        exact = copy.deepcopy(model).double()
        F.cross_entropy(exact(ids), ids.flatten()).backward()
        config_list = [
            {"op_names": ["lstm"], "target_names": ["weight_ih_l0"], "sparse_ratio": 0.5, "granularity": "default"},
            {"op_names": ["out"], "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": "default"},
        ]
        pruner = TaylorPruner(model, config_list, training_steps=1)
        pruner.start()
        F.cross_entropy(model(ids), ids.flatten()).backward()
        pruner.step()
        for name, parameter in (("lstm.weight_ih_l0", exact.lstm.weight_ih_l0), ("out.weight", exact.out.weight)):
            expected = (parameter.grad * parameter.detach()).square()
            torch.testing.assert_close(pruner.collect()[name].double(), expected, rtol=1e-3, atol=1e-10)
        assert torch.equal(pruner.get_masks(completed=True)["embed"]["weight"], pruner.get_masks()["out"]["weight"])
        pruner.unwrap_model()
