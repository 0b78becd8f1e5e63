"""A program computes what the simulation does, to the bit."""

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy.lowering import lower
from tersor.errors import CheckpointError, ConflictError, TraceError, UnmatchedError, WrapError
from tersor.graph import functions_as_modules
from tersor.pruning import L1NormPruner
from tersor.quantization import (
    AdaRoundQuantizer,
    AWQQuantizer,
    BNNQuantizer,
    DoReFaQuantizer,
    GPTQQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
    SmoothQuantizer,
    fuse_modules,
)
from tersor.storage import load_calibration, save_calibration
from tests.deploy.lowered import (
    GROUPS,
    Net,
    batches,
    departure,
    entries,
    evaluator,
    fresh,
    largest_difference,
    program_of,
    program_outputs,
    ptq,
    run,
    simulated,
)


def of_net(quantizer):
    return departure(quantizer, batches()[0][:2], fresh())


WEIGHTS = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int4"}]


def trained(kind, config_list, **arguments):
    model = Net()
    quantizer = kind(model, config_list, evaluator(model), **arguments)
    quantizer.compress(max_steps=4, max_epochs=None)
    return quantizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: trained(QATQuantizer, entries()),
        lambda: trained(LsqQuantizer, entries("int4", "uint4", "symmetric")),
        lambda: trained(LsqPlusQuantizer, entries("int4", "uint4")),
        lambda: trained(DoReFaQuantizer, entries("int4", "uint4", None)),
        lambda: trained(DoReFaQuantizer, entries("int1", "uint1", None)),
        lambda: trained(DoReFaQuantizer, entries("uint1", "uint8", None)),
        lambda: trained(BNNQuantizer, entries("int1", "int1", None)),
    ],
    ids=["QAT", "LSQ", "LSQ+", "DoReFa", "DoReFa int1", "DoReFa uint1", "BNN"],
)
def test_quantizers_that_train(make):
    assert of_net(make()) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPTQQuantizer(Net(), entries("int4"), calibration=batches()),
        lambda: AdaRoundQuantizer(Net(), entries("int4"), calibration=batches(), iterations=20),
        lambda: AWQQuantizer(Net(), WEIGHTS, calibration=batches(), example_inputs=batches()[0]),
        lambda: SmoothQuantizer(Net(), entries(), calibration=batches(), example_inputs=batches()[0]),
    ],
    ids=["GPTQ", "AdaRound", "AWQ", "Smooth"],
)
def test_quantizers_that_calibrate(make):
    quantizer = make()
    quantizer.compress()
    assert of_net(quantizer) == 0


