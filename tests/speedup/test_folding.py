"""Folded constants: the small model computes what the model with nothing but the given masks computes."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.graph import groups
from tersor.graph.inputs import named_tensors
from tersor.speedup.folding import find_constants, fold
from tersor.speedup.rounding import round_up_kept
from tersor.speedup.slicing import bake, cut
from tersor.speedup.verify import outputs_of, relative_error
from tests.networks import randomize

IMAGE = (2, 3, 6, 6)


def masks_of(model, **dropped):
    """Masks of nothing but weights: ``layer=[rows]``."""
    masks = {}
    for name, rows in dropped.items():
        name = name.strip("_")
        weight = model.get_submodule(name).weight
        keep = torch.ones(weight.shape[0], *[1] * (weight.dim() - 1), dtype=torch.bool)
        keep[rows] = False
        masks[name] = {"weight": keep}
    return masks


def shrink(model, x, masks, round_to=1, **options):
    """The recipe: the small model, the reference that it must equal, and what was found."""
    model = randomize(model).double().eval()
    coupling = groups(model, x)
    removed = round_up_kept(coupling, coupling.removed(masks), round_to)
    assert removed.any()
    before = {name: tensor.clone() for name, tensor in named_tensors(model).items()}
    constants = find_constants(model, coupling, masks, removed, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(model).items())
    reference = copy.deepcopy(model)
    bake(named_tensors(reference), coupling.complete(masks, constants.masked))
    kept = coupling.kept(removed)
    cut(model, named_tensors(model), kept, coupling.complete(masks, constants.masked))
    made = fold(model, constants.shifts, kept)
    return model, reference, constants, made


def error(small, reference, shape=IMAGE):
    x = torch.randn(5, *shape[1:], dtype=torch.float64)
    return relative_error(outputs_of(small, x), outputs_of(reference, x))


def only_masked(model, masks):
    """The model with the given masks burnt in, and nothing else."""
    model = copy.deepcopy(model)
    bake(named_tensors(model), {m: {t: (mask,) for t, mask in targets.items()} for m, targets in masks.items()})
    return model


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


class Residual(nn.Module):
    """Two branches that are added: the constants of both arrive together."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.c = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x) + self.norm(self.b(x))
        return self.fc(x.relu().mean((2, 3))), self.c(x.sigmoid())


FOLDED = {
    "conv-relu-conv1x1": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        {"0": [1, 4]},
    ),
    "conv-conv3x3": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, stride=2)), {"0": [0, 1, 2]}),
    "conv-bn-relu-linear": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
        ),
        {"0": [2, 5, 6]},
    ),
    "conv-bn-conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)), {"0": [3, 7]}),
    "flatten-linear": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(128, 3)),
        {"0": [0, 7]},
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.SiLU(), nn.Conv2d(8, 4, 1)
        ),
        {"0": [1, 2], "2": [1, 2]},
    ),
    "groups that leave whole": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Tanh(), nn.Conv2d(12, 4, 1)),
        {"0": [2, 3], "1": [3, 4, 5]},
    ),
    "two in a row": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 1)),
        {"0": [1, 4], "2": [0, 4]},
    ),
    "residual": (Residual, {"a": [1, 4, 6], "b": [1, 4, 6]}),
    **{
        f"{mode} padding": (
            lambda mode=mode: nn.Sequential(
                nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 3, padding=1, padding_mode=mode)
            ),
            {"0": [1, 4]},
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "padding that adds nothing": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1, padding="same")),
        {"0": [1, 4]},
    ),
    "one dimension": (
        lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 1), nn.SiLU(), nn.Conv1d(8, 4, 3)),
        {"1": [1, 4]},
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folding_is_exact_with_respect_to_the_given_masks_alone(name):
    make, dropped = FOLDED[name]
    model = make()
    masks = masks_of(model, **dropped)
    small, reference, constants, made = shrink(model, double(*IMAGE), masks)
    assert constants.not_folded == ()
    assert not constants.masked.any()
    assert made == ()
    assert sum(float(shift.values.abs().sum()) for shift in constants.shifts) > 1e-4
    assert error(small, reference) < 1e-12
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in reference.parameters())


