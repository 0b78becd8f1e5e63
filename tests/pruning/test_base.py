"""What a pruner's masks do: they are simulated, completed, exchanged, made small and taken away again."""

import copy

import pytest
import torch
from torch import nn

import tersor
from tersor.errors import CheckpointError, EmptyLayerError, MaskError
from tersor.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LevelPruner
from tersor.speedup import ModelSpeedup
from tests.networks import IMAGE, IMAGE_NETWORKS, Plain, Residual, Tokens, randomize


def half(network):
    types = (
        ["Embedding", "Linear"] if network is Tokens else ["_ConvNd", *(["Linear"] if hasattr(network(), "fc") else [])]
    )
    return [{"op_types": types, "sparse_ratio": 0.5}]


def example(network, batch=2):
    generator = torch.Generator().manual_seed(batch)
    if network is Tokens:
        return torch.randint(0, 11, (batch, 4), generator=generator)
    return torch.randn(batch, *IMAGE[1:], generator=generator).double()


@pytest.mark.parametrize(
    ("pruner_class", "grouped"),
    [(L1NormPruner, False), (L1NormPruner, True), (L2NormPruner, True), (FPGMPruner, True), (LevelPruner, False)],
)
@pytest.mark.parametrize("network", [*IMAGE_NETWORKS, Tokens])
def test_the_masked_model_computes_what_the_small_one_does(network, pruner_class, grouped):
    model, x, fresh = randomize(network()).double(), example(network), example(network, batch=5)
    before = sum(parameter.numel() for parameter in model.parameters())
    config_list = half(network)
    if grouped:
        config_list = tersor.auto_set_dependency_group_ids(model, config_list, x)
    pruner = pruner_class(model, config_list, example_inputs=x)
    _, masks = pruner.compress()
    with torch.no_grad():
        masked = model(fresh)
    for target in pruner.sparsity():
        assert target.reason or target.removed == int(target.blocks * 0.5)
    pruner.unwrap_model()
    small = ModelSpeedup(model, x, masks).speedup_model()
    with torch.no_grad():
        torch.testing.assert_close(small(fresh), masked, rtol=1e-9, atol=1e-12)
    if grouped:
        assert sum(parameter.numel() for parameter in small.parameters()) < 0.75 * before


def test_completed_masks_reach_bias_norm_and_consumer():
    model = randomize(Residual())
    pruner = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.3}], example_inputs=torch.randn(IMAGE))
    _, masks = pruner.compress()
    completed = pruner.get_masks(completed=True)
    pruner.unwrap_model()
    kept = masks["conv1"]["weight"].any((1, 2, 3))
    assert int(kept.sum()) == 7
    assert {name: set(targets) for name, targets in masks.items()} == {"conv1": {"weight", "bias"}}
    assert set(completed) == {"conv1", "bn1", "conv2"}
    assert torch.equal(completed["conv1"]["bias"], kept)
    assert torch.equal(completed["bn1"]["weight"], kept)
    assert torch.equal(completed["conv2"]["weight"], kept[None, :, None, None].expand(8, 10, 3, 3))


def test_without_example_inputs_only_the_targets_are_masked():
    model = randomize(Residual())
    pruner = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.3}])
    pruner.compress()
    assert set(pruner.get_masks(completed=True)) == {"conv1"}
    pruner.unwrap_model()


def bits(model):
    return [(name, tensor.clone()) for name, tensor in model.state_dict().items()]


def same(before, after):
    assert [name for name, _ in before] == [name for name, _ in after]
    return all(torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))


@pytest.mark.parametrize("network", [*IMAGE_NETWORKS, Tokens])
def test_unwrapping_leaves_the_model_as_it_was(network):
    model, x = randomize(network()), example(network)
    x = x.float() if x.is_floating_point() else x
    before, expected, types = bits(model), model(x), [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    pruner = L1NormPruner(model, half(network), example_inputs=x)
    for _ in range(2):
        pruner.compress()
        assert not torch.equal(model(x), expected)
        pruner.unwrap_model()
        assert same(before, bits(model))
        assert torch.equal(model(x), expected)
        assert [type(module) for module in model.modules()] == types
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    pruner.wrap_model()
    assert not torch.equal(model(x), expected)
    pruner.unwrap_model()


def test_baking_writes_the_completed_masks_and_nothing_else():
    model, x = randomize(Residual()), torch.randn(IMAGE)
    latent = dict(bits(model))
    pruner = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], example_inputs=x)
    pruner.compress()
    masked, completed = model(x), pruner.get_masks(completed=True)
    pruner.unwrap_model(bake=True)
    assert torch.equal(model(x), masked)
    for name, tensor in model.state_dict().items():
        module, _, target = name.rpartition(".")
        mask = completed.get(module, {}).get(target, torch.tensor(True))
        assert torch.equal(tensor, latent[name] * mask)


@pytest.mark.parametrize("form", ["dict", "float", "file"])
@pytest.mark.parametrize("pruner_class", [L1NormPruner, LevelPruner])
def test_masks_go_round(form, pruner_class, tmp_path):
    x, config_list = torch.randn(IMAGE), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    first, second = randomize(Plain()), randomize(Plain(), seed=1)
    source = pruner_class(first, config_list, example_inputs=x)
    _, masks = source.compress()
    source.unwrap_model()
    sink = pruner_class(second, config_list, example_inputs=x)
    if form == "file":
        sink.update_masks(tersor.save_masks(masks, tmp_path / "masks.safetensors"))
    elif form == "float":
        sink.update_masks({name: {key: mask.float() for key, mask in own.items()} for name, own in masks.items()})
    else:
        sink.update_masks(masks)
    for completed in (False, True):
        one, other = source.get_masks(completed=completed), sink.get_masks(completed=completed)
        assert one.keys() == other.keys()
        for name, own in one.items():
            assert own.keys() == other[name].keys()
            assert all(torch.equal(mask, other[name][target]) for target, mask in own.items())
    assert not second[0].weight[~masks["0"]["weight"]].any()
    sink.unwrap_model()


