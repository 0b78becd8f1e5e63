"""What all quantizers share, by a quantizer that does nothing but calibrate."""

import copy
import re

import pytest
import torch
from torch import nn

from tersor.errors import (
    CheckpointError,
    ConflictError,
    InvalidValueError,
    NumericalError,
    TrainingError,
    UnmatchedError,
)
from tersor.pruning import L1NormPruner
from tersor.quantization import CalibratedQuantizer, MinMax, PtqQuantizer, UniformQuantize
from tersor.storage import load_calibration, save_calibration
from tersor.testing.toys import BATCHES, EXAMPLE, FRESH, ToyNetwork

CONFIG = [{"op_types": ["Conv2d", "Linear"], "target_names": ["_input_0", "weight", "_output_0"]}]


class Calibrated(CalibratedQuantizer):
    def fake_quantize(self, target):
        return UniformQuantize(target.name, self.form(target), self.cut(target), MinMax())

    def calibrate(self):
        transforms = [transform for _, transform in self.transforms()]
        for transform in transforms:
            transform.watching = True
        self.run_calibration()
        for transform in transforms:
            transform.watching = False
            transform.settle()
            transform.enabled = True


def network():
    return ToyNetwork().eval()


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Each model that a test wraps is given back at its end."""
    made, make = [], Calibrated.__init__

    def remember(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Calibrated, "__init__", remember)
    yield
    for quantizer in made:
        quantizer.unwrap_model()


def quantized(config=CONFIG):
    quantizer = Calibrated(network(), config, calibration=BATCHES)
    quantizer.compress()
    return quantizer


def by_hand(x, weight, bias, scales):
    """A linear layer with int8 weights per channel and int8 input and output, by PyTorch's kernels."""
    weight = weight.detach()
    rows = weight.abs().amax(1) / 127
    weight = torch.fake_quantize_per_channel_affine(weight, rows, torch.zeros(len(rows)), 0, -127, 127)
    x = torch.fake_quantize_per_tensor_affine(x, scales[0], 0, -127, 127)
    return torch.fake_quantize_per_tensor_affine(x @ weight.T + bias, scales[1], 0, -127, 127)


def test_weights_by_channel_and_activations_as_a_whole_by_default():
    model = nn.Sequential(nn.Linear(4, 3))
    plain, data = copy.deepcopy(model), [torch.randn(6, 4) for _ in range(3)]
    config = [{"op_types": ["Linear"], "target_names": ["_input_0", "weight", "_output_0"]}]
    quantizer = Calibrated(model, config, calibration=data)
    _, calibration = quantizer.compress()
    values = calibration["0"]
    seen = torch.cat(data)
    scales = (seen.abs().max() / 127).item(), (plain(seen).abs().max() / 127).item()
    assert values["_input_0"]["scale"].item() == pytest.approx(scales[0])
    assert values["_output_0"]["scale"].item() == pytest.approx(scales[1])
    torch.testing.assert_close(values["weight"]["scale"], plain[0].weight.abs().amax(1, keepdim=True) / 127)
    fresh = torch.randn(5, 4)
    torch.testing.assert_close(model(fresh), by_hand(fresh, plain[0].weight, plain[0].bias, scales))
    assert torch.equal(quantizer.unwrap_model()(fresh), plain(fresh))


def test_blocks_of_a_granularity_have_scales_of_their_own():
    config = [{"op_names": ["hidden"], "target_names": ["weight"], "granularity": [1, 4]}]
    weight = ToyNetwork().hidden.weight
    scale = quantized(config).get_calibration_config()["hidden"]["weight"]["scale"]
    torch.testing.assert_close(scale, weight.view(10, 2, 4).abs().amax(2) / 127)


def test_a_granularity_that_does_not_divide_is_refused_and_nothing_wrapped():
    model = network()
    config = [{"op_names": ["hidden"], "target_names": ["weight"], "granularity": [1, 3]}]
    with pytest.raises(
        InvalidValueError, match=r"config_list\[0\]\['granularity'\] on hidden.weight: .*does not divide"
    ):
        Calibrated(model, config, calibration=BATCHES)
    assert not hasattr(model.hidden, "parametrizations")


def test_channels_of_activations():
    config = [{"op_names": ["stem", "hidden"], "target_names": ["_output_0"], "granularity": "per_channel"}]
    calibration = quantized(config).get_calibration_config()
    assert calibration["stem"]["_output_0"]["scale"].shape == (1, 8, 1, 1)
    assert calibration["hidden"]["_output_0"]["scale"].shape == (1, 10)