def test_the_reference_differs_from_the_completed_model():
    """What folding saves: with masked biases the model computes something else."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    masks = masks_of(model, **{"0": [1, 4]})
    _, reference, _, _ = shrink(model, double(*IMAGE), masks)
    completed = copy.deepcopy(reference)
    coupling = groups(completed, double(*IMAGE))
    bake(named_tensors(completed), coupling.complete(masks))
    assert error(completed, reference) > 1e-3


@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_without_a_bias_gets_one(grad):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Flatten()
    )
    model.append(nn.Linear(96, 2, bias=False)).requires_grad_(grad)
    masks = masks_of(model, **{"0": [1, 4], "2": [0]})
    small, reference, constants, made = shrink(model, double(*IMAGE), masks)
    assert made == ("2.bias", "5.bias")
    assert small[2].bias.shape == (5,)
    assert small[2].bias.requires_grad is grad
    assert constants.not_folded == ()
    assert error(small, reference) < 1e-12
    assert reference[2].bias is None


def test_zero_padding_masks_what_is_not_zero():
    """Of a ReLU's constants half are zero, and zero is what the padding is."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    masks = masks_of(model, **{"0": [1, 4, 6]})
    randomize(model)
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([1.0, -1, 1, 1, 2, 1, -2, 1]))
    fixed = copy.deepcopy(model)
    coupling = groups(model, torch.randn(IMAGE))
    constants = find_constants(model, coupling, masks, coupling.removed(masks))
    assert constants.masked[coupling.classes_along("0.weight", 0)].tolist() == [row == 4 for row in range(8)]
    [left] = constants.not_folded
    assert (left.target, left.count) == ("2.weight dim 1", 1)
    assert left.reason == "zero padding meets its constant at the border"
    bake(named_tensors(fixed), coupling.complete(masks, constants.masked))
    kept = coupling.kept(coupling.removed(masks))
    cut(model, named_tensors(model), kept, coupling.complete(masks, constants.masked))
    fold(model, constants.shifts, kept)
    x = torch.randn(5, *IMAGE[1:])
    assert relative_error(outputs_of(model, x), outputs_of(fixed, x)) < 1e-6


class TwoReaders(nn.Module):
    """One channel is read with and without padding: it cannot be folded in one place and masked in the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.point, self.padded = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.conv(x)).sigmoid()
        return self.point(x), self.padded(x)


def test_what_one_reader_cannot_fold_is_masked_for_all():
    masks = masks_of(TwoReaders(), conv=[1, 4])
    small, reference, constants, _ = shrink(TwoReaders(), double(*IMAGE), masks)
    assert constants.masked.sum() == 2
    assert constants.shifts == ()
    assert not reference.point.weight[:, [1, 4]].any()
    assert not reference.norm.bias[[1, 4]].any()
    assert error(small, reference) < 1e-12


class Gate(nn.Module):
    """A constant of one layer is part of another one's: ``side`` feeds a gate on ``main``."""

    def __init__(self, padding):
        super().__init__()
        self.side, self.main = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.gate = nn.Conv2d(4, 1, 1)
        self.extra = nn.Conv2d(4, 2, 3, padding=padding)
        self.last = nn.Conv2d(6, 2, 1)
        with torch.no_grad():
            self.main.bias.fill_(1.0)

    def forward(self, x):
        side = self.side(x).sigmoid()
        return self.last(self.main(x) * self.gate(side)), self.extra(side)


@pytest.mark.parametrize("padding", [0, 1])
def test_masking_one_channel_moves_what_another_carries(padding):
    """The gate reads nothing but a removed channel of ``side``, which the padded reader does not let fold."""
    model = randomize(Gate(padding))
    masks = masks_of(model, side=[2], main=[0, 5])
    masks["gate"] = {"weight": torch.tensor([False, False, True, False]).reshape(1, 4, 1, 1)}
    small, reference, constants, _ = shrink(model, double(*IMAGE), masks)
    assert int(constants.masked.sum()) == padding
    assert [left.target for left in constants.not_folded] == ["extra.weight dim 1"] * padding
    shifts = {shift.weight: shift.values for shift in constants.shifts}
    weight = reference.last.weight.data[:, [0, 5], 0, 0]
    factor = reference.gate.bias.data.clone()
    if not padding:
        factor += reference.gate.weight.data[0, 2, 0, 0] * reference.side.bias.data[2].sigmoid()
    torch.testing.assert_close(shifts["last.weight"], weight @ reference.main.bias.data[[0, 5]] * factor)
    assert error(small, reference) < 1e-12