@pytest.mark.parametrize(
    ("masks", "error", "words"),
    [
        ({"stem": {"weight": torch.ones(8, 3, 3, 3)}}, MaskError, "'stem'"),
        ({"0": {"wieght": torch.ones(8, 3, 3, 3)}}, MaskError, "Did you mean 'weight'"),
        ({"0": {"weight": torch.ones(8, 3, 3, 2)}}, MaskError, r"\(8, 3, 3, 2\).*\(8, 3, 3, 3\)"),
        ({"0": {"weight": torch.full((8, 3, 3, 3), 0.5)}}, MaskError, "0 .removes. and 1 .keeps."),
        ({"0": {"weight": torch.zeros(8, 3, 3, 3)}}, EmptyLayerError, "all 8"),
        ("no/such.safetensors", CheckpointError, "no such file"),
    ],
)
def test_wrong_masks_change_nothing(masks, error, words):
    model, x = randomize(Plain()), torch.randn(IMAGE)
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=x)
    pruner.compress()
    before, expected = pruner.get_masks()["0"]["weight"], model(x)
    with pytest.raises(error, match=words):
        pruner.update_masks(masks)
    assert torch.equal(pruner.get_masks()["0"]["weight"], before)
    assert torch.equal(model(x), expected)
    pruner.unwrap_model()


def test_fused_pruners_keep_each_others_masks():
    model, x = randomize(Residual()), torch.randn(IMAGE)
    first = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}], example_inputs=x)
    second = LevelPruner.from_compressor(first, [{"op_names": ["fc"], "sparse_ratio": 0.25}])
    _, masks = first.compress()
    assert set(masks) == {"conv1", "fc"}
    other = torch.ones(10, 1, 1, 1, dtype=torch.bool)
    other[3] = False
    first.update_masks({"conv1": {"weight": other}})
    assert set(second.get_masks()) == {"conv1", "fc"}
    assert (model.conv1.weight == 0).all((1, 2, 3)).nonzero().tolist() == [[3]]
    assert int((model.fc.weight == 0).sum()) == 12
    first.unwrap_model()


class Shared(nn.Module):
    """Three of the eight channels of ``a`` are added to an output of the model, and so cannot leave."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.u = nn.Linear(4, 3)
        self.v = nn.Linear(4, 5)
        self.b = nn.Linear(8, 3)

    def forward(self, x):
        u = self.u(x)
        return u, self.b(torch.relu(self.a(x) + torch.cat([u, self.v(x)], 1)))


def test_blocks_that_cannot_leave_are_never_masked():
    model, x = randomize(Shared()), torch.randn(2, 4)
    with torch.no_grad():
        model.a.weight[:3] = 0.001
    pruner = L1NormPruner(model, [{"op_names": ["a"], "sparse_ratio": 0.75}], example_inputs=x)
    row = pruner.plan.rows[0]
    assert (row.removes, row.reason) == (3, "3 blocks stay: one is the model's own output")
    _, masks = pruner.compress()
    lives = masks["a"]["weight"].any(1)
    assert (lives[:3].all(), int(lives.sum())) == (True, 5)  # three of the five that can leave
    (sparsity,) = pruner.sparsity()
    assert (sparsity.asked, sparsity.removed, sparsity.reason) == (0.75, 3, row.reason)
    pruner.unwrap_model()


def test_sparsity_counts_blocks_and_elements():
    model = randomize(Residual())
    config_list = [{"op_names": ["conv1", "conv2"], "sparse_ratio": 0.5}, {"op_names": ["fc"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, config_list, example_inputs=torch.randn(IMAGE))
    assert [target.removed for target in pruner.sparsity()] == [0, 0, 0]
    pruner.compress()
    conv1, conv2, fc = pruner.sparsity()
    pruner.unwrap_model()
    assert (conv1.target, conv1.asked, conv1.blocks, conv1.removed) == ("conv1.weight", 0.5, 10, 5)
    assert (conv1.elements, conv1.reason) == (0.5, "")
    assert (conv2.blocks, conv2.removed, conv2.elements) == (8, 4, 0.75)  # half of its rows, half of what they read
    assert (fc.removed, fc.elements, fc.reason) == (0, 0.0, "is the model's own output")


def test_sparsity_is_known_also_when_the_model_has_become_small():
    model, x = randomize(Plain()), torch.randn(IMAGE)
    pruner = L1NormPruner(model, [{"op_names": ["0", "3"], "sparse_ratio": 0.5}], example_inputs=x)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    before = pruner.sparsity()
    ModelSpeedup(model, x, masks).speedup_model()
    assert pruner.sparsity() == before
    assert [target.removed for target in before] == [4, 3]
    with pytest.raises(MaskError, match=r"\(8, 1, 1, 1\) does not fit .*\(4, 3, 3, 3\).*made small"):
        pruner.get_masks()


def test_masks_of_a_deep_copy_are_its_own():
    model, x = randomize(Plain()), torch.randn(IMAGE)
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=x)
    pruner.compress()
    twin = copy.deepcopy(model)
    expected = twin(x)
    pruner.update_masks({"0": {"weight": torch.ones(8, 1, 1, 1)}})
    assert torch.equal(twin(x), expected)
    assert not torch.equal(model(x), expected)
    pruner.unwrap_model()
