"""Importance by the loss, against autograd in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.pruning import TaylorPruner
from tests.pruning.training import BATCHES, DATA, X, equal, evaluator_of, network, removed_of, values

CONFIG = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]


def importances(model, name, **kwargs):
    pruner = TaylorPruner(model, CONFIG, evaluator_of(model, lr=0.0), BATCHES, **kwargs)
    pruner.gather()
    found = pruner.importance()[f"{name}.weight"].flatten().double()
    pruner.unwrap_model()
    return found


@pytest.mark.parametrize("name", ["0", "3"])
def test_the_importance_is_the_papers(name):
    """With a learning rate of zero all gradients are those of the model as it is."""
    model = network()
    exact = copy.deepcopy(model).double().train()
    weight = exact.get_submodule(name).weight
    expected = torch.zeros(len(weight), dtype=torch.float64)
    for x, y in DATA:
        (grad,) = torch.autograd.grad(F.cross_entropy(exact(x.double()), y), weight)
        expected += (grad * weight.detach()).square().flatten(1).sum(1) / BATCHES
    torch.testing.assert_close(importances(model, name), expected, rtol=1e-3, atol=1e-9)


def test_the_least_important_leave_and_everything_is_put_back():
    model = network()
    evaluator = evaluator_of(model, lr=0.1)
    before = values(model)
    pruner = TaylorPruner(model, CONFIG, evaluator, 6)
    _, masks = pruner.compress()
    assert removed_of(pruner) == {"0.weight": 4, "3.weight": 3}
    for name, count in (("0", 4), ("3", 3)):
        lowest = pruner.importance()[f"{name}.weight"].flatten().argsort()[:count]
        assert set(lowest.tolist()) == set((~masks[name]["bias"]).nonzero().flatten().tolist())
    pruner.unwrap_model()
    assert equal(before, values(model))
    assert evaluator.state_dict()["optimizers"][0]["state"] == {}


def test_the_steps_may_stay():
    model = network()
    before = values(model)
    pruner = TaylorPruner(model, CONFIG, evaluator_of(model), 2, restores=False)
    pruner.compress()
    pruner.unwrap_model()
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_an_output_is_weighed_by_its_own_gradient():
    model = network()
    exact = copy.deepcopy(model).double().train()
    expected = torch.zeros(8, dtype=torch.float64)
    for x, y in DATA:
        kept = []
        handle = exact[2].register_forward_hook(lambda *call, kept=kept: kept.append(call[2]))
        loss = F.cross_entropy(exact(x.double()), y)
        handle.remove()
        (grad,) = torch.autograd.grad(loss, kept)
        expected += (grad * kept[0].detach()).square().sum((0, 2, 3)) / BATCHES
    config_list = [{"op_names": ["2"], "target_names": ["_output_0"], "sparse_ratio": 0.5}]
    pruner = TaylorPruner(model, config_list, evaluator_of(model, lr=0.0), BATCHES, example_inputs=X[:2])
    _, masks = pruner.compress()
    found = pruner.importance()["2._output_0"].flatten().double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)
    assert set((~masks["2"]["_output_0"]).flatten().nonzero().flatten().tolist()) == set(
        expected.argsort()[:4].tolist()
    )
    assert not model[2]._forward_hooks or len(model[2]._forward_hooks) == 1  # the mask's alone
    pruner.unwrap_model()


def test_a_loop_of_ones_own_is_watched_and_masked_after_the_steps():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = TaylorPruner(model, CONFIG, training_steps=3, example_inputs=X[:2])
    pruner.start()
    for step, (x, y) in enumerate(DATA):
        assert bool(pruner.get_masks()) == (step >= 3)
        optimizer.zero_grad()
        pruner.loss(F.cross_entropy(model(x), y)).backward()
        pruner.before_step()
        optimizer.step()
        pruner.step()
    pruner.finish()
    assert removed_of(pruner) == {"0.weight": 4, "3.weight": 3}
    pruner.unwrap_model()


class TestRefusals:
    def test_a_number_of_steps(self):
        with pytest.raises(InvalidValueError, match="training_steps: 0"):
            TaylorPruner(network(), CONFIG, training_steps=0)

    def test_a_training_that_ends_before(self):
        model = network()

        def one_step(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
            training_step(DATA[0], model).backward()
            optimizer.step()

        evaluator = evaluator_of(model)
        evaluator._training_func = one_step
        pruner = TaylorPruner(model, CONFIG, evaluator, 3)
        with pytest.raises(TrainingError, match="training ended after 1 of 3 steps"):
            pruner.compress()
        assert pruner.get_masks() == {}
        pruner.unwrap_model()

    def test_a_frozen_weight(self):
        model = network()
        model[0].weight.requires_grad_(False)
        pruner = TaylorPruner(model, CONFIG, evaluator_of(model), 2)
        with pytest.raises(TrainingError, match=r"0\.weight: no gradient"):
            pruner.compress()
        pruner.unwrap_model()

    def test_rho_is_another_pruners(self):
        with pytest.raises(ConflictError, match=r"'rho'.*TaylorPruner has no penalty"):
            TaylorPruner(network(), [{"op_types": ["Linear"], "sparse_ratio": 0.5, "rho": 0.1}])

    def test_nothing_to_prune_is_said_before_any_training(self):
        model = nn.Sequential(nn.Linear(4, 1))
        pruner = TaylorPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], training_steps=2)
        with pytest.raises(Exception, match="nothing would be pruned"):
            pruner.start()
        pruner.unwrap_model()
