"""Patterns (2:4) and balanced parts: exactly so many of each part leave, and they are the least."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tersor
from tersor.config import PruningSpec
from tersor.errors import ConflictError, EmptyLayerError, InvalidValueError
from tersor.pruning import L1NormPruner, LevelPruner
from tersor.pruning.decision import decide
from tersor.targets.choices import choices
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.targets.resolve import TargetConfig
from tests.networks import randomize


class Conv1D(nn.Module):
    """As in Transformers: a linear layer whose weight is (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def least_of_each_part(scores, part, count):
    """What lives, block by block: of each part of a grid the ``count`` least leave, of equal ones those in front."""
    keep = np.ones(scores.shape, dtype=bool)
    for corner in itertools.product(*(range(0, size, step) for size, step in zip(scores.shape, part, strict=True))):
        places = itertools.product(*(range(at, at + step) for at, step in zip(corner, part, strict=True)))
        for place in sorted(places, key=lambda place: scores[place])[:count]:
            keep[place] = False
    return keep


def magnitude(layer):
    return np.abs(layer.weight.detach().double().numpy())


def masks_of(pruner_class, model, config_list, **kwargs):
    pruner = pruner_class(model, config_list, **kwargs)
    try:
        return pruner.compress()[1], pruner.sparsity(), pruner.plan.rows
    finally:
        pruner.unwrap_model()


LAYERS = {
    "linear": (nn.Linear(8, 6), 1),
    "conv1d": (nn.Conv1d(8, 6, 3), 1),
    "conv2d": (nn.Conv2d(8, 6, 3), 1),
    "conv3d": (nn.Conv3d(8, 3, (2, 1, 3)), 1),
    "grouped": (nn.Conv2d(16, 6, 3, groups=2), 1),
    "transposed": (nn.ConvTranspose2d(8, 6, 3), 0),
    "grouped transposed": (nn.ConvTranspose1d(8, 6, 3, groups=2), 0),
    "conv1d of transformers": (Conv1D(6, 8), 0),
}


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:4", "1:8"])
@pytest.mark.parametrize("name", LAYERS)
def test_of_every_m_consecutive_inputs_the_n_greatest_stay(name, pattern):
    layer, dim = LAYERS[name]
    model = nn.Sequential(randomize(layer))
    stay, of = map(int, pattern.split(":"))
    config_list = [{"op_names": ["0"], "target_names": ["weight"], "sparse_pattern": pattern}]
    masks, (sparsity,), (row,) = masks_of(LevelPruner, model, config_list)
    part = [of if axis == dim else 1 for axis in range(layer.weight.dim())]
    assert np.array_equal(masks["0"]["weight"].numpy(), least_of_each_part(magnitude(layer), part, of - stay))
    count = layer.weight.numel() * (of - stay) // of
    assert (row.removes, row.action, row.setting["sparse_pattern"]) == (count, "prune", pattern)
    assert (sparsity.removed, sparsity.asked, sparsity.reason) == (count, (of - stay) / of, "")


def test_transformers_own_class_is_known():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(randomize(pytorch_utils.Conv1D(6, 8)))
    masks, _, _ = masks_of(
        LevelPruner, model, [{"op_names": ["0"], "target_names": ["weight"], "sparse_pattern": "2:4"}]
    )
    assert torch.equal(masks["0"]["weight"].view(2, 4, 6).sum(1), torch.full((2, 6), 2))
    masks, _, _ = masks_of(L1NormPruner, model, [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.5}])
    gone = set((~masks["0"]["weight"].any(0)).nonzero().flatten().tolist())
    assert gone == set(np.argsort(magnitude(model[0]).sum(0))[:3].tolist())


def test_the_masked_layer_computes_with_what_stays():
    layer, x = randomize(nn.Linear(8, 6)), torch.randn(5, 8)
    pruner = LevelPruner(layer, [{"op_types": ["Linear"], "sparse_pattern": "2:4"}], example_inputs=x)
    pruner.compress()
    found = layer(x)
    pruner.unwrap_model()
    weight = layer.weight.detach().double().numpy()
    weight = weight * least_of_each_part(np.abs(weight), (1, 4), 2)
    expected = x.double().numpy() @ weight.T + layer.bias.detach().double().numpy()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_schedule_goes_there_block_by_block():
    layer = randomize(nn.Linear(8, 6))
    pruner = LevelPruner(layer, [{"op_types": ["Linear"], "sparse_pattern": "1:4"}])
    for share, count in ((0.3, 0), (0.4, 1), (0.67, 2), (1.0, 3)):
        pruner.prune(lambda ratio, _, share=share: ratio * share)
        expected = least_of_each_part(magnitude_of(pruner), (1, 4), count)
        assert np.array_equal(pruner.get_masks()[""]["weight"].numpy(), expected)
    pruner.unwrap_model()


