"""What leaves as one is scored, counted and masked as one: heads, units, groups, halves, what is joined."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import tersor
from tersor.errors import ConflictError, EmptyLayerError
from tersor.graph import groups
from tersor.pruning import L1NormPruner, L2NormPruner
from tersor.speedup import ModelSpeedup
from tersor.targets.choices import choices, connected
from tests.networks import IMAGE, Plain, randomize
from tests.torchvision_stub import import_torchvision

WIDTH, HEADS, SIZE = 12, 8, 4
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Fused(nn.Module):
    """Self-attention with queries, keys and values from one layer, as in ViT."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE)
        self.proj = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, -1, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Grouped(nn.Module):
    """Self-attention with a layer each; several query heads read one head of keys and values."""

    def __init__(self, shared=1):
        super().__init__()
        self.shared = shared
        self.q = nn.Linear(WIDTH, HEADS * SIZE)
        self.k = nn.Linear(WIDTH, HEADS // shared * SIZE)
        self.v = nn.Linear(WIDTH, HEADS // shared * SIZE)
        self.proj = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x):
        heads = [
            layer(x).reshape(x.shape[0], x.shape[1], -1, SIZE).transpose(1, 2) for layer in (self.q, self.k, self.v)
        ]
        q, k, v = heads
        if self.shared > 1:
            k, v = (h.repeat_interleave(self.shared, dim=1) for h in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 10, batch_first=True)
        self.fc = nn.Linear(10, 3)

    def forward(self, x):
        return self.fc(self.lstm(x)[0])


class Gated(nn.Module):
    """Each half of ``up`` has a part of each unit."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * 8)
        self.down = nn.Linear(8, WIDTH)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * value)


class Joined(nn.Module):
    """Ten channels of ``whole`` are added to four of ``left`` and six of ``right``."""

    def __init__(self, *, returns_left=False):
        super().__init__()
        self.returns_left = returns_left
        self.left = nn.Linear(WIDTH, 4)
        self.right = nn.Linear(WIDTH, 6)
        self.whole = nn.Linear(WIDTH, 10)
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        left = self.left(x)
        result = self.out(torch.relu(torch.cat([left, self.right(x)], -1) + self.whole(x)))
        return (result, left) if self.returns_left else result


class Standardized(nn.Module):
    """The second convolution's weight is standardized, so that masked values of its parameter are not zero."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.conv = nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-3)
        return self.fc(torch.relu(nn.functional.conv2d(self.stem(x), weight, self.conv.bias)).mean((2, 3)))


class Cut(nn.Sequential):
    """A convolution in three groups of four channels, between two others."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 5, 1)
        )


def pruned(model, config_list, x=X, pruner_class=L1NormPruner, *, auto=True, tolerance=1e-5):
    """Prune, make small, and compare at another batch size.

    Returns the masks, the small model and what came of each target that the plan prunes.
    """
    coupling = groups(model, x)
    if auto:
        config_list = tersor.auto_set_dependency_group_ids(model, config_list, coupling)
    pruner = pruner_class(model, config_list, example_inputs=coupling)
    _, masks = pruner.compress()
    fresh = torch.randn(7, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        masked = model(fresh)
    sparsity, rows = {}, {f"{row.module}.{row.target}".lstrip("."): row for row in pruner.plan.rows}
    for target in pruner.sparsity():
        planned = rows[target.target].removes
        if planned is not None:
            assert target.removed == planned
            assert target.reason or target.removed >= int(target.blocks * target.asked)
        if rows[target.target].action == "prune":
            sparsity[target.target] = target
    pruner.unwrap_model()
    small = ModelSpeedup(model, x, masks).speedup_model()
    with torch.no_grad():
        torch.testing.assert_close(small(fresh), masked, rtol=tolerance, atol=tolerance)
    return masks, small, sparsity


def norms(layer, target="weight"):
    """L1 norm of each row."""
    return getattr(layer, target).detach().abs().flatten(1).sum(1)


def highest(scores):
    """The better half, as a bool vector."""
    vector = torch.zeros(len(scores), dtype=torch.bool)
    vector[scores.argsort(descending=True)[: len(scores) // 2]] = True
    return vector


def kept(masks, name, target="weight"):
    return masks[name][target].flatten(1).any(1)


@pytest.mark.parametrize("auto", [False, True])
def test_half_of_the_heads_of_a_fused_projection(auto):
    model = randomize(Fused())
    heads = highest(norms(model.qkv).view(3, HEADS, SIZE).mean((0, 2)))
    masks, small, sparsity = pruned(model, LINEAR, auto=auto)
    assert torch.equal(kept(masks, "qkv"), heads.repeat_interleave(SIZE).repeat(3))
    assert (small.qkv.weight.shape, small.proj.weight.shape) == ((3 * 16, WIDTH), (WIDTH, 16))
    assert sparsity["qkv.weight"].elements == 0.5


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("pruner_class", [L1NormPruner, L2NormPruner])
@pytest.mark.parametrize("own_group", [False, True])
def test_half_of_the_heads_of_projections_that_share_them(shared, pruner_class, own_group):
    """Each head of keys and values leaves with all query heads that read it; a group of the user's own is as good."""
    model = randomize(Grouped(shared))
    rows = {name: getattr(model, name).weight.detach().abs() for name in "qkv"}
    if pruner_class is L2NormPruner:
        rows = {name: weight.square() for name, weight in rows.items()}
    heads = HEADS // shared
    if own_group:
        given = [{"op_names": list("qkv"), "sparse_ratio": 0.5, "dependency_group_id": "heads"}]
        each = {name: weight.sum(1) for name, weight in rows.items()}  # a block is a row
    else:
        given = LINEAR
        each = {name: weight.view(heads, -1).sum(1) for name, weight in rows.items()}  # a block is a run of rows
    each = each if pruner_class is L1NormPruner else {name: score.sqrt() for name, score in each.items()}
    score = torch.cat([own.view(heads, -1) for own in each.values()], 1).mean(1)
    masks, small, _ = pruned(model, given, pruner_class=pruner_class, auto=not own_group)
    for name, layer in zip("qkv", (small.q, small.k, small.v), strict=True):
        assert torch.equal(kept(masks, name), highest(score).repeat_interleave(len(rows[name]) // heads))
        assert layer.weight.shape[0] == len(rows[name]) // 2
    assert small.proj.weight.shape == (WIDTH, 16)


@pytest.mark.parametrize("auto", [False, True])
def test_half_of_the_units_of_an_lstm(auto):
    """Four rows of each of its two weights make a unit; the weights of one module decide together unasked."""
    model = randomize(Recurrent())
    names = ["weight_ih_l0", "weight_hh_l0"]
    units = highest(torch.stack([norms(model.lstm, name).view(4, 10) for name in names]).mean((0, 1)))
    config_list = [{"op_types": ["LSTM"], "target_names": names, "sparse_ratio": 0.5}]
    masks, small, sparsity = pruned(model, config_list, auto=auto)
    assert all(torch.equal(kept(masks, "lstm", name), units.repeat(4)) for name in names)
    assert (small.lstm.hidden_size, small.lstm.weight_hh_l0.shape, small.fc.in_features) == (5, (20, 5), 5)
    assert [target.removed for target in sparsity.values()] == [20, 20]


def test_half_of_the_positions_of_a_grouped_convolution():
    """The same positions leave in all three groups, on both sides."""
    model = randomize(Cut())
    better = [highest(norms(model[at]).view(3, 4).mean(0)) for at in (0, 2)]
    masks, small, _ = pruned(model, CONV, torch.randn(IMAGE))
    assert [torch.equal(kept(masks, str(at)), own.repeat(3)) for at, own in zip((0, 2), better, strict=True)] == [
        True
    ] * 2
    assert [tuple(small[at].weight.shape[:2]) for at in (0, 2, 4)] == [(6, 3), (6, 2), (5, 6)]


def test_half_of_the_units_of_a_gated_layer():
    model = randomize(Gated())
    units = highest(norms(model.up).view(2, 8).mean(0))
    masks, small, _ = pruned(model, LINEAR, auto=False)
    assert torch.equal(kept(masks, "up"), units.repeat(2))
    assert (small.up.weight.shape, small.down.weight.shape) == ((8, WIDTH), (WIDTH, 4))


def test_half_of_each_kind_of_channels_that_are_joined():
    """What is shared leaves from both layers that write it, and each of the joined layers keeps its half."""
    model = randomize(Joined())
    whole = norms(model.whole)
    left, right = highest(norms(model.left) + whole[:4]), highest(norms(model.right) + whole[4:])
    masks, small, sparsity = pruned(model, LINEAR)
    assert torch.equal(kept(masks, "left"), left)
    assert torch.equal(kept(masks, "right"), right)
    assert torch.equal(kept(masks, "whole"), torch.cat([left, right]))
    assert (len(small.left.weight), len(small.right.weight), len(small.whole.weight)) == (2, 3, 5)
    assert {target.removed for target in sparsity.values()} == {2, 3, 5}
    assert not any(target.reason for target in sparsity.values())


def test_what_no_weight_writes_leaves_where_it_is_read():
    """The masked rows of a standardized weight are not zero, so the next layer does not read what they compute."""
    model = randomize(Standardized())
    rows = highest(norms(model.conv))
    masks, small, sparsity = pruned(model, [{"op_names": ["conv"], "sparse_ratio": 0.5}], torch.randn(IMAGE))
    assert torch.equal(kept(masks, "conv"), rows)
    assert torch.equal(masks["fc"]["weight"], rows.expand(3, 8))
    assert (small.conv.weight.shape, small.fc.weight.shape) == ((4, 4, 3, 3), (3, 4))
    assert sparsity["conv.weight"].removed == 4


def test_a_ratio_counts_heads_and_says_so():
    masks, _, sparsity = pruned(randomize(Fused()), [{"op_names": ["qkv"], "sparse_ratio": 0.45}])
    assert int((~kept(masks, "qkv")).sum()) == 3 * 3 * SIZE
    (target,) = sparsity.values()
    assert (target.blocks, target.removed) == (24, 9)
    config_list = [{"op_names": ["qkv"], "sparse_ratio": 0.45}]
    _, _, sparsity = pruned(randomize(Fused()), config_list, auto=False)
    assert sparsity["qkv.weight"].removed == 36
    assert sparsity["qkv.weight"].reason == "only whole choices leave, of each kind its share: 8 choices of 12 blocks"
    (row, _) = tersor.plan(Fused(), [{"op_names": ["qkv"], "sparse_ratio": 0.1}], example_inputs=X).rows
    assert (row.action, row.removes) == ("nothing", 0)
    assert row.reason == "0.1 of 8 choices of 12 blocks is less than one"


@pytest.mark.parametrize(
    ("setting", "heads"),
    [
        ({"sparse_ratio": 0.75, "max_sparse_ratio": 0.3}, 2),
        ({"sparse_ratio": 0.2, "min_sparse_ratio": 0.5}, 4),
        ({"sparse_ratio": 0.5, "global_group_id": "all"}, 4),
        ({"sparse_threshold": 2.5}, 3),
    ],
)
def test_bounds_thresholds_and_budgets_count_heads(setting, heads):
    """Head i has rows of an L1 norm of i + 0.1, so three have a mean below 2.5."""
    model = Fused()
    with torch.no_grad():
        norm = torch.arange(HEADS).add(0.1).repeat_interleave(SIZE).repeat(3)
        model.qkv.weight.copy_((norm / WIDTH)[:, None].expand(-1, WIDTH))
    masks, _, _ = pruned(model, [{"op_names": ["qkv"], **setting}], auto=False)
    assert kept(masks, "qkv").view(3, HEADS, SIZE)[0, :, 0].tolist() == [False] * heads + [True] * (HEADS - heads)


def test_a_budget_weighs_choices_by_what_leaves_with_them():
    """Of 8 heads of 3 * 4 rows and 8 units of 2, a quarter of the elements is 336: two heads, and no third one."""
    model = randomize(nn.Sequential(Grouped(), Gated()))
    with torch.no_grad():
        for name in "qkv":
            getattr(model[0], name).weight.mul_(0.01)
    given = [{"op_names": ["0.q", "0.k", "0.v", "1.up"], "sparse_ratio": 0.25, "global_group_id": "all"}]
    masks, small, sparsity = pruned(model, given)
    assert [int((~kept(masks, name)).sum()) for name in ("0.q", "0.k", "0.v", "1.up")] == [8, 8, 8, 0]
    assert (small[0].proj.in_features, small[1].down.in_features) == (24, 8)
    assert not any(target.reason for target in sparsity.values())


def test_a_budget_that_is_not_reached_has_a_reason():
    given = [{"op_names": ["qkv"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.25, "global_group_id": "all"}]
    _, _, sparsity = pruned(randomize(Fused()), given, auto=False)
    assert sparsity["qkv.weight"].removed == 2 * 12
    assert sparsity["qkv.weight"].reason.startswith("global group all gives up 288 of 576 elements: max_sparse_ratio")


def test_what_stays_does_not_count():
    """The four channels that are an output too stay; of the other six, half leaves."""
    model = randomize(Joined(returns_left=True))
    right = highest(norms(model.right) + norms(model.whole)[4:])
    coupling = groups(model, X)
    pruner = L1NormPruner(model, tersor.auto_set_dependency_group_ids(model, LINEAR, coupling), example_inputs=coupling)
    _, masks = pruner.compress()
    sparsity = {target.target: target for target in pruner.sparsity()}
    pruner.unwrap_model()
    assert torch.equal(kept(masks, "whole"), torch.cat([torch.ones(4, dtype=torch.bool), right]))
    assert torch.equal(kept(masks, "right"), right)
    assert "left" not in masks
    assert (sparsity["whole.weight"].asked, sparsity["whole.weight"].removed) == (0.5, 3)
    assert sparsity["whole.weight"].reason == "4 blocks stay: one is the model's own output"


def test_targets_that_the_graph_does_not_connect_share_a_mask_by_position():
    """Two attentions in one group: head i of the second leaves with head i of the first."""
    model = randomize(nn.Sequential(Fused(), Fused()))
    heads = highest(sum(norms(model[at].qkv).view(3, HEADS, SIZE).mean((0, 2)) for at in (0, 1)))
    given = [{"op_names": ["0.qkv", "1.qkv"], "sparse_ratio": 0.5, "dependency_group_id": "both"}]
    masks, _, _ = pruned(model, given, auto=False)
    for name in ("0.qkv", "1.qkv"):
        assert torch.equal(kept(masks, name), heads.repeat_interleave(SIZE).repeat(3))
    without = L1NormPruner(randomize(nn.Sequential(Fused(), Fused())), given)
    _, masks = without.compress()
    without.unwrap_model()
    assert torch.equal(kept(masks, "0.qkv"), kept(masks, "1.qkv"))
    assert int(kept(masks, "0.qkv").sum()) == 3 * HEADS * SIZE // 2


def test_blocks_of_several_classes_are_one_choice():
    """Pairs of channels, of which the classifier behind the flatten reads sixteen columns each."""
    model = randomize(Plain())
    pairs = highest(norms(model[0]).view(4, 2).sum(1))
    given = [{"op_names": ["0"], "sparse_ratio": 0.5, "granularity": [2, -1, -1, -1]}]
    masks, small, _ = pruned(model, given, torch.randn(IMAGE))
    assert torch.equal(kept(masks, "0"), pairs.repeat_interleave(2))
    given = [{"op_names": ["7"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    masks, small, sparsity = pruned(randomize(Plain()), given, torch.randn(IMAGE), auto=False)
    assert (small[3].out_channels, small[7].in_features, sparsity["7.weight"].removed) == (3, 48, 48)


def test_different_ratios_in_one_group_are_an_error():
    given = [{"op_names": ["left", "whole"], "sparse_ratio": 0.5}, {"op_names": ["right"], "sparse_ratio": 0.25}]
    model = randomize(Joined())
    config_list = tersor.auto_set_dependency_group_ids(model, given, X)
    pruner = L1NormPruner(model, config_list, example_inputs=X)
    with pytest.raises(ConflictError, match=r"sparse_ratio is 0\.25 for right\.weight but 0\.5 for whole\.weight"):
        pruner.compress()
    pruner.unwrap_model()


def test_all_heads_are_too_many():
    model = randomize(Fused())
    pruner = L1NormPruner(model, [{"op_names": ["qkv"], "sparse_ratio": 1.0}], example_inputs=X)
    with pytest.raises(EmptyLayerError, match=r"qkv\.weight"):
        pruner.compress()
    pruner.unwrap_model()


def test_sets_of_choices():
    model = Joined()
    plan = tersor.plan(model, tersor.auto_set_dependency_group_ids(model, LINEAR, X), example_inputs=X)
    first, second = choices(plan.targets)
    assert [(str(part), part.count, part.width, part.weight) for part in first] == [
        ("left.weight", 4, 1, WIDTH),
        ("whole.weight", 4, 1, WIDTH),
    ]
    assert [part.blocks.ravel().tolist() for part in second] == [list(range(6)), list(range(4, 10))]
    assert connected([]) == []
    assert connected([np.array([3]), np.array([1]), np.array([], dtype=np.int64), np.array([1, 3])]) == [[0, 1, 3], [2]]


def timm_model(name):
    import_torchvision()
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def test_one_of_three_heads_and_half_of_each_mlp_of_a_vit():
    model = timm_model("vit_tiny_patch16_224")
    scores = [norms(block.attn.qkv).view(3, 3, 64).mean((0, 2)) for block in model.blocks]
    masks, small, _ = pruned(model, LINEAR, torch.randn(2, 3, 224, 224))
    for at, (block, score) in enumerate(zip(small.blocks, scores, strict=True)):
        assert (block.attn.qkv.out_features, block.mlp.fc1.out_features) == (2 * 192, 384)
        heads = torch.arange(3) != score.argmin()
        assert torch.equal(kept(masks, f"blocks.{at}.attn.qkv"), heads.repeat_interleave(64).repeat(3))


@pytest.mark.parametrize("name", ["resnest14d", "ghostnet_050", "efficientnet_b0_g16_evos", "test_nfnet"])
def test_as_much_leaves_as_the_graph_allows(name):
    """Split attention, ghost modules, grouped convolutions and standardized weights: as with random choices."""
    model, x = timm_model(name), torch.randn(2, 3, 96, 96)
    whole = sum(parameter.numel() for parameter in model.parameters())
    by_chance = ModelSpeedup(copy.deepcopy(model), x, groups(model, x).random_masks(0.5)).speedup_model()
    types = ["Conv2d", "Linear", *(["ScaledStdConv2d"] if "nfnet" in name else [])]
    _, small, _ = pruned(model, [{"op_types": types, "sparse_ratio": 0.5}], x, tolerance=1e-4)
    removed, expected = (1 - sum(p.numel() for p in made.parameters()) / whole for made in (small, by_chance))
    assert removed == pytest.approx(expected, abs=0.005)
    assert removed > 0.25


def test_targets_are_joined_through_one_that_decides_nothing():
    """``left`` and ``right`` share no channel; ``whole`` has those of both, and no ratio of its own."""
    model = randomize(Joined())
    left, right = highest(norms(model.left)), highest(norms(model.right))
    given = [
        {"op_names": ["left", "right"], "sparse_ratio": 0.5, "dependency_group_id": "all"},
        {"op_names": ["whole"], "dependency_group_id": "all"},
    ]
    pruner = L1NormPruner(model, given, example_inputs=X)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert torch.equal(kept(masks, "left"), left)
    assert torch.equal(kept(masks, "right"), right)
    assert "whole" not in masks
