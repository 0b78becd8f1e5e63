"""Which modules can be fused, and what a config list's groups come to."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.config import parse_config_list
from tersor.errors import ConflictError, InvalidValueError, UnmatchedError
from tersor.targets.fused import FusedGroup, channels_of, fused_groups, over_outputs, read_groups, why_not_folded
from tersor.targets.plan import plan
from tersor.targets.resolve import resolve_targets
from tersor.targets.selection import Modules
from tests.networks import Plain
from tests.quantization.chains import HEADS, NORMS, channels


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Unbiased(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


class NormAndMore(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


def groups_of(config_list, model=None):
    model = model or Plain()
    entries = parse_config_list(config_list, "quantization")
    return fused_groups(model, entries, resolve_targets(model, entries, "quantization").targets)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_takes_the_norm_of_its_dimensions(name):
    head = HEADS[name]()
    assert channels_of(head) == channels(head)
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        fits = NORMS[head.weight.dim()] is kind
        assert (why_not_folded(head, kind(channels(head))) == "") is fits
    assert why_not_folded(head, nn.SyncBatchNorm(channels(head))) == ""


@pytest.mark.parametrize(
    ("head", "norm", "reason"),
    [
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(8), "the one has 4 channels, the other 8"),
        (nn.ConvTranspose2d(4, 6, 1, groups=2), nn.BatchNorm2d(3), "the one has 6 channels, the other 3"),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), "it keeps no running statistics"),
        (nn.Linear(3, 4), nn.BatchNorm2d(4), "a BatchNorm2d does not follow a Linear"),
        (nn.Conv2d(3, 4, 1), NormAndMore(4), "may do more"),
        (Standardised(3, 4, 2), nn.BatchNorm2d(4), "not proportional to the weight"),
        (Unbiased(3, 4, 2), nn.BatchNorm2d(4), "not proportional to the weight"),
    ],
)
def test_why_a_norm_cannot_be_folded(head, norm, reason):
    assert reason in why_not_folded(head, norm)


def test_one_number_for_each_output_channel_of_a_grouped_transposed_convolution():
    layer, scale = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False), torch.randn(6)
    x = torch.randn(2, 4, 5)
    expected = layer(x) * scale.view(6, 1)
    with torch.no_grad():
        layer.weight *= over_outputs(scale, layer.weight.shape, 1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("0", "1"), FusedGroup("0", "1")),
        (("0", "1", "2"), FusedGroup("0", "1", "2")),
        (("3", "4"), FusedGroup("3", None, "4")),
        (("7", "8"), FusedGroup("7", None, "8")),
        (["0", "2"], FusedGroup("0", None, "2")),
        (("1", "2"), FusedGroup("1", None, "2")),
    ],
)
def test_names_in_order(names, group):
    assert read_groups(Modules(Plain()), [("here", names)]) == [group]
    assert group.names == tuple(names)
    assert group.last == names[-1]


@pytest.mark.parametrize(
    ("names", "error", "match"),
    [
        ([("0",)], InvalidValueError, "two or three names"),
        ([("0", "1", "2", "3")], InvalidValueError, "two or three names"),
        ([("0", "bn1")], UnmatchedError, "'bn1' of .* is no module"),
        ([("0", "2", "1")], ConflictError, "they are Conv2d, ReLU, BatchNorm2d.*Legal: a convolution or"),
        ([("0", "1", "5")], ConflictError, "they are Conv2d, BatchNorm2d, AdaptiveAvgPool2d"),
        ([("2", "0")], ConflictError, "they are ReLU, Conv2d"),
        ([("1", "1")], ConflictError, "they are BatchNorm2d, BatchNorm2d"),
        ([("3", "1")], ConflictError, "'1' cannot be folded into '3': the one has 6 channels, the other 8"),
        ([("0", "1"), ("0", "1", "2")], ConflictError, "'0' belongs to .'0', '1'. and to .'0', '1', '2'"),
        ([("3", "4"), ("7", "4")], ConflictError, "'4' belongs to"),
    ],
)
def test_what_is_no_group(names, error, match):
    with pytest.raises(error, match=match):
        read_groups(Modules(Plain()), [("here", group) for group in names])


def test_groups_of_a_config_list():
    weights = {
        "op_types": ["Conv2d", "Linear"],
        "target_names": ["weight"],
        "fuse_names": [("0", "1", "2"), ("3", "4")],
    }
    outputs = {"op_names": ["0"], "target_names": ["_output_0"], "fuse_names": [("0", "1", "2")]}
    expected = {"0": FusedGroup("0", "1", "2"), "3": FusedGroup("3", None, "4")}
    assert groups_of([weights, outputs]) == expected
    assert groups_of([weights, {"op_names": ["3"], "exclude": True}]) == {"0": FusedGroup("0", "1", "2")}


def test_the_weight_that_a_norm_is_folded_into_is_quantized():
    entry = {"op_names": ["0"], "target_names": ["_output_0"], "fuse_names": [("0", "1")]}
    with pytest.raises(ConflictError, match="'1' is to be folded into the weight of '0', which is not quantized"):
        groups_of([entry])
    assert groups_of([{**entry, "fuse_names": [("0", "2")]}]) == {"0": FusedGroup("0", None, "2")}


def test_members_have_no_targets_of_their_own_and_the_plan_says_so():
    config = [{"op_types": ["Conv2d", "BatchNorm2d", "ReLU"], "fuse_names": [("0", "1", "2")]}]
    made = plan(Plain(), config, "quantization")
    assert {row.module for row in made.rows} == {"0", "3", "4"}
    assert {row.group for row in made.rows if row.module == "0"} == {"0 + 1 + 2"}
    assert {row.group for row in made.rows if row.module != "0"} == {""}
    assert {name: made.skipped[name] for name in "12"} == {"1": "fused into '0'", "2": "fused into '0'"}
    assert "fused into '0'" in made.explain("1")
