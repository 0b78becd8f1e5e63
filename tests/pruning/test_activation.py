"""Silent and little active channels, against counts by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import InvalidValueError, TrainingError
from tersor.pruning import ActivationAPoZRankPruner, ActivationMeanRankPruner
from tests.pruning.training import BATCHES, DATA, X, equal, evaluator_of, network, removed_of, values

CONFIG = [{"op_names": ["3"], "sparse_ratio": 0.5}]
STATISTICS = {
    ActivationAPoZRankPruner: lambda x: (x.relu() != 0).double(),
    ActivationMeanRankPruner: lambda x: x.relu(),
}


def outputs_of(model, name):
    """What a module gave for all data in train mode, in float64."""
    exact, kept = copy.deepcopy(model).double().train(), []
    handle = exact.get_submodule(name).register_forward_hook(lambda *call: kept.append(call[2].detach()))
    for x, _ in DATA:
        exact(x.double())
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize("pruner_class", STATISTICS)
def test_a_weight_is_ranked_by_its_modules_output(pruner_class):
    model = network()
    expected = STATISTICS[pruner_class](outputs_of(model, "3")).mean((0, 2, 3))
    before = values(model)
    pruner = pruner_class(model, CONFIG, evaluator_of(model, lr=0.0), BATCHES)
    _, masks = pruner.compress()
    torch.testing.assert_close(pruner.importance()["3.weight"].flatten().double(), expected, rtol=1e-3, atol=1e-6)
    assert set((~masks["3"]["bias"]).nonzero().flatten().tolist()) == set(expected.argsort(stable=True)[:3].tolist())
    assert removed_of(pruner) == {"3.weight": 3}
    pruner.unwrap_model()
    assert equal(before, values(model))


@pytest.mark.parametrize("pruner_class", STATISTICS)
def test_an_output_is_ranked_by_itself(pruner_class):
    model = network()
    expected = STATISTICS[pruner_class](outputs_of(model, "2")).mean((0, 2, 3))
    config_list = [{"op_names": ["2"], "target_names": ["_output_0"], "sparse_ratio": 0.5}]
    pruner = pruner_class(model, config_list, evaluator_of(model, lr=0.0), BATCHES)
    _, masks = pruner.compress()
    gone = set((~masks["2"]["_output_0"]).flatten().nonzero().flatten().tolist())
    assert gone == set(expected.argsort(stable=True)[:4].tolist())
    assert masks["2"]["_output_0"].shape == (1, 8, 1, 1)
    pruner.unwrap_model()


def test_linear_layers_have_their_channels_last():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
    pruner = ActivationAPoZRankPruner(
        model, [{"op_names": ["0"], "sparse_ratio": 0.5}], training_steps=1, example_inputs=torch.randn(2, 7, 3)
    )
    pruner.start()
    model(torch.rand(2, 7, 3)).sum().backward()
    pruner.step()
    assert pruner.get_masks()["0"]["bias"].tolist() == [True, False, True, False]
    pruner.unwrap_model()


@pytest.mark.parametrize(("activation", "function"), [("gelu", F.gelu), ("relu6", F.relu6), (torch.tanh, torch.tanh)])
def test_other_activations(activation, function):
    model = network()
    expected = function(outputs_of(model, "3")).mean((0, 2, 3))
    pruner = ActivationMeanRankPruner(model, CONFIG, evaluator_of(model, lr=0.0), BATCHES, activation)
    pruner.compress()
    torch.testing.assert_close(pruner.importance()["3.weight"].flatten().double(), expected, rtol=1e-3, atol=1e-6)
    pruner.unwrap_model()


def test_refusals():
    with pytest.raises(InvalidValueError, match=r"'swish' is unknown.*relu6"):
        ActivationMeanRankPruner(network(), CONFIG, activation="swish")
    lstm = [{"op_types": ["LSTM"], "target_names": ["weight_ih_l0"], "sparse_ratio": 0.5}]
    with pytest.raises(InvalidValueError, match=r"0\.weight_ih_l0: the channels of a LSTM.*_output_0"):
        ActivationMeanRankPruner(nn.Sequential(nn.LSTM(2, 4)), lstm)
    model = Unused()
    pruner = ActivationMeanRankPruner(model, [{"op_names": ["unused"], "sparse_ratio": 0.5}], training_steps=1)
    pruner.start()
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(TrainingError, match=r"unused\.weight: nothing passed"):
        pruner.step()
    pruner.unwrap_model()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_the_steps_are_counted_over_all_samples():
    """The mean runs over samples, however they are batched."""
    model = network()
    pruner = ActivationMeanRankPruner(model, CONFIG, training_steps=2, example_inputs=X[:2])
    model.eval()
    pruner.start()
    with torch.no_grad():
        model(X[:3])
        pruner.step()
        model(X[3:4])
        pruner.step()
    ours = pruner.importance()["3.weight"].flatten()
    pruner.unwrap_model()
    torch.testing.assert_close(ours, model[:4](X[:4]).relu().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