def chain(width=8, depth=14):
    """Many layers for many settings: to export a model takes longer than to run it."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def settings_of(layers, target, **common):
    """A config list of one setting a layer."""
    return [{"op_names": [str(index)], "target_names": [target], **common, **own} for index, own in enumerate(layers)]


WEIGHT_TYPES = [
    "int2", "int3", "int5", "int8", "int12", "int16", "int24", "int32", "uint4", "uint8", "uint16", "uint32",
    "fp8_e4m3", "fp8_e5m2",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_types_of_weights(scheme):
    kinds = [kind for kind in WEIGHT_TYPES if scheme == "symmetric" or "fp8" not in kind]
    config_list = settings_of([{"quant_dtype": kind} for kind in kinds], "weight", quant_scheme=scheme)
    quantizer = ptq(chain(depth=len(kinds)), config_list, torch.randn(8, 8))
    assert departure(quantizer, torch.randn(2, 8), torch.randn(5, 8)) == 0
    assert {own.kind for own in program_of(quantizer, torch.randn(2, 8)).targets.values()} == set(kinds)


INPUT_TYPES = [
    ("int8", "symmetric"), ("int8", "affine"), ("uint8", "symmetric"), ("uint8", "affine"), ("int4", "affine"),
    ("uint2", "affine"), ("int16", "symmetric"), ("fp8_e4m3", "symmetric"), ("fp8_e5m2", "symmetric"),
]  # fmt: skip


@pytest.mark.parametrize("target", ["_input_", "_output_"])
def test_types_of_inputs_and_outputs(target):
    layers = [{"quant_dtype": kind, "quant_scheme": scheme} for kind, scheme in INPUT_TYPES]
    quantizer = ptq(chain(depth=len(layers)), settings_of(layers, target), torch.randn(8, 8))
    assert departure(quantizer, torch.randn(2, 8), 1.5 * torch.randn(5, 8)) == 0


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_granularities_of_weights(scheme):
    granularities = ["default", "out_channel", "in_channel", [1, 1], [4, -1], [2, 1], [3, 3], [1, 3], [4, 12], [12, 1]]
    layers = [{"granularity": own} for own in granularities]
    config_list = settings_of(layers, "weight", quant_dtype="int4", quant_scheme=scheme)
    quantizer = ptq(chain(12, len(layers)), config_list, torch.randn(8, 12))
    assert departure(quantizer, torch.randn(2, 12), torch.randn(5, 12)) == 0


def test_blocks_of_kernels():
    layers = [{"granularity": own} for own in ([1, 1, 3, 3], [2, 1, 3, 1], [1, 4, 1, 1], [2, 2, 3, 3], "in_channel")]
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in layers))
    quantizer = ptq(model, settings_of(layers, "weight", quant_dtype="int4"), torch.randn(4, 4, 5, 5))
    assert departure(quantizer, torch.randn(2, 4, 5, 5), torch.randn(3, 4, 5, 5)) == 0


def test_groups_of_128():
    config = {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int4", "granularity": [1, 128]}
    quantizer = ptq(nn.Sequential(nn.Linear(256, 3)), [config], torch.randn(4, 256))
    program = program_of(quantizer, torch.randn(2, 256))
    assert program.targets["0.weight"].block == 128
    assert program.targets["0.weight"].scale.shape == (3, 2)
    assert departure(quantizer, torch.randn(2, 256), torch.randn(5, 256)) == 0


def test_inputs_with_many_scales():
    layers = [
        {"granularity": "per_channel"},
        {"granularity": [-1, 4]},
        {"granularity": [-1, 4], "quant_dtype": "uint8", "quant_scheme": "affine"},
        {"dynamic": True},
        {"dynamic": True, "granularity": [-1]},
        {"dynamic": True, "quant_dtype": "uint8", "quant_scheme": "affine"},
        {"dynamic": True, "quant_dtype": "fp8_e4m3"},
    ]
    config_list = [{"quant_dtype": "int8", **own} for own in layers]
    quantizer = ptq(chain(depth=len(layers)), settings_of(config_list, "_input_"), torch.randn(6, 8))
    assert departure(quantizer, torch.randn(2, 8), torch.randn(5, 8)) == 0


def test_biases():
    biases = {"op_types": ["Conv2d", "Linear"], "target_names": ["bias"], "quant_dtype": "int8"}
    wide = {"op_names": ["head"], "target_names": ["bias"], "quant_dtype": "int32"}
    assert of_net(ptq(Net(), [*entries(), biases, wide], batches())) == 0


def fused(kind="int8"):
    config_list = [{**entry, "fuse_names": GROUPS} for entry in entries(kind)]
    outputs = {"op_names": ["conv", "conv2", "fc"], "target_names": ["_output_"], "quant_dtype": "uint8"}
    biases = {"op_names": ["conv"], "target_names": ["bias"], "quant_dtype": "int8", "fuse_names": GROUPS[:1]}
    return [*config_list, {**outputs, "quant_scheme": "affine", "fuse_names": GROUPS}, biases]


def close(quantizer):
    """A folded convolution sums other products than a convolution and a norm: the last digit may differ."""
    expected = simulated(quantizer.model, fresh())
    program = program_of(quantizer, batches()[0][:2])
    return largest_difference(program_outputs(program, fresh()), expected) / float(expected[0].abs().max())


def test_fused_norms():
    assert close(ptq(Net(), fused(), batches())) < 1e-6
    assert close(trained(QATQuantizer, fused())) < 1e-6


def test_fused_norms_from_a_file_with_latent_weights(tmp_path):
    model = Net()
    quantizer = ptq(model, fused(), batches())
    expected = simulated(model, fresh())
    calibration = load_calibration(save_calibration(quantizer.get_calibration_config(), tmp_path / "c.safetensors"))
    quantizer.unwrap_model()
    program = lower(model, batches()[0][:2], calibration)
    assert largest_difference(program_outputs(program, fresh()), expected) < 1e-6
    assert isinstance(model.norm, nn.BatchNorm2d)
    folded = fuse_modules(model.eval(), GROUPS)
    program = lower(folded, batches()[0][:2], calibration)
    assert largest_difference(program_outputs(program, fresh()), expected) < 1e-6


def test_norms_folded_before():
    model = fuse_modules(Net().eval(), GROUPS)
    assert of_net(ptq(model, entries(), batches())) == 0


def test_a_channel_of_no_scale():
    model = Net()
    model.norm.weight.data[2:4] = 0
    assert close(ptq(model, fused(), batches())) < 1e-6


@pytest.mark.parametrize("with_norms", [False, True])
def test_masks_of_weights(with_norms):
    model = Net()
    pruner = L1NormPruner(model, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.4}])
    pruner.compress()
    quantizer = PtqQuantizer.from_compressor(pruner, fused() if with_norms else entries(), calibration=batches())
    quantizer.compress()
    assert close(quantizer) < 1e-6
    program = program_of(quantizer, batches()[0][:2])
    kept = pruner.get_masks()["fc"]["weight"]
    numbers = program.exported.state_dict["fc.weight_numbers.numbers"]
    assert bool((numbers[~kept] == 0).all())
    assert bool((numbers[kept] != 0).any())


def test_masked_weights_of_dorefa():
    for kind in ("int3", "int1"):
        model = Net()
        pruner = L1NormPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.4}])
        pruner.compress()
        quantizer = DoReFaQuantizer.from_compressor(pruner, entries(kind, "uint4", None), evaluator=evaluator(model))
        quantizer.compress(max_steps=2, max_epochs=None)
        assert of_net(quantizer) == 0


def masked_outputs(config_list, place, mask):
    model = Net()
    quantizer = ptq(model, config_list, batches())
    quantizer.wrappers.mask(*place).set([mask])
    return quantizer


@pytest.mark.parametrize(
    "place", [("conv", "_output_0"), ("norm", "_input_0"), ("relu", "_output_0"), ("fc", "_input_0")]
)
def test_masks_of_inputs_and_outputs(place):
    mask = torch.tensor([True, False, True, True, False, True, True, True])
    mask = mask if place[0] == "fc" else mask.view(1, 8, 1, 1)
    assert of_net(masked_outputs(entries(), place, mask)) == 0
    assert close(masked_outputs(fused(), place, mask)) < 1e-6


def test_a_mask_between_layer_and_norm_is_one_of_channels():
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 2] = False
    assert of_net(masked_outputs(entries(), ("conv", "_output_0"), mask)) == 0
    with pytest.raises(ConflictError, match=r"conv\._output_0: lies between .* no mask of whole channels"):
        close(masked_outputs(fused(), ("conv", "_output_0"), mask))


def test_dynamic_scales_of_masked_values():
    config = {"op_types": ["Linear"], "target_names": ["_input_"], "quant_dtype": "int8", "dynamic": True}
    quantizer = ptq(nn.Sequential(nn.Linear(4, 3)), [config], torch.randn(6, 4))
    quantizer.wrappers.mask("0", "_input_0").set([torch.tensor([True, True, False, True])])
    x = torch.randn(5, 4)
    x[:, 2] = 50
    assert departure(quantizer, torch.randn(2, 4), x) == 0


LAYERS = [
    {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"},
    {"op_types": ["Linear"], "target_names": ["_input_", "_output_"], "quant_dtype": "uint8", "quant_scheme": "affine"},
]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.fc(self.embed(ids)))


@pytest.mark.filterwarnings("ignore:.*nothing that could be rounded passed")
def test_tied_weights_are_stored_once():
    ids = torch.randint(11, (3, 5))
    embeddings = [{"op_types": ["Embedding"], "target_names": ["weight"], "quant_dtype": "int4"}]
    for config_list in (LAYERS, embeddings):
        quantizer = ptq(Tied(), config_list, ids)
        assert departure(quantizer, ids, torch.randint(11, (4, 5))) == 0
    numbers = [own for own in program_of(quantizer, ids).exported.state_dict.values() if own.shape == (11, 6)]
    assert len({own.data_ptr() for own in numbers}) == 1
    assert numbers[0].dtype is torch.int8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(self.attend(x, x, x, need_weights=False)[0])


@pytest.mark.filterwarnings("ignore:.*nothing that could be rounded passed")
def test_attention_and_norms():
    config_list = [
        {"op_types": ["MultiheadAttention"], "target_names": ["in_proj_weight", "_input_0"], "quant_dtype": "int8"},
        {"op_names": ["attend.out_proj"], "target_names": ["weight"], "quant_dtype": "int8"},
        {"op_types": ["LayerNorm"], "target_names": ["weight"], "quant_dtype": "int8"},
    ]
    x = torch.randn(3, 4, 8)
    assert departure(ptq(Attention(), config_list, x), x, torch.randn(5, 4, 8)) == 0
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert departure(ptq(layer, LAYERS, x), x, torch.randn(5, 4, 8)) == 0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x):
        values, (hidden, _) = self.lstm(x)
        return self.fc(values), hidden


def test_recurrent_layers_stay_in_floating_point():
    names = ["weight_ih_l0", "weight_hh_l1_reverse"]
    config_list = [{"op_types": ["LSTM"], "target_names": names, "quant_dtype": "int4"}, *LAYERS]
    x = torch.randn(3, 4, 4)
    model = Recurrent()
    quantizer = ptq(model, config_list, x)
    assert departure(quantizer, x, torch.randn(5, 4, 4)) == 0
    program = program_of(quantizer, x)
    assert [own.where for own in program.fallbacks] == [f"lstm.{name}" for name in names]
    assert "in floating point, on the rounded values" in program.fallbacks[0].reason
    expected = simulated(model, x)
    calibration = quantizer.get_calibration_config()
    quantizer.unwrap_model()
    assert largest_difference(program_outputs(lower(model, x, calibration), x), expected) == 0


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_module_in_two_places():
    assert departure(ptq(Shared(), LAYERS, torch.randn(3, 6)), torch.randn(3, 6), torch.randn(5, 6)) == 0


def test_models_in_other_precisions():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).bfloat16()
    x = torch.randn(3, 4).bfloat16()
    assert departure(ptq(model, LAYERS, x), x, torch.randn(5, 4).bfloat16()) == 0
    # A program computes with float32 between stored numbers, the simulation with float64 there.
    x = torch.randn(3, 4).double()
    assert (
        departure(
            ptq(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).double(), LAYERS, x),
            x,
            torch.randn(5, 4).double(),
        )
        < 1e-6
    )


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.left(x) + self.right(x))


def test_functions_as_modules():
    x = torch.randn(3, 4)
    sums = {
        "op_types": ["Add"],
        "target_names": ["_input_", "_output_"],
        "quant_dtype": "uint8",
        "quant_scheme": "affine",
    }
    assert departure(ptq(functions_as_modules(Branches(), x), [*LAYERS, sums], x), x, torch.randn(5, 4)) == 0


class Absolute(nn.Module):
    def forward(self, weight):
        return weight.abs()


def test_a_parametrization_of_the_users():
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Absolute())
    x = torch.randn(3, 4)
    quantizer = ptq(model, LAYERS, x)
    assert departure(quantizer, x, torch.randn(5, 4)) == 0
    calibration, expected = quantizer.get_calibration_config(), simulated(model, x)
    quantizer.unwrap_model()
    assert largest_difference(program_outputs(lower(model, x, calibration), x), expected) == 0
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")


def test_hooks_of_the_users():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = model[0].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(3, 4)
    assert departure(ptq(model, LAYERS, x), x, torch.randn(5, 4)) == 0
    assert handle.id in model[0]._forward_hooks


def test_hooks_on_a_norm_that_is_folded_are_refused():
    model = Net()
    quantizer = ptq(model, fused(), batches())
    model.norm.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ConflictError, match=r"hooks hang on the norm.*Leave the group out"):
        of_net(quantizer)


@pytest.mark.parametrize("training", [False, True])
def test_a_plain_model_stays_as_it_was(training):
    model = Net().train(training)
    model.relu.train(not training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    quantizer = ptq(model, entries(), batches())
    calibration, expected = quantizer.get_calibration_config(), simulated(model, fresh())
    quantizer.unwrap_model()
    program = lower(model, batches()[0][:2], calibration)
    assert largest_difference(program_outputs(program, fresh()), expected) == 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model.conv) is nn.Conv2d


def test_without_a_calibration_it_is_the_model():
    model = Net()
    assert largest_difference(program_outputs(lower(model, fresh()), fresh()), simulated(model, fresh())) == 0


def test_inputs_without_a_batch():
    for x in (torch.randn(4), torch.randn(4, 4)):
        model = nn.Sequential(nn.Linear(4, 4))
        assert departure(ptq(model, LAYERS, x), x, torch.randn_like(x), dynamic_batch=False) == 0


class LeftProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.matrix = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return self.fc(self.matrix @ x)


def test_a_first_dimension_that_is_no_batch():
    x = torch.randn(4, 5)
    quantizer = ptq(LeftProduct(), LAYERS, x)
    with pytest.raises(TraceError, match=r"LeftProduct: .*constant \(4\).* set dynamic_batch=False"):
        program_of(quantizer, x)
    assert departure(quantizer, x, torch.randn(4, 5), dynamic_batch=False) == 0


def test_a_wrapped_model_is_refused():
    model = Net()
    quantizer = ptq(model, entries(), batches())
    with pytest.raises(WrapError, match="Give the compressor itself"):
        lower(model, fresh(), quantizer.get_calibration_config())


def test_a_calibration_of_another_model_is_refused():
    quantizer = ptq(Net(), entries(), batches())
    calibration = quantizer.get_calibration_config()
    with pytest.raises(
        UnmatchedError, match=r"calibration\['cov'\]: the model has no such module. Did you mean 'conv'"
    ):
        lower(Net(), fresh(), {"cov": calibration["conv"]})
    with pytest.raises(UnmatchedError, match=r"calibration\['conv'\]: the model has no such parameter"):
        lower(Net(), fresh(), {"conv": {"wieght": calibration["conv"]["weight"]}})
    with pytest.raises(UnmatchedError, match=r"calibration\['bn'\]: the model has no such module"):
        lower(Net(), fresh(), {"conv": {"weight": {**calibration["conv"]["weight"], "fuse_names": ["conv", "bn"]}}})
    other = Net()
    other.fc, other.head = nn.Linear(8, 10), nn.Linear(10, 3)
    with pytest.raises(CheckpointError, match=r"fc\.weight: scales of shape \(16, 1\) do not fit .* \(10, 8\)"):
        lower(other, fresh(), calibration)
    channels = {
        "op_types": ["Conv2d"],
        "target_names": ["_input_"],
        "quant_dtype": "int8",
        "granularity": "per_channel",
    }
    calibration = ptq(Net(), [channels], batches()).get_calibration_config()
    with pytest.raises(CheckpointError, match=r"conv\._input_0: there are 8 scales, and 2 channels pass"):
        lower(Net(), fresh(), {"conv": calibration["conv2"]})


@pytest.mark.parametrize(
    ("kind", "config"),
    [(DoReFaQuantizer, entries("int4", "uint4", None)), (BNNQuantizer, entries("int1", "int1", None))],
)
def test_latent_weights_that_do_not_say_their_numbers_are_refused(kind, config):
    quantizer = trained(kind, config)
    model, calibration = quantizer.model, quantizer.get_calibration_config()
    expected = simulated(model, fresh())
    quantizer.unwrap_model()
    with pytest.raises(CheckpointError, match=r"conv\.weight: the weights are latent.*bake=True"):
        lower(model, fresh(), calibration)
    quantizer.wrap_model()
    quantizer.unwrap_model(bake=True)
    program = lower(model, batches()[0][:2], calibration)
    assert largest_difference(program_outputs(program, fresh()), expected) == 0


def test_rounded_weights_of_adaround_say_their_numbers():
    model = Net()
    quantizer = AdaRoundQuantizer(model, entries("int3"), calibration=batches(), iterations=20)
    quantizer.compress()
    calibration, expected = quantizer.get_calibration_config(), simulated(model, fresh())
    quantizer.unwrap_model()
    program = lower(model, batches()[0][:2], calibration)
    assert largest_difference(program_outputs(program, fresh()), expected) == 0


def test_weights_are_stored_as_numbers():
    program = program_of(ptq(Net(), entries("int4"), batches()), batches()[0][:2])
    weights = {name: own for name, own in program.exported.state_dict.items() if name.endswith("_numbers.numbers")}
    assert {name.split(".")[0] for name in weights} == {"conv", "conv2", "fc", "head"}
    assert all(own.dtype is torch.int8 and int(own.abs().max()) == 7 for own in weights.values())
    floating = [own for own in program.exported.state_dict.values() if own.is_floating_point() and own.dim() > 1]
    assert not floating
    assert set(program.modules.values()) == {"Conv2d", "Linear"}
    assert run(program.exported.module(), torch.randn(9, 2, 6, 6)).shape == (9, 3)
