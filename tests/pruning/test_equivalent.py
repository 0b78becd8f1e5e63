"""Pruned inputs and outputs: as if their channels were zero, in the small model too."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tersor
from tersor.errors import ConflictError, EmptyLayerError, MaskError
from tersor.pruning import L1NormPruner, L2NormPruner, LevelPruner
from tersor.speedup import ModelSpeedup
from tests.networks import Plain, Tokens, randomize
from tests.pruning.test_patterns import Conv1D


class Pair(nn.Module):
    """Two layers with a ReLU, which keeps zeros, between them."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def image(channels=4):
    return torch.randn(3, channels, 6, 6, dtype=torch.float64)


def tokens(width=8):
    return torch.randn(3, 5, width, dtype=torch.float64)


PAIRS = {
    "linear": (lambda: Pair(nn.Linear(8, 8), nn.Linear(8, 3)), lambda: torch.randn(3, 8, dtype=torch.float64), 1),
    "tokens": (lambda: Pair(nn.Linear(8, 8), nn.Linear(8, 3)), tokens, 2),
    "no bias": (lambda: Pair(nn.Linear(8, 8, bias=False), nn.Linear(8, 3, bias=False)), tokens, 2),
    "conv1d": (
        lambda: Pair(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 3, 2)),
        lambda: torch.randn(3, 8, 9, dtype=torch.float64),
        1,
    ),
    "conv2d": (lambda: Pair(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 3, 1)), image, 1),
    "grouped": (lambda: Pair(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 6, 1, groups=2)), image, 1),
    "depthwise": (lambda: Pair(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3, groups=8)), image, 1),
    "conv3d": (
        lambda: Pair(nn.Conv3d(2, 8, 2), nn.Conv3d(8, 3, 1)),
        lambda: torch.randn(2, 2, 3, 4, 5, dtype=torch.float64),
        1,
    ),
    "transposed": (lambda: Pair(nn.ConvTranspose2d(4, 8, 2), nn.ConvTranspose2d(8, 3, 1)), image, 1),
    "grouped transposed": (
        lambda: Pair(nn.ConvTranspose2d(4, 8, 2, groups=2), nn.ConvTranspose2d(8, 6, 1, groups=2)),
        image,
        1,
    ),
    "conv1d of transformers": (lambda: Pair(Conv1D(8, 8), Conv1D(3, 8)), tokens, 2),
}


def hooked(model, masks, x):
    """What a model computes with its inputs and outputs multiplied by masks, without any of our own hooks."""
    handles = []
    for name, targets in masks.items():
        for target, mask in targets.items():
            module = model.get_submodule(name)
            if target == "_output_0":
                handles.append(module.register_forward_hook(lambda *call, mask=mask: call[-1] * mask))
            elif target == "_input_0":
                handles.append(module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask, *args[1:])))
    with torch.no_grad():
        found = model(x)
    for handle in handles:
        handle.remove()
    return found