def test_blocks_that_follow_the_batch_are_refused_at_run_time():
    config = [{"op_names": ["hidden"], "target_names": ["_input_0"], "granularity": [-1]}]
    quantizer = quantized(config)
    with pytest.raises(InvalidValueError, match=r"hidden._input_0: there are scales for \(8, 1\) blocks.*dynamic"):
        quantizer.model(FRESH)


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 7])
def test_channels_of_a_linear_layer_are_last_however_many_dimensions_there_are(rank):
    x = torch.randn(*[2] * (rank - 1), 4, generator=torch.Generator().manual_seed(0))
    config = [{"op_types": ["Linear"], "target_names": ["_input_0"], "granularity": "per_channel"}]
    quantizer = Calibrated(nn.Linear(4, 3), config, calibration=[x])
    _, calibration = quantizer.compress()
    largest = x.abs().reshape(-1, 4).amax(0)
    torch.testing.assert_close(calibration[""]["_input_0"]["scale"], (largest / 127).view([1] * (rank - 1) + [4]))


def test_the_calibration_makes_a_fresh_quantizer_equal(tmp_path):
    quantizer = quantized()
    saved = load_calibration(save_calibration(quantizer.get_calibration_config(), tmp_path / "c.safetensors"))
    other = Calibrated(network(), CONFIG)
    other.update_calibration_config(saved)
    assert torch.equal(other.model(FRESH), quantizer.model(FRESH))
    assert not torch.equal(other.model(FRESH), network()(FRESH))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(hiden=c.pop("hidden")), UnmatchedError, "hiden.*Did you mean 'hidden"),
        (lambda c: c["hidden"]["weight"].update(quant_dtype="int4"), CheckpointError, "quant_dtype is 'int4'"),
        (lambda c: c["hidden"]["weight"].pop("scale"), CheckpointError, "no 'scale'"),
        (lambda c: c["hidden"]["weight"].update(scale=torch.ones(10)), CheckpointError, r"\(10,\) blocks .* \(10, 1\)"),
        (lambda c: c["hidden"]["_input_0"].update(scale=torch.ones(1)), CheckpointError, r"\(1,\) blocks .* \(\)"),
        (lambda c: c["hidden"]["_input_0"].update(scale=torch.tensor(torch.nan)), CheckpointError, "scale is not fin"),
        (lambda c: c["hidden"]["weight"]["scale"][3].zero_(), CheckpointError, "scale is not finite and above 0"),
        (lambda c: c["hidden"]["weight"]["scale"][3].neg_(), CheckpointError, "scale is not finite and above 0"),
        (lambda c: c["hidden"]["_input_0"].update(scale="0.5"), CheckpointError, "scale is a str .* no tensor"),
        (lambda c: c["hidden"]["_input_0"].update(zero_point=torch.tensor(0.5)), CheckpointError, "no.* whole number"),
        (lambda c: c["hidden"]["_input_0"].update(zero_point=999), CheckpointError, "-127 to 127"),
        (
            lambda c: c["hidden"]["_input_0"].update(zero_point=torch.zeros(5)),
            CheckpointError,
            r"zero points for \(5,\).* \(\)",
        ),
        (lambda c: c["hidden"].update(_input_0=None), CheckpointError, "hidden._input_0: a NoneType is no part"),
        (lambda c: c.update(hidden="scales"), CheckpointError, "hidden: a str is no part"),
    ],
)
def test_a_calibration_that_does_not_fit_changes_nothing(change, error, message):
    calibration = quantized().get_calibration_config()
    assert calibration["hidden"]["_input_0"]["quant_max"] == 127
    change(calibration)
    other = Calibrated(network(), CONFIG)
    with pytest.raises(error, match=message):
        other.update_calibration_config(calibration)
    assert torch.equal(other.model(FRESH), network()(FRESH))


def test_the_state_goes_on_where_it_was():
    quantizer = quantized()
    other = Calibrated(network(), CONFIG)
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.model(FRESH), quantizer.model(FRESH))


@pytest.mark.parametrize(
    ("config", "observer", "message"),
    [
        ([{**CONFIG[0], "target_names": ["weight", "bias"]}], "minmax", r"bias: .* another quantizer: '\w+.bias'"),
        (CONFIG, "mse", r"_input_0: .* another quantizer: .*observer\.counts"),
    ],
)
def test_a_state_of_other_targets_or_observers_is_refused(config, observer, message):
    saved = PtqQuantizer(network(), CONFIG, observer="minmax", calibration=BATCHES)
    saved.compress()
    other = PtqQuantizer(network(), config, observer=observer)
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
        other.load_state_dict(saved.state_dict())
    for quantizer in (saved, other):
        quantizer.unwrap_model()


