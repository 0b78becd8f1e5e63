"""Channels in multiples: as few as possible come back, and nothing new leaves."""

import copy
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor.errors import InvalidValueError
from tersor.graph import groups
from tersor.graph.inputs import named_tensors
from tersor.speedup.rounding import round_up_kept
from tersor.speedup.slicing import bake, cut
from tersor.speedup.verify import outputs_of, relative_error
from tests.networks import randomize

IMAGE = (2, 3, 6, 6)


class Branches(nn.Module):
    """Two branches of 20 and 12 channels, joined; the second also ends in a flatten, four positions a channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 20, 1), nn.Conv2d(3, 12, 1)
        self.norm = nn.BatchNorm2d(32)
        self.mix = nn.Conv2d(32, 24, 3)
        self.fc = nn.Linear(48, 5)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        y = self.mix(self.norm(torch.cat([a, b], 1)).relu())
        return y.mean((2, 3)), self.fc(nn.functional.adaptive_avg_pool2d(b, 2).flatten(1))


class WithInput(nn.Module):
    """The model's own input is joined to 16 channels, so that what reads them never has a multiple of 4."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(19, 4, 1)

    def forward(self, x):
        return self.last(torch.cat([self.conv(x), x], 1))


class Grouped(nn.Module):
    """Eight groups of two channels, whose classes are two indices wide, and a residual stream of 16 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=8)
        self.inner, self.outer = nn.Conv2d(16, 10, 1), nn.Conv2d(10, 16, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        x = self.grouped(self.stem(x).relu())
        return self.fc((x + self.outer(self.inner(x).relu())).mean((2, 3)))


class Heads(nn.Module):
    """Six heads of four, in one projection."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 72), nn.Linear(24, 8)
        self.up, self.down = nn.Linear(8, 30), nn.Linear(30, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), -1, 3, 6, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.out((torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2))
        return self.down(torch.relu(self.up(x)))


NETWORKS = {Branches: IMAGE, WithInput: IMAGE, Grouped: IMAGE, Heads: (2, 5, 8)}


@cache
def coupling_of(network):
    return groups(randomize(network()), torch.randn(NETWORKS[network]))


def parts_of(coupling):
    """For each contraction's dimension its parts: classes that cut the same dimensions equally often, by hand."""
    touched = coupling.written | coupling.read
    axes = [axis for axis in coupling.axes if touched[axis.span].any()]
    cuts = defaultdict(Counter)
    for number, axis in enumerate(axes):
        for label in coupling.classes[axis.span].tolist():
            cuts[label][number] += 1
    alike = defaultdict(list)
    for label, counts in cuts.items():
        alike[tuple(sorted(counts.items()))].append(label)
    return axes, alike


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=60, deadline=None, database=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), multiple=st.integers(1, 17))
def test_every_part_is_a_multiple_or_uncut_and_as_little_as_possible_comes_back(network, seed, share, multiple):
    coupling = coupling_of(network)
    removed = (np.random.default_rng(seed).random(len(coupling.classes)) < share) & ~coupling.frozen
    before = removed.copy()
    rounded = round_up_kept(coupling, removed, multiple)
    assert np.array_equal(removed, before)
    assert not (rounded & ~removed).any()
    axes, alike = parts_of(coupling)
    total = Counter()
    whole = set(range(len(axes)))
    for counts, labels in alike.items():
        kept = int((~rounded[labels]).sum())
        fits = [all(count * left % multiple == 0 for _, count in counts) for left in range(len(labels) + 1)]
        assert fits[kept] or kept == len(labels)
        asked = int((~removed[labels]).sum())
        assert not any(fits[asked:kept])
        for number, count in counts:
            total[number] += count * kept
            if count * kept % multiple:
                whole.discard(number)
    for number, axis in enumerate(axes):
        left = int((~rounded[coupling.classes[axis.span]]).sum())
        assert left == total[number]
        assert number not in whole or left % multiple == 0