def passing(model, x, name, what):
    """What passes a module, in numpy."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, output: seen.append(args[0] if what == "_input_0" else output)
    )
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[-1].double().numpy()


def highest(scores, count):
    lives = np.zeros(len(scores), dtype=bool)
    lives[np.argsort(-scores, kind="stable")[:count]] = True
    return lives


def pruned(model, config_list, x, pruner_class=L1NormPruner):
    """Masks, what the masked model computes on fresh inputs, the small model, its report, and the inputs."""
    pruner = pruner_class(model, config_list, example_inputs=x)
    try:
        _, masks = pruner.compress()
        fresh = torch.randn(5, *x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            masked = model(fresh)
    finally:
        pruner.unwrap_model()
    expected = hooked(model, masks, fresh)
    speedup = ModelSpeedup(model, x, masks)
    return masks, masked, expected, speedup.speedup_model(), speedup.report, fresh


@pytest.mark.parametrize(("name", "target"), [("first", "_output_0"), ("second", "_input_0")])
@pytest.mark.parametrize("kind", PAIRS)
def test_masked_channels_are_zero_and_leave(kind, name, target):
    """The least by L1 norm over the batch are masked; that is what a hook computes, and what the small model does."""
    build, inputs, dim = PAIRS[kind]
    model, x = randomize(build()).double(), inputs()
    values = passing(model, x, name, target)
    scores = np.abs(np.moveaxis(values, dim, 0).reshape(8, -1)).sum(1)
    before = sum(parameter.numel() for parameter in model.parameters())
    config = {"op_names": [name], "target_names": [target], "sparse_ratio": 0.5}
    masks, masked, expected, small, _, fresh = pruned(model, [config], x)
    assert np.array_equal(masks[name][target].flatten().numpy(), highest(scores, 4))
    if kind not in ("grouped", "grouped transposed", "depthwise"):  # unequal groups stay, and a bias that is an output
        assert sum(parameter.numel() for parameter in small.parameters()) < 0.7 * before
    torch.testing.assert_close(masked, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(small(fresh), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("target", ["_input_0", "_output_0"])
@pytest.mark.parametrize("kind", PAIRS)
def test_masks_of_weights_alone_compute_the_same(kind, target):
    """The weight masks that come along say all: the mask of the input or output is not needed beside them."""
    build, inputs, _ = PAIRS[kind]
    model, x = randomize(build()).double(), inputs()
    pruner = L2NormPruner(
        model, [{"op_names": ["second"], "target_names": [target], "sparse_ratio": 0.4}], example_inputs=x
    )
    _, masks = pruner.compress()
    pruner.unwrap_model()
    expected = hooked(model, masks, x)
    weights = masks["second"]
    assert set(weights) == {target, "weight", *(["bias"] if target == "_output_0" and kind != "no bias" else [])}
    with torch.no_grad():
        for name, mask in weights.items():
            if not name.startswith("_"):
                getattr(model.second, name).mul_(mask)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def made_small(model, config, x):
    """The masks, and the difference of the masked and the small model from a model with hooks."""
    masks, masked, expected, small, report, fresh = pruned(model, [config], x)
    torch.testing.assert_close(masked, expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        return masks, float((small(fresh) - expected).abs().max()), report


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out, self.again = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.again.weight = self.out.weight

    def forward(self, x):
        return self.again(torch.relu(self.out(torch.relu(self.body(x)))))


def test_a_tied_weight_is_not_masked_for_one_of_its_users():
    """Rows of a weight that another layer reads too: masking them would change what that layer computes."""
    model, x = randomize(Tied()).double(), tokens()
    masks, _, _ = made_small(model, {"op_names": ["again"], "target_names": ["_output_0"], "sparse_ratio": 0.5}, x)
    assert list(masks["again"]) == ["_output_0"]


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_weight_that_is_computed_is_left_to_itself(norm):
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 3))).double(), tokens()
    norm(model.first)
    before = model(x).detach()
    pruner = L1NormPruner(
        model, [{"op_names": ["first"], "target_names": ["_output_0"], "sparse_ratio": 0.5}], example_inputs=x
    )
    _, masks = pruner.compress()
    assert list(masks["first"]) == ["_output_0"]
    with torch.no_grad():
        found = model(x)
    pruner.unwrap_model()
    torch.testing.assert_close(found, hooked(model, masks, x))
    torch.testing.assert_close(model(x), before)
    parametrize.remove_parametrizations(model.first, "weight")


def test_the_models_own_output_is_zero_there_and_keeps_its_shape():
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 6))).double(), tokens()
    config = {"op_names": ["second"], "target_names": ["_output_0"], "sparse_ratio": 0.5}
    masks, difference, report = made_small(model, config, x)
    assert difference < 1e-12
    assert int((~masks["second"]["_output_0"]).sum()) == 3
    assert [(item.count, item.reason) for item in report.left_alone if "weight" in item.target] == [
        (3, "is the model's own output")
    ]


def test_an_output_between_layers_is_masked_by_itself_and_said_to_be_lost():
    """A ReLU has no weight to mask. What is only simulated is reported when the model is made small."""
    model = randomize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))).double()
    x = tokens()
    config = {"op_names": ["1"], "target_names": ["_output_0"], "sparse_ratio": 0.25, "granularity": [1]}
    pruner = L1NormPruner(model, [config], example_inputs=x)
    _, masks = pruner.compress()
    with torch.no_grad():
        masked = model(x)
    pruner.unwrap_model()
    assert set(masks) == {"1"}
    assert masks["1"]["_output_0"].shape == (1, 5, 8)
    torch.testing.assert_close(masked, hooked(model, masks, x))


@pytest.mark.parametrize("method", ["add", "bypass"])
def test_other_ways_to_apply_a_mask_mask_no_weights(method):
    model, x = randomize(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1))).double(), tokens()
    plain = model(x).detach()
    values = passing(model, x, "0", "_output_0")
    config = {"op_names": ["0"], "target_names": ["_output_0"], "sparse_ratio": 0.5, "apply_method": method}
    pruner = L1NormPruner(model, [config], example_inputs=x)
    _, masks = pruner.compress()
    with torch.no_grad():
        found = model(x)
    again = pruner.generate_masks()
    pruner.unwrap_model()
    lives = highest(np.abs(values).sum((0, 1)), 4)
    assert set(masks["0"]) == {"_output_0"}
    assert np.array_equal(masks["0"]["_output_0"].flatten().numpy(), lives)
    assert torch.equal(again["0"]["_output_0"], masks["0"]["_output_0"])  # scored without the number that is added
    if method == "bypass":
        assert torch.equal(found, plain)
    else:
        exponentials = np.exp(values) * lives
        np.testing.assert_allclose(found.numpy(), exponentials / exponentials.sum(-1, keepdims=True), atol=1e-12)


def test_a_weight_and_its_layers_output_are_masked_both():
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 3))).double(), tokens()
    config_list = [
        {
            "op_names": ["first"],
            "target_names": ["weight", "_output_0"],
            "sparse_ratio": 0.25,
            "target_settings": {"weight": {"granularity": [1]}},
        }
    ]
    scores = np.abs(passing(model, x, "first", "_output_0")).sum((0, 1))
    weight = np.abs(model.first.weight.detach().numpy())
    masks, masked, expected, _, _, _ = pruned(model, config_list, x)
    rows = highest(scores, 6)
    elements = highest(weight.ravel(), 48).reshape(8, 8)
    assert np.array_equal(masks["first"]["weight"].numpy(), elements & rows[:, None])
    assert not torch.allclose(masked, expected)  # the hooks know nothing of the elements


def greedy(units, ratio):
    """The rule of global groups: the least blocks that fit, of each unit all but one."""
    budget = int(ratio * sum(len(scores) * weight for scores, weight in units) + 1e-6)
    gone = [set() for _ in units]
    for _, number, index in sorted((s, n, i) for n, (scores, _) in enumerate(units) for i, s in enumerate(scores)):
        weight = units[number][1]
        if weight <= budget and len(gone[number]) < len(units[number][0]) - 1:
            gone[number].add(index)
            budget -= weight
    return gone


def test_a_global_group_of_a_weight_and_an_output():
    """A filter weighs its elements, a channel of an output those of one sample."""
    model = randomize(Pair(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1))).double()
    x = image()
    filters = np.abs(model.first.weight.detach().numpy()).reshape(8, -1).sum(1)
    channels = np.abs(passing(model, x, "second", "_output_0")).sum((0, 2, 3)) / 10
    with torch.no_grad():
        model.second.weight.div_(10)
        model.second.bias.div_(10)
    config_list = [
        {"op_names": ["first"], "sparse_ratio": 0.5, "global_group_id": 1},
        {"op_names": ["second"], "target_names": ["_output_0"], "sparse_ratio": 0.5, "global_group_id": 1},
    ]
    pruner = L1NormPruner(model, config_list, example_inputs=x)
    _, masks = pruner.compress()
    sparsity = {item.target: item for item in pruner.sparsity()}
    pruner.unwrap_model()
    gone = greedy([(filters, 36), (channels, 16)], 0.5)
    assert set((~masks["first"]["weight"].any((1, 2, 3))).nonzero().flatten().tolist()) == gone[0]
    assert set((~masks["second"]["_output_0"].flatten()).nonzero().flatten().tolist()) == gone[1]
    assert sparsity["second._output_0"].removed == len(gone[1])


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"sparse_ratio": 0.5}, 4),
        ({"sparse_ratio": 0.75, "max_sparse_ratio": 0.3}, 2),
        ({"sparse_ratio": 0.1, "min_sparse_ratio": 0.4}, 3),
        ({"min_sparse_ratio": 0.4}, 3),
        ({"sparse_threshold": "third"}, 2),
        ({"sparse_threshold": "third", "max_sparse_ratio": 0.2}, 1),
        ({"sparse_ratio": 0.5, "internal_metric_block": 4}, 4),
        ({"sparse_ratio": 0.5, "balance_granularity": [-1, 4]}, 4),
    ],
)
@pytest.mark.parametrize("target", ["_input_0", "_output_0"])
def test_all_settings_hold_for_inputs_and_outputs(target, settings, count):
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 8))).double(), tokens()
    scores = np.abs(passing(model, x, "second", target)).sum((0, 1))
    settings = {key: np.sort(scores)[2] if value == "third" else value for key, value in settings.items()}
    config = {"op_names": ["second"], "target_names": [target], **settings}
    plan = tersor.plan(model, [config], example_inputs=x)
    pruner = L1NormPruner(model, [config], example_inputs=x)
    _, masks = pruner.compress()
    (sparsity,) = pruner.sparsity()
    pruner.unwrap_model()
    parts = {"internal_metric_block": 4, "balance_granularity": 2}.get(next(reversed(settings)), 1)
    least = np.argsort(scores.reshape(parts, -1), axis=1, kind="stable")[:, : count // parts]
    lives = np.ones((parts, 8 // parts), dtype=bool)
    np.put_along_axis(lives, least, False, 1)
    assert np.array_equal(masks["second"][target].flatten().numpy(), lives.ravel())
    assert (sparsity.target, sparsity.blocks, sparsity.removed) == (f"second.{target}", 8, count)
    assert sparsity.elements == count / 8
    row = plan.rows[0]
    assert (row.target, row.blocks, row.action) == (target, 8, "prune")
    if "sparse_threshold" not in settings:
        assert row.removes == count
        assert f"{target}: prune, {count} of 8 blocks leave" in plan.explain("second")


def test_outputs_of_one_dependency_group_share_a_mask():
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 8))).double(), tokens()
    scores = sum(np.abs(passing(model, x, name, "_output_0")).sum((0, 1)) for name in ("first", "second"))
    config = {"op_types": ["Linear"], "target_names": ["_output_0"], "sparse_ratio": 0.5, "dependency_group_id": "d"}
    masks, masked, expected, _, _, _ = pruned(model, [config], x)
    for name in ("first", "second"):
        assert np.array_equal(masks[name]["_output_0"].flatten().numpy(), highest(scores, 4))
    torch.testing.assert_close(masked, expected)


@pytest.mark.parametrize("form", ["dict", "float", "file"])
def test_masks_of_inputs_and_outputs_go_round(form, tmp_path):
    x = image(3)
    config_list = [
        {"op_names": ["0"], "target_names": ["_output_0"], "sparse_ratio": 0.5},
        {"op_names": ["7"], "target_names": ["_input_0"], "sparse_ratio": 0.25},
        {"op_names": ["3"], "sparse_ratio": 0.5},
    ]
    models = [randomize(Plain()).double() for _ in range(2)]
    source, sink = (L1NormPruner(model, config_list, example_inputs=x) for model in models)
    _, masks = source.compress()
    if form == "file":
        sink.update_masks(tersor.save_masks(masks, tmp_path / "masks.safetensors"))
    elif form == "float":
        sink.update_masks({name: {key: mask.double() for key, mask in own.items()} for name, own in masks.items()})
    else:
        sink.update_masks(masks)
    for completed in (False, True):
        one, other = source.get_masks(completed=completed), sink.get_masks(completed=completed)
        assert {name: set(own) for name, own in one.items()} == {name: set(own) for name, own in other.items()}
        assert all(torch.equal(mask, other[name][key]) for name, own in one.items() for key, mask in own.items())
    assert sink.sparsity() == source.sparsity()
    assert torch.equal(models[0](x), models[1](x))
    source.unwrap_model()
    sink.unwrap_model()
    small = [ModelSpeedup(model, x, masks).speedup_model() for model in models]
    assert [made[0].out_channels for made in small] == [4, 4]
    assert torch.equal(small[0](x), small[1](x))


@pytest.mark.parametrize("batch", [1, 7])
def test_a_batch_of_one(batch):
    model, x = randomize(Plain()).double(), image(3)[:1]
    pruner = L1NormPruner(
        model, [{"op_names": ["0"], "target_names": ["_output_0"], "sparse_ratio": 0.5}], example_inputs=x
    )
    _, masks = pruner.compress()
    fresh = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        masked = model(fresh)
    pruner.unwrap_model()
    small = ModelSpeedup(model, x, masks).speedup_model()
    with torch.no_grad():
        torch.testing.assert_close(small(fresh), masked)
    assert small[0].out_channels == 4


class Loop(nn.Module):
    """One layer called three times, on its own outputs."""

    def __init__(self):
        super().__init__()
        self.step, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.relu(self.step(x))
        return self.out(x)


def test_a_module_that_is_called_in_a_loop():
    model, x = randomize(Loop()).double(), tokens()
    scores = np.abs(passing(model, x, "step", "_output_0")).sum((0, 1))  # of the last call
    config = {"op_names": ["step"], "target_names": ["_output_0"], "sparse_ratio": 0.5}
    masks, difference, _ = made_small(model, config, x)
    assert np.array_equal(masks["step"]["_output_0"].flatten().numpy(), highest(scores, 4))
    assert difference < 1e-12


def test_token_models_of_another_length():
    model = randomize(Tokens()).double()
    x, longer = torch.randint(0, 11, (2, 4)), torch.randint(0, 11, (3, 9))
    config = {"op_names": ["fc1"], "target_names": ["_output_0"], "sparse_ratio": 0.5}
    pruner = L1NormPruner(model, [config], example_inputs=x)
    _, masks = pruner.compress()
    with torch.no_grad():
        masked = model(longer)
    pruner.unwrap_model()
    torch.testing.assert_close(masked, hooked(model, masks, longer))
    small = ModelSpeedup(model, x, masks).speedup_model()
    assert small.fc1.out_features == 5
    with torch.no_grad():
        torch.testing.assert_close(small(longer), masked)


def test_scheduled_rounds_end_at_the_same_channels():
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 3))).double(), tokens()
    scores = np.abs(passing(model, x, "first", "_output_0")).sum((0, 1))
    inner = L1NormPruner(
        model, [{"op_names": ["first"], "target_names": ["_output_0"], "sparse_ratio": 0.5}], example_inputs=x
    )
    for share in (0.25, 0.5, 1.0):
        inner.prune(lambda ratio, _, share=share: ratio * share)
        lives = highest(scores, 8 - int(4 * share))
        assert np.array_equal(inner.get_masks()["first"]["_output_0"].flatten().numpy(), lives)
    inner.unwrap_model()


def test_what_cannot_be_decided_is_an_error():
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 1))).double(), tokens()
    config = {"op_types": ["Linear"], "target_names": ["_output_0"], "sparse_ratio": 0.5}
    with pytest.raises(ConflictError, match=r"first\._output_0: the shape .* is not known"):
        L1NormPruner(model, [config])
    with pytest.raises(ConflictError, match="neither a ratio of its own nor another target to follow"):
        L1NormPruner(model, [{"op_types": ["Linear"], "target_names": ["_output_0"], "max_sparse_ratio": 0.5}])
    config = {"op_names": ["first"], "target_names": ["_output_0"], "sparse_pattern": "2:4"}
    with pytest.raises(ConflictError, match="a pattern runs along the input dimension of a weight"):
        LevelPruner(model, [config], example_inputs=x)
    config = {"op_types": ["Embedding"], "target_names": ["_input_0"], "sparse_ratio": 0.5}
    with pytest.raises(ConflictError, match=r"_input_0: its values are torch\.int64"):
        L1NormPruner(Tokens(), [config], example_inputs=torch.randint(0, 11, (2, 4)))
    pruner = L1NormPruner(
        model, [{"op_names": ["first"], "target_names": ["_output_0"], "sparse_ratio": 1}], example_inputs=x
    )
    with pytest.raises(EmptyLayerError, match=r"first\._output_0: sparse_ratio 1\.0 would remove all 8"):
        pruner.compress()
    pruner.unwrap_model()


def test_one_channel_alone_stays():
    model, x = randomize(Pair(nn.Linear(8, 8), nn.Linear(8, 1))).double(), tokens()
    pruner = L1NormPruner(
        model, [{"op_types": ["Linear"], "target_names": ["_output_0"], "sparse_ratio": 0.5}], example_inputs=x
    )
    assert [row.reason for row in pruner.plan.rows] == ["", "is a single block, and one has to stay"]
    _, masks = pruner.compress()
    assert [item.reason for item in pruner.sparsity()] == ["", "is a single block, and one has to stay"]
    pruner.unwrap_model()
    assert set(masks) == {"first"}


def test_positions_of_images_are_masked_and_another_size_is_refused():
    """With single elements as blocks the mask knows the size of the example."""
    model = randomize(Pair(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 3, 1))).double()
    x = image()
    values = passing(model, x, "first", "_output_0")
    pruner = LevelPruner(
        model, [{"op_names": ["first"], "target_names": ["_output_0"], "sparse_ratio": 0.5}], example_inputs=x
    )
    _, masks = pruner.compress()
    assert np.array_equal(masks["first"]["_output_0"].numpy().ravel(), highest(np.abs(values).sum(0).ravel(), 16))
    with pytest.raises(MaskError, match=r"first\._output_0: a mask of shape \(1, 2, 4, 4\).*'per_channel'"):
        model(torch.randn(2, 4, 7, 7, dtype=torch.float64))
    pruner.unwrap_model()
