"""Dependency groups set by the graph."""

import copy

import pytest
import torch
import yaml
from torch import nn

import tersor
from tersor.errors import ConfigError, TraceError
from tersor.graph import groups
from tests.networks import IMAGE, Dense, Residual, Separable, Tokens, randomize

CONV = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def grouped(config_list, given):
    """What was put behind the given entries: sets of names, with the granularity."""
    added = config_list[len(given) :]
    assert all(entry["target_names"] == ["weight"] for entry in added)
    return {
        (frozenset(entry["op_names"]), "dependency_group_id" in entry, str(entry.get("granularity"))) for entry in added
    }


def test_layers_that_are_added_share_a_group():
    config_list = tersor.auto_set_dependency_group_ids(Residual(), CONV, X)
    assert grouped(config_list, CONV) == {
        (frozenset({"stem", "conv2"}), True, "default"),
        (frozenset({"conv3", "project"}), True, "default"),
    }
    assert [entry["dependency_group_id"] for entry in config_list[1:]] == ["dependency_0", "dependency_1"]


def test_grouped_convolutions_are_cut_in_runs():
    """Four groups of two channels each, between two convolutions; a gate of twelve channels before them."""
    config_list = tersor.auto_set_dependency_group_ids(Separable(), CONV, X)
    run = "[[2], 'back', -1]"
    assert grouped(config_list, CONV) == {
        (frozenset({"expand", "depthwise", "excite"}), True, "default"),
        (frozenset({"project", "grouped"}), True, run),
    }
    model = randomize(Separable())
    pruner = tersor.pruning.L1NormPruner(model, config_list, example_inputs=X)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    kept = masks["grouped"]["weight"].any((1, 2, 3))
    assert torch.equal(kept, masks["project"]["weight"].any((1, 2, 3)))
    assert torch.equal(kept[::2], kept[1::2])
    assert int(kept.sum()) == 4


def test_a_run_without_a_partner_gets_a_granularity_and_no_group():
    given = [{"op_names": ["grouped"], "sparse_ratio": 0.5}]
    (_, added) = tersor.auto_set_dependency_group_ids(Separable(), given, X)
    assert "dependency_group_id" not in added
    assert (added["op_names"], added["granularity"]) == (["grouped"], [[2], "back", -1])


def test_layers_that_are_joined_need_no_group():
    assert tersor.auto_set_dependency_group_ids(Dense(), CONV, X) == CONV


def test_tokens_that_are_added_share_a_group():
    """An embedding has its channels in the second dimension."""
    given = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}]
    config_list = tersor.auto_set_dependency_group_ids(Tokens(), given, torch.randint(0, 11, (2, 4)))
    assert grouped(config_list, given) == {(frozenset({"embed", "fc2"}), True, "default")}


class Attention(nn.Module):
    """Four heads of three queries' features; each head of keys and values is read by two."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 12), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 6)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_projections_of_grouped_heads_share_a_group_and_differ_in_their_runs():
    given = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    config_list = tersor.auto_set_dependency_group_ids(Attention(), given, torch.randn(2, 5, 6))
    assert grouped(config_list, given) == {
        (frozenset({"q"}), True, "[[6], 'back', -1]"),
        (frozenset({"k", "v"}), True, "[[3], 'back', -1]"),
    }
    assert {entry["dependency_group_id"] for entry in config_list[1:]} == {"dependency_0"}


class Mixed(nn.Module):
    """``both`` is added to what ``a`` and ``b`` make, in another order; ``alone`` shares nothing."""

    def __init__(self):
        super().__init__()
        self.alone = nn.Conv2d(3, 4, 1)
        self.a, self.b, self.both = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.alone(x))
        return self.fc(torch.relu(torch.cat([self.b(x), self.a(x)], 1) + self.both(x).flip(1)).mean((2, 3)))


def test_layers_that_share_a_part_are_decided_together():
    config_list = tersor.auto_set_dependency_group_ids(Mixed(), CONV, X)
    assert grouped(config_list, CONV) == {(frozenset({"a", "b", "both"}), True, "default")}
    model = randomize(Mixed())
    norms = {name: getattr(model, name).weight.detach().abs().sum((1, 2, 3)) for name in ("a", "b", "both")}
    joined = torch.cat([norms["b"], norms["a"]]) + norms["both"].flip(0)
    pruner = tersor.pruning.L1NormPruner(model, config_list, example_inputs=X)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    kept = {name: masks[name]["weight"].any((1, 2, 3)) for name in norms}
    assert torch.equal(torch.cat([kept["b"], kept["a"]]), kept["both"].flip(0))
    assert int(joined[:3].argmin()) == int((~kept["b"]).nonzero())
    assert int(joined[3:].argmin()) == int((~kept["a"]).nonzero())
    assert int((~kept["both"]).sum()) == 2


def test_settings_are_kept_and_different_ones_stand_apart():
    given = [
        {"op_names": ["stem"], "sparse_ratio": 0.5, "max_sparse_ratio": 0.75},
        {"op_names": ["conv2"], "sparse_ratio": 0.5},
    ]
    config_list = tersor.auto_set_dependency_group_ids(Residual(), given, X)
    assert config_list[:2] == given
    first, second = config_list[2:]
    assert (first["op_names"], first["max_sparse_ratio"]) == (["stem"], 0.75)
    assert (second["op_names"], second.get("max_sparse_ratio")) == (["conv2"], None)
    assert first["dependency_group_id"] == second["dependency_group_id"]
    plan = tersor.plan(Residual(), config_list, example_inputs=X)
    assert [(row.module, row.removes) for row in plan.rows if row.target == "weight"] == [("stem", 4), ("conv2", 4)]


def test_other_granularities_are_left_alone():
    given = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    assert tersor.auto_set_dependency_group_ids(Residual(), given, X) == given


def test_nothing_of_the_callers_is_changed():
    model, given = randomize(Residual()), [{"op_types": ["Conv2d"], "sparse_ratio": 0.5, "exclude_op_names": ["stem"]}]
    before, weights = copy.deepcopy(given), copy.deepcopy(model.state_dict())
    config_list = tersor.auto_set_dependency_group_ids(model, given, X)
    assert given == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    config_list.append({})
    config_list[0] = {}
    assert given == before


def test_the_same_list_for_the_same_model():
    model = Residual()
    first = tersor.auto_set_dependency_group_ids(model, CONV, X)
    assert first == tersor.auto_set_dependency_group_ids(model, CONV, groups(model, X))
    assert first == tersor.auto_set_dependency_group_ids(model, first[:1], X)


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_list_in_a_file(suffix, tmp_path):
    path = tmp_path / f"config.{suffix}"
    path.write_text(yaml.safe_dump(CONV) if suffix == "yaml" else str(CONV).replace("'", '"'))
    for given in (path, str(path)):
        assert tersor.auto_set_dependency_group_ids(Residual(), given, X) == (
            tersor.auto_set_dependency_group_ids(Residual(), CONV, X)
        )


def test_wrong_input_is_an_error():
    with pytest.raises(ConfigError, match=r"Did you mean 'Conv2d'"):
        tersor.auto_set_dependency_group_ids(Residual(), [{"op_types": ["Conv2D"], "sparse_ratio": 0.5}], X)
    with pytest.raises(TraceError, match="example_inputs"):
        tersor.auto_set_dependency_group_ids(Residual(), CONV, torch.randn(2, 4))
    with pytest.raises(TraceError, match="another model"):
        tersor.auto_set_dependency_group_ids(Residual(), CONV, groups(Dense(), X))