def kept_of(network, multiple, masks):
    coupling = coupling_of(network)
    removed = coupling.removed({name: {"weight": mask} for name, mask in masks.items()})
    kept = coupling.kept(round_up_kept(coupling, removed, multiple))
    return {f"{name} {dim}": int(v.sum()) for name, dims in kept.items() for dim, v in dims.items() if "weight" in name}


def first(kept, size, rank):
    return (torch.arange(size) < kept).reshape([-1] + [1] * (rank - 1))


def test_each_branch_of_a_concatenation_is_rounded():
    """9 of 20 become 16. 3 of 12 become 8: they are 4 indices wide in the flatten, but one in the convolution."""
    kept = kept_of(Branches, 8, {"a": first(9, 20, 4), "b": first(3, 12, 4)})
    assert kept == {"a.weight 0": 16, "b.weight 0": 8, "norm.weight 0": 24, "mix.weight 1": 24, "fc.weight 1": 32}


def test_what_has_no_larger_multiple_keeps_its_size():
    """17 of 20 would need 24; 12 is no multiple of 8, so the whole concatenation is not either: 20 + 8."""
    kept = kept_of(Branches, 8, {"a": first(17, 20, 4), "b": first(3, 12, 4)})
    assert kept == {"b.weight 0": 8, "norm.weight 0": 28, "mix.weight 1": 28, "fc.weight 1": 32}


def test_a_part_that_cannot_be_cut_is_counted_apart():
    kept = kept_of(WithInput, 4, {"conv": first(5, 16, 4)})
    assert kept == {"conv.weight 0": 8, "last.weight 1": 11}


def test_wide_classes_come_back_whole():
    """Two indices a class: 3 of 8 groups are 6 channels, and 4 are 8. Ten inner channels are cut to 8, not to 4."""
    masks = {"stem": first(6, 16, 4), "grouped": first(6, 16, 4), "outer": first(6, 16, 4), "inner": first(5, 10, 4)}
    kept = kept_of(Grouped, 4, masks)
    assert kept["stem.weight 0"] == kept["grouped.weight 0"] == kept["outer.weight 0"] == kept["fc.weight 1"] == 8
    assert kept["inner.weight 0"] == kept["outer.weight 1"] == 8


def test_heads_come_back_whole():
    """One head is four indices of the output projection: two make a multiple of 8."""
    mask = torch.ones(3, 6, 4, dtype=torch.bool)
    mask[:, [0, 2, 5]] = False
    kept = kept_of(Heads, 8, {"qkv": mask.reshape(72, 1)})
    assert kept == {"qkv.weight 0": 48, "out.weight 1": 16}


def test_the_first_channels_come_back():
    coupling = coupling_of(Branches)
    mask = torch.ones(20, 1, 1, 1, dtype=torch.bool)
    mask[[1, 4, 5, 8, 9, 12, 19]] = False
    rounded = round_up_kept(coupling, coupling.removed({"a": {"weight": mask}}), 8)
    assert np.flatnonzero(rounded[coupling.classes_along("a.weight", 0)]).tolist() == [8, 9, 12, 19]


@pytest.mark.parametrize("network", [Branches, WithInput, Grouped])
def test_channels_that_come_back_change_nothing(network):
    """They stay with their masks, and with the masks that follow from them: the masked model is the reference."""
    model = randomize(network()).double()
    coupling = coupling_of(network)
    masks = coupling.random_masks(0.7)
    removed = coupling.removed(masks)
    rounded = round_up_kept(coupling, removed, 4)
    assert 0 < rounded.sum() < removed.sum()
    bake(named_tensors(model), coupling.complete(masks, removed))
    reference = copy.deepcopy(model)
    cut(model, named_tensors(model), coupling.kept(rounded), {})
    x = torch.randn(NETWORKS[network], dtype=torch.float64)
    assert relative_error(outputs_of(model, x), outputs_of(reference, x)) < 1e-12


@pytest.mark.parametrize("multiple", [0, -8, 2.5, True, "8"])
def test_a_multiple_is_a_positive_integer(multiple):
    coupling = coupling_of(Branches)
    with pytest.raises(InvalidValueError, match=r"round_to: .* is no number of channels"):
        round_up_kept(coupling, np.zeros(len(coupling.classes), dtype=bool), multiple)