class Excite(nn.Module):
    """Squeeze and excitation: a removed channel carries ``bias * gate(x)``."""

    def __init__(self):
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.table = nn.Parameter(torch.randn(8, 4, 4))
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.last(x * self.gate(x))

    def gate(self, x):
        return self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Positions(Excite):
    """A removed channel carries another value at each place of a feature map."""

    def gate(self, x):
        return F.interpolate(self.table[None], x.shape[2:])


class Pooled(Excite):
    """Zero padding before the layer: the constant is absent at the border."""

    def forward(self, x):
        return self.last(F.avg_pool2d(self.conv(x), 3, 1, 1))


@pytest.mark.parametrize("network", [Positions, Pooled])
def test_what_varies_is_masked(network):
    model = network()
    masks = masks_of(model, conv=[1, 4])
    small, reference, constants, _ = shrink(model, double(*IMAGE), masks)
    assert constants.masked.sum() == 2
    assert {left.reason for left in constants.not_folded} == {"what it carries is not the same everywhere"}
    assert error(small, reference) < 1e-12


def test_a_gate_is_constant_where_its_own_rows_are_masked():
    """``sigmoid(bias)`` of a masked row is one number; with one kept gate for all channels it would not be."""
    model = Excite()
    masks = masks_of(model, conv=[1, 4], excite=[1, 4])
    small, reference, constants, _ = shrink(model, double(*IMAGE), masks)
    assert constants.not_folded == ()
    assert error(small, reference) < 1e-12


class TokenGate(nn.Module):
    """Tokens of an example are often all alike; the gate still depends on them."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.gate = nn.Embedding(9, 5), nn.Linear(5, 8), nn.Linear(5, 1)
        self.down = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        return self.down(self.up(x) * self.gate(x))


def test_tokens_that_are_all_alike_do_not_pass_for_a_constant():
    model = randomize(TokenGate())
    masks = masks_of(model, up=[1, 4])
    coupling = groups(model, torch.zeros(1, 4, dtype=torch.int64))
    constants = find_constants(model, coupling, masks, coupling.removed(masks))
    assert [left.reason for left in constants.not_folded] == ["what it carries is not the same everywhere"]


class Functional(nn.Module):
    """Weights that the model's own code reads."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(6, 8)
        self.down, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        x = self.up(x).sigmoid()
        match self.kind:
            case "matmul":
                return x @ self.weight.t()
            case "no bias":
                return F.linear(x, self.weight)
            case "computed bias":
                return F.linear(x, self.weight, self.bias * 2)
            case "shared bias":
                return F.linear(x, self.weight, self.bias) * self.bias
            case "own bias":
                return F.linear(input=x, weight=self.weight, bias=self.bias)
            case "twice":
                return self.down(x), self.down(2 * x)
            case "twice alike":
                return self.down(x), self.down(x).sigmoid()
            case "tied":
                return self.down(x), self.other(x).sigmoid()
            case _:
                return self.down(x) + F.linear(x, self.down.weight[:4].repeat(2, 1))


REFUSED = {
    "matmul": "it is read by something else than a linear layer or a convolution",
    "no bias": "the layer that reads it takes no bias",
    "computed bias": "the bias of the layer that reads it is computed or shared",
    "shared bias": "the bias of the layer that reads it is computed or shared",
    "own bias": None,
    "twice": "what it carries is not the same everywhere",
    "twice alike": None,
    "tied": "its weight is tied to another layer's",
    "slice": "it is read by something else than a linear layer or a convolution",
}


@pytest.mark.parametrize(("kind", "reason"), REFUSED.items())
def test_a_reader_without_a_bias_of_its_own_is_refused(kind, reason):
    model = randomize(Functional(kind))
    if kind == "tied":
        model.other.weight = model.down.weight
    masks = masks_of(model, up=[1, 4])
    small, reference, constants, _ = shrink(model, double(2, 6), masks)
    assert [left.reason for left in constants.not_folded] == ([reason] if reason else [])
    assert bool(constants.shifts) == (reason is None)
    assert error(small, reference, (2, 6)) < 1e-12


