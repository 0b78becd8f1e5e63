"""Finding modules that can be fused, and folding batch norms into weights, against the formula in loops of numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import ConflictError, InvalidValueError, UnmatchedError, WrapError
from tersor.pruning import L1NormPruner
from tersor.quantization.module_fusion import auto_fuse, fuse_modules
from tests.networks import IMAGE, Dense, Plain, Residual, Separable, Tokens, Upsampling, randomize
from tests.quantization.chains import HEADS, batch, chain, channels
from tests.torchvision_stub import import_torchvision


def folded_in_loops(head, norm):
    """Weight and bias by the formula, channel by channel."""
    weight = head.weight.detach().numpy().copy()
    out, mean, variance = channels(head), norm.running_mean.numpy(), norm.running_var.numpy()
    gamma = np.ones(out) if norm.weight is None else norm.weight.detach().numpy()
    beta = np.zeros(out) if norm.bias is None else norm.bias.detach().numpy()
    bias = np.zeros(out) if head.bias is None else head.bias.detach().numpy().copy()
    groups = getattr(head, "groups", 1)
    for channel in range(out):
        scale = gamma[channel] / np.sqrt(variance[channel] + norm.eps)
        if type(head).__name__.startswith("ConvTranspose"):
            group, place = divmod(channel, out // groups)
            rows = weight.shape[0] // groups
            weight[group * rows : (group + 1) * rows, place] *= scale
        else:
            weight[channel] *= scale
        bias[channel] = beta[channel] + (bias[channel] - mean[channel]) * scale
    return weight, bias


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_a_norm_is_folded_by_the_formula_and_the_output_stays(name, affine):
    model = chain(HEADS[name](), affine)
    head, norm = model
    weight, bias = folded_in_loops(head, norm)
    x = batch(head)
    before = model(x)
    assert fuse_modules(model, [("0", "1")], x) is model
    np.testing.assert_allclose(head.weight.detach().numpy(), weight, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(head.bias.detach().numpy(), bias, rtol=1e-12, atol=1e-15)
    assert model[0] is head
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.Mish])
@pytest.mark.parametrize("name", HEADS)
def test_chains_of_all_kinds_are_found_and_fused_in_single_precision(name, kind):
    head = HEADS[name]()
    x = batch(head, torch.float32)
    for names, model in {
        ("0", "1", "2"): chain(copy.deepcopy(head), activation=kind()).float(),
        ("0", "1"): chain(copy.deepcopy(head)).float(),
    }.items():
        assert auto_fuse(model, x) == [names]
        before = model(x)
        torch.testing.assert_close(fuse_modules(model, [names], x)(x), before, rtol=1e-5, atol=1e-5)
    alone = nn.Sequential(copy.deepcopy(head), kind())
    weight = alone[0].weight.detach().clone()
    assert auto_fuse(alone, x) == [("0", "1")]
    assert torch.equal(fuse_modules(alone, [("0", "1")], x)[0].weight, weight)


def test_a_norm_in_front_of_an_activation_is_a_head():
    model = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.Hardsigmoid())
    assert auto_fuse(model, torch.zeros(IMAGE)) == [("1", "2")]
    assert isinstance(fuse_modules(model, [("1", "2")])[1], nn.BatchNorm2d)


def test_parameters_keep_their_identity_flags_hooks_and_types():
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).to(torch.bfloat16)
    model[1].float()
    model.train()
    head, weight, called = model[0], model[0].weight.requires_grad_(False), []
    weight.grad = torch.ones_like(weight)
    handle = head.register_forward_hook(lambda *_: called.append(1))
    fuse_modules(model, [("0", "1")])
    assert head.weight is weight
    assert (weight.dtype, weight.requires_grad, weight.grad) == (torch.bfloat16, False, None)
    assert (head.bias.dtype, head.bias.requires_grad, type(head.bias)) == (torch.bfloat16, False, nn.Parameter)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert head.training
    assert model[1].training
    model(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16))
    assert called == [1]
    handle.remove()


def test_what_a_low_precision_weight_becomes_is_rounded_once():
    torch.manual_seed(1)
    model = chain(nn.Conv2d(3, 4, 1)).float()
    model[0].to(torch.bfloat16)
    weight, _ = folded_in_loops(copy.deepcopy(model[0]).double(), copy.deepcopy(model[1]).double())
    fuse_modules(model, [("0", "1")])
    assert torch.equal(model[0].weight.float(), torch.from_numpy(weight).float().to(torch.bfloat16).float())


class Padding(nn.Conv2d):
    """Pads by itself, as networks that come from TensorFlow do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


def test_a_subclass_is_folded_where_it_is_linear_in_its_weight():
    model = chain(Padding(3, 4, 2))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    before = model(x)
    assert auto_fuse(model, x) == [("0", "1")]
    torch.testing.assert_close(fuse_modules(model, [("0", "1")])(x), before, rtol=1e-12, atol=1e-12)


