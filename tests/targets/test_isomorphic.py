"""Global groups set by the graph."""

import copy

import pytest
import torch
import yaml
from torch import nn

import tersor
from tersor.errors import ConfigError, TraceError
from tersor.graph import groups
from tersor.pruning import L1NormPruner
from tersor.pruning.group_norm import GroupNormPruner
from tersor.targets.isomorphic import auto_set_isomorphic_group_ids
from tests.networks import IMAGE, Residual, Tokens, randomize
from tests.torchvision_stub import import_torchvision

CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
LINEAR = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
FLAT = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def kinds(config_list, given):
    """What was put behind the given entries: the modules of each group."""
    found = {}
    for entry in config_list[len(given) :]:
        assert entry["target_names"] == ["weight"]
        found.setdefault(entry["global_group_id"], set()).update(entry["op_names"])
    return found


def test_the_blocks_of_a_resnet_are_alike_whatever_their_width():
    """Streams of the same number of writers and readers too; the first is written by a stem, the last classified."""
    model = import_torchvision().models.resnet18(num_classes=10)
    coupling = groups(model, torch.randn(2, 3, 32, 32))
    given = tersor.auto_set_dependency_group_ids(model, CONV, coupling)
    config_list = auto_set_isomorphic_group_ids(model, given, coupling)
    assert config_list[: len(given)] == given
    assert kinds(config_list, given) == {
        "isomorphic_0": {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3, 4) for block in (0, 1)},
        "isomorphic_1": {
            f"layer{stage}.{name}" for stage in (2, 3) for name in ("0.conv2", "0.downsample.0", "1.conv2")
        },
    }
    assert {entry.get("dependency_group_id") for entry in config_list[len(given) :]} == {
        None, "dependency_1", "dependency_2"
    }  # fmt: skip


class Block(nn.Module):
    """Attention of three heads and an MLP on a stream of six."""

    def __init__(self, size, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, 3 * size) for _ in range(3))
        self.out = nn.Linear(3 * size, 6)
        self.fc1, self.fc2 = nn.Linear(6, hidden), nn.Linear(hidden, 6)

    def forward(self, x):
        normed = self.norm1(x)
        q, k, v = (layer(normed).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """A vision transformer of two blocks, with other widths inside."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, 4, 6))
        self.first, self.second = Block(2, 12), Block(4, 8)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.second(self.first(x))).mean(1))


TRANSFORMER = [{"op_types": ["Linear", "Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["head"]}]


@pytest.mark.parametrize("allow_inexact", [False, True])
def test_heads_hidden_channels_and_the_stream_are_of_three_kinds(allow_inexact):
    """There is one stream, so it is ranked by itself and needs no group."""
    model = randomize(Transformer())
    coupling = groups(model, X, allow_inexact=allow_inexact)
    given = tersor.auto_set_dependency_group_ids(model, TRANSFORMER, coupling)
    config_list = auto_set_isomorphic_group_ids(model, given, coupling)
    assert kinds(config_list, given) == {
        "isomorphic_0": {f"{block}.{name}" for block in ("first", "second") for name in "qkv"},
        "isomorphic_1": {"first.fc1", "second.fc1"},
    }
    runs = {name: str(entry["granularity"]) for entry in config_list[len(given) :] for name in entry["op_names"]}
    assert (runs["first.q"], runs["second.q"]) == ("[[2], 'back', -1]", "[[4], 'back', -1]")
    plan = tersor.plan(model, config_list, example_inputs=coupling)
    stream = [row for row in plan.rows if (row.module, row.target) in {("patches", "weight"), ("first.fc2", "weight")}]
    assert [row.removes for row in stream] == ([3, 3] if allow_inexact else [0, 0])


def test_the_ratio_holds_for_the_kind_as_a_whole():
    """Half of 12 + 8 hidden channels of six elements each leaves, the weaker of both layers together."""
    model = randomize(Transformer())
    with torch.no_grad():
        model.second.fc1.weight.mul_(1.5)
    config_list = auto_set_isomorphic_group_ids(
        model, [{"op_names": ["first.fc1", "second.fc1"], "sparse_ratio": 0.5}], X
    )
    pruner = L1NormPruner(model, config_list, example_inputs=X)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    norms = torch.cat([block.fc1.weight.detach().abs().sum(1) for block in (model.first, model.second)])
    kept = torch.cat([masks[f"{name}.fc1"]["weight"].any(1) for name in ("first", "second")])
    assert set(kept.nonzero().flatten().tolist()) == set(norms.argsort()[10:].tolist())
    assert [int(part.sum()) for part in kept.split([12, 8])] != [6, 4]


def test_together_with_group_norms():
    model = randomize(Transformer())
    given = tersor.auto_set_dependency_group_ids(model, TRANSFORMER, X)
    pruner = GroupNormPruner(model, auto_set_isomorphic_group_ids(model, given, X), example_inputs=X)
    pruner.compress()
    removed = {target.target: target.removed for target in pruner.sparsity()}
    pruner.unwrap_model()
    assert removed["first.fc1.weight"] + removed["second.fc1.weight"] == 10
    heads = [removed[f"{block}.q.weight"] for block in ("first", "second")]
    # Heads of 2 * 6 * 3 and 4 * 6 * 3 elements: half of all is 4.5 of the lighter ones.
    assert 4.5 - 2 < 2 * heads[1] + heads[0] <= 4.5
    assert removed["first.k.weight"] == heads[0]


class Pairs(nn.Module):
    """Hidden channels of pairs of layers, each pair on the model's input; the hidden ones are pairwise different."""

    def __init__(self, *pairs):
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(*pair) for pair in pairs)

    def forward(self, x):
        return [pair(x) for pair in self.pairs]


