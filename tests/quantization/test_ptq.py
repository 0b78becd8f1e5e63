"""Post-training quantization against PyTorch's kernels, on the values that a float model gives."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tersor.config import QuantizationSpec
from tersor.errors import ConflictError, InvalidValueError, NumericalError
from tersor.pruning import L1NormPruner
from tersor.quantization import ByHistogram, Format, PtqQuantizer
from tersor.quantization.clipping import least_squares_range, percentile_range
from tersor.quantization.histogram import Histogram
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.testing.toys import BATCHES, EXAMPLE, FRESH, ToyNetwork
from tersor.training import TorchEvaluator

EVERYTHING = [{"op_types": ["Conv2d", "Linear"], "target_names": ["_input_0", "weight", "_output_0"]}]
LINEAR = [{**EVERYTHING[0], "op_types": ["Linear"]}]
WEIGHTS = [{"op_types": ["Linear"], "target_names": ["weight"]}]


def network():
    return ToyNetwork().eval()


def layer(rows=4, columns=8):
    torch.manual_seed(0)
    return nn.Linear(columns, rows)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def per_tensor(x, scale, zero_point=0, low=-127, high=127):
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), low, high)


def per_channel(weight, scale, zero_point, low, high):
    zero_point = torch.as_tensor(zero_point).int().expand(len(weight))
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, low, high)


class Chain(nn.Module):
    """Two layers and what lies between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layer(6, 8), layer(3, 6)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("observer", ["minmax", "mse", "percentile", "entropy", "moving_average"])
def test_a_network_is_what_the_kernels_compute_with_the_scales_of_the_observer(observer):
    plain, data, fresh = Chain(), [draw(64, 8, seed=seed) for seed in range(3)], draw(9, 8, seed=9)
    quantizer = PtqQuantizer(Chain(), LINEAR, calibration=data, observer=observer)
    model, calibration = quantizer.compress()
    x = fresh
    for name in ("first", "second"):
        found, own = calibration[name], plain.get_submodule(name)
        x = per_tensor(x, found["_input_0"]["scale"])
        rows = own.weight.detach().abs().amax(1) / 127
        weight = per_channel(own.weight.detach(), rows, 0, -127, 127)
        x = per_tensor(x @ weight.T + own.bias.detach(), found["_output_0"]["scale"])
        x = x.relu() if name == "first" else x
    torch.testing.assert_close(model(fresh), x)
    seen = torch.cat(data)
    if observer == "minmax":
        assert calibration["first"]["_input_0"]["scale"].item() == pytest.approx(seen.abs().max().item() / 127)
    if observer == "mse":
        form = Format.of(QuantizationSpec())
        wanted, _ = form.scale_and_zero_point(
            *least_squares_range(Histogram.of(plain.first(seen).detach().flatten()), form)
        )
        assert calibration["first"]["_output_0"]["scale"].item() == pytest.approx(wanted.item())
    assert torch.equal(quantizer.unwrap_model()(fresh), plain(fresh))


def test_nothing_of_the_model_changes_and_baking_writes_the_rounded_weights():
    quantizer = PtqQuantizer(network(), EVERYTHING, calibration=BATCHES)
    model, _ = quantizer.compress(max_steps=2)
    rounded = model.hidden.weight.detach().clone()
    latent = {name: quantizer.wrappers[name].tensor("weight") for name in ("stem", "hidden", "head")}
    for name, tensor in latent.items():
        assert torch.equal(tensor, network().get_submodule(name).weight)
    assert torch.equal(quantizer.unwrap_model(bake=True).hidden.weight, rounded)
    assert not torch.equal(rounded, network().hidden.weight)


