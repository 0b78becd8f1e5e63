"""Coupling groups of small networks, written down by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import EmptyLayerError
from tersor.graph import Coupling, groups
from tests.networks import IMAGE, IMAGE_NETWORKS, Dense, LiteralView, Plain, Residual, Separable, Tokens, Upsampling


def free(coupling):
    """Free groups as (size, {tensor dim [offset:end]})."""
    return {
        (group.size, frozenset(f"{m.name} {m.dim} {m.offset}:{m.offset + m.count}" for m in group.members))
        for group in coupling.groups
        if group.frozen is None
    }


def bn(name, size):
    return {f"{name}.{target} 0 0:{size}" for target in ("weight", "bias", "running_mean", "running_var")}


def layer(name, size):
    return {f"{name}.weight 0 0:{size}", f"{name}.bias 0 0:{size}"}


def test_plain():
    assert free(groups(Plain(), torch.randn(IMAGE))) == {
        (8, frozenset(layer("0", 8) | bn("1", 8) | {"3.weight 1 0:8"})),
        (6, frozenset(layer("3", 6) | {"7.weight 1 0:96"})),
        (7, frozenset(layer("7", 7) | {"9.weight 1 0:7"})),
    }


def test_residual_stream_is_one_group():
    stream = layer("stem", 8) | bn("bn", 8) | layer("conv2", 8) | bn("bn2", 8)
    assert free(groups(Residual(), torch.randn(IMAGE))) == {
        (8, frozenset(stream | {"conv1.weight 1 0:8", "conv3.weight 1 0:8", "project.weight 1 0:8"})),
        (10, frozenset(layer("conv1", 10) | bn("bn1", 10) | {"conv2.weight 1 0:10"})),
        (12, frozenset(layer("conv3", 12) | layer("project", 12) | {"fc.weight 1 0:12"})),
    }


def test_joined_layers_stay_apart_with_offsets():
    last = {"last.weight", "last.bias", "last.running_mean", "last.running_var"}
    assert free(groups(Dense(), torch.randn(IMAGE))) == {
        (
            4,
            frozenset(
                layer("conv0", 4) | bn("norm", 4) | {"conv1.weight 1 0:4", "conv2.weight 1 0:4", "fc.weight 1 0:4"}
                | {f"{name} 0 0:4" for name in last}
            ),
        ),
        (6, frozenset(layer("conv1", 6) | {"conv2.weight 1 4:10", "fc.weight 1 4:10"} | {f"{n} 0 4:10" for n in last})),
        (5, frozenset(layer("conv2", 5) | {"fc.weight 1 10:15"} | {f"{name} 0 10:15" for name in last})),
    }  # fmt: skip


def test_groups_of_a_convolution_leave_whole():
    assert free(groups(Separable(), torch.randn(IMAGE))) == {
        (
            12,
            frozenset(
                layer("expand", 12) | layer("depthwise", 12) | bn("bn", 12) | layer("excite", 12)
                | {"squeeze.weight 1 0:12", "project.weight 1 0:12"}
            ),
        ),
        (4, frozenset(layer("squeeze", 4) | {"excite.weight 1 0:4"})),
        (4, frozenset(layer("project", 8) | layer("grouped", 8) | {"head.weight 1 0:8"})),
    }  # fmt: skip


def test_transposed_convolution():
    assert free(groups(Upsampling(), torch.randn(IMAGE))) == {
        (8, frozenset(layer("down", 8) | {"up.weight 0 0:8"})),
        (6, frozenset({"up.weight 1 0:6", "up.bias 0 0:6", "head.weight 1 0:6"} | layer("skip", 6))),
    }


def test_a_residual_stream_under_layer_norm_stays_unless_inexact_is_allowed():
    coupling = groups(Tokens(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert free(coupling) == {(10, frozenset(layer("fc1", 10) | {"fc2.weight 1 0:10"}))}
    assert coupling.frozen_reason("fc2.weight", 0) == "is normalized as a whole"
    inexact = Coupling(Tokens(), torch.tensor([[1, 2, 3], [4, 5, 6]]), allow_inexact=True)
    assert inexact.frozen_reason("fc2.weight", 0) is None
    assert inexact.inexact[int(inexact.classes_along("fc2.weight", 0)[0])] == "is normalized as a whole"


def test_what_has_no_rule_freezes_and_is_reported():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(torch.renorm(self.a(x), 2, 0, 1.0))

    coupling = groups(Folded(), torch.randn(2, 3))
    assert coupling.frozen_reason("a.weight", 0) == "meets 'renorm', which has no rule"
    assert coupling.unknown == {"renorm": 1}


def test_inputs_and_outputs_stay():
    coupling = groups(Plain(), torch.randn(IMAGE))
    assert "input" in (coupling.frozen_reason("0.weight", 1) or "")
    assert coupling.frozen_reason("9.weight", 0) == "is the model's own output"


def test_a_tensor_of_full_size_without_labels_freezes():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
            self.shift = torch.ones(6)

        def forward(self, x):
            return self.b(self.a(x) + self.shift)

    assert "add" in (groups(Shifted(), torch.randn(2, 3)).frozen_reason("a.weight", 0) or "")


def test_halves_lose_the_same_positions():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(3, 2)

        def forward(self, x):
            first, second = self.a(x).chunk(2, dim=1)
            return self.b(first * second)

    classes = groups(Halves(), torch.randn(2, 3)).classes_along("a.weight", 0)
    assert classes[:3].tolist() == classes[3:].tolist() == sorted(set(classes.tolist()))


def test_a_write_into_a_view_freezes():
    class Patch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = self.a(x)
            y[:, :2] = 1.0
            return self.b(y)

    assert groups(Patch(), torch.randn(2, 3)).frozen_reason("a.weight", 0) is not None


def test_tied_weights_share_their_labels():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    coupling = groups(net, torch.randn(1, 4))
    assert coupling.frozen_reason("0.weight", 0) == coupling.frozen_reason("1.weight", 0) is not None


@pytest.mark.parametrize("network", IMAGE_NETWORKS)
def test_the_model_is_left_as_it_was(network):
    net = network().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    groups(net, torch.randn(IMAGE))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())


def test_only_agreement_removes():
    coupling = groups(Residual(), torch.randn(IMAGE))
    mask = torch.ones(8, 1, 1, 1, dtype=torch.bool)
    mask[2] = False
    assert not coupling.removed({"stem": {"weight": mask}}).any()
    both = coupling.removed({"stem": {"weight": mask}, "conv2": {"weight": mask}})
    assert both.sum() == 1
    kept = coupling.kept(both)
    assert kept["conv3.weight"][1].tolist() == [True, True, False, *[True] * 5]
    assert kept["bn2.running_var"][0].sum() == 7


def test_masked_readers_remove_too():
    coupling = groups(Plain(), torch.randn(IMAGE))
    mask = torch.ones(6, 8, 1, 1, dtype=torch.bool)
    mask[:, 5] = False
    assert coupling.kept(coupling.removed({"3": {"weight": mask}}))["0.weight"][0].tolist() == [True] * 5 + [
        False, True, True]  # fmt: skip


def test_completed_masks_reach_biases_norms_and_readers():
    mask = torch.ones(8, 1, 1, 1, dtype=torch.bool)
    mask[0] = False
    complete = groups(Plain(), torch.randn(IMAGE)).complete({"0": {"weight": mask}})
    factors = {(module, target): found for module, targets in complete.items() for target, found in targets.items()}
    assert {place: [tuple(factor.shape) for factor in found] for place, found in factors.items()} == {
        ("0", "weight"): [(8, 1, 1, 1)],
        ("0", "bias"): [(8,)],
        ("1", "weight"): [(8,)],
        ("1", "bias"): [(8,)],
        ("3", "weight"): [(1, 8, 1, 1)],
    }
    assert all((~factor).flatten().nonzero().tolist() == [[0]] for found in factors.values() for factor in found)


def test_an_emptied_layer_is_refused():
    with pytest.raises(EmptyLayerError, match=r"0\.weight.*all 8"):
        groups(Plain(), torch.randn(IMAGE)).removed({"0": {"weight": torch.zeros(8, 1, 1, 1, dtype=torch.bool)}})


@pytest.mark.parametrize("network", [*IMAGE_NETWORKS, LiteralView])
def test_signatures_count_the_labels_of_each_axis(network):
    coupling = groups(network(), torch.randn(IMAGE))
    for counted in (None, np.flatnonzero(coupling.written), coupling.read):
        inside = np.zeros(len(coupling.classes), dtype=bool)
        inside[slice(None) if counted is None else counted] = True
        members = {}
        for number, axis in enumerate(coupling.axes):
            for label in range(axis.start, axis.start + axis.size):
                members.setdefault(int(coupling.classes[label]), []).extend([number] * int(inside[label]))
        signatures = coupling.signatures(counted)
        found = {(tuple(axes), int(signatures[root])) for root, axes in members.items()}
        assert len(found) == len({axes for axes, _ in found}) == len({signature for _, signature in found}) > 2


def test_words_and_json():
    coupling = groups(LiteralView(), torch.randn(IMAGE))
    assert "  conv.weight dim 0 [0:8] written" in str(coupling)
    assert coupling.to_dict()[0]["size"] == 8


def test_two_samples_of_a_batch_are_enough():
    seen = []

    class Watched(Plain):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    few, all_of_them = groups(Watched(), torch.randn(64, *IMAGE[1:])), groups(Plain(), torch.randn(IMAGE))
    assert seen == [2]
    assert str(few) == str(all_of_them)


def test_a_first_dimension_that_is_no_batch_is_taken_whole():
    class Nodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, adjacency, features):
            return self.b(torch.relu(adjacency @ self.a(features)))

    coupling = groups(Nodes(), (torch.rand(5, 5), torch.randn(5, 3)))
    assert free(coupling) == {(6, frozenset(layer("a", 6) | {"b.weight 1 0:6"}))}
