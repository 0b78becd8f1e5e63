"""Movement pruning: gradients and steps of scores against the paper's formulas in float64, and its schedule."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.pruning import L1NormPruner
from tersor.pruning.movement import MovementMask, MovementPruner
from tersor.speedup import ModelSpeedup
from tersor.targets.granularity import Blocks
from tersor.training import TorchEvaluator
from tests.networks import IMAGE, Plain, Residual, randomize
from tests.pruning.test_choices import HEADS, SIZE, WIDTH, Fused, Grouped
from tests.pruning.test_choices import X as TOKENS
from tests.test_compressor import MidRise, ToyQuantizer

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
CONVS = [{"op_names": ["0", "3"], "sparse_ratio": 0.5}]


def train(model, pruner, optimizer, steps, x=X):
    for _ in range(steps):
        optimizer.zero_grad()
        pruner.loss(model(x).square().mean()).backward()
        pruner.before_step()
        optimizer.step()
        pruner.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


def trained(model, config_list, steps=8, x=X, **arguments):
    pruner = MovementPruner(model, config_list, None, 2, 6, **arguments)
    pruner.start()
    train(model, pruner, sgd(model), steps, x)
    pruner.finish()
    return pruner


def gradients(model, pruner):
    """Of the loss by the scores of the only target."""
    pruner.loss(model(X).square().mean()).backward()
    (learned,) = pruner._learner.learned.values()
    gradient, learned.value.grad = learned.value.grad, None
    return gradient.flatten()


def scores_of(pruner):
    return pruner.own_state()["learner"]["values"]


@pytest.mark.parametrize("block", [(1, 4), (1, 1), (3, 2)])
def test_the_gradient_goes_straight_through(block):
    """dL/dS_b is the sum of dL/dW' * W over the block, masked or not, and dL/dW is dL/dW' * M."""
    blocks = Blocks((3, 4), block)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    keep = torch.arange(blocks.count).view(blocks.grid) % 2 == 0
    mask = MovementMask("fc.weight", blocks, weight)
    mask.set([blocks.expand(keep)])
    mask.scores.value.requires_grad_()
    masked = mask(weight)
    (x @ masked.T).square().sum().backward()
    kept = np.kron(keep.numpy(), np.ones(block))
    w, inputs = weight.detach().numpy(), x.numpy()
    gradient = 2 * (inputs @ (w * kept).T).T @ inputs
    expected = (gradient * w).reshape(3 // block[0], block[0], 4 // block[1], block[1]).sum((1, 3))
    assert torch.equal(masked, weight * torch.from_numpy(kept))
    np.testing.assert_allclose(mask.scores.value.grad.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(weight.grad.numpy(), gradient * kept, rtol=1e-12)
    with torch.no_grad():
        assert torch.equal(mask(weight), masked)


def test_every_step_follows_the_formulas():
    """Seven steps of a 3x4 layer by hand: descent on W, Adam on S, and the two lowest of four columns leave."""
    layer = randomize(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight, inputs = layer.weight.detach().numpy().copy(), x.numpy()
    score, mean, square, mask = (np.full((1, 4), start) for start in (0.0, 0.0, 0.0, 1.0))
    config_list = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    pruner = MovementPruner(layer, config_list, None, 2, 6)
    optimizer = sgd(layer)
    pruner.start()
    removed = []
    for step in range(1, 8):
        train(layer, pruner, optimizer, 1, x)
        gradient = 2 / 15 * (inputs @ (mask * weight).T).T @ inputs
        of_score = (gradient * weight).sum(0, keepdims=True)
        weight = weight - 0.05 * gradient * mask
        mean, square = 0.9 * mean + 0.1 * of_score, 0.999 * square + 0.001 * of_score**2
        score = score - 0.01 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        share = 1 - (1 - min(max((step - 2) / 4, 0), 1)) ** 3
        mask = np.ones((1, 4))
        mask[0, np.argsort(score[0])[: int(0.5 * share * 4 + 1e-6)]] = 0
        removed.append(int(4 - mask.sum()))
        np.testing.assert_allclose(scores_of(pruner)["weight"].numpy(), score, rtol=1e-9)
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight * mask, rtol=1e-9)
    assert removed == [0, 0, 1, 1, 1, 2, 2]
    pruner.unwrap_model()


def test_only_the_targets_are_masked_until_the_cooldown():
    """A channel that nothing reads has no gradient: it could never come back."""
    model, x = randomize(Residual()), X
    pruner = MovementPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], None, 1, 4, example_inputs=x)
    optimizer = sgd(model)
    pruner.start()
    train(model, pruner, optimizer, 3)
    assert set(pruner.get_masks(completed=True)) == {"conv1"}
    gone = ~pruner.get_masks()["conv1"]["bias"]
    assert 0 < int(gone.sum()) < 5
    assert gradients(model, pruner)[gone].any()
    train(model, pruner, optimizer, 1)
    gone = ~pruner.get_masks()["conv1"]["bias"]
    assert not gradients(model, pruner)[gone].any()
    pruner.finish()
    assert set(pruner.get_masks(completed=True)) == {"conv1", "bn1", "conv2"}
    masked, masks = model(x), pruner.get_masks()
    pruner.unwrap_model()
    small = ModelSpeedup(model, x, masks).speedup_model()
    assert len(small.conv1.weight) == 5
    torch.testing.assert_close(small(x), masked)


def test_a_masked_block_comes_back():
    """The loss has use for the last three rows at first, and for the first one afterwards."""
    layer = randomize(nn.Linear(4, 4, bias=False))
    nn.init.ones_(layer.weight)
    pruner = MovementPruner(layer, [{"op_types": ["Linear"], "sparse_ratio": 0.25}], None, 0, 1)
    use = torch.tensor([[-1.0], [3.0], [2.0], [1.0]])
    pruner.start()
    lives = []
    for step in range(40):
        pruner.loss(-(layer.weight * use * (1 if step < 5 else -1)).sum()).backward()
        pruner.step()
        lives.append(pruner.get_masks()[""]["weight"][:, 0].tolist())
    pruner.unwrap_model()
    assert lives[4] == [False, True, True, True]
    assert lives[-1][0]
    assert sum(lives[-1]) == 3


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.99])
@pytest.mark.parametrize("granularity", ["default", [1, 1, 1, 1], "in_channel"])
def test_the_ratio_is_exact_and_the_run_repeatable(ratio, granularity):
    config_list = [{"op_names": ["3"], "sparse_ratio": ratio, "granularity": granularity}]
    masks = []
    for _ in range(2):
        pruner = trained(randomize(Plain()), config_list)
        masks.append(pruner.get_masks()["3"]["weight"])
        (sparsity,) = pruner.sparsity()
        pruner.unwrap_model()
    assert torch.equal(*masks)
    blocks = {"default": 6, "in_channel": 8}.get(str(granularity), 432)
    assert (sparsity.blocks, sparsity.removed) == (blocks, int(ratio * blocks + 1e-6))


def test_thresholds_and_their_penalty():
    """Soft movement pruning: the sigmoid of the score is compared with the threshold, and its mean is penalised."""
    model = randomize(Plain())
    config_list = [{"op_names": ["0"], "sparse_threshold": 0.5}, {"op_names": ["3"], "sparse_ratio": 0.5}]
    pruner = MovementPruner(model, config_list, None, 2, 6, regular_scale=3)
    optimizer = sgd(model)
    pruner.start()
    for step in range(9):
        share = 1 - (1 - min(max((step - 2) / 4, 0), 1)) ** 3
        mean = torch.special.expit(scores_of(pruner)["0.weight"].double()).mean().item()
        assert pruner.loss(torch.tensor(1.0)).item() == pytest.approx(1 + 3 * share * mean)
        train(model, pruner, optimizer, 1)
    pruner.finish()
    masks, scores = pruner.get_masks(), scores_of(pruner)
    pruner.unwrap_model()
    kept = masks["0"]["weight"].any((1, 2, 3))
    assert torch.equal(kept, scores["0.weight"].flatten() >= 0)
    assert 0 < int(kept.sum()) < 8
    assert int(masks["3"]["bias"].sum()) == 3


@pytest.mark.parametrize(("granularity", "graph"), [([SIZE, -1], True), ("out_channel", True), ([SIZE, -1], False)])
@pytest.mark.parametrize("network", [Fused, Grouped])
def test_whole_heads_leave(network, granularity, graph):
    model = randomize(network())
    names = ["qkv"] if network is Fused else ["q", "k", "v"]
    config_list = [{"op_names": names, "sparse_ratio": 0.5, "granularity": granularity}]
    if graph and network is Grouped:
        config_list[0]["dependency_group_id"] = "heads"
    pruner = trained(model, config_list, x=TOKENS, example_inputs=TOKENS if graph else None)
    masks, masked = pruner.get_masks(), model(TOKENS)
    pruner.unwrap_model()
    kept = torch.cat([masks[name]["weight"].any(1) for name in names]).view(3, HEADS, SIZE)
    assert torch.equal(kept.any(2), kept.all(2))
    if not graph:
        assert int(kept.sum()) == 3 * HEADS * SIZE // 2
        return
    assert kept[:, :, 0].sum(1).tolist() == [HEADS // 2] * 3
    assert torch.equal(kept[0], kept[1])
    small = ModelSpeedup(model, TOKENS, masks).speedup_model()
    assert small.proj.weight.shape == (WIDTH, HEADS * SIZE // 2)
    torch.testing.assert_close(small(TOKENS), masked)


def test_channels_of_an_output():
    """Of an output the score's gradient is the sum of dL/dX' * X over samples and places."""
    model = randomize(Plain())
    config_list = [{"op_names": ["3"], "target_names": ["_output_0"], "sparse_ratio": 0.5}]
    pruner = MovementPruner(model, config_list, None, 2, 6, example_inputs=X)
    pruner.start()
    passed = []
    handle = model[4].register_forward_hook(
        lambda module, args, output: passed.append((args[0].retain_grad(), args[0]))
    )
    found = gradients(model, pruner)
    handle.remove()
    ((_, out),) = passed
    expected = (out.grad.double() * out.detach().double()).sum((0, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)
    train(model, pruner, sgd(model), 7)
    pruner.finish()
    masks = pruner.get_masks()["3"]
    assert int(masks["_output_0"].sum()) == 3
    assert torch.equal(masks["weight"].any((1, 2, 3)), masks["_output_0"].flatten())
    pruner.unwrap_model()


def test_it_goes_on_after_a_crash():
    def made():
        model = randomize(Plain())
        return model, sgd(model), MovementPruner(model, CONVS, None, 2, 7, example_inputs=X)

    for crash in (1, 4, 8):
        model, optimizer, pruner = made()
        pruner.start()
        train(model, pruner, optimizer, crash)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
        train(model, pruner, optimizer, 10 - crash)
        resumed, its_optimizer, other = made()
        other.load_state_dict(saved[2])  # first: it makes places for the masks that the graph adds
        resumed.load_state_dict(saved[0])
        its_optimizer.load_state_dict(saved[1])
        train(resumed, other, its_optimizer, 10 - crash)
        one, two = pruner.get_masks(completed=True), other.get_masks(completed=True)
        assert {n: set(o) for n, o in one.items()} == {n: set(o) for n, o in two.items()}
        assert all(torch.equal(mask, two[name][target]) for name, own in one.items() for target, mask in own.items())
        assert all(torch.equal(own, scores_of(other)[name]) for name, own in scores_of(pruner).items())
        assert torch.equal(resumed(X), model(X))
        pruner.unwrap_model()
        other.unwrap_model()


def test_beside_a_quantizer_and_a_pruner_whose_masks_reach_it():
    model = randomize(Residual())
    norm = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], example_inputs=X)
    norm.generate_masks()
    read = model.conv2.weight.detach().clone()
    quantizer = ToyQuantizer.from_compressor(norm, [{"op_names": ["conv2"], "target_names": ["weight"]}])
    pruner = MovementPruner.from_compressor(norm, [{"op_names": ["conv2"], "sparse_ratio": 0.5}], 2, 6)
    quantizer.start()
    columns = norm.get_masks()["conv1"]["bias"]
    assert torch.equal(model.conv2.weight.detach(), MidRise()(read) * columns[None, :, None, None] * 1.0)
    train(model, quantizer, sgd(model), 7)
    quantizer.finish()
    masks = pruner.get_masks()
    assert {name: int(own["bias"].sum()) for name, own in masks.items()} == {"conv1": 5, "conv2": 4}
    latent = model.conv2.parametrizations.weight.original.detach()
    expected = MidRise()(latent) * masks["conv2"]["weight"] * columns[None, :, None, None]
    assert torch.equal(model.conv2.weight, expected)
    pruner.unwrap_model()


def test_nothing_is_masked_anew_where_nothing_changes(monkeypatch):
    model = randomize(Plain())
    pruner = MovementPruner(model, CONVS, None, 1, 4, example_inputs=X)
    pruner.start()
    replaced = []
    original = pruner.wrappers.replace_masks
    monkeypatch.setattr(pruner.wrappers, "replace_masks", lambda masks: (replaced.append(1), original(masks)))
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.0), 4)
    assert 1 <= len(replaced) <= 3
    replaced.clear()
    pruner._learner.learning_rate = 0.0
    pruner._learner.start()
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.0), 20)
    assert not replaced
    pruner.unwrap_model()


class TestRefusals:
    def evaluator(self, model):
        def training_func(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
            for _ in range(5 * (max_epochs or 100)):
                optimizer.zero_grad()
                training_step(X, model).backward()
                optimizer.step()

        step = lambda batch, model: model(batch).square().mean()  # noqa: E731
        return TorchEvaluator(training_func, sgd(model), step, dummy_input=X, progress=False)

    def test_a_training_that_is_too_short(self):
        model = randomize(Plain())
        pruner = MovementPruner(model, CONVS, self.evaluator(model), 2, 6)
        with pytest.raises(TrainingError, match="no length of training"):
            pruner.compress()
        before = model[0].parametrizations.weight.original.detach().clone()
        with pytest.raises(TrainingError, match=r"cooldown_begin_step: 5 steps .* less than 6"):
            pruner.compress(max_steps=5)
        assert torch.equal(model[0].parametrizations.weight.original, before)
        with pytest.raises(TrainingError, match=r"cooldown_begin_step: 5 steps .* less than 6"):
            pruner.compress(max_epochs=1)
        _, masks = pruner.compress(max_epochs=2)
        assert int(masks["0"]["bias"].sum()) == 4
        pruner.unwrap_model()

    def test_a_mask_that_is_added(self):
        with pytest.raises(ConflictError, match=r"\['apply_method'\] on 0\.weight: .*product.*'add'"):
            MovementPruner(Plain(), [{"op_names": ["0"], "sparse_ratio": 0.5, "apply_method": "add"}], None, 1, 2)

    def test_masks_before_anything_was_learned(self):
        pruner = MovementPruner(Plain(), CONVS, None, 1, 2)
        with pytest.raises(TrainingError, match="not been learned"):
            pruner.generate_masks()
        pruner.unwrap_model()

    @pytest.mark.parametrize(
        ("arguments", "where"),
        [((-1, 5), "warmup_step: -1"), ((5, 5), "cooldown_begin_step: 5"), ((1, 5, -1), "regul")],
    )
    def test_numbers_out_of_range(self, arguments, where):
        with pytest.raises(InvalidValueError, match=where):
            MovementPruner(Plain(), CONVS, None, *arguments)


def test_the_greatest_ratio_holds_from_the_first_step():
    """It is no part of the schedule: halfway, a global group may already take it all from one layer."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    asked = {"sparse_ratio": 0.5, "max_sparse_ratio": 0.5, "global_group_id": "all"}
    pruner = MovementPruner(model, [{"op_names": ["0", "2"], **asked}], None, 0, 10)
    target = pruner.plan.targets[0]
    pruner._steps = 5
    assert pruner._by_now(0.5, target, "max_sparse_ratio") == 0.5
    assert pruner._by_now(0.5, target) == 0.5 * (1 - 0.5**3)
    pruner.unwrap_model()
