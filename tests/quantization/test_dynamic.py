"""Scales found at run time, against PyTorch's kernels."""

import pytest
import torch
from torch import nn

from tersor.errors import CheckpointError, ConflictError
from tersor.pruning import L1NormPruner
from tersor.quantization import PtqQuantizer
from tersor.storage import load_calibration, save_calibration
from tersor.testing.toys import BATCHES, FRESH, ToyNetwork

INPUTS = {"op_types": ["Linear"], "target_names": ["_input_0"], "dynamic": True}


def layer():
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_whole_value_symmetric():
    plain, x = layer(), draw(4, 6)
    model, calibration = PtqQuantizer(layer(), [INPUTS]).compress()
    for factor in (1, 50):
        scale = (factor * x).abs().max().item() / 127
        rounded = torch.fake_quantize_per_tensor_affine(factor * x, scale, 0, -127, 127)
        torch.testing.assert_close(model(factor * x), plain(rounded))
    assert calibration[""]["_input_0"] == {
        "dynamic": True,
        "granularity": "default",
        "quant_dtype": "int8",
        "quant_bits": 8,
        "quant_scheme": "symmetric",
        "quant_min": -127,
        "quant_max": 127,
    }


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 5, 6)])
def test_each_token_affine(shape):
    config = [{**INPUTS, "granularity": [-1], "quant_scheme": "affine", "quant_dtype": "uint8"}]
    plain, x = layer(), draw(*shape)
    model, _ = PtqQuantizer(layer(), config).compress()
    tokens = x.reshape(-1, 6)
    low, high = tokens.amin(1).clamp(max=0), tokens.amax(1).clamp(min=0)
    scale = ((high.double() - low.double()) / 255).float()
    zero_point = -(low.double() / scale).round().to(torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(tokens, scale, zero_point.int(), 0, 0, 255).view(shape)
    torch.testing.assert_close(model(x), plain(rounded))


def test_gradients_go_straight_through():
    model, _ = PtqQuantizer(layer(), [{**INPUTS, "granularity": [-1]}]).compress()
    x = draw(4, 6).requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, layer().weight.detach().sum(0).expand(4, 6))


def test_masked_elements_count_as_zeros():
    model = nn.Sequential(layer())
    pruner = L1NormPruner(
        model,
        [{"op_types": ["Linear"], "target_names": ["_input_0"], "sparse_ratio": 0.5, "granularity": [-1, 1]}],
        example_inputs=draw(4, 6),
    )
    quantizer = PtqQuantizer.from_compressor(pruner, [INPUTS])
    pruner.update_masks({"0": {"_input_0": torch.tensor([[False, True, True, True, True, True]])}})
    quantizer.calibrate()
    x = draw(4, 6)
    kept = x * torch.tensor([0.0, 1, 1, 1, 1, 1])
    loud = x + torch.tensor([1000.0, 0, 0, 0, 0, 0])
    scale = kept.abs().max().item() / 127
    rounded = torch.fake_quantize_per_tensor_affine(kept, scale, 0, -127, 127)
    torch.testing.assert_close(model(loud), layer()(rounded))


def test_half_precision_and_empty_batches():
    model, _ = PtqQuantizer(layer().bfloat16(), [{**INPUTS, "granularity": [-1]}]).compress()
    x = draw(4, 6).bfloat16()
    scale = x.float().abs().amax(1, keepdim=True) / 127
    rounded = ((x.float() / scale).round() * scale).bfloat16()
    torch.testing.assert_close(model(x), layer().bfloat16()(rounded))
    assert model(x[:0]).shape == (0, 3)


def test_nothing_but_dynamic_inputs_and_weights_asks_for_no_data():
    config = [{"op_types": ["Linear", "Conv2d"], "target_names": ["weight"]}, INPUTS]
    model, _ = PtqQuantizer(ToyNetwork().eval(), config).compress()
    assert not torch.equal(model(FRESH), ToyNetwork().eval()(FRESH))


def test_the_calibration_makes_a_fresh_quantizer_equal(tmp_path):
    config = [{"op_types": ["Conv2d"], "target_names": ["_output_0"]}, {**INPUTS, "granularity": [-1]}]
    quantizer = PtqQuantizer(ToyNetwork().eval(), config, calibration=BATCHES)
    model, calibration = quantizer.compress()
    saved = load_calibration(save_calibration(calibration, tmp_path / "c.safetensors"))
    other, third = (PtqQuantizer(ToyNetwork().eval(), config) for _ in "ab")
    other.update_calibration_config(saved)
    third.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.model(FRESH), model(FRESH))
    assert torch.equal(third.model(FRESH), model(FRESH))


def test_another_calibration_is_refused():
    quantizer = PtqQuantizer(layer(), [INPUTS])
    _, calibration = quantizer.compress()
    fixed = PtqQuantizer(layer(), [{**INPUTS, "dynamic": False}], calibration=[draw(4, 6)]).compress()[1]
    with pytest.raises(CheckpointError, match=r"_input_0: dynamic is None in the calibration, and True"):
        quantizer.update_calibration_config(fixed)
    calibration[""]["_input_0"]["granularity"] = [-1]
    with pytest.raises(CheckpointError, match=r"granularity is \[-1\]"):
        quantizer.update_calibration_config(calibration)


def test_parameters_are_not_dynamic():
    with pytest.raises(ConflictError, match=r"config_list\[0\]\['dynamic'\] on weight: a parameter does not change"):
        PtqQuantizer(layer(), [{**INPUTS, "target_names": ["weight"]}])