def test_channels_that_nobody_reads_need_no_folding():
    """Where the readers are masked, whatever the channel carries does not matter, constant or not."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    masks = {"2": {"weight": (torch.arange(8) % 3 > 0)[None]}}
    small, reference, constants, _ = shrink(model, double(2, 6), masks)
    assert constants.shifts == ()
    assert constants.not_folded == ()
    assert small[0].out_features == 5
    assert error(small, reference, (2, 6)) < 1e-12


def test_classes_that_are_masked_in_any_case():
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    masks = masks_of(model, **{"0": [1, 4]})
    never = np.zeros(len(groups(model, double(2, 6).float()).classes), dtype=bool)
    never[groups(model, torch.randn(2, 6)).classes_along("0.weight", 0)[:2]] = True
    small, reference, constants, _ = shrink(model, double(2, 6), masks, never=never)
    assert constants.masked.sum() == 1
    assert len(constants.shifts) == 1
    assert not reference[2].weight[:, 1].any()
    assert reference[2].weight[:, 4].all()
    assert error(small, reference, (2, 6)) < 1e-12


def test_channels_that_rounding_gives_back_keep_their_constants():
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3))
    masks = masks_of(model, **{"0": [1, 4, 5]})
    small, reference, constants, _ = shrink(model, double(2, 6), masks, round_to=2)
    assert small[0].out_features == 6
    assert not small[0].weight[1].any()
    assert small[0].bias[1] != 0
    assert constants.not_folded == ()
    assert error(small, reference, (2, 6)) < 1e-12


def test_in_half_precision_a_constant_is_still_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AvgPool2d(3), nn.SiLU(), nn.Conv2d(8, 4, 1)).to(torch.bfloat16)
    x = torch.randn(IMAGE).to(torch.bfloat16)
    masks = masks_of(model, **{"0": [1, 4]})
    coupling = groups(model, x)
    constants = find_constants(model, coupling, masks, coupling.removed(masks))
    assert constants.not_folded == ()
    kept = coupling.kept(coupling.removed(masks))
    cut(model, named_tensors(model), kept, coupling.complete(masks, constants.masked))
    fold(model, constants.shifts, kept)
    assert model[3].bias.dtype is torch.bfloat16


def test_a_grouped_convolution_reads_the_same_positions_of_every_group():
    """Positions 1 and 3 of both groups, each with constants of its own."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 6, 3, groups=2))
    model = randomize(model).double()
    masks = masks_of(model, **{"0": [1, 3, 5, 7]})
    coupling = groups(model, double(*IMAGE))
    removed = coupling.removed(masks)
    constants = find_constants(model, coupling, masks, removed)
    assert constants.not_folded == ()
    carried = F.silu(model[0].bias.data)
    weight = model[2].weight.data.sum((2, 3))
    expected = torch.cat([weight[:3, [1, 3]] @ carried[[1, 3]], weight[3:, [1, 3]] @ carried[[5, 7]]])
    [shift] = constants.shifts
    torch.testing.assert_close(shift.values, expected)
    folded = copy.deepcopy(model)
    bake(named_tensors(folded), coupling.complete(masks, removed))
    assert fold(folded, constants.shifts, {}) == ()
    assert error(folded, only_masked(model, masks)) < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_random_masks_on_random_norms(seed):
    """Residual blocks with every kind of reader: whatever is folded or masked, the reference is met."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=bool(seed % 2)), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=seed % 3 // 2), nn.BatchNorm2d(8), nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False),
        nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip
    generator = np.random.default_rng(seed)
    rows = {
        layer: generator.permutation(width)[: width // 2].tolist() for layer, width in (("0", 8), ("3", 8), ("9", 6))
    }
    masks = masks_of(model, **rows, **{"6": rows["3"]})
    small, reference, constants, _ = shrink(model, double(*IMAGE), masks)
    assert error(small, reference) < 1e-12
    assert all(left.reason.startswith("zero padding") for left in constants.not_folded)
    if not constants.masked.any():
        assert error(small, only_masked(reference, masks)) < 1e-12