def magnitude_of(pruner):
    return np.abs(pruner.wrappers[""].tensor("weight").detach().double().numpy())


@pytest.mark.parametrize(
    ("layer", "balance", "part", "ratio", "count"),
    [
        (nn.Linear(8, 6), [1, 4], (1, 4), 0.25, 1),
        (nn.Linear(8, 6), [[1], "back", -1], (1, 8), 0.4, 3),
        (nn.Linear(8, 6), [3, -1], (3, 8), 0.5, 12),
        (nn.Linear(8, 6), "out_channel", (1, 8), 0.5, 4),
        (nn.Linear(8, 6), "in_channel", (6, 1), 0.5, 3),
        (nn.Conv2d(4, 6, 3), [1, -1, 1, 1], (1, 4, 1, 1), 0.5, 2),
        (nn.Conv2d(4, 6, 3), [-1, -1], (1, 1, 3, 3), 0.34, 3),
        (nn.ConvTranspose2d(4, 6, 3), "out_channel", (4, 1, 3, 3), 0.5, 18),
        (nn.ConvTranspose2d(4, 6, 3), "in_channel", (1, 6, 3, 3), 0.5, 27),
        (nn.Embedding(8, 6), "out_channel", (8, 1), 0.5, 4),
        (Conv1D(6, 8), "out_channel", (8, 1), 0.5, 4),
    ],
)
def test_each_part_loses_the_same_share(layer, balance, part, ratio, count):
    model = nn.Sequential(randomize(layer))
    config = {"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": ratio, "balance_granularity": balance}
    masks, (sparsity,), (row,) = masks_of(LevelPruner, model, [config])
    assert np.array_equal(masks["0"]["weight"].numpy(), least_of_each_part(magnitude(layer), part, count))
    assert row.removes == sparsity.removed == count * layer.weight.numel() // math.prod(part)


def test_what_is_balanced_may_be_blocks():
    """Of each four by four, the two least of the four two by twos."""
    layer = randomize(nn.Linear(8, 8))
    config = {"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": [2, 2], "balance_granularity": [4, 4]}
    masks, (sparsity,), _ = masks_of(L1NormPruner, layer, [config])
    scores = magnitude(layer).reshape(4, 2, 4, 2).sum((1, 3))
    expected = least_of_each_part(scores, (2, 2), 2).repeat(2, 0).repeat(2, 1)
    assert np.array_equal(masks[""]["weight"].numpy(), expected)
    assert (sparsity.removed, sparsity.blocks) == (8, 16)


@pytest.mark.parametrize(
    ("bounds", "count"),
    [({"max_sparse_ratio": 0.25}, 2), ({"min_sparse_ratio": 0.75}, 6), ({"min_sparse_ratio": 0.3}, 4)],
)
def test_bounds_hold_in_each_part(bounds, count):
    layer = randomize(nn.Linear(8, 6))
    config = {"op_types": ["Linear"], "sparse_ratio": 0.5, "balance_granularity": [1, -1], **bounds}
    masks, (sparsity,), (row, _) = masks_of(LevelPruner, layer, [config])
    assert np.array_equal(masks[""]["weight"].numpy(), least_of_each_part(magnitude(layer), (1, 8), count))
    assert row.removes == sparsity.removed == count * 6
    assert bool(sparsity.reason) == (count < 4)


def test_of_parts_the_one_with_the_fewest_below_a_threshold_decides():
    layer = nn.Linear(4, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 3, 9], [1, 8, 7, 2]]))
    config = {"op_types": ["Linear"], "sparse_threshold": 4, "balance_granularity": [1, -1]}
    masks, _, _ = masks_of(LevelPruner, layer, [config])
    assert masks[""]["weight"].int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 0]]


def test_a_share_that_is_less_than_one_of_each_part_says_so():
    layer = randomize(nn.Linear(8, 6))
    config = {"op_types": ["Linear"], "sparse_ratio": 0.2, "balance_granularity": [1, 4]}
    pruner = LevelPruner(layer, [config])
    row = pruner.plan.rows[0]
    assert (row.action, row.removes, row.reason) == ("nothing", 0, "0.2 of 4 blocks is less than one")
    assert "nothing (0.2 of 4 blocks is less than one)" in pruner.plan.explain("")
    pruner.unwrap_model()


