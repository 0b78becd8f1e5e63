"""Network slimming: factors and their steps against the formulas in float64, what is folded, what leaves."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.pruning import AGPPruner, L1NormPruner
from tersor.pruning.slim import Factor, SlimPruner
from tersor.speedup import ModelSpeedup
from tersor.targets.granularity import Blocks
from tersor.training import TorchEvaluator
from tests.networks import IMAGE, Plain, randomize
from tests.test_compressor import MidRise, ToyQuantizer

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
ROWS = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
NORMS = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
CONVS = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]


def train(model, pruner, optimizer, steps, x=X):
    for _ in range(steps):
        optimizer.zero_grad()
        pruner.loss(model(x).square().mean()).backward()
        pruner.before_step()
        optimizer.step()
        pruner.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def evaluator_of(model):
    def training_func(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
        while True:
            optimizer.zero_grad()
            training_step(X, model).backward()
            optimizer.step()

    return TorchEvaluator(
        training_func, sgd(model), lambda batch, model: model(batch).square().mean(), dummy_input=X, progress=False
    )


def test_steps_of_factors_and_weights_follow_the_formulas():
    """Three steps of a 3x4 layer by hand: L = mean((f W x)^2) + 0.7 mean|f|, gradient descent on W, Adam on f."""
    layer = randomize(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight, inputs = layer.weight.detach().numpy().copy(), x.numpy()
    factor, mean, square = np.ones((3, 1)), np.zeros((3, 1)), np.zeros((3, 1))
    pruner = SlimPruner(layer, ROWS, None, 3, 0.7)
    pruner.start()
    train(layer, pruner, torch.optim.SGD(layer.parameters(), lr=0.05), 3, x)
    for step in (1, 2, 3):
        gradient = 2 / 15 * (inputs @ (factor * weight).T).T @ inputs
        of_factor = (gradient * weight).sum(1, keepdims=True) + 0.7 / 3 * np.sign(factor)
        weight = weight - 0.05 * gradient * factor
        mean, square = 0.9 * mean + 0.1 * of_factor, 0.999 * square + 0.001 * of_factor**2
        factor = factor - 0.01 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    (seen,) = pruner.collect().values()
    np.testing.assert_allclose(seen.numpy(), factor, rtol=1e-12)
    kept = pruner.get_masks()[""]["weight"][:, :1]
    assert (~kept).flatten().tolist() == [int(row) == np.abs(factor).argmin() for row in range(3)]
    pruner.unwrap_model()
    np.testing.assert_allclose(layer.weight.detach().numpy(), factor * weight, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_folding_is_exact(dtype):
    latent = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    factor = Factor(Blocks((4, 6), (2, 3)), latent)
    factor.factor.value.copy_(torch.tensor([[0.3, -1.7], [2.1, 0.0]]))
    scaled = factor(latent)
    assert torch.equal(scaled[2:, :3], latent[2:, :3] * torch.tensor(2.1).to(dtype))
    factor.fold(latent)
    assert torch.equal(latent, scaled)
    assert torch.equal(factor(latent), scaled)


@pytest.mark.parametrize("bake", [False, True])
def test_unwrapping_folds_the_factors_in(bake):
    model = randomize(Plain())
    pruner = SlimPruner(model, CONVS, None, 4, example_inputs=X)
    pruner.start()
    train(model, pruner, sgd(model), 6)
    masks = pruner.get_masks(completed=True)
    scaled = {name: module.weight.detach().clone() for name, module in model.named_children() if name in "03"}
    masked = model(X)
    learned = {name: factor.flatten() for name, factor in pruner.collect().items()}
    assert [name for name, factor in learned.items() if (factor != 1).all()] == ["0.weight", "3.weight"]
    pruner.unwrap_model(bake=bake)
    for name, weight in scaled.items():
        mask = masks[name]["weight"]
        assert torch.equal(model.get_submodule(name).weight * mask, weight)
        assert bake == (not model.get_submodule(name).weight[~mask].any())
    pruner.wrap_model()
    assert torch.equal(model(X), masked)
    pruner.unwrap_model()
    small = ModelSpeedup(model, X, pruner.get_masks()).speedup_model()
    assert (len(small[0].weight), len(small[3].weight)) == (4, 3)
    torch.testing.assert_close(small(X), masked)


def test_the_scale_of_a_norm_is_its_own_factor():
    """Slimming as published: the gammas alone are targets, and the channels leave the convolutions around."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)))
    size = sum(parameter.numel() for parameter in model.parameters())
    gamma = model[1].weight
    pruner = SlimPruner(model, NORMS, None, 3, 0.5, example_inputs=X)
    pruner.start()
    assert not any("scale" in name for name, _ in model.named_modules())
    loss = pruner.loss(torch.zeros(()))
    assert loss.item() == pytest.approx(0.5 * gamma.abs().mean().item())
    train(model, pruner, sgd(model), 3)
    lowest = set(gamma.detach().abs().argsort()[:4].tolist())
    masks, masked = pruner.get_masks(), model(X)
    assert set(masks) == {"0", "1"}
    for mask in (masks["1"]["weight"], masks["1"]["bias"], masks["0"]["weight"].any((1, 2, 3))):
        assert set((~mask).nonzero().flatten().tolist()) == lowest
    pruner.unwrap_model()
    small = ModelSpeedup(model, X, masks).speedup_model()
    assert [tuple(small[at].weight.shape[:2]) for at in (0, 3)] == [(4, 3), (5, 4)]
    assert sum(parameter.numel() for parameter in small.parameters()) == size - 4 * 27 - 4 - 8 - 4 * 45
    torch.testing.assert_close(small(X), masked)


