"""Outliers move into the weights, wherever the value comes from, and the network stays what it was."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.deploy import QuantizationSpeedup, engine_config, post_training
from tersor.deploy.smoothing import ALPHA, Scaled, smooth_inputs

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """The first norm is read by two layers alone, the second is added to something, GELU is no norm."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = self.before(x)
        x = self.after(self.query(x) + self.key(x))
        return x + self.down(F.gelu(self.up(x)))


@pytest.fixture
def block():
    torch.manual_seed(1)
    made = Block().eval()
    with torch.no_grad():
        made.before.weight[2] = 60.0
        made.after.weight[5] = 40.0
        made.up.bias[3] = 30.0
    return made


def network_of(block):
    return engine_config(block, X, "openvino")[0]


def test_outputs_stay_and_norms_take_up_what_they_can(block):
    network = network_of(block)
    names = ["query", "key", "up", "down"]
    expected = network.double()(X.double())
    assert smooth_inputs(network, names, [X.double()]) == names
    torch.testing.assert_close(network(X.double()), expected, rtol=1e-6, atol=1e-6)
    assert sum(isinstance(module, Scaled) for module in network.modules()) == 2  # before up, and before down


def test_factors_are_the_papers(block):
    network = network_of(block)
    seen = F.layer_norm(X, (8,), block.before.weight, block.before.bias).abs().amax(0)
    columns = torch.maximum(block.query.weight.abs().amax(0), block.key.weight.abs().amax(0))
    factors = seen**ALPHA / columns ** (1 - ALPHA)
    smooth_inputs(network, ["query", "key"], [X[:30], X[30:]])
    torch.testing.assert_close(network.before.weight, block.before.weight / factors)
    torch.testing.assert_close(network.before.bias, block.before.bias / factors)
    torch.testing.assert_close(network.query.weight, block.query.weight * factors)
    torch.testing.assert_close(network.key.weight, block.key.weight * factors)


def test_a_norm_that_others_read_too_stays(block):
    network = network_of(block)
    smooth_inputs(network, ["query"], [X])
    assert torch.equal(network.before.weight, block.before.weight)
    assert torch.equal(network.key.weight, block.key.weight)
    torch.testing.assert_close(network(X), block(X), rtol=1e-4, atol=1e-4)


def test_shared_weights_and_layers_called_twice_are_left():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.third(self.third(self.second(self.first(x))))

    network = engine_config(Shared().eval(), X[:, :4], "openvino")[0]
    assert smooth_inputs(network, ["first", "second", "third"], [X[:, :4]]) == []


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_quantized_transformers_are_nearer_and_whole_in_integers(block, engine):
    pytest.importorskip({"openvino": "openvino", "onnxruntime": "onnxruntime"}[engine])
    pytest.importorskip("onnxscript")
    quantizer = post_training(block, X[:4], [X[:32], X[32:]], engine)
    compiled = QuantizationSpeedup(quantizer, X, engine=engine).compile()
    assert compiled.report.coverage == 1
    rough, config_list = engine_config(block, X[:4], engine)
    from tersor.quantization import PtqQuantizer

    plain = PtqQuantizer(rough, config_list, calibration=[X], observer="minmax")
    plain.compress()
    with torch.no_grad():
        exact = block(X)
        errors = [(model(X) - exact).square().mean().item() for model in (quantizer.model, rough)]
    assert errors[0] < 0.5 * errors[1]
    for own in (quantizer, plain):
        own.unwrap_model()