INTEGERS = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (2, 3, 4, 5, 6, 7, 8, 12, 16)]


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_weights_of_every_integer_type_by_groups(dtype, scheme):
    plain = layer(4, 256)
    config = [{**WEIGHTS[0], "quant_dtype": dtype, "quant_scheme": scheme, "granularity": [1, 128]}]
    model, calibration = PtqQuantizer(layer(4, 256), config).compress()
    bits, signed = int(dtype.lstrip("uint")), dtype[0] == "i"
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = (-high if scheme == "symmetric" else -high - 1) if signed else 0
    groups = plain.weight.detach().reshape(8, 128)
    least, largest = groups.amin(1).double().clamp(max=0), groups.amax(1).double().clamp(min=0)
    if scheme == "symmetric":
        scale = (torch.maximum(-least, largest) / ((high - low) / 2)).float()
        zero_point = torch.full((8,), (low + high + 1) // 2)
    else:
        scale = ((largest - least) / (high - low)).float()
        zero_point = (low - (least / scale).round()).clamp(low, high)
    found = calibration[""]["weight"]
    assert found["scale"].shape == found["zero_point"].shape == (4, 2)
    assert torch.equal(found["scale"].flatten(), scale)
    assert torch.equal(found["zero_point"].flatten().double(), zero_point.double())
    assert (found["quant_min"], found["quant_max"], found["quant_dtype"]) == (low, high, dtype)
    expected = per_channel(groups, scale, zero_point, low, high).view(4, 256)
    torch.testing.assert_close(model.weight, expected, rtol=0, atol=0)
    x = draw(2, 256)
    torch.testing.assert_close(model(x), nn.functional.linear(x, expected, plain.bias))


@pytest.mark.parametrize("granularity", ["default", [1, 4], [-1, -1]])
@pytest.mark.parametrize(("dtype", "kind"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_weights_in_eight_bit_floats(dtype, kind, granularity):
    weight = layer(4, 8).weight.detach()
    model, calibration = PtqQuantizer(
        layer(4, 8), [{**WEIGHTS[0], "quant_dtype": dtype, "granularity": granularity}]
    ).compress()
    blocks = {"default": weight.view(4, 8), "[1, 4]": weight.view(8, 4), "[-1, -1]": weight.view(1, 32)}[
        str(granularity)
    ]
    scale = blocks.abs().amax(1, keepdim=True) / torch.finfo(kind).max
    torch.testing.assert_close(calibration[""]["weight"]["scale"].view(-1, 1), scale)
    expected = ((blocks * (1 / scale)).to(kind).float() * scale).view(4, 8)
    torch.testing.assert_close(model.weight.detach(), expected)


def test_groups_that_do_not_divide_name_what_would():
    with pytest.raises(InvalidValueError, match=r"\['granularity'\] on weight: .*Legal: -1, 1, 2, 5, 10\."):
        PtqQuantizer(layer(4, 10), [{**WEIGHTS[0], "granularity": [1, 4]}])


@pytest.mark.parametrize("observer", ["mse", "percentile", "entropy"])
def test_weights_are_chosen_by_their_values_where_it_is_asked(observer):
    model = layer(4, 512)
    model.weight.data[0, 0] = 100.0
    weight = model.weight.detach().clone()
    quantizer = PtqQuantizer(model, [{**WEIGHTS[0], "quant_dtype": "int4", "observer": observer}])
    scale = quantizer.compress()[1][""]["weight"]["scale"].flatten()
    ratio = scale * 7 / weight.abs().amax(1)
    assert (ratio <= 1.0001).all()
    if observer == "mse":
        rows = weight[1].double().numpy()
        errors = {}
        for candidate in np.geomspace(0.2, 1, 400):
            step = np.abs(rows).max() * candidate / 7
            errors[candidate] = ((np.clip(np.round(rows / step), -7, 7) * step - rows) ** 2).sum()
        own = ((np.clip(np.round(rows / scale[1].item()), -7, 7) * scale[1].item() - rows) ** 2).sum()
        assert own <= 1.02 * min(errors.values())
        assert errors[1.0] > 1.02 * own


def test_an_observer_of_ones_own():
    data = [draw(500, 8)]
    own = lambda form: ByHistogram(partial(percentile_range, percentile=90.0))  # noqa: E731
    config = [{"op_types": ["Linear"], "target_names": ["_input_0"]}]
    _, calibration = PtqQuantizer(layer(), config, calibration=data, observer=own).compress()
    values = np.percentile(data[0].numpy(), [10, 90])
    assert calibration[""]["_input_0"]["scale"].item() == pytest.approx(np.abs(values).max() / 127, rel=1e-2)


def test_the_config_list_overrides_the_observer():
    data = [torch.cat([draw(20000, 8), torch.full((1, 8), 50.0)])]
    config = [{"op_types": ["Linear"], "target_names": ["_input_0", "_output_0"]}]
    config[0]["target_settings"] = {"_input_0": {"observer": "minmax"}}
    _, calibration = PtqQuantizer(layer(), config, calibration=data, observer="percentile").compress()
    assert calibration[""]["_input_0"]["scale"].item() == pytest.approx(50 / 127)
    plain = layer()(data[0]).abs().max().item()
    assert calibration[""]["_output_0"]["scale"].item() < 0.8 * plain / 127


def test_the_evaluating_function_is_the_calibration_where_there_are_no_batches():
    model, data = layer(), draw(32, 8)

    def evaluate(model):
        model(data)
        return 0.0

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    evaluator = TorchEvaluator(lambda *_, **__: None, optimizer, lambda *_: None, evaluating_func=evaluate)
    config = [{"op_types": ["Linear"], "target_names": ["_input_0"]}]
    _, calibration = PtqQuantizer(model, config, evaluator, observer="minmax").compress()
    assert calibration[""]["_input_0"]["scale"].item() == pytest.approx(data.abs().max().item() / 127)


def test_calibrating_again_forgets_the_data_from_before():
    config = [{"op_types": ["Linear"], "target_names": ["_input_0"]}]
    quantizer = PtqQuantizer(layer(), config, calibration=[100 * draw(32, 8)], observer="minmax")
    quantizer.compress()
    quantizer.calibration = [draw(32, 8)]
    _, calibration = quantizer.compress()
    assert calibration[""]["_input_0"]["scale"].item() == pytest.approx(draw(32, 8).abs().max().item() / 127)


def test_bias_correction_gives_the_means_back():
    data = [draw(100, 8, seed=seed) + 1 for seed in range(3)]
    config = [{"op_types": ["Linear"], "target_names": ["weight", "bias"], "quant_dtype": "int3"}]
    config[0]["target_settings"] = {"bias": {"quant_dtype": "int16"}}
    float_model = Chain()
    plain, corrected = (
        PtqQuantizer(Chain(), config, calibration=data, bias_correction=correct) for correct in (False, True)
    )
    assert plain.compress()[0] is plain.model
    corrected.compress()
    assert corrected.corrected == ["first", "second"]
    x = torch.cat(data)
    wanted, without, with_it = (model(x).detach().mean(0) for model in (float_model, plain.model, corrected.model))
    assert (without - wanted).abs().max() > 1e-2
    assert (with_it - wanted).abs().max() < 1e-3
    # the first layer by hand: what rounding took from its weight, times the mean of its inputs
    lost = float_model.first.weight - corrected.model.first.weight
    expected = float_model.first.bias + lost @ x.mean(0)
    torch.testing.assert_close(corrected.wrappers["first"].tensor("bias"), expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(corrected.wrappers["first"].tensor("weight"), float_model.first.weight)


def test_masked_weights_stay_zero():
    pruner = L1NormPruner(network(), [{"op_names": ["hidden"], "sparse_ratio": 0.5}], example_inputs=EXAMPLE)
    config = [{"op_names": ["hidden"], "target_names": ["weight", "bias"], "quant_scheme": "affine"}]
    quantizer = PtqQuantizer.from_compressor(pruner, config, calibration=BATCHES, bias_correction=True)
    quantizer.compress()
    alive = pruner.get_masks()["hidden"]["weight"].any(1)
    assert alive.sum() == 5
    assert quantizer.model.hidden.weight[~alive].eq(0).all()
    assert quantizer.model.hidden.bias[~alive].eq(0).all()


def test_the_calibration_and_the_state_make_a_fresh_quantizer_equal():
    quantizer = PtqQuantizer(network(), EVERYTHING, calibration=BATCHES)
    _, calibration = quantizer.compress()
    by_calibration, by_state = (PtqQuantizer(network(), EVERYTHING) for _ in "ab")
    by_calibration.update_calibration_config(copy.deepcopy(calibration))
    by_state.load_state_dict(quantizer.state_dict())
    for other in (by_calibration, by_state):
        assert torch.equal(other.model(FRESH), quantizer.model(FRESH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observer": "hist"}, "observer: 'hist' is no observer"),
        ({"bias_correction": True}, "bias_correction: it runs the model on the same batches"),
    ],
)
def test_what_cannot_be_asked_for(options, message):
    with pytest.raises(InvalidValueError, match=message):
        PtqQuantizer(network(), EVERYTHING, **options)


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_values_that_are_no_numbers_name_the_target_and_nothing_is_quantized(observer):
    quantizer = PtqQuantizer(
        network(), EVERYTHING, calibration=[*BATCHES, torch.full((2, 2, 4, 4), torch.inf)], observer=observer
    )
    with pytest.raises(NumericalError, match=r"stem._input_0: values are infinite or not numbers"):
        quantizer.compress()
    assert torch.equal(quantizer.model(FRESH), network()(FRESH))


def test_modules_that_no_batch_reaches_are_named():
    model = network()
    model.spare = nn.Linear(2, 2)
    quantizer = PtqQuantizer(model, EVERYTHING, calibration=BATCHES)
    with pytest.warns(UserWarning, match=r"spare._input_0, spare._output_0: nothing that could"):
        quantizer.compress()
    assert list(quantizer.get_calibration_config()["spare"]) == ["weight"]


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_two_processes_have_the_scales_of_all_their_data(observer):
    def scales(batches):
        quantizer = PtqQuantizer(Chain(), LINEAR, calibration=batches, observer=observer)
        _, calibration = quantizer.compress()
        return {f"{m}.{t}": c["scale"] for m, own in calibration.items() for t, c in own.items()}

    data = [draw(40, 8, seed=seed) * (seed + 1) for seed in range(4)]
    expected = scales(data)
    for found in in_two_processes(lambda rank: scales(data[rank::2])):
        assert found.keys() == expected.keys()
        for name, scale in found.items():
            torch.testing.assert_close(scale, expected[name], rtol=1e-6, atol=0)


def test_equalisation_comes_first_and_keeps_what_the_model_computes():
    def unequal():
        model = Chain()
        factors = torch.logspace(-2, 2, 6)
        with torch.no_grad():
            model.first.weight.mul_(factors.unsqueeze(1))
            model.first.bias.mul_(factors)
            model.second.weight.div_(factors)
        return model

    config = [{**LINEAR[0], "granularity": [-1, -1], "target_names": ["weight"]}]
    x = draw(200, 8)
    wanted, errors = unequal()(x), {}
    for equalize in (False, True):
        quantizer = PtqQuantizer(unequal(), config, equalize=equalize, example_inputs=x[:2])
        model, _ = quantizer.compress()
        errors[equalize] = (model(x) - wanted).square().mean().item()
        torch.testing.assert_close(quantizer.unwrap_model()(x), wanted)
    assert errors[True] < 0.01 * errors[False]
    spans = [quantizer.model.first.weight.abs().amax(1), quantizer.model.second.weight.abs().amax(0)]
    torch.testing.assert_close(*spans)


def test_nothing_to_equalise_is_an_error():
    with pytest.raises(ConflictError, match="equalize: no two layers could be equalised"):
        PtqQuantizer(layer(), WEIGHTS, calibration=[draw(4, 8)], equalize=True).compress()
