import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import ConflictError, InvalidValueError, NumericalError, TrainingError, UnmatchedError
from tersor.quantization import sensitivities
from tersor.testing.toys import BATCHES, ToyNetwork

CONFIG = [{"op_types": ["Linear"], "quant_dtype": "int8"}]


def two_layers():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def rounded(x, bits, dims=None):
    """Symmetric and narrow, to the nearest, in float64."""
    high = 2 ** (bits - 1) - 1
    largest = x.abs().amax(dims, keepdim=True) if dims is not None else x.abs().max()
    return (x / (largest / high)).round() * (largest / high)


def by_hand(model, data, place, bits):
    """The model with one layer's weight rounded by output channel, and its input by the range of all data."""
    seen = torch.cat(data).double()
    first, last = (copy.deepcopy(model[i]).double() for i in (0, 2))
    hidden = first(seen).relu()

    def layer(module, x, whole):
        largest = whole.abs().max()
        high = 2 ** (bits - 1) - 1
        return F.linear((x / (largest / high)).round() * (largest / high), rounded(module.weight, bits, 1), module.bias)

    if place == "0":
        return last(layer(first, seen, seen).relu())
    return layer(last, hidden, hidden)


def test_noise_to_signal_of_one_layer_at_a_time():
    model, data = two_layers(), [torch.randn(16, 6) for _ in range(3)]
    found = sensitivities(model, CONFIG, iter(data), choices=(2, 4, 8))
    with torch.no_grad():
        plain = copy.deepcopy(model).double()(torch.cat(data).double())
        for place in ("0", "2"):
            for bits in (2, 4, 8):
                noise = (by_hand(model, data, place, bits) - plain).square().sum() / plain.square().sum()
                assert found[place][bits] == pytest.approx(noise.item(), rel=1e-3)
    assert list(found) == ["0", "2"]
    assert all(widths[2] > widths[4] > widths[8] for widths in found.values())


def test_by_the_loss_for_weights_by_the_formula():
    """For a batch of one sample the Fisher estimate is the gradient squared."""
    model = two_layers()
    data = [(torch.randn(1, 6), torch.tensor([i % 3])) for i in range(8)]

    def loss(batch, model):
        return F.cross_entropy(model(batch[0]), batch[1])

    found = sensitivities(model, CONFIG, data, choices=(3,), targets=["weight"], loss=loss)
    for place in ("0", "2"):
        weight, fisher = model.get_parameter(f"{place}.weight"), 0.0
        for batch in data:
            (gradient,) = torch.autograd.grad(loss(batch, model), weight)
            fisher += gradient.double().square() / len(data)
        error = rounded(weight.detach().double(), 3, 1) - weight.detach().double()
        assert found[place][3] == pytest.approx(float((fisher * error**2).sum() / 2), rel=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_by_the_loss_for_inputs_and_batches():
    """A quadratic loss of a linear layer: the gradient at its input is known, and samples count alike."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    x = torch.randn(10, 4)
    found = sensitivities(
        model, CONFIG, [x], choices=(4,), targets=["_input_0"], loss=lambda b, m: m(b).square().sum(1).mean()
    )
    weight, x = model[0].weight.detach().double(), x.double()
    gradient = 2 * x @ weight.T @ weight  # of each sample's own loss
    expected = (gradient * (rounded(x, 4) - x)).square().sum(1).mean() / 2
    assert found["0"][4] == pytest.approx(expected.item(), rel=1e-4)


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.fc(self.fc(x))


def test_a_weight_that_is_used_twice_has_one_gradient():
    model, x = Shared(), torch.randn(1, 4)
    found = sensitivities(model, CONFIG, [x], choices=(4,), targets=["weight"], loss=lambda b, m: m(b).sum())
    (gradient,) = torch.autograd.grad(model(x).sum(), model.fc.weight)
    weight = model.fc.weight.detach()
    expected = (gradient * (rounded(weight, 4, 1) - weight)).square().sum() / 2
    assert found["fc"][4] == pytest.approx(expected.item(), rel=1e-4)


def test_only_the_targets_asked_for_count_and_types_are_kept():
    model, data = two_layers(), [torch.randn(16, 6)]
    weights = sensitivities(model, CONFIG, data, (4,), targets=["weight"])
    both = sensitivities(model, CONFIG, data, (4,))
    assert weights["0"][4] < both["0"][4]
    unsigned = [
        {"op_names": ["2"], "target_settings": {"_input_0": {"quant_dtype": "uint8", "quant_scheme": "affine"}}}
    ]
    finer = sensitivities(model, unsigned, data, (4,), targets=["_input_0"])["2"][4]
    coarser = sensitivities(model, CONFIG, data, (4,), targets=["_input_0"])["2"][4]
    assert finer < coarser / 2  # all 15 steps for values above zero


def test_the_model_is_as_it_was():
    model = ToyNetwork().train()
    before = copy.deepcopy(model.state_dict())
    config = [{"op_types": ["Conv2d", "Linear"], "quant_dtype": "int8"}]
    for loss in (None, lambda batch, model: F.cross_entropy(model(batch[0]), batch[1])):
        found = sensitivities(model, config, BATCHES, (2, 8), loss=loss)
        assert set(found) == {"stem", "left", "right", "hidden", "head"}
        assert all(0 <= widths[8] < widths[2] for widths in found.values())
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_errors():
    model, data = two_layers(), [torch.randn(2, 6)]
    with pytest.raises(InvalidValueError, match=r"choices: 0 is no number of bits"):
        sensitivities(model, CONFIG, data, (0, 8))
    with pytest.raises(InvalidValueError, match="int1"):
        sensitivities(model, CONFIG, data, (1, 8))
    with pytest.raises(UnmatchedError, match=r"targets: the config list has none of \['bias'\].*weight"):
        sensitivities(model, CONFIG, data, targets=["bias"])
    with pytest.raises(InvalidValueError, match="no calibration batch"):
        sensitivities(model, CONFIG, [])
    with pytest.raises(NumericalError, match=r"unused._input_0: no finite value was ever seen"):
        sensitivities(Unused(), CONFIG, [torch.randn(2, 4)])
    with pytest.raises(TrainingError, match="does not depend"):
        sensitivities(model, CONFIG, data, loss=lambda batch, model: batch.sum())
    with pytest.raises(ConflictError, match="lsq"):
        sensitivities(model, [{**CONFIG[0], "apply_method": "lsq_clamp_round"}], data)
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