def test_a_channel_that_another_target_keeps_stays():
    """Half of the gammas are masked and half of the rows; only channels that neither keeps leave."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3)))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 9)[:, None, None, None].expand(8, 3, 3, 3))
        model[1].weight.copy_(torch.tensor([1.0, 1, 2, 2, 1, 1, 2, 2]))
    pruner = L1NormPruner(model, [{"op_names": ["0", "1"], "sparse_ratio": 0.5}], example_inputs=X)
    _, masks = pruner.compress()
    removed = {
        name: (~own["weight"].flatten(1).any(1)) if name == "0" else ~own["weight"] for name, own in masks.items()
    }
    pruner.unwrap_model()
    assert removed["0"].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert removed["1"].nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert len(ModelSpeedup(model, X, masks).speedup_model()[0].weight) == 4


@pytest.mark.parametrize("restores", [False, True])
def test_with_an_evaluator(restores):
    model = randomize(Plain())
    before, evaluator = copy.deepcopy(model.state_dict()), evaluator_of(model)
    pruner = SlimPruner(model, CONVS, evaluator, 5, restores=restores)
    _, masks = pruner.compress()
    factors = pruner.collect()
    for name in ("0", "3"):
        magnitudes, mask = factors[f"{name}.weight"].abs().flatten(), masks[name]["weight"].any((1, 2, 3))
        assert int(mask.sum()) == len(mask) // 2
        assert magnitudes[mask].min() > magnitudes[~mask].max()
    pruner.unwrap_model()
    same = [torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()]
    assert all(same) if restores else not any(same[:2])


def test_it_goes_on_after_a_crash():
    def made():
        model = randomize(Plain())
        return model, sgd(model), SlimPruner(model, [*CONVS, *NORMS], None, 6, example_inputs=X)

    for crash in (3, 7):
        model, optimizer, pruner = made()
        pruner.start()
        train(model, pruner, optimizer, crash)
        saved = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
        train(model, pruner, optimizer, 8 - crash)
        resumed, its_optimizer, other = made()
        for part, state in zip((other, resumed, its_optimizer), saved, strict=True):
            part.load_state_dict(state)
        train(resumed, other, its_optimizer, 8 - crash)
        one, two = pruner.get_masks(completed=True), other.get_masks(completed=True)
        assert {n: set(o) for n, o in one.items()} == {n: set(o) for n, o in two.items()}
        assert all(torch.equal(mask, two[name][target]) for name, own in one.items() for target, mask in own.items())
        assert torch.equal(resumed(X), model(X))
        pruner.unwrap_model()
        other.unwrap_model()


@pytest.mark.parametrize("speedup", [None, ModelSpeedup])
def test_under_a_schedule_each_round_learns_anew(speedup):
    model = randomize(Plain())
    pruner = AGPPruner(
        SlimPruner(model, CONVS, evaluator_of(model), 3, example_inputs=X), total_times=2, speedup=speedup
    )
    result, masks = pruner.compress(max_steps=2)
    pruner.unwrap_model()
    if speedup is None:
        assert {name: int(own["bias"].sum()) for name, own in masks.items()} == {"0": 4, "3": 3}
        result = ModelSpeedup(result, X, masks).speedup_model()
    assert (len(result[0].weight), len(result[3].weight)) == (4, 3)


def test_scaled_then_quantized_then_masked_beside_another_pruner():
    model = randomize(Plain())
    slim = SlimPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], None, 3, example_inputs=X)
    quantizer = ToyQuantizer.from_compressor(slim, [{"op_names": ["0"], "target_names": ["weight"]}])
    norm = L1NormPruner.from_compressor(slim, [{"op_names": ["3"], "sparse_ratio": 0.5}])
    quantizer.start()
    assert set(slim.get_masks()) == {"3"}
    train(model, quantizer, sgd(model), 4)
    masks, expected = norm.get_masks(), model(X)
    assert {name: int(own["bias"].sum()) for name, own in masks.items()} == {"0": 4, "3": 3}
    latent = model[0].parametrizations.weight.original.detach()
    factor = slim.collect()["0.weight"]
    assert torch.equal(model[0].weight, MidRise()(latent * factor) * masks["0"]["weight"])
    slim.unwrap_model()
    slim.wrap_model()
    assert torch.equal(model(X), expected)
    slim.unwrap_model()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_a_tied_weight_has_one_factor():
    model, x = randomize(Tied()), torch.randn(3, 4)
    with pytest.raises(ConflictError, match=r"b\.weight: is the tensor of a\.weight as well"):
        SlimPruner(model, ROWS, None, 2)
    pruner = SlimPruner(model, [{"op_names": ["a"], "sparse_ratio": 0.25}], None, 2)
    pruner.start()
    train(model, pruner, sgd(model), 2, x)
    expected, mask = model.b.weight, pruner.get_masks()["a"]["weight"]
    assert torch.equal(model.a.weight, expected)
    pruner.unwrap_model()
    assert torch.equal(model.b.weight * mask, expected)


class TestRefusals:
    @pytest.mark.parametrize("target", ["_input_0", "_output_0"])
    def test_inputs_and_outputs(self, target):
        config_list = [{"op_names": ["3"], "target_names": [target], "sparse_ratio": 0.5}]
        with pytest.raises(ConflictError, match=rf"3\.{target}: .* no parameter.* Prune the weight"):
            SlimPruner(randomize(Plain()), config_list, None, 2, example_inputs=X)

    def test_a_weight_behind_another_parametrization(self):
        layer = parametrizations.spectral_norm(nn.Linear(4, 4))
        with pytest.raises(ConflictError, match=r"weight: .*another parametrization.* Remove that"):
            SlimPruner(layer, ROWS, None, 2)
        nn.utils.parametrize.remove_parametrizations(layer, "weight")

    def test_masks_before_anything_was_learned(self):
        pruner = SlimPruner(randomize(Plain()), CONVS, None, 2)
        with pytest.raises(TrainingError, match="not been learned"):
            pruner.generate_masks()
        pruner.unwrap_model()

    def test_the_scale_of_a_norm_that_is_not_trained(self):
        model = randomize(Plain())
        model[1].weight.requires_grad_(False)
        pruner = SlimPruner(model, NORMS, None, 2)
        with pytest.raises(TrainingError, match=r"1\.weight: .*not trained"):
            pruner.start()
        pruner.unwrap_model()

    @pytest.mark.parametrize(
        ("arguments", "where"),
        [
            ({"training_steps": 0}, "training_steps"),
            ({"regular_scale": -1}, "regular_scale: -1"),
            ({"learning_rate": "fast"}, "learning_rate: 'fast'"),
        ],
    )
    def test_numbers_out_of_range(self, arguments, where):
        with pytest.raises(InvalidValueError, match=where):
            SlimPruner(Plain(), CONVS, **arguments)
