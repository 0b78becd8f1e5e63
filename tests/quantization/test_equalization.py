"""Cross-layer equalisation: equal ranges, an equal function, less error of weights with one scale."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import InvalidValueError
from tersor.quantization.equalization import equalize
from tests.networks import IMAGE, Plain, Residual, Separable, Upsampling, randomize

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def ranges(weight, dim):
    """The largest magnitude along all dimensions but one, in float64 numpy."""
    values = np.abs(weight.detach().numpy().astype(np.float64))
    return values.max(axis=tuple(axis for axis in range(values.ndim) if axis != dim))


def uneven(model, seed=3):
    """Weights whose output channels differ by factors of up to a thousand."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in randomize(model).parameters():
        if parameter.dim() > 1:
            spread = 10 ** (torch.rand(len(parameter), generator=generator) * 3 - 1.5)
            parameter.data *= spread.view(-1, *[1] * (parameter.dim() - 1))
    return model


def error(model, before, x):
    with torch.no_grad():
        expected = before(x).double()
        return float((model(x) - expected).abs().max() / expected.abs().max())


def test_a_pair_has_the_papers_ranges():
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    before = copy.deepcopy(model)
    r1, r2 = ranges(model[0].weight, 0), ranges(model[2].weight, 1)
    report = equalize(model, X)
    np.testing.assert_allclose(ranges(model[0].weight, 0), np.sqrt(r1 * r2), rtol=1e-6)
    np.testing.assert_allclose(ranges(model[2].weight, 1), np.sqrt(r1 * r2), rtol=1e-6)
    scale = np.sqrt(r1 * r2) / r2  # the paper's s
    np.testing.assert_allclose(model[0].bias.detach().numpy(), before[0].bias.detach().numpy() / scale, rtol=1e-6)
    assert error(model, before, X) < 1e-5
    assert report.iterations == 2
    assert dict(report.refused) == {"0.weight": "is an input of the model"}


def test_a_chain_over_a_depthwise_convolution_comes_to_the_geometric_mean():
    model = uneven(
        nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)
        )
    )
    before = copy.deepcopy(model)
    mean = np.cbrt(ranges(model[0].weight, 0) * ranges(model[2].weight, 0) * ranges(model[4].weight, 1))
    equalize(model, X)
    for weight, dim in ((model[0].weight, 0), (model[2].weight, 0), (model[4].weight, 1)):
        np.testing.assert_allclose(ranges(weight, dim), mean, rtol=1e-5)
    assert error(model, before, X) < 1e-5


def test_writers_that_are_added_share_their_scales():
    model = uneven(Upsampling())
    before = copy.deepcopy(model)
    report = equalize(model, X)
    written = np.maximum(ranges(model.up.weight, 1), ranges(model.skip.weight, 0))
    np.testing.assert_allclose(written, ranges(model.head.weight, 1), rtol=1e-5)
    np.testing.assert_allclose(ranges(model.down.weight, 0), ranges(model.up.weight, 0), rtol=1e-5)
    assert [len(group.writers) for group in report.groups] == [2, 4]
    assert error(model, before, X) < 1e-5


def test_grouped_convolutions():
    model = uneven(Separable())
    before = copy.deepcopy(model)
    equalize(model, X)
    grouped = np.abs(model.grouped.weight.detach().numpy()).max(axis=(2, 3)).reshape(4, 2, 2)
    np.testing.assert_allclose(ranges(model.project.weight, 0), grouped.max(axis=1).ravel(), rtol=1e-5)
    np.testing.assert_allclose(ranges(model.grouped.weight, 0), ranges(model.head.weight, 1), rtol=1e-5)
    assert error(model, before, X) < 1e-5


def test_channels_without_weights_are_left_alone():
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].weight[:, 2] = 0
    bias = model[0].bias.detach().clone()
    equalize(model, torch.randn(2, 3))
    assert model[0].bias[1:3].tolist() == bias[1:3].tolist()
    assert not torch.equal(model[0].bias, bias)


@pytest.mark.parametrize(("network", "reader"), [(Plain, "3.weight"), (Residual, "conv2.weight")])
def test_channels_of_a_norm_are_refused(network, reader):
    report = equalize(randomize(network()), X)
    assert "fold it into the layer before it first" in report.refused[reader]


def test_relu6_is_refused_or_replaced():
    model = uneven(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)))
    before = copy.deepcopy(model)
    report = equalize(model, X)
    assert "relu6" in report.refused["2.weight"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    report = equalize(model, X, replace_relu6=True)
    assert report.replaced == ("1",)
    assert type(model[1]) is nn.ReLU
    assert not model[1].training
    np.testing.assert_allclose(ranges(model[0].weight, 0), ranges(model[2].weight, 1), rtol=1e-5)
    before[1] = nn.ReLU()
    assert error(model, before, X) < 1e-5


def test_eight_bits_with_one_scale_lose_less():
    model = uneven(
        nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1)
        )
    )
    before = copy.deepcopy(model)

    def decibels(net):
        net = copy.deepcopy(net)
        for layer in (net[0], net[2], net[4]):
            scale = layer.weight.detach().abs().max() / 127
            layer.weight.data = torch.fake_quantize_per_tensor_affine(layer.weight.data, scale.item(), 0, -127, 127)
        with torch.no_grad():
            expected = before(X)
            return 10 * float((expected.square().sum() / (net(X) - expected).square().sum()).log10())

    rounded = decibels(model)
    equalize(model, X)
    assert decibels(model) > rounded + 5
    assert decibels(model) > 30


def test_where_it_fails_modules_are_put_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU6(), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="cannot run"):
        equalize(model, torch.zeros(1, 5), replace_relu6=True)
    assert type(model[1]) is nn.ReLU6


def test_a_number_of_passes():
    with pytest.raises(InvalidValueError, match="iterations"):
        equalize(nn.Linear(2, 2), torch.zeros(1, 2), iterations=0)
