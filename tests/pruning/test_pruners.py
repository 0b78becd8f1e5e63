"""Which blocks each pruner removes, against the papers' formulas in float64 numpy, in every mode."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import ConfigError, EmptyLayerError
from tersor.pruning import FPGMPruner, L1NormPruner, L2NormPruner, LevelPruner
from tests.networks import IMAGE, Plain, Residual, Tokens, Upsampling, randomize

CHANNEL_PRUNERS = (L1NormPruner, L2NormPruner, FPGMPruner)


def paper_scores(pruner, weight, dim=0):
    """The score of each index along a dimension, by the formula of the pruner's paper."""
    rows = np.moveaxis(weight.detach().double().numpy(), dim, 0).reshape(weight.shape[dim], -1)
    if pruner is L2NormPruner:
        return np.sqrt((rows**2).sum(1))
    if pruner is FPGMPruner:
        return np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(-1)).sum(1)
    return np.abs(rows).sum(1)


def lowest(scores, count):
    return set(np.argsort(scores, kind="stable")[:count].tolist())


def removed(mask, dim=0):
    """The indices along a dimension that are masked in whole; the mask holds nothing else."""
    rows = mask.movedim(dim, 0).reshape(mask.shape[dim], -1)
    gone = ~rows.any(1)
    assert torch.equal(rows, ~gone[:, None].expand_as(rows))
    return set(gone.nonzero().flatten().tolist())


def masks_of(pruner_class, model, config_list, **kwargs):
    pruner = pruner_class(model, config_list, **kwargs)
    try:
        return pruner.compress()[1]
    finally:
        pruner.unwrap_model()


def conv(out=12, into=8, seed=0):
    return randomize(nn.Conv2d(into, out, 3), seed)


@pytest.mark.parametrize("ratio", [0, 0.25, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("pruner", CHANNEL_PRUNERS)
def test_output_channels_of_least_score_leave(pruner, ratio):
    layer = conv(out=100, into=2)
    mask = masks_of(pruner, layer, [{"op_types": ["Conv2d"], "sparse_ratio": ratio}])[""]["weight"]
    assert removed(mask) == lowest(paper_scores(pruner, layer.weight), round(100 * ratio))


@pytest.mark.parametrize(
    ("network", "name", "dim", "granularity"),
    [
        (Plain, "7", 0, "out_channel"),
        (Plain, "7", 1, "in_channel"),
        (Plain, "3", 1, "in_channel"),
        (Plain, "3", 0, [1, -1, -1, -1]),
        (Plain, "3", 1, [-1, 1, -1, -1]),
        (Plain, "3", 0, [[1], "back", -1]),
        (Plain, "7", 0, [[1], "back", -1]),
        (Upsampling, "up", 1, "out_channel"),
        (Upsampling, "up", 0, "in_channel"),
        (Tokens, "embed", 1, "out_channel"),
    ],
)
@pytest.mark.parametrize("pruner", CHANNEL_PRUNERS)
def test_granularity_says_along_which_dimension(pruner, network, name, dim, granularity):
    model = randomize(network())
    weight = model.get_submodule(name).weight
    masks = masks_of(pruner, model, [{"op_names": [name], "sparse_ratio": 0.5, "granularity": granularity}])
    count = weight.shape[dim] // 2
    assert removed(masks[name]["weight"], dim) == lowest(paper_scores(pruner, weight, dim), count)


def test_level_removes_the_elements_of_least_magnitude():
    model = randomize(Plain())
    masks = masks_of(LevelPruner, model, [{"op_names": ["3", "7"], "sparse_ratio": 0.3}])
    for name in ("3", "7"):
        weight = model.get_submodule(name).weight.detach().double().numpy().ravel()
        gone = set((~masks[name]["weight"]).flatten().nonzero().flatten().tolist())
        assert gone == lowest(np.abs(weight), int(0.3 * weight.size))


def test_level_masks_single_elements_also_where_channels_cannot_leave():
    """One row only: its elements are slices of the model's input, which cannot leave, but zeros they can be."""
    model = randomize(nn.Sequential(nn.Linear(8, 1)))
    masks = masks_of(LevelPruner, model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=torch.randn(2, 8))
    assert int((~masks["0"]["weight"]).sum()) == 4


@pytest.mark.parametrize("pruner", [LevelPruner, L1NormPruner, L2NormPruner, FPGMPruner])
def test_blocks_of_four_by_four(pruner):
    layer = randomize(nn.Linear(12, 8))
    config_list = [{"op_types": ["Linear"], "sparse_ratio": 0.5, "granularity": [4, 4]}]
    mask = masks_of(pruner, layer, config_list)[""]["weight"]
    blocks = layer.weight.detach().reshape(2, 4, 3, 4).permute(0, 2, 1, 3).reshape(6, 16)
    gone = ~mask.reshape(2, 4, 3, 4).permute(0, 2, 1, 3).reshape(6, 16)
    assert removed(~gone) == lowest(paper_scores(pruner, blocks), 3)


def test_internal_blocks_lose_equally_many():
    layer = conv(out=12)
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "internal_metric_block": 4}]
    pruner = L1NormPruner(layer, config_list)
    _, masks = pruner.compress()
    (sparsity,) = pruner.sparsity()
    pruner.unwrap_model()
    scores = paper_scores(L1NormPruner, layer.weight)
    assert removed(masks[""]["weight"]) == {
        3 * part + int(scores[3 * part : 3 * part + 3].argmin()) for part in range(4)
    }
    assert (pruner.plan.rows[0].removes, sparsity.removed) == (4, 4)
    assert "internal_metric_block 4" in sparsity.reason