def test_a_dependency_group_shares_the_balanced_mask_of_the_mean():
    """The input dimension of a convolution is not its last, so the order of its banks is not that of its elements."""
    model = nn.Sequential(randomize(nn.Conv2d(4, 6, 3)), randomize(nn.Conv2d(4, 6, 3), seed=1))
    config = {"op_types": ["Conv2d"], "sparse_pattern": "2:4", "dependency_group_id": "both"}
    masks, _, _ = masks_of(LevelPruner, model, [config])
    expected = least_of_each_part((magnitude(model[0]) + magnitude(model[1])) / 2, (1, 4, 1, 1), 2)
    for name in ("0", "1"):
        assert np.array_equal(masks[name]["weight"].numpy(), expected)


@pytest.mark.parametrize(
    "other", [{"sparse_ratio": 0.5}, {"sparse_ratio": 0.5, "balance_granularity": "in_channel"}, "linear"]
)
def test_a_group_whose_members_are_not_balanced_alike_is_an_error(other):
    """A shared mask cannot be balanced along two dimensions: which of them was would be left to chance."""
    second = nn.Linear(9, 24) if other == "linear" else nn.Conv2d(4, 6, 3)
    other = {"sparse_ratio": 0.5, "balance_granularity": [24, 1]} if other == "linear" else other
    model = nn.Sequential(nn.Conv2d(4, 6, 3), second)
    pruner = LevelPruner(
        model,
        [
            {"op_names": ["0"], "sparse_pattern": "2:4", "dependency_group_id": 1},
            {"op_names": ["1"], **other, "dependency_group_id": 1},
        ],
    )
    with pytest.raises(ConflictError, match=r"0\.weight, 1\.weight: .*not balanced alike"):
        pruner.compress()
    pruner.unwrap_model()


def test_in_a_global_group_each_part_of_a_target_loses_one_at_a_time():
    """Of 96 elements half leave: of each layer's rows equally many, the layers as their scores demand."""
    model = nn.Sequential(randomize(nn.Linear(8, 6)), randomize(nn.Linear(8, 6), seed=1))
    with torch.no_grad():
        model[1].weight.mul_(1.5)
    config = {"op_types": ["Linear"], "sparse_ratio": 0.5, "balance_granularity": [1, -1], "global_group_id": 1}
    masks, _, _ = masks_of(LevelPruner, model, [config])
    levels = [np.sort(magnitude(layer), 1).mean(0)[:7] for layer in model]  # the mean of what each row would lose next
    cheapest = sorted((score, number) for number, own in enumerate(levels) for score in own)[:8]
    for number, layer in enumerate(model):
        count = sum(own == number for _, own in cheapest)
        expected = least_of_each_part(magnitude(layer), (1, 8), count)
        assert np.array_equal(masks[str(number)]["weight"].numpy(), expected)
    assert sum(int((~masks[name]["weight"]).sum()) for name in "01") == 48


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 32) for _ in range(3))
        self.proj = nn.Linear(32, 12)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_are_blocks_of_rows_without_a_graph_and_what_the_graph_says_with_it():
    model, x = randomize(Attention()), torch.randn(2, 5, 12)
    config = {"op_names": ["q", "k", "v"], "sparse_ratio": 0.5, "dependency_group_id": "heads"}
    blind, _, _ = masks_of(L1NormPruner, model, [{**config, "granularity": [4, -1]}])
    seeing, _, _ = masks_of(L1NormPruner, model, [config], example_inputs=x)
    scores = sum(magnitude(layer).reshape(8, 48).sum(1) for layer in (model.q, model.k, model.v))
    lives = least_of_each_part(scores, (8,), 4).repeat(4)
    for masks in (blind, seeing):
        for name in "qkv":
            assert np.array_equal(masks[name]["weight"].numpy(), np.broadcast_to(lives[:, None], (32, 12)))
            assert np.array_equal(masks[name]["bias"].numpy(), lives)


@pytest.mark.parametrize(
    ("layer", "config", "error", "words"),
    [
        (nn.Linear(6, 4), {"sparse_pattern": "2:4"}, InvalidValueError, r"6 blocks .* parts of 4\. Leave this target"),
        (nn.LayerNorm(8), {"sparse_pattern": "2:4"}, ConflictError, "this target has none. Use sparse_ratio"),
        (nn.Linear(8, 4), {"sparse_ratio": 0.5, "balance_granularity": [1, 3]}, InvalidValueError, "parts of 3"),
        (nn.Linear(8, 4), {"sparse_ratio": 0.5, "balance_granularity": "default"}, InvalidValueError, "out_channel"),
        (
            nn.Linear(8, 4),
            {"sparse_ratio": 0.5, "granularity": [1, 4], "balance_granularity": [1, 2]},
            InvalidValueError,
            r"\(1, 2\) is no multiple of the block \(1, 4\)",
        ),
    ],
)
def test_parts_that_do_not_fit_name_the_place(layer, config, error, words):
    kind = type(layer).__name__
    with pytest.raises(error, match=words) as caught:
        LevelPruner(layer, [{"op_types": [kind], "target_names": ["weight"], **config}])
    key = "sparse_pattern" if "sparse_pattern" in config else "balance_granularity"
    assert caught.value.where == f"config_list[0]['{key}'] on weight"
    assert type(layer.weight) is nn.Parameter