def untouched(model, names, error, match, example=None):
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(error, match=match):
        fuse_modules(model, names, example)
    assert list(model.modules()) == modules
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.second, self.norm2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.norm1(self.first(x)))
        y = self.second(x)
        return self.act(self.norm2(y)) + y


def tied():
    model = Shared()
    model.second.weight = model.first.weight
    return model


def standing_twice():
    model = Shared()
    model.second = model.first
    return model


@pytest.mark.parametrize(
    ("model", "names", "error", "match"),
    [
        (Plain, [("0", "1"), ("3", "nonsense")], UnmatchedError, "'nonsense' of .* no module"),
        (Plain, [("0", "1"), ("0",)], InvalidValueError, "two or three names"),
        (Plain, [("0", "1"), "34"], InvalidValueError, "two or three names"),
        (Plain, [("0", "2", "1")], ConflictError, "cannot be fused: they are Conv2d, ReLU, BatchNorm2d"),
        (Shared, [("first", "norm1"), ("second", "norm1")], ConflictError, "'norm1' belongs to"),
        (tied, [("second", "norm2")], ConflictError, "tied"),
        (standing_twice, [("first", "norm1")], ConflictError, "several places"),
    ],
)
def test_what_cannot_be_fused_is_refused_and_nothing_changes(model, names, error, match):
    untouched(model(), names, error, match)


def test_a_parametrized_weight_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    untouched(model, [("0", "1")], ConflictError, "parametrization")
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    fuse_modules(model, [("0", "1")])


def test_a_refusal_of_the_second_group_leaves_the_first_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    handle = model[3].register_forward_hook(lambda *_: None)
    untouched(model, [("0", "1"), ("2", "3")], ConflictError, "hooks hang on the norm")
    handle.remove()


def test_an_example_shows_what_is_used_elsewhere():
    x = torch.zeros(IMAGE)
    model = Shared()
    assert auto_fuse(model, x) == [("first", "norm1")]
    untouched(model, [("second", "norm2")], ConflictError, "'norm2' is not all that uses 'second'", x)
    untouched(model, [("first", "norm2")], ConflictError, "Behind 'first' comes 'norm1'", x)
    untouched(model, [("first", "norm1", "act")], ConflictError, "called more than once", x)


def test_a_wrapped_model_is_refused():
    model = Plain()
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    for call in (lambda: fuse_modules(model, [("0", "1")]), lambda: auto_fuse(model, torch.zeros(IMAGE))):
        with pytest.raises(WrapError, match="unwrap_model"):
            call()
    pruner.unwrap_model()


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Plain, [("0", "1", "2"), ("3", "4"), ("7", "8")]),
        (Residual, [("stem", "bn"), ("conv1", "bn1"), ("conv2", "bn2")]),
        (Dense, []),
        (Separable, [("depthwise", "bn")]),
        (Upsampling, []),
    ],
)
def test_small_networks(network, expected):
    model, x = randomize(network()), torch.randn(IMAGE)
    assert auto_fuse(model, x) == expected
    before = model(x)
    torch.testing.assert_close(fuse_modules(model, expected, x)(x), before, rtol=1e-5, atol=1e-5)


def test_linear_layers_over_tokens():
    assert auto_fuse(Tokens(), torch.zeros(2, 6, dtype=torch.long)) == []
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    assert auto_fuse(model, torch.zeros(2, 4)) == [("0", "1", "2")]
    assert auto_fuse(model, torch.zeros(2, 5, 4)) == [("1", "2")]  # the norm's channels are the tokens
    with pytest.raises(ConflictError, match="'1' is not all that uses '0'"):
        fuse_modules(model, [("0", "1")], torch.zeros(2, 5, 4))


class InPlace(nn.Module):
    """An activation that writes into its input, which is used before it or after it."""

    def __init__(self, before):
        super().__init__()
        self.conv, self.act, self.before = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), before

    def forward(self, x):
        y = self.conv(x)
        z = y * 2 if self.before else 0
        self.act(y)
        return y + z


def test_an_activation_in_place():
    x = torch.zeros(IMAGE)
    assert auto_fuse(InPlace(before=False), x) == [("conv", "act")]
    assert auto_fuse(InPlace(before=True), x) == []


class WeightUsedElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight)


def test_a_weight_that_a_function_uses_too():
    assert auto_fuse(WeightUsedElsewhere(), torch.zeros(IMAGE)) == []


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [
        ("resnet18", 20, ("conv1", "bn1", "relu")),
        ("mobilenet_v2", 52, ("features.0.0", "features.0.1", "features.0.2")),
    ],
)
def test_torchvision(name, count, first):
    model = getattr(import_torchvision().models, name)(num_classes=4)
    model, x = randomize(model).double(), torch.randn(1, 3, 33, 33, dtype=torch.float64)
    found = auto_fuse(model, x)
    assert (len(found), found[0]) == (count, first)
    before = model(x)
    fuse_modules(model, found)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-12)
