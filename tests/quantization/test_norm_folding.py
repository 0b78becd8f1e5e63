"""Batch norms folded in simulation, against folded weights written out by hand in float64."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.config import Granularity, QuantizationSpec
from tersor.errors import ConflictError
from tersor.pruning import L1NormPruner
from tersor.quantization import (
    AdaRoundQuantizer,
    AWQQuantizer,
    BNNQuantizer,
    Cut,
    DoReFaQuantizer,
    Format,
    GPTQQuantizer,
    Latest,
    MinMax,
    PtqQuantizer,
    QATQuantizer,
    Quantizer,
    UniformQuantize,
)
from tersor.quantization.module_fusion import fuse_modules
from tersor.quantization.norm_folding import FrozenNorms, NormFolded, away_from_zero
from tests.networks import randomize
from tests.quantization.chains import HEADS, batch, chain

TARGETS = ["weight", "_output_0"]


def by_extremes(model, config_list, **settings):
    return PtqQuantizer(model, config_list, observer="minmax", **settings)


class Live(Quantizer):
    """Ranges that follow each training step."""

    def fake_quantize(self, target):
        simulation = UniformQuantize(target.name, self.form(target), self.cut(target), Latest(), live=True)
        simulation.watching = simulation.enabled = True
        return simulation


@pytest.fixture
def made():
    """Quantizers whose models are given back at the end of a test."""
    quantizers = []
    yield lambda quantizer: quantizers.append(quantizer) or quantizer
    for quantizer in quantizers:
        quantizer.unwrap_model()


def config(targets, *names, dtype="int4"):
    return [{"op_names": [names[0]], "target_names": targets, "quant_dtype": dtype, "fuse_names": [names]}]


def rounded(value, scale, high=7):
    """On a symmetric grid, with a gradient that goes straight through."""
    simulated = (value / scale).round().clamp(-high, high) * scale
    return value + (simulated - value).detach()


def scale_by_channel(weight, out_dim=0, high=7):
    """The scale of each output channel beside a weight, 1 where that is zero; ranges and scales are kept in float32."""
    others = [dim for dim in range(weight.dim()) if dim != out_dim]
    scale = (weight.detach().abs().amax(others, keepdim=True).float().double() / high).float().double()
    return torch.where(scale > 0, scale, 1)


@pytest.mark.parametrize("activation", [None, nn.ReLU(), nn.Hardswish()])
@pytest.mark.parametrize("name", HEADS)
def test_in_eval_mode_it_is_the_quantized_folded_layer(name, activation, made):
    model = chain(HEADS[name](), activation=activation)
    if name.startswith("transposed") and model[0].groups > 1:  # scales cross its groups, a dead channel counts there
        model[1].weight.data[0] = 0.3
    x = batch(model[0])
    folded = fuse_modules(copy.deepcopy(model), [("0", "1")])
    weight = folded[0].weight.data
    weight.copy_(rounded(weight, scale_by_channel(weight, 1 if name.startswith("transposed") else 0)))
    expected = folded(x).detach()
    names = ("0", "1", "2") if activation else ("0", "1")

    quantizer = made(by_extremes(copy.deepcopy(model), config(["weight"], *names), calibration=[x]))
    quantizer.compress()
    torch.testing.assert_close(quantizer.model(x), expected, rtol=1e-9, atol=1e-9)

    plain = fuse_modules(copy.deepcopy(model), [("0", "1")])(x)
    quantizer = made(by_extremes(model, config(["weight", "_output_0"], *names), calibration=[x]))
    quantizer.compress()
    output_scale = (plain.abs().max().float().double() / 7).float().double()
    torch.testing.assert_close(quantizer.model(x), rounded(expected, output_scale), rtol=1e-9, atol=1e-9)


def convolution():
    """A convolution and its norm in float64, ready to train, the scale of one channel negative."""
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())).double().train()
    model[1].weight.data[0] = -0.7
    return model, torch.randn(5, 3, 6, 6, dtype=torch.float64), torch.randn(5, 4, 4, 4, dtype=torch.float64)


def written_out(model, x, *, train, quantized=True):
    """The folded layer by hand: what it gives, and the mean and variance of the batch."""
    conv, norm = model[0], model[1]
    across = (1, -1, 1, 1)
    scale = norm.weight / torch.sqrt(norm.running_var.clone() + norm.eps)
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    if quantized:
        weight = rounded(weight, scale_by_channel(weight))
    if not train:
        bias = norm.bias + (conv.bias - norm.running_mean) * scale
        return F.silu(F.conv2d(x, weight, bias)), None, None
    before = F.conv2d(x, weight) / scale.view(across) + conv.bias.view(across)
    mean, variance = before.mean((0, 2, 3)), before.var((0, 2, 3), correction=0)
    normal = (before - mean.view(across)) / torch.sqrt(variance.view(across) + norm.eps)
    return F.silu(normal * norm.weight.view(across) + norm.bias.view(across)), mean, before.var((0, 2, 3))


@pytest.mark.parametrize("train", [True, False])
def test_gradients_are_those_of_the_folded_computation_written_out(train, made):
    model, x, direction = convolution()
    model.train(train)
    parameters = list(model.parameters())
    expected, mean, variance = written_out(model, x, train=train)
    # The bias of the convolution has no gradient where the mean of the batch is taken off.
    gradients = torch.autograd.grad((expected * direction).sum(), parameters)
    statistics = [model[1].running_mean.clone(), model[1].running_var.clone()]
    made(Live(model, config(["weight"], "0", "1", "2")))
    output = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    (output * direction).sum().backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)
    if train:
        moved = [0.9 * old + 0.1 * new for old, new in zip(statistics, (mean, variance), strict=True)]
        torch.testing.assert_close([model[1].running_mean, model[1].running_var], moved)


def test_gradients_in_eval_mode_by_hand(made):
    model, x, direction = convolution()
    conv, norm = model[0], model[1]
    model.eval()[2] = nn.Identity()
    made(Live(model, config(["weight"], "0", "1")))
    (model(x) * direction).sum().backward()
    inverse = 1 / torch.sqrt(norm.running_var + norm.eps)
    latent = conv.parametrizations.weight.original
    scale = (norm.weight * inverse).view(1, -1, 1, 1)
    by_weight = torch.nn.grad.conv2d_weight(x, latent.shape, (direction * scale).detach())
    torch.testing.assert_close(latent.grad, by_weight)
    unrounded = F.conv2d(x, latent, conv.bias) - norm.running_mean.view(1, -1, 1, 1)  # straight through: as if exact
    by_gamma = (direction * unrounded * inverse.view(1, -1, 1, 1)).sum((0, 2, 3))
    torch.testing.assert_close(norm.weight.grad, by_gamma)


def test_a_quantizer_that_waits_changes_no_bit(made):
    model, x, _ = convolution()
    model.eval().float()
    x = x.float()
    before = model(x)
    quantizer = made(by_extremes(model, config(["weight", "_output_0"], "0", "1", "2"), calibration=[x]))
    assert torch.equal(model(x), before)
    quantizer.compress()
    assert not torch.equal(model(x), before)
    assert torch.equal(quantizer.unwrap_model()(x), before)


def test_channels_whose_scale_is_zero_learn_on():
    assert away_from_zero(torch.tensor([2.0, 0.0, -4.0, 1e-9])).tolist() == [2.0, 3.0, -4.0, 3.0]
    assert away_from_zero(torch.zeros(2)).tolist() == [1.0, 1.0]
    assert away_from_zero(torch.full((2,), 1e-20)).tolist() == pytest.approx([1e-20, 1e-20])


@pytest.mark.parametrize("gammas", [[0.0, 0.5, -0.5, 1.0], [0.0] * 4])
def test_a_gamma_of_zero_gives_finite_numbers_and_gets_a_gradient(gammas, made):
    model, x, direction = convolution()
    model[1].weight.data.copy_(torch.tensor(gammas))
    made(Live(model, config(["weight"], "0", "1", "2")))
    (model(x) * direction).sum().backward()
    weight, latent = model[0].weight.detach(), model[0].parametrizations.weight.original
    grid = scale_by_channel(latent)
    torch.testing.assert_close(weight[0], rounded(latent, grid)[0].detach(), rtol=1e-6, atol=1e-9)
    gradient = model[1].weight.grad
    assert gradient.isfinite().all()
    assert gradient[0] != 0
    assert latent.grad.isfinite().all()


def test_masked_weights_stay_zero_and_are_not_seen(made):
    model, x, _ = convolution()
    model.eval()
    mask = torch.rand(4, 3, 3, 3) > 0.3
    mask[2], mask[:, :, 0, 0] = False, False
    with torch.no_grad():
        model[0].weight[:, :, 0, 0] = 50  # what is masked would be the range
    folded = fuse_modules(copy.deepcopy(model), [("0", "1")])[0].weight.detach() * mask
    pruner = made(L1NormPruner(model, [{"op_names": ["0"], "target_names": ["weight"], "sparse_ratio": 0.25}]))
    pruner.update_masks({"0": {"weight": mask}})
    quantizer = Live.from_compressor(pruner, config(["weight"], "0", "1", "2"))
    model(x)
    assert not model[0].weight[~mask].any()
    scale = quantizer.get_calibration_config()["0"]["weight"]["scale"]
    torch.testing.assert_close(scale.double(), scale_by_channel(folded), rtol=1e-6, atol=0)


def test_the_norm_is_no_part_of_the_simulation_and_goes_along_with_copies(made):
    model, x, _ = convolution()
    made(Live(model, config(["weight"], "0", "1", "2")))
    model.eval()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 1
    assert [name for name in model.state_dict() if "running_mean" in name] == ["1.running_mean"]
    other = copy.deepcopy(model)
    assert other[0].parametrizations.weight[0].quantize._group == (other[0], other[1])
    expected = model(x)
    with torch.no_grad():
        model[1].weight.mul_(torch.tensor([1, 2, 3, 4]))
    assert not torch.allclose(model(x), expected)
    torch.testing.assert_close(other(x), expected)


def test_it_is_pickled_together_with_its_norm():
    head, norm = nn.Linear(2, 3), nn.BatchNorm1d(3)
    form = Format.of(QuantizationSpec(quant_dtype="int4"))
    cut = Cut("weight", Granularity(name="out_channel"), ((0, 1),) * 3)
    simulation = NormFolded(UniformQuantize("weight", form, cut, MinMax()), head, norm)
    norms, copied = pickle.loads(pickle.dumps((norm, simulation)))  # noqa: S301
    assert copied._group[1] is norms


EIGHT = {
    "Conv1d + BatchNorm1d": (nn.Conv1d, nn.BatchNorm1d, None),
    "Conv2d + BatchNorm2d": (nn.Conv2d, nn.BatchNorm2d, None),
    "Conv3d + BatchNorm3d": (nn.Conv3d, nn.BatchNorm3d, None),
    "Conv + BatchNorm + ReLU": (nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    "Conv + ReLU": (nn.Conv2d, None, nn.ReLU),
    "Linear + BatchNorm1d": (nn.Linear, nn.BatchNorm1d, None),
    "Linear + BatchNorm1d + ReLU": (nn.Linear, nn.BatchNorm1d, nn.ReLU),
    "Linear + ReLU": (nn.Linear, None, nn.ReLU),
}


@pytest.mark.parametrize("name", EIGHT)
def test_the_combinations_of_nni(name, made):
    head, norm, activation = EIGHT[name]
    layer = head(4, 6) if head is nn.Linear else head(4, 6, 2)
    model = randomize(nn.Sequential(*(layer, *([norm(6)] if norm else []), *([activation()] if activation else []))))
    model.double().eval()
    x, names = batch(layer), tuple(str(index) for index in range(len(model)))
    expected = fuse_modules(copy.deepcopy(model), [names])
    weight, plain = expected[0].weight.data, expected(x).detach()
    weight.copy_(rounded(weight, scale_by_channel(weight, high=127), 127))
    scale = (plain.abs().max().float().double() / 127).float().double()
    quantizer = made(by_extremes(model, config(["weight", "_output_0"], *names, dtype="int8"), calibration=[x]))
    _, calibration = quantizer.compress()
    torch.testing.assert_close(model(x), rounded(expected(x), scale, 127), rtol=1e-9, atol=1e-9)
    assert list(calibration) == ["0"]
    assert calibration["0"]["_output_0"]["scale"].double() == scale


def test_a_norm_and_its_activation(made):
    model = randomize(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).double()
    x, norm = torch.randn(3, 4, 5, 5, dtype=torch.float64), copy.deepcopy(model[0])
    plain = model(x).detach()
    scales = [(value.abs().max().float().double() / 127).float().double() for value in (norm.weight, plain)]
    gamma = rounded(norm.weight, scales[0], 127)
    expected = F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, gamma, norm.bias))
    made(by_extremes(model, config(TARGETS, "0", "1", dtype="int8"), calibration=[x])).compress()
    torch.testing.assert_close(model(x), rounded(expected, scales[1], 127), rtol=1e-9, atol=1e-9)


def test_nothing_is_quantized_between_the_members(made):
    model, x, _ = convolution()
    between = []
    config_list = [
        {"op_types": ["Conv2d", "BatchNorm2d"], "fuse_names": [("0", "1", "2")]},
        {"op_names": ["2"], "target_names": ["_output_0"]},
    ]
    quantizer = made(Live(model.eval(), config_list))
    assert [target.name for target, _ in quantizer.transforms()] == ["0._input_0", "0.weight", "0._output_0"]
    assert quantizer.plan.skipped == {"1": "fused into '0'", "2": "fused into '0'"}
    handle = model[2].register_forward_pre_hook(lambda module, args: between.append(args[0]))
    output = model(x)
    handle.remove()
    assert len(between[0].unique()) == between[0].numel() == 320
    scale = quantizer.get_calibration_config()["0"]["_output_0"]["scale"].double()
    steps = output / scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)


def test_the_folded_bias_is_quantized_on_the_norm(made):
    model, x, _ = convolution()
    model.eval()
    folded = fuse_modules(copy.deepcopy(model), [("0", "1")])
    bias = folded[0].bias.data
    scale = (bias.abs().max().float().double() / 7).float().double()
    bias.copy_(rounded(bias, scale))
    quantizer = made(by_extremes(model, config(["weight", "bias"], "0", "1", "2"), calibration=[x]))
    weight = folded[0].weight.data
    weight.copy_(rounded(weight, scale_by_channel(weight)))
    _, calibration = quantizer.compress()
    torch.testing.assert_close(model(x), folded(x), rtol=1e-9, atol=1e-9)
    assert calibration["0"]["bias"]["scale"].double() == scale
    assert "1.parametrizations.bias.original" in dict(model.named_parameters())
    baked = quantizer.unwrap_model(bake=True)
    torch.testing.assert_close(baked(x), folded(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [PtqQuantizer, QATQuantizer])
def test_every_quantizer_puts_the_bias_on_the_norm_alone(kind, made):
    model, x, _ = convolution()
    folded = fuse_modules(copy.deepcopy(model), [("0", "1")]).eval()
    for value, scale in ((folded[0].weight.data, None), (folded[0].bias.data, folded[0].bias.data.abs().max())):
        scale = scale_by_channel(value) if scale is None else (scale.float().double() / 7).float().double()
        value.copy_(rounded(value, scale))
    quantizer = made(kind(model.eval(), config(["weight", "bias"], "0", "1", "2")))
    quantizer.calibration = [x]
    quantizer.start()
    quantizer.finish()
    assert isinstance(model[0].bias, nn.Parameter)  # nothing is put on it
    torch.testing.assert_close(model(x), folded(x), rtol=1e-9, atol=1e-9)


def test_norms_are_frozen_after_a_number_of_steps_and_let_go_at_the_end(made):
    model, x, _ = convolution()
    quantizer = made(QATQuantizer(model, config(["weight"], "0", "1", "2"), freeze_norm_step=2))
    quantizer.start()
    means = []
    for _ in range(4):
        model(x)
        means.append(model[1].running_mean.clone())
        quantizer.step()
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[2])
    assert torch.equal(means[2], means[3])
    twin = made(QATQuantizer(convolution()[0], config(["weight"], "0", "1", "2"), freeze_norm_step=2))
    twin.load_state_dict(quantizer.state_dict())
    before = twin.model[1].running_mean.clone()
    twin.model(x)
    assert torch.equal(twin.model[1].running_mean, before)
    quantizer.finish()
    assert not model[1]._forward_pre_hooks
    with pytest.raises(ConflictError, match="freeze_norm_step: no batch norm is fused"):
        QATQuantizer(convolution()[0], config(["weight"], "0", "2"), freeze_norm_step=2)


def test_a_tied_weight_takes_no_norm():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model[2].weight = model[0].weight
    with pytest.raises(ConflictError, match=r"the weight of '0'.* is 2.weight as well"):
        Live(model, config(["weight"], "0", "1"))


def test_what_cannot_be_simulated_is_refused_and_nothing_wrapped():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ConflictError, match="on the bias of '1', which has none"):
        Live(model, config(["weight", "bias"], "0", "1"))
    with pytest.raises(ConflictError, match=r"'3' is not all that uses '0'.*Behind '0' comes '1'"):
        Live(model, config(["weight"], "0", "3"), example_inputs=torch.zeros(1, 3, 5, 5))
    assert not any(hasattr(module, "parametrizations") for module in model)


@pytest.mark.parametrize("kind", [GPTQQuantizer, AdaRoundQuantizer, AWQQuantizer, BNNQuantizer, DoReFaQuantizer])
def test_what_rounds_latent_weights_wants_the_norm_folded_for_good(kind):
    model, _, _ = convolution()
    with pytest.raises(ConflictError, match=f"{kind.__name__} rounds weights as they are.*fuse_modules"):
        kind(model, config(["weight"], "0", "1"))
    assert not hasattr(model[0], "parametrizations")


def test_the_calibration_and_the_state_make_another_quantizer_equal(made):
    model, x, _ = convolution()
    model.eval()
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    quantizer = made(by_extremes(model, config(TARGETS, "0", "1", "2"), calibration=[x]))
    _, calibration = quantizer.compress()
    fresh = made(by_extremes(other, config(TARGETS, "0", "1", "2")))
    fresh.update_calibration_config(calibration)
    assert torch.equal(other(x), model(x))
    resumed = made(by_extremes(plain, config(TARGETS, "0", "1", "2")))
    resumed.load_state_dict(quantizer.state_dict())
    assert torch.equal(plain(x), model(x))


def test_frozen_norms_use_and_keep_their_statistics_and_still_learn():
    model, x, direction = convolution()
    norm = model[1]
    expected = copy.deepcopy(model).eval()(x)
    before = copy.deepcopy(norm.state_dict())
    frozen = FrozenNorms([norm])
    output = model(x)
    (output * direction).sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert norm.training
    assert norm.weight.grad.abs().min() > 0
    model.eval()(x)
    assert not norm.training
    frozen.remove()
    frozen.remove()
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks
    model.train()(x)
    assert norm.num_batches_tracked == before["num_batches_tracked"] + 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize("targets", [["weight"], ["weight", "bias", "_output_0"]])
def test_a_compiled_training_step_is_the_eager_one(targets, made):
    torch.compiler.reset()
    model, x, direction = convolution()
    made(Live(model, config(targets, "0", "1", "2", dtype="int8")))
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend="aot_eager")
    for network in (model, compiled):
        (network(x) * direction).sum().backward()
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad)
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    torch.compiler.reset()


def test_frozen_norms_are_compiled():
    torch.compiler.reset()
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    expected = copy.deepcopy(norm).eval()(x)
    frozen = FrozenNorms([norm])
    torch.testing.assert_close(torch.compile(norm, backend="eager")(x), expected)
    assert (norm.training, int(norm.num_batches_tracked)) == (True, 0)
    frozen.remove()
    torch.compiler.reset()


def test_a_calibration_says_what_was_quantized_as_one(made):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    entries = [*config(TARGETS, "0", "1", "2"), {"op_names": ["3"], "target_names": TARGETS, "quant_dtype": "int8"}]
    quantizer = made(by_extremes(model, entries, calibration=[torch.randn(8, 3)]))
    _, calibration = quantizer.compress()
    assert [calibration["0"][name]["fuse_names"] for name in TARGETS] == [["0", "1", "2"]] * 2
    assert not any("fuse_names" in said for said in calibration["3"].values())
    quantizer.update_calibration_config(calibration)
