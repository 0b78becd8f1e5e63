"""BNN: signs and their gradient, and what the quantizer does on a model."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import ConflictError, InvalidValueError
from tersor.pruning import L1NormPruner
from tersor.quantization.bnn import BNNQuantizer, as_signs, binarize
from tersor.testing.toys import EXAMPLE, ToyNetwork, ToyTraining

CONFIG = {"op_names": ["left", "hidden"], "target_names": ["_input_0", "weight"], "quant_dtype": "int1"}


def test_signs_and_their_gradient_by_hand():
    values = 2 * torch.randn(50, dtype=torch.float64)
    values[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    values.requires_grad_(True)
    upstream = torch.randn(50, dtype=torch.float64)
    signs = binarize(values)
    (signs * upstream).sum().backward()
    x = values.detach().numpy()
    np.testing.assert_array_equal(signs.detach().numpy(), np.where(x >= 0, 1.0, -1.0))
    np.testing.assert_array_equal(values.grad.numpy(), upstream.numpy() * (np.abs(x) <= 1))


def test_signs_are_exact_whatever_the_value():
    tiny = torch.tensor([1e-30, -1e-30, 0.3, -0.7, 123.4, -1e30])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        signs = binarize(tiny.to(dtype))
        assert signs.dtype is dtype
        assert signs.tolist() == [1, -1, 1, -1, 1, -1]


def test_what_is_no_number_has_no_sign():
    assert as_signs(torch.tensor([torch.nan])).isnan().all()
    assert binarize(torch.tensor([torch.nan])).isnan().all()


@pytest.fixture
def quantize():
    """Makes quantizers, each of a network of its own, and gives the models back in the end."""
    made = []

    def make(model, *config, evaluator=None):
        made.append(BNNQuantizer(model, list(config or [CONFIG]), evaluator))
        return made[-1]

    yield make
    for quantizer in made:
        quantizer.unwrap_model()


def test_a_layer_multiplies_signs(quantize):
    layer, x = nn.Linear(6, 3), torch.randn(5, 6)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    quantizer = quantize(layer, CONFIG | {"op_names": [""]})
    quantizer.start()
    by_hand = np.where(x.numpy() < 0, -1, 1) @ np.where(weight < 0, -1, 1).T + bias
    np.testing.assert_allclose(layer(x).detach().numpy(), by_hand, rtol=1e-6)
    assert quantizer.get_calibration_config()[""]["weight"] == {
        "scale": torch.ones(()),
        "zero_point": torch.zeros(()),
        "quant_dtype": "int1",
        "quant_bits": 1,
        "quant_scheme": "symmetric",
        "quant_min": -1,
        "quant_max": 1,
    }


def test_latent_weights_are_clipped_after_each_step_and_no_others(quantize):
    model = ToyNetwork()
    with torch.no_grad():
        model.hidden.weight *= 20
        model.head.weight *= 20
    free = model.hidden.bias.detach().clone()
    training = ToyTraining(model)
    quantizer = quantize(model)
    quantizer.start()
    assert quantizer.latent(quantizer.plan.targets[-1]).abs().max() > 2
    training.step(quantizer, 0)
    latent = model.hidden.parametrizations.weight.original
    assert latent.abs().max() == 1
    assert (latent.abs() < 1).any()
    assert model.head.weight.abs().max() > 2
    assert not torch.equal(model.hidden.bias, free)
    quantizer.unwrap_model(bake=True)
    assert set(model.hidden.weight.detach().flatten().tolist()) == {-1.0, 1.0}


def test_it_learns(quantize):
    model = ToyNetwork()
    training = ToyTraining(model)
    config = [
        CONFIG | {"target_names": ["weight"]},
        CONFIG | {"op_names": ["left_norm"], "target_names": ["_output_0"]},
    ]
    quantize(model, *config, evaluator=training.evaluator).compress(max_steps=100)
    assert sum(training.runs[-1][-8:]) < 0.8 * sum(training.runs[-1][:8])


def test_what_is_masked_has_no_sign(quantize):
    model = ToyNetwork()
    quantizer = quantize(model)
    pruner = L1NormPruner.from_compressor(quantizer, [{"op_names": ["hidden"], "sparse_ratio": 0.5}])
    quantizer.start()
    mask = pruner.get_masks()["hidden"]["weight"]
    weight = model.hidden.weight.detach()
    assert not weight[~mask].any()
    assert set(weight[mask].tolist()) == {-1.0, 1.0}


def test_a_compiled_step_in_bfloat16_is_the_eager_one(quantize):
    layers = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).bfloat16()
    quantize(layers, CONFIG | {"op_names": ["0", "1"]}).start()
    assert set(layers[0].weight.detach().flatten().tolist()) == {-1.0, 1.0}
    x, found = torch.randn(5, 4).bfloat16(), []
    for run in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        layers.zero_grad()
        run(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in layers.parameters()])
    torch.compiler.reset()
    for eager, compiled in zip(*found, strict=True):
        assert eager.dtype is torch.bfloat16
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"quant_dtype": "int8"}, InvalidValueError, r"\['quant_dtype'\] on left._input_0: 'int8' .* Legal: int1"),
        ({"granularity": "per_channel"}, ConflictError, "'granularity' has no meaning here: signs have no scale"),
        ({"observer": "minmax"}, ConflictError, "'observer' has no meaning here"),
        ({"quant_range": "full"}, ConflictError, "'quant_range' has no meaning here"),
        ({"target_names": ["bias"]}, ConflictError, "left.bias: BNNQuantizer does not keep the size of values"),
    ],
)
def test_what_makes_no_sense_is_refused(keys, error, message):
    model = ToyNetwork()
    with pytest.raises(error, match=message):
        BNNQuantizer(model, [CONFIG | keys], example_inputs=EXAMPLE)
    assert not hasattr(model.left, "parametrizations")
