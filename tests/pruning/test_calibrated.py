"""Pruners that see each layer's inputs: against the papers' formulas in float64, layer after layer."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import ConfigError, ConflictError, EmptyLayerError, InvalidValueError, NumericalError
from tersor.pruning import AGPPruner, L1NormPruner, LevelPruner, OBSPruner, SparseGPTPruner, WandaPruner
from tersor.pruning.reconstruction import reconstruct
from tersor.speedup import ModelSpeedup
from tests.networks import randomize

LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(256, 6, generator=GENERATOR) @ torch.randn(6, 12, generator=GENERATOR)
X += 0.1 * torch.randn(256, 12, generator=GENERATOR)
BATCHES = list(X.split(64))
IMAGES = torch.randn(32, 4, 8, 8, generator=GENERATOR)


def mlp():
    return randomize(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), 0)


def convolutions():
    layers = (nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten())
    return randomize(nn.Sequential(*layers, nn.Linear(288, 4)), 0)


def error(model, original, x):
    with torch.no_grad():
        expected = original(x)
        return float((model(x) - expected).norm() / expected.norm())


def pruned(pruner_class, model, config_list, x, **kwargs):
    if pruner_class not in (LevelPruner, L1NormPruner):
        kwargs["calibration"] = x.split(64)
    pruner = pruner_class(model, config_list, **kwargs)
    _, masks = pruner.compress()
    return pruner, masks


class TestWanda:
    def test_the_score_is_the_papers_by_row_and_layer_after_layer(self):
        model, exact = mlp(), mlp().double()
        pruner, masks = pruned(WandaPruner, model, LINEAR, X)
        pruner.unwrap_model()
        for name in ("0", "2", "4"):
            layer = exact.get_submodule(name)
            inputs = exact[: int(name)](X.double())
            scores = layer.weight.detach().abs() * inputs.norm(dim=0)
            keep = torch.ones_like(scores, dtype=torch.bool)
            keep.scatter_(1, scores.argsort(dim=1)[:, : scores.shape[1] // 2], False)
            assert torch.equal(masks[name]["weight"], keep)
            layer.weight.data *= keep  # what the next layer's inputs are computed with

    @pytest.mark.parametrize("balance", [[-1, -1], [4, 4]])
    def test_balance_may_be_another(self, balance):
        model = mlp()
        config_list = [{"op_names": ["2"], "sparse_ratio": 0.25, "balance_granularity": balance}]
        pruner, masks = pruned(WandaPruner, model, config_list, X)
        scores = (model[2].parametrizations.weight.original.abs() * model[:2](X).norm(dim=0)).detach()
        pruner.unwrap_model()
        size = 16 if balance == [-1, -1] else 4
        for row in range(0, 16, size):
            for column in range(0, 16, size):
                part = scores[row : row + size, column : column + size].flatten()
                gone = ~masks["2"]["weight"][row : row + size, column : column + size].flatten()
                assert set(gone.nonzero().flatten().tolist()) == set(part.argsort()[: part.numel() // 4].tolist())

    def test_two_of_four(self):
        model = mlp()
        pruner, masks = pruned(WandaPruner, model, [{"op_types": ["Linear"], "sparse_pattern": "2:4"}], X)
        for name in ("0", "2", "4"):
            assert (masks[name]["weight"].view(-1, 4).sum(1) == 2).all()
        assert [of.asked for of in pruner.sparsity()] == [0.5] * 3
        pruner.unwrap_model()

    def test_it_says_why_a_row_loses_less(self):
        layer = nn.Linear(3, 4)
        pruner, _ = pruned(WandaPruner, layer, LINEAR, torch.randn(8, 3))
        (of,) = pruner.sparsity()
        assert (of.removed, of.blocks) == (4, 12)
        assert of.reason == "each of 4 equal parts loses whole blocks"
        pruner.unwrap_model()


class TestSparseGPT:
    @pytest.mark.parametrize("pattern", [{"sparse_ratio": 0.5}, {"sparse_pattern": "2:4"}])
    @pytest.mark.parametrize(("network", "x"), [(mlp, X), (convolutions, IMAGES)])
    def test_less_is_lost_than_by_magnitude_and_wanda(self, network, x, pattern):
        lost = {}
        config_list = [{"op_names": ["0", "2"], **pattern}]
        for pruner_class in (LevelPruner, WandaPruner, SparseGPTPruner):
            model = network()
            pruner, _ = pruned(pruner_class, model, config_list, x)
            assert [of.removed * 2 for of in pruner.sparsity()] == [of.blocks for of in pruner.sparsity()]
            lost[pruner_class] = error(model, network(), x)
            pruner.unwrap_model()
        assert lost[SparseGPTPruner] < 0.93 * min(lost[LevelPruner], lost[WandaPruner])

    def test_a_pattern_of_a_convolution_runs_along_its_input_channels(self):
        model = convolutions()
        pruner, masks = pruned(SparseGPTPruner, model, [{"op_types": ["Conv2d"], "sparse_pattern": "1:2"}], IMAGES)
        for name in ("0", "2"):
            assert (masks[name]["weight"].unflatten(1, (-1, 2)).sum(2) == 1).all()
        pruner.unwrap_model()

    def test_the_adjusted_weights_stay_when_the_model_is_unwrapped(self):
        model = mlp()
        pruner, masks = pruned(SparseGPTPruner, model, LINEAR, X)
        expected = model(X)
        pruner.unwrap_model()
        assert torch.equal(model(X), expected)
        assert not model[0].weight[~masks["0"]["weight"]].any()
        assert not torch.equal(model[0].weight[masks["0"]["weight"]], mlp()[0].weight[masks["0"]["weight"]])

    def test_ratio_and_bounds(self):
        for bounds, count in (({}, 96), ({"max_sparse_ratio": 0.25}, 48), ({"min_sparse_ratio": 0.75}, 144)):
            model = mlp()
            config_list = [{"op_names": ["0"], "sparse_ratio": 0.5, **bounds}]
            pruner, masks = pruned(SparseGPTPruner, model, config_list, X)
            assert int((~masks["0"]["weight"]).sum()) == count
            pruner.unwrap_model()

    def test_step_by_step(self):
        model = mlp()
        config_list = [{"op_types": ["Linear"], "sparse_pattern": "2:4"}]
        schedule = AGPPruner(SparseGPTPruner(model, config_list, calibration=BATCHES), total_times=3)
        _, masks = schedule.compress()
        assert (masks["2"]["weight"].view(-1, 4).sum(1) == 2).all()
        assert error(model, mlp(), X) < 0.5
        schedule.unwrap_model()


class TestOBS:
    CONFIG = [{"op_names": ["0", "2"], "sparse_ratio": 0.5}]

    def test_one_layer_against_least_squares(self):
        """The greedy choice and the fit, by solving every least squares problem anew."""
        model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
        model = randomize(model, 1)
        x, before = X.double(), copy.deepcopy(model).double()
        hidden = before[:2](x).detach().numpy()
        target = before(x).detach().numpy()
        centred = hidden - hidden.mean(0)
        alive = list(range(6))

        def lost(columns):
            solution, *_ = np.linalg.lstsq(centred[:, columns], target - target.mean(0), rcond=None)
            return ((centred[:, columns] @ solution - target + target.mean(0)) ** 2).sum()

        for _ in range(3):
            alive.remove(min(alive, key=lambda channel: lost([of for of in alive if of != channel])))
        config_list = [{"op_names": ["0"], "sparse_ratio": 0.5}]
        pruner, masks = pruned(OBSPruner, model, config_list, X, example_inputs=X[:2], damping=1e-9)
        assert masks["0"]["bias"].nonzero().flatten().tolist() == alive
        ours = model(X).detach().double().numpy()
        pruner.unwrap_model()
        assert ((ours - target) ** 2).sum() == pytest.approx(lost(alive), rel=1e-3)
        np.testing.assert_allclose(ours.mean(0), target.mean(0), atol=1e-5)

    @pytest.mark.parametrize(
        ("network", "x", "names"), [(mlp, X, ["0", "2"]), (convolutions, IMAGES, ["2"])], ids=["linear", "convolution"]
    )
    def test_less_is_lost_than_by_norms_and_the_small_model_is_equal(self, network, x, names):
        lost = {}
        for pruner_class in (L1NormPruner, OBSPruner):
            model = network()
            config_list = [{"op_names": names, "sparse_ratio": 0.5}]
            pruner, masks = pruned(pruner_class, model, config_list, x, example_inputs=x[:2])
            assert [of.removed * 2 for of in pruner.sparsity()] == [of.blocks for of in pruner.sparsity()]
            lost[pruner_class] = error(model, network(), x)
            simulated = model(x).detach()
            pruner.unwrap_model()
            ModelSpeedup(model, x[:2], masks).speedup_model()
            torch.testing.assert_close(model(x), simulated, rtol=1e-4, atol=1e-4)
        assert lost[OBSPruner] < 0.8 * lost[L1NormPruner]

    def test_twins_are_not_both_free(self):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Identity(), nn.Linear(3, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0.3, 0]]))
            model[2].weight.fill_(1.0)
        config_list = [{"op_names": ["0"], "sparse_ratio": 0.67}]
        pruner, masks = pruned(OBSPruner, model, config_list, torch.randn(64, 3), example_inputs=torch.randn(2, 3))
        gone = (~masks["0"]["weight"]).any(1).nonzero().flatten().tolist()
        assert len(gone) == 2
        assert 2 in gone  # one of the twins takes over for the other
        assert float(model[2].weight.detach().sum()) == pytest.approx(2.0, rel=0.05)
        pruner.unwrap_model()

    def test_heads_leave_whole(self):
        model = randomize(Attention(), 0)
        x = torch.randn(16, 5, 12) @ torch.randn(12, 12)
        config_list = [{"op_names": ["q", "k", "v"], "sparse_ratio": 0.5}]
        before = copy.deepcopy(model)
        pruner, masks = pruned(OBSPruner, model, config_list, x, example_inputs=x[:2])
        heads = masks["v"]["bias"].view(4, 3)
        assert heads.any(1).sum() == heads.all(1).sum() == 2
        assert all(torch.equal(masks[name]["bias"], masks["v"]["bias"]) for name in "qk")
        ours = error(model, before, x)
        pruner.unwrap_model()
        norms = copy.deepcopy(before)
        pruner, _ = pruned(L1NormPruner, norms, config_list, x, example_inputs=x[:2])
        assert ours < error(norms, before, x)
        pruner.unwrap_model()


class Attention(nn.Module):
    """Four heads of three."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TestRefusals:
    @pytest.mark.parametrize(
        ("pruner", "settings", "error", "words"),
        [
            (
                WandaPruner,
                {"granularity": "out_channel", "sparse_ratio": 0.5},
                ConflictError,
                "OBSPruner prunes channels",
            ),
            (WandaPruner, {"global_group_id": "a", "sparse_ratio": 0.5}, ConflictError, "one layer after another"),
            (SparseGPTPruner, {"sparse_threshold": 0.5}, ConflictError, "Give sparse_ratio or sparse_pattern"),
            (SparseGPTPruner, {"sparse_ratio": 0.5, "granularity": [4, 4]}, ConflictError, "single weights"),
            (SparseGPTPruner, {"sparse_pattern": "2:5"}, InvalidValueError, "cannot be cut into parts of 5"),
        ],
    )
    def test_settings(self, pruner, settings, error, words):
        with pytest.raises(error, match=words):
            pruner(mlp(), [{"op_names": ["0"], **settings}], calibration=BATCHES, example_inputs=X[:2])

    @pytest.mark.parametrize("pruner", [WandaPruner, SparseGPTPruner])
    def test_a_module_that_is_no_matrix_product(self, pruner):
        with pytest.raises(InvalidValueError, match="BatchNorm1d is no matrix product"):
            pruner(nn.BatchNorm1d(4), [{"op_types": ["BatchNorm1d"], "sparse_ratio": 0.5}], calibration=BATCHES)

    def test_a_weight_of_a_recurrent_layer(self):
        config_list = [{"op_types": ["GRU"], "target_names": ["weight_ih_l0"], "sparse_ratio": 0.5}]
        with pytest.raises(ConflictError, match="prunes weights by the inputs"):
            WandaPruner(nn.GRU(12, 4), config_list, calibration=BATCHES)

    @pytest.mark.parametrize("pruner", [WandaPruner, SparseGPTPruner, OBSPruner])
    @pytest.mark.parametrize("calibration", [[], None])
    def test_no_data(self, pruner, calibration):
        with pytest.raises(InvalidValueError, match="calibration: there is no calibration batch"):
            pruner(mlp(), LINEAR, calibration=calibration, example_inputs=X[:2])

    @pytest.mark.parametrize("pruner", [WandaPruner, SparseGPTPruner])
    def test_all_of_a_layer(self, pruner):
        model = mlp()
        made = pruner(model, [{"op_names": ["0"], "sparse_ratio": 1}], calibration=BATCHES)
        with pytest.raises(EmptyLayerError, match=r"0\.weight: sparse_ratio 1 would remove all"):
            made.compress()
        made.unwrap_model()

    def test_channels_without_example_inputs(self):
        with pytest.raises(ConfigError, match="example_inputs: what reads a channel"):
            OBSPruner(mlp(), LINEAR, calibration=BATCHES)

    def test_channels_that_nothing_reads_by_a_matrix(self):
        class Read(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(12, 8), nn.GRU(8, 4, batch_first=True)

            def forward(self, x):
                return self.second(self.first(x))[0]

        model = Read()
        x = torch.randn(4, 3, 12)
        pruner = OBSPruner(model, [{"op_names": ["first"], "sparse_ratio": 0.5}], calibration=[x], example_inputs=x)
        with pytest.raises(ConflictError, match=r"first\.weight: no linear layer or plain convolution reads"):
            pruner.compress()
        pruner.unwrap_model()


class TestErrorsInBetween:
    """The second of two layers cannot be pruned."""

    @pytest.mark.parametrize("pruner_class", [WandaPruner, SparseGPTPruner])
    def test_the_masks_are_those_from_before(self, pruner_class, monkeypatch):
        model, mask = mlp(), torch.ones(16, 12, dtype=torch.bool)
        mask[:, 3] = False
        pruner = pruner_class(model, LINEAR, calibration=BATCHES)
        pruner.update_masks({"0": {"weight": mask}})
        choose = pruner.choose

        def choose_or_fail(target, *args):
            if target.name == "2.weight":
                raise NumericalError("singular", where="2.weight")
            return choose(target, *args)

        monkeypatch.setattr(pruner, "choose", choose_or_fail)
        with pytest.raises(NumericalError):
            pruner.compress()
        for masks in (pruner.get_masks(), pruner.get_masks(completed=True)):
            assert list(masks) == ["0"]
            assert torch.equal(masks["0"]["weight"], mask)
        pruner.unwrap_model()

    def test_readers_are_fitted_all_or_none(self, monkeypatch):
        model, calls = mlp(), []
        before = copy.deepcopy(model.state_dict())

        def fit_or_fail(*args, **kwargs):
            calls.append(kwargs["where"])
            if len(calls) == 2:
                raise NumericalError("singular", where=calls[-1])
            return reconstruct(*args, **kwargs)

        monkeypatch.setattr("tersor.pruning.obs.reconstruct", fit_or_fail)
        pruner = OBSPruner(model, TestOBS.CONFIG, calibration=BATCHES, example_inputs=X[:2])
        with pytest.raises(NumericalError):
            pruner.compress()
        assert calls == ["2", "4"]
        assert pruner.get_masks() == {}
        assert pruner._moments == {}
        pruner.unwrap_model()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    def test_pruning_again_by_as_much_changes_nothing(self):
        """What is gone carries nothing, costs nothing, and leaves first."""
        model = mlp()
        pruner, masks = pruned(OBSPruner, model, TestOBS.CONFIG, X, example_inputs=X[:2])
        outputs = model(X).detach()
        assert all(torch.equal(own["weight"], masks[name]["weight"]) for name, own in pruner.generate_masks().items())
        torch.testing.assert_close(model(X).detach(), outputs, rtol=1e-4, atol=1e-4)
        pruner.unwrap_model()