def test_a_pattern_of_channels_says_what_to_do():
    with pytest.raises(InvalidValueError, match=r"1 blocks .*granularity \[1\]"):
        L1NormPruner(nn.Linear(8, 4), [{"op_types": ["Linear"], "sparse_pattern": "2:4"}])
    masks, _, _ = masks_of(
        L1NormPruner, nn.Linear(8, 4), [{"op_types": ["Linear"], "sparse_pattern": "2:4", "granularity": [1]}]
    )
    assert torch.equal(masks[""]["weight"].view(8, 4).sum(1), torch.full((8,), 2))


def test_rows_that_the_graph_joins_cannot_be_balanced():
    pruner = L1NormPruner(
        randomize(Attention()),
        [{"op_names": ["q"], "sparse_ratio": 0.5, "balance_granularity": [8, -1]}],
        example_inputs=torch.randn(2, 5, 12),
    )
    with pytest.raises(ConflictError, match="equal shares of each part cannot be removed"):
        pruner.compress()
    pruner.unwrap_model()


def divisors(number):
    return [part for part in range(1, number + 1) if number % part == 0]


@st.composite
def requests(draw):
    """Grids of up to three dimensions, parts of them, ratios, and scores with many ties."""
    grid = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    part = tuple(draw(st.sampled_from(divisors(size))) for size in grid)
    balanced = draw(st.booleans())
    members = draw(st.integers(1, 3))
    scores = [
        np.array(draw(st.lists(st.integers(0, 4), min_size=math.prod(grid), max_size=math.prod(grid)))).reshape(grid)
        for _ in range(members)
    ]
    ratios = st.integers(0, 12).map(lambda twelfths: twelfths / 12)
    bounds = sorted(draw(st.tuples(ratios, ratios)))
    keys = draw(st.sets(st.sampled_from(["min_sparse_ratio", "max_sparse_ratio"])))
    config = {"sparse_ratio": draw(ratios)}
    config |= {
        key: bound for key, bound in zip(["min_sparse_ratio", "max_sparse_ratio"], bounds, strict=True) if key in keys
    }
    return grid, part if balanced else grid, balanced, scores, config


@settings(max_examples=100, deadline=None)
@given(requests())
def test_decisions_are_those_of_brute_force(drawn):
    """The count of each part is exact, the lowest scores leave, and of equal ones those of the lowest index."""
    grid, part, balanced, scores, config = drawn
    spec = PruningSpec.parse({**config, "dependency_group_id": "all"})
    targets = [
        PlannedTarget(
            TargetConfig(str(number), nn.Identity(), "weight", spec, 0),
            Blocks(grid, (1,) * len(grid)),
            Blocks(grid, part) if balanced else None,
        )
        for number in range(len(scores))
    ]
    size = math.prod(part)
    whole = {key: math.floor(ratio * size + 1e-6) for key, ratio in config.items()}
    least, greatest = whole.get("min_sparse_ratio", 0), whole.get("max_sparse_ratio", size)
    count = min(max(whole["sparse_ratio"], least), greatest)
    given_scores = {f"{number}.weight": torch.tensor(own).double() for number, own in enumerate(scores)}
    if size in (count, least):
        with pytest.raises(EmptyLayerError):
            decide(choices(targets), given_scores)
        return
    keep = decide(choices(targets), given_scores)
    expected = least_of_each_part(np.mean(scores, axis=0), part, count)
    assert all(np.array_equal(own.view(grid).numpy(), expected) for own in keep.values())
    assert list(keep) == list(given_scores)


def test_plan_says_it_in_words():
    plan = tersor.plan(
        nn.Sequential(nn.Linear(8, 6)), [{"op_names": ["0"], "sparse_pattern": "2:4", "granularity": [1]}]
    )
    assert "weight: prune, 24 of 48 blocks leave" in plan.explain("0")
    assert plan.to_dict()["targets"][0]["setting"]["sparse_pattern"] == "2:4"