@pytest.mark.parametrize("quantizer_first", [True, False])
def test_scales_are_those_of_masked_values(quantizer_first):
    model = network()
    with torch.no_grad():
        model.hidden.weight[:, 0] = 100  # the largest, and masked
    pruning = [{"op_names": ["hidden"], "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    quantization = [{"op_names": ["hidden"], "target_names": ["weight"], "quant_scheme": "affine"}]
    masks = {"hidden": {"weight": torch.arange(8).ne(0).expand(10, 8)}}
    if quantizer_first:
        quantizer = Calibrated(model, quantization, calibration=BATCHES)
        pruner = L1NormPruner.from_compressor(quantizer, pruning)
    else:
        pruner = L1NormPruner(model, pruning, example_inputs=EXAMPLE)
        quantizer = Calibrated.from_compressor(pruner, quantization, calibration=BATCHES)
    quantizer.start()
    pruner.update_masks(masks)
    quantizer.calibrate()
    scale = quantizer.get_calibration_config()["hidden"]["weight"]["scale"].flatten()
    kept = ToyNetwork().hidden.weight[:, 1:].detach()
    torch.testing.assert_close(scale, (kept.amax(1).clamp(min=0) - kept.amin(1).clamp(max=0)) / 255)
    assert model.hidden.weight[:, 0].tolist() == [0] * 10


def test_steps_limit_the_batches_and_nothing_trains():
    quantizer = Calibrated(network(), CONFIG, calibration=BATCHES * 2)
    runs = []
    with quantizer.model.register_forward_pre_hook(lambda *_: runs.append(torch.is_grad_enabled())):
        quantizer.compress(max_steps=3)
    assert runs == [False] * 3
    after, before = quantizer.unwrap_model().state_dict(), network().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_without_data_it_says_what_is_missing():
    with pytest.raises(InvalidValueError, match="there is no calibration batch"):
        Calibrated(network(), CONFIG).compress()


def test_values_that_are_no_numbers_are_refused():
    batch = torch.full((2, 2, 4, 4), torch.nan)
    with pytest.raises(NumericalError, match=r"stem._input_0: values are infinite or not numbers"):
        Calibrated(network(), CONFIG, calibration=[batch]).compress()


def test_bypass_leaves_a_target_alone():
    config = [*CONFIG, {"op_names": ["head"], "target_names": ["weight"], "apply_method": "bypass"}]
    assert "weight" not in quantized(config).get_calibration_config()["head"]


def test_the_method_of_another_quantizer_is_refused():
    config = [{"op_names": ["head"], "target_names": ["weight"], "apply_method": "lsq_clamp_round"}]
    with pytest.raises(ConflictError, match="does not quantize by 'lsq_clamp_round'"):
        Calibrated(network(), config)


def test_transforms_of_activations_follow_the_mode_of_the_model():
    quantizer = quantized()
    transform = quantizer.wrappers["stem"].stack("_output_0").quantize
    for training in (True, False):
        quantizer.model.train(training)
        quantizer.model(FRESH)
        assert transform.training is training


def test_biases_and_wide_types():
    config = [{"op_names": ["hidden"], "target_names": ["bias"], "quant_dtype": "int32"}]
    quantizer = quantized(config)
    bias = ToyNetwork().hidden.bias
    torch.testing.assert_close(quantizer.model.hidden.bias, bias, rtol=0, atol=bias.abs().max().item() * 2**-23)


def test_a_batch_that_the_model_cannot_be_called_with_is_told_the_forms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x, y):
            return self.fc(x + y)

    linear = [{"op_types": ["Linear"]}]
    quantizer = Calibrated(Two(), linear, calibration=[(torch.ones(1, 2), torch.ones(1, 2))])
    with pytest.raises(TrainingError, match=r"calibration: .*missing 1 required.*a mapping of the model's arguments"):
        quantizer.compress()
    by_name = [{"x": torch.ones(1, 2), "y": torch.ones(1, 2)}]
    assert "fc" in Calibrated(quantizer.unwrap_model(), linear, calibration=by_name).compress()[1]


def test_transformers_linear_layer_has_default_targets():
    class Conv1D(nn.Module):  # known by its name, and by what it stores
        def __init__(self):
            super().__init__()
            self.nf, self.weight, self.bias = 3, nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x @ self.weight + self.bias

    model = nn.Sequential(Conv1D())
    weight = model[0].weight.detach()
    _, calibration = Calibrated(model, [{"op_types": ["Conv1D"]}], calibration=[torch.randn(5, 4)]).compress()
    assert sorted(calibration["0"]) == ["_input_0", "_output_0", "weight"]
    torch.testing.assert_close(calibration["0"]["weight"]["scale"], weight.abs().amax(0, keepdim=True) / 127)