@pytest.mark.parametrize(
    ("bounds", "count"), [({}, 7), ({"max_sparse_ratio": 0.25}, 3), ({"min_sparse_ratio": 0.75}, 9)]
)
def test_threshold_within_least_and_greatest_ratio(bounds, count):
    layer = conv()
    scores = paper_scores(L1NormPruner, layer.weight)
    threshold = float(np.sort(scores)[6:8].mean())
    config_list = [{"op_types": ["Conv2d"], "sparse_threshold": threshold, **bounds}]
    assert removed(masks_of(L1NormPruner, layer, config_list)[""]["weight"]) == lowest(scores, count)


@pytest.mark.parametrize(
    ("bounds", "count"),
    [({"max_sparse_ratio": 0.25}, 3), ({"min_sparse_ratio": 0.75}, 9), ({"min_sparse_ratio": 0}, 6)],
)
def test_ratio_within_least_and_greatest_ratio(bounds, count):
    layer = conv()
    pruner = L1NormPruner(layer, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, **bounds}])
    _, masks = pruner.compress()
    (sparsity,) = pruner.sparsity()
    pruner.unwrap_model()
    assert removed(masks[""]["weight"]) == lowest(paper_scores(L1NormPruner, layer.weight), count)
    assert (pruner.plan.rows[0].removes, sparsity.removed) == (count, count)
    assert sparsity.reason == ("limited by max_sparse_ratio 0.25" if count == 3 else "")


def greedy(units, ratio):
    """The rule of global groups, block by block.

    Args:
        units: for each, its scores, the elements that one of its blocks weighs, and how many must go and may go.
        ratio: of all elements.

    Returns:
        for each unit the indices that go.
    """
    gone = [lowest(scores, least) for scores, _, least, _ in units]
    budget = int(ratio * sum(len(scores) * weight for scores, weight, *_ in units) + 1e-6)
    budget -= sum(len(out) * unit[1] for out, unit in zip(gone, units, strict=True))
    blocks = sorted((score, number, index) for number, unit in enumerate(units) for index, score in enumerate(unit[0]))
    for _, number, index in blocks:
        _, weight, _, greatest = units[number]
        if index in gone[number] or len(gone[number]) >= greatest:
            continue
        if weight > budget:
            break
        gone[number].add(index)
        budget -= weight
    return gone


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("pruner", CHANNEL_PRUNERS)
def test_global_group_spreads_one_ratio(pruner, ratio):
    model = randomize(nn.Sequential(conv(12, 8), conv(10, 12, seed=1), conv(6, 10, seed=2)))
    config_list = [
        {"op_names": ["0", "1"], "sparse_ratio": ratio, "global_group_id": 1},
        {
            "op_names": ["2"],
            "sparse_ratio": ratio,
            "global_group_id": 1,
            "min_sparse_ratio": 0.5,
            "max_sparse_ratio": 0.5,
        },
    ]
    masks = masks_of(pruner, model, config_list)
    weights = [model[name].weight for name in range(3)]
    bounds = [(0, 11), (0, 9), (3, 3)]
    units = [(paper_scores(pruner, w), w[0].numel(), *bound) for w, bound in zip(weights, bounds, strict=True)]
    assert [removed(masks[str(number)]["weight"]) for number in range(3)] == greedy(units, ratio)


def test_dependency_group_shares_the_mask_of_the_mean_score():
    model = randomize(Residual())
    config_list = [{"op_names": ["stem", "conv2"], "sparse_ratio": 0.5, "dependency_group_id": "stream"}]
    masks = masks_of(L1NormPruner, model, config_list, example_inputs=torch.randn(IMAGE))
    mean = (paper_scores(L1NormPruner, model.stem.weight) + paper_scores(L1NormPruner, model.conv2.weight)) / 2
    assert removed(masks["stem"]["weight"]) == removed(masks["conv2"]["weight"]) == lowest(mean, 4)


