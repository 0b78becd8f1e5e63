"""A model and its training go back to what they were, to the bit."""

import io

import torch
from torch import nn

from tersor.pruning import L1NormPruner
from tersor.training.snapshot import Snapshot, plain_name
from tests.pruning.training import DATA, X, equal, evaluator_of, network, values

CONFIG = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]


def test_parameters_statistics_and_moments_go_back():
    model = network()
    evaluator = evaluator_of(model)
    evaluator.train(model, max_steps=2)
    before, momentum = values(model), evaluator.state_dict()["optimizers"][0]["state"][0]["momentum_buffer"].clone()
    snapshot, parameters = Snapshot(model, evaluator), list(model.parameters())
    for _ in range(2):  # more than once
        evaluator.train(model, max_steps=2)
        assert not equal(before, values(model))
        snapshot.restore()
        assert equal(before, values(model))
        restored = evaluator.state_dict()["optimizers"][0]["state"][0]["momentum_buffer"]
        assert torch.equal(momentum, restored)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_training_from_there_is_the_same_again():
    model = network()
    evaluator = evaluator_of(model)
    snapshot, results = Snapshot(model, evaluator), []
    for _ in range(2):
        snapshot.restore()
        evaluator.train(model, max_epochs=1)
        results.append(values(model))
    assert equal(*results)


def test_gradients_of_other_values_are_dropped():
    """A loop that forgets gradients only behind a step would add them to its first ones."""
    model = network()
    snapshot = Snapshot(model)
    nn.functional.cross_entropy(model(DATA[0][0]), DATA[0][1]).backward()
    snapshot.restore()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_masks_belong_to_it_where_they_are_asked_for():
    for simulation, removed in ((True, 0), (False, 4)):
        model = network()
        pruner = L1NormPruner(model, CONFIG, example_inputs=X[:2])
        pruner.compress()
        snapshot = Snapshot(model, simulation=simulation)
        with torch.no_grad():
            model[1].running_mean.add_(1)
            for mask in model[0].parametrizations.weight.buffers():
                mask.fill_(True)
        snapshot.restore()
        assert int((model[0].weight == 0).flatten(1).all(1).sum()) == 4 - removed
        assert torch.equal(model[1].running_mean, network()[1].running_mean)
        pruner.unwrap_model()


def test_wrapped_and_plain_are_one_model():
    """Taken before the model was wrapped, saved, and restored in one that is."""
    file, model = io.BytesIO(), network()
    torch.save(Snapshot(model, evaluator_of(model)).state_dict(), file)
    file.seek(0)
    before = values(model)
    pruner = L1NormPruner(model, CONFIG, evaluator_of(model))
    snapshot = Snapshot(model, pruner.evaluator, simulation=False)
    pruner.compress(max_steps=2)
    snapshot.load_state_dict(torch.load(file, weights_only=True))
    snapshot.restore()
    assert pruner.evaluator.state_dict()["optimizers"][0]["state"] == {}
    pruner.unwrap_model()
    assert equal(before, values(model))


def test_names_of_parametrized_parameters():
    names = ["0.parametrizations.weight.original", "a.b.parametrizations.bias.original", "parametrizations.w.original"]
    assert [plain_name(of) for of in names] == ["0.weight", "a.b.bias", "w"]
    for other in ("0.parametrizations.weight.0.mask.factor_0", "original", "0.weight"):
        assert plain_name(other) == other
