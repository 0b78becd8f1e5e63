"""GPTQ on models: layer after layer against the paper's formula, on all layers and granularities it takes."""

import copy

import pytest
import torch
from torch import nn

from tersor.config import IntDtype
from tersor.errors import ConflictError, InvalidValueError
from tersor.pruning import L1NormPruner, LevelPruner
from tersor.quantization.format import Format
from tersor.quantization.gptq import GPTQQuantizer
from tersor.quantization.second_order import gptq
from tersor.storage import load_calibration, save_calibration
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
from tests.torchvision_stub import import_torchvision

INT4 = Format(IntDtype(4), "symmetric", -7, 7)


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Each model that a test wraps is given back at its end."""
    made, make = [], GPTQQuantizer.__init__

    def remember(self, *args, **kwargs):
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(GPTQQuantizer, "__init__", remember)
    yield
    for quantizer in made:
        quantizer.unwrap_model()


def quantized(model, config_list, x=X, **settings):
    quantizer = GPTQQuantizer(model, config_list, calibration=list(x.split(16)), **settings)
    return quantizer, quantizer.compress()[1]


def test_each_layer_sees_what_the_rounded_layers_before_it_give():
    model, exact = mlp(), mlp().double()
    _, calibration = quantized(model, config(4))
    x = X.double()
    for index in (0, 2, 4):
        rows, scale, _ = gptq(exact[index].weight.data, x.T @ x / len(x), INT4)
        torch.testing.assert_close(calibration[str(index)]["weight"]["scale"], scale)
        torch.testing.assert_close(model[index].weight, rows.float())
        exact[index].weight.data = rows
        x = exact[index : index + 2](x)


@pytest.mark.parametrize(("bits", "won"), [(2, 0.5), (3, 2.5), (4, 4.0)])
def test_less_is_lost_than_by_rounding_to_the_nearest(bits, won):
    plain, ordered, original = trained(), trained(), trained()
    quantized(plain, config(bits))
    quantized(ordered, config(bits), act_order=True)
    found = [decibels(model, original, FRESH) for model in (nearest(original, bits), plain, ordered)]
    assert found[1] > found[0] + won
    assert found[2] > found[0] + 4


def test_less_is_lost_in_convolutions():
    model, original = convolutions(), convolutions()
    quantized(model, config(4), IMAGES)
    assert decibels(model, original, MORE_IMAGES) > decibels(nearest(original, 4), original, MORE_IMAGES) + 1


class TestWhatStays:
    @pytest.mark.parametrize("bake", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_the_weights_lie_on_their_grid(self, dtype, bake):
        model, data = mlp().to(dtype), X.to(dtype)
        quantizer, calibration = quantized(model, config(4), data)
        simulated = model(data)
        quantizer.unwrap_model(bake=bake)
        assert torch.equal(model(data), simulated)
        for index in (0, 2, 4):
            levels = model[index].weight.double() / calibration[str(index)]["weight"]["scale"]
            assert (levels - levels.round()).abs().max() < (0.05 if dtype.itemsize == 2 else 1e-5)
            assert levels.round().abs().max() == 7

    def test_weights_and_calibration_make_a_fresh_model_equal(self, tmp_path):
        quantizer, calibration = quantized(mlp(), [*config(4), {"op_names": ["2"], "target_names": ["_input_0"]}])
        expected = quantizer.model(FRESH)
        saved = load_calibration(save_calibration(calibration, tmp_path / "c.safetensors"))
        state = quantizer.unwrap_model().state_dict()
        model = mlp()
        model.load_state_dict(state)
        other = GPTQQuantizer(model, [*config(4), {"op_names": ["2"], "target_names": ["_input_0"]}])
        other.update_calibration_config(saved)
        assert torch.equal(model(FRESH), expected)

    def test_nothing_but_the_weights_changes(self):
        model, original = mlp(), mlp()
        modes = [module.training for module in model.modules()]
        quantizer, _ = quantized(model, config(4))
        quantizer.unwrap_model()
        assert [module.training for module in model.modules()] == modes
        for index in (0, 2, 4):
            assert torch.equal(model[index].bias, original[index].bias)
            assert not torch.equal(model[index].weight, original[index].weight)


class TestGranularity:
    @pytest.mark.parametrize("act_order", [False, True])
    def test_groups_of_columns(self, act_order):
        model, weight = nn.Sequential(nn.Linear(12, 5)), torch.randn(5, 12)
        model[0].weight.data.copy_(weight)
        _, calibration = quantized(model, config(4, granularity=[1, 4]), act_order=act_order)
        rows, scale, _ = gptq(weight.double(), X.double().T @ X.double() / 256, INT4, group_size=4, act_order=act_order)
        torch.testing.assert_close(model[0].weight, rows.float())
        torch.testing.assert_close(calibration["0"]["weight"]["scale"], scale)
        of_original = weight.view(5, 3, 4).abs().amax(2) / 7
        assert torch.allclose(calibration["0"]["weight"]["scale"], of_original) == act_order

    def test_groups_of_input_channels_of_a_convolution(self):
        model, weight = convolutions(), convolutions()[0].weight.detach()
        _, calibration = quantized(
            model, config(4, op_names=["0"], op_names_re=None, granularity=[1, 2, -1, -1]), IMAGES
        )
        patches = nn.functional.unfold(IMAGES.double(), 3, padding=1).mT.flatten(0, 1)
        moment = patches.T @ patches / len(patches)
        rows, scale, _ = gptq(weight.double().flatten(1), moment, INT4, group_size=18)
        torch.testing.assert_close(model[0].weight, rows.float().view(8, 4, 3, 3))
        torch.testing.assert_close(calibration["0"]["weight"]["scale"], scale.view(8, 2, 1, 1))

    @pytest.mark.parametrize("granularity", [[-1, -1], [2, 6], [-1, 1]])
    def test_other_blocks_have_the_scales_of_the_original_weights(self, granularity):
        model, weight = nn.Sequential(nn.Linear(12, 4)), torch.randn(4, 12)
        model[0].weight.data.copy_(weight)
        _, calibration = quantized(model, config(4, granularity=granularity))
        height, width = (size if size > 0 else whole for size, whole in zip(granularity, (4, 12), strict=True))
        scale = weight.view(4 // height, height, 12 // width, width).abs().amax((1, 3)) / 7
        torch.testing.assert_close(calibration["0"]["weight"]["scale"], scale)
        spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
        moment = X.double().T @ X.double() / 256
        rows = gptq(weight.double(), moment, INT4, fixed=(spread, torch.zeros(1))).rows
        torch.testing.assert_close(model[0].weight, rows.float())

    def test_affine(self):
        model, weight = nn.Sequential(nn.Linear(12, 4)), torch.randn(4, 12) + 0.5
        model[0].weight.data.copy_(weight)
        keys = {"quant_dtype": "uint3", "quant_scheme": "affine", "granularity": [1, 6]}
        _, calibration = quantized(model, [{**config(3)[0], **keys}])
        uint3 = Format(IntDtype(3, signed=False), "affine", 0, 7)
        rows, scale, zero_point = gptq(weight.double(), X.double().T @ X.double() / 256, uint3, group_size=6)
        torch.testing.assert_close(model[0].weight, rows.float())
        torch.testing.assert_close(calibration["0"]["weight"]["scale"], scale)
        assert calibration["0"]["weight"]["zero_point"].tolist() == zero_point.tolist()

    def test_fp8(self):
        model, original = mlp(), mlp()
        quantized(model, [{**config(4)[0], "quant_dtype": "fp8_e5m2"}])
        assert decibels(model, original, FRESH) > 25


class TestLayers:
    @pytest.mark.parametrize("index", [2, 4])
    def test_groups_of_a_convolution_are_matrices_of_their_own(self, index):
        model, original = convolutions(), convolutions()
        quantized(model, [{"op_names": [str(index)], "target_names": ["weight"], "quant_dtype": "int4"}], IMAGES)
        conv, x = original[index], original[:index](IMAGES).detach()
        per_group = conv.in_channels // conv.groups
        for group in range(conv.groups):
            own = x[:, group * per_group : (group + 1) * per_group].double()
            patches = nn.functional.unfold(own, 3).mT.flatten(0, 1)
            out = slice(group * 8 // conv.groups, (group + 1) * 8 // conv.groups)
            rows = gptq(conv.weight[out].detach().double().flatten(1), patches.T @ patches / len(patches), INT4).rows
            torch.testing.assert_close(model[index].weight[out].flatten(1), rows.float())

    def test_conv1d_of_transformers(self):
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 12)
        linear = nn.Linear(12, 5)
        linear.weight.data.copy_(layer.weight.data.T)
        linear.bias.data.copy_(layer.bias.data)
        models = nn.Sequential(layer), nn.Sequential(linear)
        _, first = quantized(models[0], config(4, granularity=[4, 1]))
        _, second = quantized(models[1], config(4, granularity=[1, 4]))
        torch.testing.assert_close(layer.weight.T, linear.weight)
        torch.testing.assert_close(first["0"]["weight"]["scale"].T, second["0"]["weight"]["scale"])
        torch.testing.assert_close(models[0](FRESH), models[1](FRESH))

    def test_a_small_language_model(self):
        import_torchvision()  # transformers imports it where it finds it
        transformers = pytest.importorskip("transformers")
        settings = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, **heads)).eval()
        model.apply(lambda m: nn.init.normal_(m.weight, std=0.2) if isinstance(m, (nn.Linear, nn.Embedding)) else None)
        original, ids = copy.deepcopy(model), torch.randint(50, (8, 24))

        def logits(of):
            return nn.Sequential(of.model, _First(), of.lm_head)

        keys = {"op_types": ["Linear"], "exclude_op_names": ["lm_head"], "target_names": ["weight"]}
        quantizer = GPTQQuantizer(
            model, [{**keys, "quant_dtype": "int4", "granularity": [1, 16]}], calibration=[{"input_ids": ids}]
        )
        _, calibration = quantizer.compress()
        assert len(calibration) == 14
        assert calibration["model.layers.1.mlp.down_proj"]["weight"]["scale"].shape == (32, 3)
        rounded = copy.deepcopy(original)
        for name, module in rounded.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                groups = module.weight.data.unflatten(1, (-1, 16))
                scale = groups.abs().amax(2, keepdim=True) / 7
                module.weight.data = ((groups / scale).round() * scale).flatten(1)
        won = decibels(logits(model), logits(original), ids) - decibels(logits(rounded), logits(original), ids)
        assert won > 1.5


class _First(nn.Module):
    def forward(self, output):
        return output[0]


class TestMasks:
    def test_they_stay_and_the_rest_makes_up_for_them(self):
        model = nn.Sequential(nn.Linear(12, 64))
        pruner = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
        pruner.compress()
        masks, rounded = pruner.get_masks(), nn.Sequential(nn.Linear(12, 64))
        rounded.load_state_dict({"0.weight": model[0].weight.detach(), "0.bias": model[0].bias.detach()})
        original = copy.deepcopy(rounded)
        GPTQQuantizer.from_compressor(pruner, config(4), calibration=BATCHES).compress()
        assert torch.equal(pruner.get_masks()["0"]["weight"], masks["0"]["weight"])
        pruner.unwrap_model()
        assert model[0].weight[~masks["0"]["weight"]].count_nonzero() == 0
        assert decibels(model, original, FRESH) > decibels(nearest(rounded, 4), original, FRESH) + 1

    def test_masked_channels(self):
        model = mlp()
        pruner = L1NormPruner(model, [{"op_names": ["0", "2"], "sparse_ratio": 0.5}], example_inputs=X[:2])
        quantizer = GPTQQuantizer.from_compressor(pruner, config(4), calibration=BATCHES)
        quantizer.compress()
        masks, outputs = pruner.get_masks(completed=True), model(FRESH)
        quantizer.unwrap_model()
        for name in ("0", "2", "4"):
            assert not masks[name]["weight"].all()
            assert model.get_submodule(name).weight[~masks[name]["weight"]].count_nonzero() == 0
        for name in ("0", "2"):
            model.get_submodule(name).bias.data *= masks[name]["bias"]
        assert torch.equal(model(FRESH), outputs)


class TestOtherTargets:
    def test_they_are_calibrated_on_what_the_rounded_weights_give(self):
        model = mlp()
        both = [{"op_names_re": [r"\d"], "target_names": ["_input_0", "weight", "_output_0"]}]
        both[0] |= {"quant_dtype": "int8", "observer": "minmax"}
        quantizer, calibration = quantized(model, both)
        plain = copy.deepcopy(quantizer.unwrap_model())
        x = X
        for name in ("0", "2", "4"):
            assert calibration[name]["_input_0"]["scale"] == x.abs().max() / 127
            x = plain.get_submodule(name)(x)
            assert calibration[name]["_output_0"]["scale"] == x.abs().max() / 127
            x = x.relu()
        quantizer.wrap_model()
        _, alone = quantized(mlp(), config(8))
        assert all(torch.equal(alone[name]["weight"]["scale"], calibration[name]["weight"]["scale"]) for name in alone)

    def test_nothing_but_activations(self):
        _, calibration = quantized(mlp(), [{"op_names": ["2"], "target_names": ["_output_0"], "observer": "minmax"}])
        assert calibration["2"]["_output_0"]["scale"] == mlp()[:3](X).abs().max() / 127


def test_fewer_samples_than_columns_and_dead_columns():
    model, x = nn.Sequential(nn.Linear(12, 64)), X[:5].clone()
    x[:, 3] = 0
    original = copy.deepcopy(model)
    quantized(model, config(4), x)
    weight, scale = original[0].weight.detach(), original[0].weight.detach().abs().amax(1) / 7
    torch.testing.assert_close(model[0].weight[:, 3], (weight[:, 3] / scale).round() * scale)
    assert decibels(model, original, x) > decibels(nearest(original, 4), original, x) + 2


def test_a_singular_moment_is_damped_with_a_warning():
    with pytest.warns(UserWarning, match=r"0\.weight: the second moment is singular; damping raised"):
        quantized(nn.Sequential(nn.Linear(12, 4)), config(4), X[:5], damping=0)


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_round_as_one_that_sees_everything():
    def work(rank):
        model = mlp()
        quantizer = GPTQQuantizer(model, config(4), calibration=BATCHES[rank::2])
        quantizer.compress()
        return quantizer.unwrap_model().state_dict()

    first, second = in_two_processes(work)
    model = mlp()
    quantized(model, config(4))[0].unwrap_model()
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value)


class TestRefusals:
    def test_a_weight_that_is_no_matrix(self):
        with pytest.raises(
            ConflictError, match=r"0\.weight: GPTQQuantizer .* ConvTranspose2d is no layer.*PtqQuantizer"
        ):
            GPTQQuantizer(nn.Sequential(nn.ConvTranspose2d(2, 2, 2)), config(4))

    def test_a_weight_with_other_inputs(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
                self.head.weight = self.embed.weight

        with pytest.raises(ConflictError, match=r"head\.weight: .*change embed\.weight as well"):
            GPTQQuantizer(Tied(), [{"op_types": ["Linear"], "target_names": ["weight"]}])

    def test_a_weight_is_not_dynamic(self):
        with pytest.raises(ConflictError, match=r"\['dynamic'\] on 0.weight: a parameter does not change"):
            GPTQQuantizer(mlp(), config(4, dynamic=True), calibration=BATCHES)

    @pytest.mark.parametrize("calibration", [None, []])
    def test_no_data(self, calibration):
        quantizer = GPTQQuantizer(mlp(), config(4), calibration=calibration)
        with pytest.raises(InvalidValueError, match="calibration: there is no calibration batch"):
            quantizer.compress()

    @pytest.mark.parametrize("settings", [{"damping": -1}, {"block_size": 0}])
    def test_numbers_out_of_range(self, settings):
        with pytest.raises(InvalidValueError, match=next(iter(settings))):
            GPTQQuantizer(mlp(), config(4), calibration=BATCHES, **settings)
