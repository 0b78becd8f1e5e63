"""Inputs and outputs of layers that no one calls: attention reads the weight of its output projection itself."""

import pytest
import torch
from torch import nn

from tersor.errors import NumericalError
from tersor.quantization import LsqQuantizer, PtqQuantizer, QATQuantizer, SmoothQuantizer

LINEAR = [{"op_types": ["Linear"]}]
LEFT_OUT = r"self_attn.out_proj._input_0, self_attn.out_proj._output_0: nothing that could be rounded passed there"
X = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)) for _ in range(3)]


def layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()


def check(quantizer):
    calibration = quantizer.get_calibration_config()
    assert list(calibration["self_attn.out_proj"]) == ["weight"]
    assert sorted(calibration["linear1"]) == ["_input_0", "_output_0", "weight"]
    module = quantizer.model.self_attn.out_proj
    rows = module.parametrizations.weight.original.detach()
    scale = calibration["self_attn.out_proj"]["weight"]["scale"].flatten()
    zeros = torch.zeros(len(rows), dtype=torch.int)
    low = int(calibration["self_attn.out_proj"]["weight"]["quant_min"])
    assert torch.equal(module.weight.detach(), torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, low, 127))


@pytest.mark.parametrize("kind", [PtqQuantizer, SmoothQuantizer])
def test_they_are_left_out_with_a_warning(kind):
    quantizer = kind(layer(), LINEAR, calibration=X)
    with pytest.warns(UserWarning, match=LEFT_OUT):
        quantizer.compress()
    check(quantizer)
    other = kind(layer(), LINEAR)
    other.load_state_dict(quantizer.state_dict())
    assert list(other.get_calibration_config()["self_attn.out_proj"]) == ["weight"]


@pytest.mark.parametrize("kind", [QATQuantizer, LsqQuantizer])
def test_no_training_is_lost_by_them(kind):
    model = layer()
    quantizer = kind(model, [{**LINEAR[0], "granularity": "per_channel", "target_names": ["weight"]}, *ACTIVATIONS])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    quantizer.start()
    model.train()
    for x in X:
        optimizer.zero_grad()
        quantizer.loss(model(x).square().mean()).backward()
        quantizer.before_step()
        optimizer.step()
        quantizer.step()
    with pytest.warns(UserWarning, match=LEFT_OUT):
        quantizer.finish()
    check(quantizer)


ACTIVATIONS = [{**LINEAR[0], "target_names": ["_input_0", "_output_0"]}]


def test_one_that_is_named_is_an_error():
    config_list = [{"op_names": ["self_attn.out_proj"]}]
    with pytest.raises(NumericalError, match=r"self_attn.out_proj._input_0: no value was ever seen here.*out_proj"):
        PtqQuantizer(layer(), config_list, calibration=X).compress()