def alike(*pairs, config_list=None, target="0"):
    config_list = config_list or [{"op_names": [f"pairs.{n}.{target}" for n in range(len(pairs))], "sparse_ratio": 0.5}]
    found = kinds(auto_set_isomorphic_group_ids(Pairs(*pairs), config_list, X), config_list)
    return sorted(sorted(int(name.split(".")[1]) for name in names) for names in found.values())


def conv(into, out, size=1, **settings):
    return nn.Conv2d(into, out, size, padding=size // 2, **settings)


def test_what_is_alike_and_what_is_not():
    plain = conv(3, 8), conv(8, 2)
    assert alike(plain, (conv(3, 6), conv(6, 4))) == [[0, 1]]
    assert alike(plain, (conv(3, 8, 3), conv(8, 2))) == []  # the writer's kernel
    assert alike(plain, (conv(3, 8), conv(8, 2, 5))) == []  # the reader's kernel
    assert alike(plain, (conv(3, 8), nn.BatchNorm2d(8), conv(8, 2))) == []  # one more that is carried
    assert alike(plain, (conv(3, 8, bias=False), conv(8, 2))) == []  # one less
    assert alike(plain, (conv(3, 8), nn.ConvTranspose2d(8, 2, 1))) == []  # the type, and the dimension
    # A stride and what has no parameters is no part of what leaves, and nor is the reader's bias.
    assert alike(plain, (conv(3, 8, stride=2), nn.GELU(), conv(8, 2, bias=False))) == [[0, 1]]
    assert alike(plain, (conv(3, 4), conv(4, 2)), (conv(3, 4, 3), conv(4, 2)), (conv(3, 6, 3), conv(6, 2))) == [
        [0, 1],
        [2, 3],
    ]


class Sum(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.first(x) + self.second(x)


class DepthwiseOrAdded(nn.Module):
    """A depthwise convolution behind another, and a dense one beside another, write the same kinds of weights."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Sequential(conv(3, 8), conv(8, 8, 3, groups=8), conv(8, 2))
        self.added = nn.Sequential(Sum(conv(3, 8), conv(3, 8, 3)), conv(8, 2))

    def forward(self, x):
        return self.depthwise(x), self.added(x)


def test_convolutions_in_groups_are_unlike_dense_ones():
    given = tersor.auto_set_dependency_group_ids(DepthwiseOrAdded(), CONV, X)
    assert len(given) == 3
    assert auto_set_isomorphic_group_ids(DepthwiseOrAdded(), given, X) == given


class Halves(nn.Module):
    """The channels of ``whole`` are added to those of two layers, each of which has readers of its own."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.whole = nn.Linear(6, 4), nn.Linear(6, 6), nn.Linear(6, 10)
        self.fc, self.side = nn.Linear(10, 2), nn.Linear(4, 2)

    def forward(self, x):
        left = self.left(x)
        return self.fc(torch.cat([left, self.right(x)], -1) + self.whole(x)), self.side(left)


class TwoHalves(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Halves(), Halves()

    def forward(self, x):
        return self.a(x), self.b(x)


def test_a_target_with_channels_of_two_kinds_shares_a_group_with_those_of_both():
    """Each of its kinds must be in the group of the target, and so must the others that they belong to."""
    given = tersor.auto_set_dependency_group_ids(TwoHalves(), LINEAR, FLAT)
    config_list = auto_set_isomorphic_group_ids(TwoHalves(), given, FLAT)
    assert kinds(config_list, given) == {
        "isomorphic_0": {f"{half}.{name}" for half in "ab" for name in ("left", "right", "whole")}
    }
    model = randomize(TwoHalves())
    pruner = GroupNormPruner(model, config_list, example_inputs=FLAT)
    pruner.compress()
    removed = {target.target: target.removed for target in pruner.sparsity() if target.asked}
    pruner.unwrap_model()
    assert sum(removed[f"{half}.whole.weight"] for half in "ab") == 10


class Fused(nn.Module):
    """Heads of a fused projection are written by one linear layer and read by another, as hidden channels are."""

    def __init__(self, size):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 9 * size), nn.Linear(3 * size, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_of_a_fused_projection_are_unlike_hidden_channels():
    hidden = [nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6)) for width in (8, 12)]
    model = nn.Sequential(Fused(2), hidden[0], Fused(4), hidden[1])
    given = [{"op_names": ["0.qkv", "1.0", "2.qkv", "3.0"], "sparse_ratio": 0.5}]
    assert kinds(auto_set_isomorphic_group_ids(model, given, FLAT), given) == {
        "isomorphic_0": {"0.qkv", "2.qkv"},
        "isomorphic_1": {"1.0", "3.0"},
    }


def test_different_ratios_share_no_group():
    pairs = [(conv(3, width), conv(width, 2)) for width in (4, 6, 8, 10)]
    config_list = [
        {"op_names": ["pairs.0.0", "pairs.2.0"], "sparse_ratio": 0.5},
        {"op_names": ["pairs.1.0", "pairs.3.0"], "sparse_ratio": 0.25},
    ]
    assert alike(*pairs, config_list=config_list) == [[0, 2], [1, 3]]
    thresholds = [{"op_names": ["pairs.0.0", "pairs.1.0"], "sparse_threshold": 0.5}]
    assert alike(*pairs, config_list=thresholds) == []
    limits = [{"op_names": ["pairs.0.0", "pairs.1.0"], "sparse_ratio": 0.5}]
    limits.append({"op_names": ["pairs.2.0"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.75})
    found = auto_set_isomorphic_group_ids(Pairs(*pairs), limits, X)[2:]
    assert [(entry["op_names"], entry.get("max_sparse_ratio"), entry["global_group_id"]) for entry in found] == [
        (["pairs.0.0", "pairs.1.0"], None, "isomorphic_0"),
        (["pairs.2.0"], 0.75, "isomorphic_0"),
    ]


def test_groups_that_were_set_before_are_kept_and_their_names_not_used_again():
    pairs = [(conv(3, width), conv(width, 2)) for width in (4, 6, 8, 10)]
    given = [
        {"op_names": ["pairs.0.0", "pairs.1.0"], "sparse_ratio": 0.5},
        {"op_names": ["pairs.2.0", "pairs.3.0"], "sparse_ratio": 0.5, "global_group_id": "isomorphic_0"},
    ]
    config_list = auto_set_isomorphic_group_ids(Pairs(*pairs), given, X)
    assert kinds(config_list, given) == {"isomorphic_1": {"pairs.0.0", "pairs.1.0"}}
    assert auto_set_isomorphic_group_ids(Pairs(*pairs), config_list, X) == config_list


def test_other_blocks():
    """Input channels are structures too; single elements are none."""
    pairs = [(conv(3, width), conv(width, 2)) for width in (4, 6)]
    given = [{"op_names": ["pairs.0.1", "pairs.1.1"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    assert alike(*pairs, config_list=given) == [[0, 1]]
    assert alike(*pairs, config_list=[{**given[0], "granularity": [1, 1, 1, 1]}]) == []


def test_nothing_of_the_callers_is_changed():
    model = randomize(Transformer())
    before, weights = copy.deepcopy(TRANSFORMER), copy.deepcopy(model.state_dict())
    config_list = auto_set_isomorphic_group_ids(model, TRANSFORMER, X)
    assert len(config_list) > 1
    config_list.append({})
    assert before == TRANSFORMER
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_list_in_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(TRANSFORMER))
    model = Transformer()
    assert auto_set_isomorphic_group_ids(model, path, X) == auto_set_isomorphic_group_ids(model, TRANSFORMER, X)


def test_wrong_input_is_an_error():
    with pytest.raises(ConfigError, match=r"Did you mean 'Conv2d'"):
        auto_set_isomorphic_group_ids(Residual(), [{"op_types": ["Conv2D"], "sparse_ratio": 0.5}], X)
    with pytest.raises(TraceError, match="example_inputs"):
        auto_set_isomorphic_group_ids(Residual(), CONV, torch.randn(2, 4))
    with pytest.raises(TraceError, match="another model"):
        auto_set_isomorphic_group_ids(Residual(), CONV, groups(Tokens(), torch.zeros(2, 3, dtype=torch.int64)))