@pytest.mark.parametrize("pruner", CHANNEL_PRUNERS)
def test_global_and_dependency_groups_on_the_same_targets(pruner):
    model = randomize(Residual())
    config_list = [
        {"op_names": ["stem", "conv2"], "sparse_ratio": 0.6, "global_group_id": 1, "dependency_group_id": "stream"},
        {"op_names": ["conv1"], "sparse_ratio": 0.6, "global_group_id": 1, "max_sparse_ratio": 0.5},
        {"op_names": ["conv3", "project"], "sparse_ratio": 0.6, "global_group_id": 1, "dependency_group_id": "wide"},
    ]
    masks = masks_of(pruner, model, config_list)
    groups = [("stem", "conv2"), ("conv1",), ("conv3", "project")]
    units = []
    for names, greatest in zip(groups, [7, 5, 11], strict=True):
        weights = [model.get_submodule(name).weight for name in names]
        scores = np.mean([paper_scores(pruner, weight) for weight in weights], axis=0)
        units.append((scores, sum(weight[0].numel() for weight in weights), 0, greatest))
    for names, expected in zip(groups, greedy(units, 0.6), strict=True):
        assert [removed(masks[name]["weight"]) for name in names] == [expected] * len(names)


def test_equal_scores_go_from_the_front_and_always_the_same():
    layer = conv()
    nn.init.constant_(layer.weight, 0.5)
    config_list = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    for pruner in CHANNEL_PRUNERS:
        assert removed(masks_of(pruner, layer, config_list)[""]["weight"]) == set(range(6))
    level = [masks_of(LevelPruner, layer, config_list)[""]["weight"] for _ in range(2)]
    assert torch.equal(level[0], level[1])
    assert not level[0].flatten()[: layer.weight.numel() // 2].any()


class TestNni2Arithmetic:
    """Layers of 500 and 1000 parameters, as in the specification of NNI 2.x; the first is by far the weaker."""

    @staticmethod
    def count(config):
        model = nn.Sequential(nn.Linear(25, 20), nn.Linear(50, 20))
        with torch.no_grad():
            model[0].weight.copy_(torch.linspace(0.001, 0.01, 500).view(20, 25))
            model[1].weight.copy_(torch.linspace(1, 2, 1000).view(20, 50))
        pruner = LevelPruner(model, [{"op_types": ["Linear"], **config}])
        _, masks = pruner.compress()
        reasons = [sparsity.reason for sparsity in pruner.sparsity()]
        pruner.unwrap_model()
        assert all("bias" not in masks[name] for name in masks)
        return [int((~masks[name]["weight"]).sum()) for name in masks], reasons

    @pytest.mark.parametrize("key", ["sparsity", "sparsity_per_layer"])
    def test_per_layer(self, key):
        assert self.count({key: 0.8})[0] == [400, 800]

    def test_total(self):
        assert self.count({"total_sparsity": 0.8})[0] == [499, 701]  # one block of each target stays

    def test_total_with_a_maximum_per_layer(self):
        assert self.count({"total_sparsity": 0.8, "max_sparsity_per_layer": 0.9})[0] == [450, 750]

    def test_a_maximum_that_forbids_the_total_is_reported(self):
        counts, reasons = self.count({"total_sparsity": 0.8, "max_sparsity_per_layer": 0.5})
        assert counts == [250, 500]
        assert all("750 of 1200 elements" in reason for reason in reasons)


def test_a_ratio_of_one_would_empty_the_layer():
    layer = conv()
    pruner = L1NormPruner(layer, [{"op_types": ["Conv2d"], "sparse_ratio": 1}])
    with pytest.raises(EmptyLayerError, match=r"weight: .*all 12 blocks.*max_sparse_ratio"):
        pruner.compress()
    assert pruner.get_masks() == {}
    pruner.unwrap_model()


def test_a_layer_of_one_channel_is_left_alone_and_the_plan_says_so():
    model = randomize(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1)))
    pruner = FPGMPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert "single block" in next(row.reason for row in pruner.plan.rows if (row.module, row.target) == ("2", "weight"))
    assert set(pruner.compress()[1]) == {"0"}
    assert "single block" in pruner.sparsity()[1].reason
    pruner.unwrap_model()


def test_nothing_to_prune_is_an_error():
    model = randomize(nn.Sequential(nn.Linear(4, 6)))
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=torch.randn(2, 4))
    with pytest.raises(ConfigError, match=r"nothing would be pruned.*0\.weight: is the model's own output"):
        pruner.compress()
    pruner.unwrap_model()
