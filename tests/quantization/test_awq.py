"""AWQ: the paper's search against one by hand, clipping against every choice, and less error where inputs are loud."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from tersor.config import Granularity, IntDtype
from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.quantization.awq import EXPONENTS, SHARES, AWQQuantizer, clipped_scales, emphasis, output_error
from tersor.quantization.cut import Cut
from tersor.quantization.format import Format
from tersor.testing.processes import in_two_processes, why_not_two
from tests.networks import randomize
from tests.quantization.outliers import RoundToNearest, block, decibels, llama, tokens

INT4 = {"target_names": ["weight"], "quant_dtype": "int4", "granularity": [1, 8]}
CONFIG = [{"op_types": ["Linear"], **INT4}]


def quantized(kind, model, config, data):
    quantizer = kind(model, config, calibration=data)
    quantizer.compress()
    return quantizer


@torch.no_grad()
def outputs(model, data):
    return torch.cat([torch.as_tensor(getattr(out, "logits", out)).flatten() for out in map(model, data)])


def rounded(weight, size, share=1.0):
    """int4, symmetric and narrow, in blocks along the rows; float64 numpy."""
    blocks = weight.reshape(len(weight), -1, size)
    scale = np.abs(blocks).max(2, keepdims=True) * share / 7
    return (np.clip(np.rint(blocks / scale), -7, 7) * scale).reshape(weight.shape)


def test_factors_are_the_means_to_a_power_around_one():
    means = np.random.default_rng(0).random(12) * 50
    for alpha in (0.0, 0.4, 1.0):
        s = means**alpha
        s /= np.sqrt(s.max() * s.min())
        np.testing.assert_allclose(emphasis(torch.from_numpy(means), alpha).numpy(), s, rtol=1e-12)
    assert torch.isfinite(emphasis(torch.tensor([0.0, 2.0]), 1.0)).all()
    assert emphasis(torch.zeros(3), 0.5).tolist() == [1, 1, 1]


def test_the_moment_of_inputs_gives_the_error_of_outputs():
    generator = np.random.default_rng(1)
    x, difference = generator.standard_normal((2, 30, 6)), generator.standard_normal((2, 4, 6))
    moment = torch.from_numpy(x.transpose(0, 2, 1) @ x)
    expected = ((x @ difference.transpose(0, 2, 1)) ** 2).sum()
    assert float(output_error(torch.from_numpy(difference), moment).sum()) == pytest.approx(expected, rel=1e-12)


def test_the_exponent_is_the_one_of_least_error():
    model, data = block(), tokens()
    before = copy.deepcopy(model).double()
    quantizer = quantized(AWQQuantizer, model, CONFIG, data)
    quantizer.unwrap_model()
    with torch.no_grad():
        x = before.norm(torch.cat(data).double()).reshape(-1, 16).numpy()
    errors = []
    for alpha in EXPONENTS:
        s = np.abs(x).mean(0) ** alpha
        s /= np.sqrt(s.max() * s.min())
        errors.append(0.0)
        for layer in (before.gate, before.up):
            weight = layer.weight.detach().numpy()
            errors[-1] += (((x / s) @ rounded(weight * s, 8).T - x @ weight.T) ** 2).sum()
    best = int(np.argmin(errors))
    assert quantizer.exponents[0] == EXPONENTS[best] > 0
    s = np.abs(x).mean(0) ** EXPONENTS[best]
    np.testing.assert_allclose(quantizer.factors[0], s / np.sqrt(s.max() * s.min()), rtol=1e-5)
    np.testing.assert_allclose(
        model.norm.weight.detach(), before.norm.weight.detach() / quantizer.factors[0], rtol=1e-5
    )
    assert decibels(outputs(model, data), outputs(before, [own.double() for own in data])) > 110


def test_each_block_is_clipped_where_its_own_output_loses_least():
    generator = np.random.default_rng(2)
    weight, x = generator.standard_normal((5, 16)) ** 3, generator.standard_normal((40, 16)) * np.logspace(-1, 1, 16)
    layer, form = nn.Linear(16, 5), Format(IntDtype(4), "symmetric", -7, 7)
    cut = Cut("", Granularity.parse([1, 8]), ((0, 1),) * 3)
    scale, zero_point = clipped_scales(layer, torch.from_numpy(weight), torch.from_numpy(x.T @ x)[None], form, cut)
    for row in range(5):
        for number in range(2):
            inside = slice(8 * number, 8 * number + 8)
            own = weight[row : row + 1, inside]
            errors = [((x[:, inside] @ (rounded(own, 8, share) - own).T) ** 2).sum() for share in SHARES]
            expected = np.abs(own).max() * SHARES[int(np.argmin(errors))] / 7
            assert float(scale[row, number]) == pytest.approx(expected, rel=1e-6)
    assert not zero_point.any()


def test_affine_ranges_are_clipped_on_both_sides():
    weight = torch.tensor([[-1.0, 0.1, 0.2, 8.0]], dtype=torch.float64)
    form, cut = Format(IntDtype(2, signed=False), "affine", 0, 3), Cut("", None, ((0, 1),) * 3)
    moment = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1e-9], dtype=torch.float64))[None]
    scale, _ = clipped_scales(nn.Linear(4, 1), weight, moment, form, cut)
    assert float(scale) == pytest.approx((1 + 8 * SHARES[-1]) / 3, rel=1e-6)


def test_loud_inputs_cost_less():
    fresh = tokens(seed=5)
    expected = outputs(block(), fresh)
    found = []
    for kind in (RoundToNearest, AWQQuantizer):
        quantizer = quantized(kind, block(), CONFIG, tokens())
        found.append(decibels(outputs(quantizer.model, fresh), expected))
        quantizer.unwrap_model()
    assert found[1] > found[0] + 3


def test_a_transformer():
    data = list(torch.randint(50, (3, 4, 9)))
    expected, config, found = outputs(llama(), data), [*CONFIG, {"op_names": ["lm_head"], "exclude": True}], []
    for kind in (RoundToNearest, AWQQuantizer):
        quantizer = quantized(kind, llama(), config, data)
        found.append(decibels(outputs(quantizer.model, data), expected))
        quantizer.unwrap_model()
    assert found[1] > found[0] + 2
    assert len(quantizer.moved) == 8
    assert decibels(outputs(quantizer.model, data), expected) > 90


def test_grouped_convolutions():
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)))
    with torch.no_grad():
        model[0].weight[[0, 5]] *= 30
        model[2].weight[:4, 0] /= 10
        model[2].weight[4:, 1] /= 10
    before, data, found = copy.deepcopy(model), [torch.randn(4, 3, 8, 8)], []
    config = [{"op_names": ["2"], "target_names": ["weight"], "quant_dtype": "int4"}]
    for kind in (RoundToNearest, AWQQuantizer):
        quantizer = quantized(kind, copy.deepcopy(before), config, data)
        found.append(decibels(outputs(quantizer.model, data), outputs(before, data)))
        quantizer.unwrap_model()
    assert found[1] > found[0] + 1


def test_a_layer_that_takes_no_factor_is_clipped_and_named():
    model = randomize(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)))
    with torch.no_grad():
        model[2].weight[:, 0] *= 6
    before, data = copy.deepcopy(model), [torch.randn(64, 8)]
    quantizer = quantized(AWQQuantizer, model, [{"op_names": ["2"], **INT4}], data)
    assert quantizer.refused == {"2.weight": "passes gelu, which does not commute with a factor"}
    scale = quantizer.get_calibration_config()["2"]["weight"]["scale"]
    shares = scale / (before[2].weight.detach().view(4, 2, 8).abs().amax(2) / 7)
    assert float(shares.min()) < 0.99
    quantizer.unwrap_model()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_weights_alone():
    with pytest.raises(ConflictError, match="AWQ quantizes weights alone"):
        AWQQuantizer(block(), [{"op_types": ["Linear"], "target_names": ["_input_0"]}], calibration=tokens())
    with pytest.raises(InvalidValueError, match="LayerNorm"):
        AWQQuantizer(block(), [{"op_types": ["LayerNorm"], "target_names": ["weight"]}], calibration=tokens())


def test_data_is_needed():
    quantizer = AWQQuantizer(block(), CONFIG, example_inputs=tokens()[0])
    with pytest.raises(InvalidValueError, match="there is no calibration batch"):
        quantizer.compress()
    quantizer.unwrap_model()


def test_a_layer_that_no_batch_reaches_is_named():
    class Branching(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x)) if len(x) > 1 else self[0](x)

    quantizer = AWQQuantizer(
        Branching(nn.Linear(8, 8), nn.Linear(8, 8)),
        CONFIG,
        example_inputs=torch.zeros(2, 8),
        calibration=[torch.zeros(1, 8)],
    )
    with pytest.raises(TrainingError, match="calls '1' on no batch"):
        quantizer.compress()
    quantizer.unwrap_model()


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_find_what_one_would_with_all_the_data():
    data = tokens(batches=4)

    def work(rank):
        quantizer = AWQQuantizer(block(), CONFIG, calibration=data[rank::2], example_inputs=data[0])
        quantizer.compress()
        scale = quantizer.get_calibration_config()["gate"]["weight"]["scale"]
        quantizer.unwrap_model()
        return {"factors": quantizer.factors[0], "scale": scale, "exponents": torch.tensor(quantizer.exponents)}

    alone = quantized(AWQQuantizer, block(), CONFIG, data)
    alone.unwrap_model()
    for found in in_two_processes(work):
        assert found["exponents"].tolist() == pytest.approx(alone.exponents)
        torch.testing.assert_close(found["factors"], alone.factors[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(
            found["scale"], alone.get_calibration_config()["gate"]["weight"]["scale"], rtol=1e-5, atol=0
        )
