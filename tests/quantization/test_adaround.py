"""AdaRound on models: what is learned, against the pure function by hand, and what stays of it."""

import copy

import pytest
import torch
from torch import nn

from tersor.config import IntDtype
from tersor.errors import ConflictError, InvalidValueError
from tersor.pruning import LevelPruner
from tersor.quantization.adaround import AdaRoundQuantizer
from tersor.quantization.format import Format
from tersor.quantization.learned_rounding import RoundingSettings, adaround
from tersor.testing.processes import in_two_processes, why_not_two
from tests.quantization.rounding import (
    BATCHES,
    FRESH,
    IMAGES,
    MORE_IMAGES,
    X,
    config,
    convolutions,
    decibels,
    mlp,
    nearest,
    trained,
)

SHORT = {"iterations": 60, "batch_size": 64}


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Each model that a test wraps is given back at its end."""
    made, make = [], AdaRoundQuantizer.__init__

    def remember(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(AdaRoundQuantizer, "__init__", remember)
    yield
    for quantizer in made:
        quantizer.unwrap_model()


def quantized(model, config_list, x=X, **settings):
    quantizer = AdaRoundQuantizer(model, config_list, calibration=list(x.split(16)), **{**SHORT, **settings})
    return quantizer, quantizer.compress()[1]


@pytest.mark.parametrize(("bits", "won"), [(2, 3.0), (4, 3.0)])
def test_less_is_lost_than_by_rounding_to_the_nearest(bits, won):
    model, original = trained(), trained()
    quantized(model, config(bits), iterations=300)
    assert decibels(model, original, FRESH) > decibels(nearest(original, bits), original, FRESH) + won


def test_less_is_lost_in_convolutions():
    model, original = convolutions(), convolutions()
    quantized(model, config(4), IMAGES, iterations=200)
    assert decibels(model, original, MORE_IMAGES) > decibels(nearest(original, 4), original, MORE_IMAGES) + 0.5


def test_the_inputs_are_the_rounded_models_and_the_targets_the_originals():
    """All samples are kept, in one batch, so that their order within it is all that is drawn."""
    model, original = mlp(), mlp()
    quantizer = AdaRoundQuantizer(model, config(3), calibration=[X], samples=256, seed=5, **SHORT)
    quantizer.compress()
    order, x, y = torch.randperm(256, generator=torch.Generator().manual_seed(5)), X, X
    for index in (0, 2, 4):
        rows = original[index].weight.detach()
        scales = rows.abs().amax(1, keepdim=True) / 3, torch.zeros(1)
        exact = (y @ rows.T)[order]
        int3 = Format(IntDtype(3), "symmetric", -3, 3)
        learned = adaround(
            rows[None], x[order][None], exact[None], int3, scales, settings=RoundingSettings(60, 64), seed=5
        )
        torch.testing.assert_close(model[index].weight, learned[0])
        x = model[index : index + 2](x).detach()
        y = original[index : index + 2](y).detach()


def test_scales_are_those_of_the_original_weights_and_no_weight_moves_by_more_than_one():
    model, original = mlp(), mlp()
    quantizer, calibration = quantized(model, config(3, granularity=[1, 4]))
    expected = model(FRESH)
    for index in (0, 2, 4):
        weight = original[index].weight.detach()
        scale = weight.unflatten(1, (-1, 4)).abs().amax(2) / 3
        torch.testing.assert_close(calibration[str(index)]["weight"]["scale"], scale)
        spread = scale.repeat_interleave(4, 1)
        assert ((model[index].weight - weight).abs() <= spread * 1.0001).all()
        levels = model[index].weight / spread
        torch.testing.assert_close(levels, levels.round())
    quantizer.unwrap_model()
    assert torch.equal(model(FRESH), expected)
    assert list(model.state_dict()) == list(original.state_dict())
    assert not any(tensor.requires_grad for tensor in model.buffers())


@pytest.mark.parametrize("granularity", [[-1, -1], "default"])
def test_affine_types(granularity):
    model, original = mlp(), mlp()
    keys = {"quant_dtype": "uint4", "quant_scheme": "affine", "granularity": granularity}
    _, calibration = quantized(model, [{**config(4)[0], **keys}])
    for index in (0, 2, 4):
        weight, own = original[index].weight.detach(), calibration[str(index)]["weight"]
        width = weight.amax() - weight.amin() if granularity != "default" else weight.amax(1) - weight.amin(1)
        torch.testing.assert_close(own["scale"].squeeze(), width / 15)
        levels = model[index].weight / own["scale"] + own["zero_point"]
        torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
        assert ((levels.round() >= 0) & (levels.round() <= 15)).all()


def test_masked_weights_stay_zero():
    model = nn.Sequential(nn.Linear(12, 64))
    pruner = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    pruner.compress()
    keep, original = pruner.get_masks()["0"]["weight"], nn.Sequential(nn.Linear(12, 64))
    original.load_state_dict({"0.weight": model[0].weight.detach(), "0.bias": model[0].bias.detach()})
    AdaRoundQuantizer.from_compressor(pruner, config(4), calibration=BATCHES, iterations=200).compress()
    pruner.unwrap_model()
    assert model[0].weight[~keep].count_nonzero() == 0
    assert decibels(model, original, FRESH) > decibels(nearest(original, 4), original, FRESH) + 2


def test_activations_are_calibrated_on_what_the_rounded_weights_give():
    model = mlp()
    both = {**config(8)[0], "target_names": ["_input_0", "weight"], "observer": "minmax"}
    quantizer, calibration = quantized(model, [both])
    plain = copy.deepcopy(quantizer.unwrap_model())
    assert calibration["0"]["_input_0"]["scale"] == X.abs().max() / 127
    assert calibration["4"]["_input_0"]["scale"] == plain[:4](X).abs().max() / 127


def test_a_seed_gives_the_same_and_no_random_state_changes():
    made = []
    for _ in range(2):
        model, state = mlp(), torch.get_rng_state()
        quantizer, _ = quantized(model, config(3), seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        made.append(quantizer.unwrap_model().state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_round_alike():
    def work(rank):
        model = mlp()
        AdaRoundQuantizer(model, config(3), calibration=BATCHES[rank::2], **SHORT).compress()
        return {name: model.get_submodule(name).weight.detach() for name in ("0", "2", "4")}

    first, second = in_two_processes(work)
    assert all(torch.equal(first[name], second[name]) for name in ("0", "2", "4"))


class TestRefusals:
    def test_uneven_types(self):
        with pytest.raises(ConflictError, match=r"0\.weight: fp8_e4m3 is not evenly spaced"):
            AdaRoundQuantizer(mlp(), [{**config(4)[0], "quant_dtype": "fp8_e4m3"}])

    def test_a_weight_with_other_inputs(self):
        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        model[1].weight = model[0].weight
        with pytest.raises(ConflictError, match=r"0\.weight: AdaRoundQuantizer would change 1\.weight as well"):
            AdaRoundQuantizer(model, config(4))

    @pytest.mark.parametrize("settings", [{"iterations": 0}, {"samples": 0}, {"warm_start": 2}])
    def test_numbers_out_of_range(self, settings):
        with pytest.raises(InvalidValueError, match=next(iter(settings))):
            AdaRoundQuantizer(mlp(), config(4), calibration=BATCHES, **settings)
