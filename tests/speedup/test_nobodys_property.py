"""What a speedup and a pruner must not change, and shared parts that must stay consistent."""

import copy

import pytest
import torch
from torch import nn

from tersor.errors import SpeedupError, TraceError, WrapError
from tersor.graph import groups
from tersor.pruning import L1NormPruner, LevelPruner
from tersor.speedup import ModelSpeedup
from tests.networks import randomize


def rows(count, removed, rank=2):
    mask = torch.ones([count] + [1] * (rank - 1), dtype=torch.bool)
    mask[list(removed)] = False
    return mask


class Counting(nn.Module):
    """Writes into its input and its buffers, and draws random numbers, in every forward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))

    def forward(self, x):
        x.sub_(1.0).mul_(0.3)
        self.calls += 1
        h = self.a(x)
        self.last = h.mean(0)
        return self.b(h) + 0.01 * torch.rand(())


def test_inputs_buffers_and_random_state_are_untouched():
    model, x = randomize(Counting()), torch.randn(4, 3)
    given, state, last, address = x.clone(), torch.get_rng_state(), model.last, model.calls.data_ptr()
    coupling = groups(model, x)
    assert coupling.frozen_reason("a.weight", 0) is None
    assert torch.equal(x, given)
    assert torch.equal(state, torch.get_rng_state())
    assert model.calls == randomize(Counting()).calls
    assert model.last is last
    assert model.calls.data_ptr() == address


def test_a_model_that_draws_is_verified():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand(())

    model = randomize(Noisy(nn.Linear(3, 6), nn.Linear(6, 2)))
    speedup = ModelSpeedup(model, torch.randn(4, 3), {"0": {"weight": rows(6, [1, 2])}})
    assert speedup.speedup_model()[0].out_features == 4
    assert speedup.report.error < 1e-5


def test_a_module_under_two_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.again = self.b

        def forward(self, x):
            return self.c(torch.relu(self.again(torch.relu(self.b(torch.relu(self.a(x)))))))

    model, x = randomize(Shared()), torch.randn(4, 3)
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], example_inputs=x)
    masked, masks = pruner.compress()
    expected = masked(x).detach()
    pruner.unwrap_model()
    small = ModelSpeedup(model, x, masks).speedup_model()
    torch.testing.assert_close(small(x), expected)
    assert small.again is small.b


def test_a_mask_on_a_tied_weight_holds_under_both_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.sigmoid(self.a(x)))

    model, x = randomize(Tied()), torch.randn(5, 4)
    pruner = LevelPruner(model, [{"op_names": ["a"], "sparse_ratio": 0.5}])
    masked, masks = pruner.compress()
    expected = masked(x).detach()
    pruner.unwrap_model()
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        by_hand.a.weight.mul_(masks["a"]["weight"])
    torch.testing.assert_close(by_hand(x), expected)
    torch.testing.assert_close(ModelSpeedup(model, x, masks).speedup_model()(x), expected)


def test_a_branch_that_the_run_did_not_take_is_reported():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x):
            h = self.a(x)
            return (self.b(h), self.aux(h)) if self.training else self.b(h)

    speedup = ModelSpeedup(Auxiliary(), torch.randn(4, 3), {"a": {"weight": rows(6, [0])}})
    speedup.speedup_model()
    assert speedup.report.unused == ("aux.weight", "aux.bias")


def test_masks_of_outputs_are_reported():
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))
    speedup = ModelSpeedup(model, torch.randn(4, 3), {"0": {"_output_0": torch.zeros(1, 6)}})
    speedup.speedup_model()
    (left,) = speedup.report.left_alone
    assert (left.target, left.count) == ("0._output_0", 6)


def test_a_norm_that_refuses_one_sample_is_verified_with_more():
    model = randomize(
        nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 2))
    )
    speedup = ModelSpeedup(model, torch.randn(4, 3), {"0": {"weight": rows(6, [1, 2])}})
    assert speedup.speedup_model()[1].num_features == 4
    assert speedup.report.error < 1e-5


def test_channels_last_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    ModelSpeedup(model, torch.randn(2, 3, 8, 8), {"0": {"weight": rows(8, range(4), 4)}}).speedup_model()
    assert model[2].weight.shape == (4, 4, 3, 3)
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_masks_are_copies():
    model, mask = nn.Linear(3, 4), torch.tensor([True, False, True, True])
    pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.25}])
    pruner.update_masks({"": {"bias": mask}})
    mask[:] = False
    assert (model.bias == 0).tolist() == [False, True, False, False]
    pruner.unwrap_model()


def test_a_computed_weight_is_refused_and_nothing_stays_wrapped():
    model = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    with pytest.raises(WrapError, match=r"1\.weight.*several tensors"):
        L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert not hasattr(model[0], "parametrizations")
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")


def test_lazy_parameters_are_named():
    model, x = nn.Sequential(nn.LazyLinear(3)), torch.zeros(1, 2)
    with pytest.raises(TraceError, match=r"0\.weight: a lazy parameter"):
        groups(model, x)
    with pytest.raises(TraceError, match=r"0\.weight: a lazy parameter"):
        L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    model(x)
    assert groups(model, x).frozen_reason("0.weight", 0) == "is the model's own output"


def test_a_buffer_that_is_not_persistent_stays_so():
    model = nn.Linear(3, 4)
    model.register_buffer("shift", torch.zeros(4), persistent=False)
    config_list = [{"op_types": ["Linear"], "target_names": ["shift"], "sparse_ratio": 0.5, "granularity": [1]}]
    pruner = LevelPruner(model, config_list)
    pruner.compress()
    pruner.unwrap_model()
    assert list(model.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_what_feeds_a_recurrent_layer_may_leave(kind):
    model, x = nn.Sequential(nn.Linear(3, 6), kind(6, 4, batch_first=True)), torch.randn(2, 5, 3)
    speedup = ModelSpeedup(model, x, {"0": {"weight": rows(6, [1, 2])}})
    assert speedup.speedup_model()[1].input_size == model[0].out_features
    assert speedup.report.error < 1e-5


def test_two_parameters_over_the_same_values():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = nn.Parameter(model[0].weight.data)
    assert groups(model, torch.randn(3, 4)).frozen_reason("2.weight", 0) == groups(
        model, torch.randn(3, 4)
    ).frozen_reason("0.weight", 0)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(SpeedupError, match="inference mode"):
        ModelSpeedup(nn.Linear(2, 2), torch.zeros(1, 2), {})


def test_an_embedding_that_renormalizes_keeps_its_table():
    model = nn.Sequential(nn.Embedding(5, 6, max_norm=0.1), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    table = model[0].weight.detach().clone()
    groups(model, torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(model[0].weight, table)
