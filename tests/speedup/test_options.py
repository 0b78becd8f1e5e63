"""What ModelSpeedup takes beside masks."""

import copy

import pytest
import torch
from torch import nn

from tersor.errors import InvalidValueError, VerificationError
from tersor.graph import groups
from tersor.graph.inputs import named_tensors
from tersor.speedup import ModelSpeedup
from tersor.speedup.slicing import bake
from tersor.speedup.verify import outputs_of, relative_error
from tests.networks import IMAGE, randomize


def convolutions(width=20):
    return randomize(
        nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, 4, 1), nn.Flatten())
    )


def test_round_to_leaves_a_multiple_and_stays_exact():
    model, x = convolutions(), torch.randn(IMAGE)
    coupling = groups(model, x)
    masks = coupling.random_masks(0.5)
    reference = copy.deepcopy(model)
    bake(named_tensors(reference), coupling.complete(masks))
    speedup = ModelSpeedup(model, x, masks, round_to=8)
    small = speedup.speedup_model()
    assert small[0].out_channels == 16  # ten of twenty were asked for
    assert relative_error(outputs_of(small, x), outputs_of(reference, x)) < 1e-6
    assert [(left.target, left.count) for left in speedup.report.left_alone] == [("0.weight dim 0", 6)]
    assert "round_to" in speedup.report.left_alone[0].reason


def test_constants_are_folded_on_request():
    """Only the weight is masked: its bias and the norm's shift go on, and end up in the reader's bias."""
    model, x = convolutions(), torch.randn(IMAGE)
    masks = groups(model, x).random_masks(0.5)
    reference = copy.deepcopy(model)
    bake(named_tensors(reference), {name: {t: (m,) for t, m in own.items()} for name, own in masks.items()})
    small = ModelSpeedup(model, x, masks, constants="fold").speedup_model()
    assert small[0].out_channels == 10
    assert relative_error(outputs_of(small, x), outputs_of(reference, x)) < 1e-6
    masked = ModelSpeedup(convolutions(), x, masks).speedup_model()
    assert relative_error(outputs_of(masked, x), outputs_of(reference, x)) > 0.01


def test_a_choice_that_does_not_exist():
    model, x = convolutions(), torch.randn(IMAGE)
    with pytest.raises(InvalidValueError, match="constants is 'bake'"):
        ModelSpeedup(model, x, {}, constants="bake")
    with pytest.raises(InvalidValueError, match="round_to"):
        ModelSpeedup(model, x, groups(model, x).random_masks(0.5), round_to=0).speedup_model()


class Stream(nn.Module):
    """A residual stream under layer norm."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def test_the_width_under_layer_norm_leaves_only_where_inexact_is_allowed():
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    stays = ModelSpeedup(model := Stream(), x, groups(model, x).random_masks(0.5))
    assert stays.speedup_model().norm.normalized_shape == (16,)
    assert stays.report.inexact == ()
    model = Stream()
    masks = groups(model, x, allow_inexact=True).random_masks(0.5)
    speedup = ModelSpeedup(model, x, masks, allow_inexact=True)
    small = speedup.speedup_model()
    assert small.norm.normalized_shape == (8,)
    assert (small.up.in_features, small.up.out_features, small.embed.out_features) == (8, 16, 8)
    assert {left.target for left in speedup.report.inexact} == {"embed.weight dim 0", "down.weight dim 0"}
    assert {left.reason for left in speedup.report.inexact} == {"is normalized as a whole"}
    assert 1e-4 < speedup.report.error < 1


class Doubled(nn.Module):
    """Opaque to the graph: it takes a detour through NumPy."""

    def forward(self, x):
        return torch.from_numpy(2 * x.detach().numpy())


def test_a_rule_for_one_speedup():
    model = randomize(nn.Sequential(nn.Linear(5, 8), Doubled(), nn.Linear(8, 3)))
    x = torch.randn(2, 5)
    assert groups(model, x).frozen_reason("0.weight", 0) is not None
    rules = {Doubled: lambda call: call.labels("x")}
    masks = groups(model, x, customized_mask_updaters=rules).random_masks(0.5)
    small = ModelSpeedup(model, x, masks, customized_mask_updaters=rules).speedup_model()
    assert small[0].out_features == 4
    assert groups(small, x).frozen_reason("0.weight", 0) is not None, "the rule is gone"


class Counted(nn.Module):
    """Its code knows how many channels it has."""

    def __init__(self, channels):
        super().__init__()
        self.inner, self.channels_seen = nn.Linear(channels, channels), 2 * channels

    def forward(self, x):
        if x.shape[-1] != self.channels_seen // 2:
            raise ValueError("another width")
        return self.inner(x)


def test_a_replacer_for_one_speedup():
    def count(module, cut):
        module.channels_seen = 2 * int(cut.along("inner.weight", 1).sum())

    model, x = randomize(nn.Sequential(nn.Linear(5, 8), Counted(8), nn.Linear(8, 3))), torch.randn(2, 5)
    masks = groups(model, x).random_masks(0.5)
    speedup = ModelSpeedup(model, x, masks, customized_replacers={Counted: count})
    small = speedup.speedup_model()
    assert (small[0].out_features, small[1].channels_seen) == (4, 8)
    assert speedup.report.error < 1e-6


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).view(-1, 288))


def test_a_graph_of_the_users_own():
    model, x = randomize(Literal()), torch.randn(IMAGE)
    graph = torch.fx.symbolic_trace(model)
    masks = groups(model, x).random_masks(0.5)
    speedup = ModelSpeedup(model, x, masks, graph_module=graph)
    with pytest.warns(UserWarning, match="GraphModule"):
        small = speedup.speedup_model()
    assert small is graph
    assert speedup.report.repairs == ("the model: args[2] of 'view' 288 -> 144",)
    assert small(torch.randn(7, *IMAGE[1:])).shape == (7, 4)


def test_a_graph_that_does_not_help_stays_as_it_was():
    class Deciding(Literal):
        def forward(self, x):
            return super().forward(x) / self.conv.out_channels

    model, x = randomize(Deciding()), torch.randn(IMAGE)
    graph = torch.fx.symbolic_trace(Literal())  # another model's
    code = graph.code
    with pytest.raises(VerificationError):
        ModelSpeedup(model, x, groups(model, x).random_masks(0.5), graph_module=graph).speedup_model()
    assert graph.code == code
    assert (model.conv.out_channels, graph.conv.out_channels) == (8, 8)
