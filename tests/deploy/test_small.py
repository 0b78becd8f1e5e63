"""Pruned and quantized models, made small with their calibration."""

import copy
from dataclasses import replace

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy import QuantizationSpeedup
from tersor.deploy.agreement import agreement
from tersor.deploy.lowering import lower
from tersor.deploy.plain import Plain, plain_copy, plain_of
from tersor.deploy.small import common_block, make_small, simulated
from tersor.errors import InvalidValueError, MaskError, VerificationError, WrapError
from tersor.graph import groups
from tersor.pruning import L1NormPruner
from tersor.quantization import PtqQuantizer, QATQuantizer, auto_fuse
from tersor.speedup.verify import outputs_of


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.depth = nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.norm2, self.relu2 = nn.ConvTranspose2d(16, 24, 2), nn.BatchNorm2d(24), nn.ReLU()
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.depth(self.relu(self.norm(self.stem(x))))
        return self.head(self.relu2(self.norm2(self.up(x))).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    made = Net().eval()
    for norm in (made.norm, made.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    return made


EXAMPLE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
PRUNED = [{"op_names": ["stem", "up"], "sparse_ratio": 0.5}]


def quantized(settings, order="pruner first", model=None, example=EXAMPLE, pruned=PRUNED):
    model = model or net()
    config = [{"quant_dtype": "int8", **entry} for entry in settings]
    if order == "pruner first":
        pruner = L1NormPruner(model, pruned, example_inputs=example)
        last = PtqQuantizer.from_compressor(pruner, config, calibration=[example])
    else:
        quantizer = PtqQuantizer(model, config, calibration=[example], example_inputs=example)
        last = L1NormPruner.from_compressor(quantizer, pruned)
    last.compress()
    return last


def shapes(plain):
    return {
        f"{module}.{target}": tuple(torch.as_tensor(said["scale"]).shape)
        for module, targets in plain.calibration.items()
        for target, said in targets.items()
    }


LAYERS = {"op_types": ["Conv2d", "ConvTranspose2d", "Linear"]}


@pytest.mark.parametrize("order", ["pruner first", "quantizer first"])
def test_small_model_computes_what_the_compressors_simulate(order):
    compressor = quantized([LAYERS], order)
    plain = plain_copy(compressor)
    small = make_small(plain, EXAMPLE)
    model = small.model
    assert (model.stem.out_channels, model.depth.in_channels, model.up.out_channels) == (8, 8, 12)
    assert shapes(small)["stem.weight"] == (8, 1, 1, 1)
    assert shapes(small)["depth.weight"] == (16, 1, 1, 1)
    assert shapes(small)["up.weight"] == (1, 12, 1, 1)
    assert shapes(small)["head.weight"] == (5, 1)
    assert small.masks == {}
    expected = outputs_of(compressor.model, EXAMPLE)[0]
    torch.testing.assert_close(simulated(small)(EXAMPLE), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert plain.model.stem.out_channels == 16
    program = lower(model, EXAMPLE, small.calibration)
    torch.testing.assert_close(program.exported.module()(EXAMPLE), simulated(small)(EXAMPLE), rtol=1e-5, atol=1e-6)


def test_scales_are_those_of_the_channels_that_stay():
    plain = plain_copy(quantized([LAYERS]))
    kept = plain.masks["stem"]["weight"].flatten(1).any(1)
    small = make_small(plain, EXAMPLE)
    before, after = (own.calibration["stem"]["weight"]["scale"] for own in (plain, small))
    assert torch.equal(after.flatten(), before.flatten()[kept])
    assert torch.equal(small.model.stem.weight, plain.model.stem.weight[kept])


def test_inputs_and_outputs_with_a_scale_for_each_channel():
    entries = [
        {"op_names": ["depth"], "target_names": ["_input_", "_output_"], "granularity": "per_channel"},
        {"op_names": ["relu2"], "target_names": ["_output_"], "granularity": "per_channel"},
    ]
    plain = plain_copy(quantized(entries))
    small = make_small(plain, EXAMPLE)
    assert shapes(small) == {
        "depth._input_0": (1, 8, 1, 1), "depth._output_0": (1, 16, 1, 1), "relu2._output_0": (1, 12, 1, 1),
    }  # fmt: skip
    kept = plain.masks["stem"]["weight"].flatten(1).any(1)
    before, after = (own.calibration["depth"]["_input_0"]["scale"] for own in (plain, small))
    assert torch.equal(after.flatten(), before.flatten()[kept])


def test_fused_norms():
    model = net()
    fused = auto_fuse(model, EXAMPLE)
    assert ("stem", "norm", "relu") in fused
    compressor = quantized([{**LAYERS, "fuse_names": fused}], model=model)
    small = make_small(plain_copy(compressor), EXAMPLE)
    assert small.calibration["stem"]["weight"]["fuse_names"] == ["stem", "norm", "relu"]
    expected = outputs_of(compressor.model, EXAMPLE)[0]
    outputs = lower(small.model, EXAMPLE, small.calibration).exported.module()(EXAMPLE)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    calibration, masks = compressor.get_calibration_config(), compressor.wrappers.masks()
    later = make_small(plain_of(compressor.unwrap_model(), calibration, masks), EXAMPLE)
    assert isinstance(later.model.norm, nn.Identity)
    assert later.model.stem.out_channels == 8
    outputs = lower(later.model, EXAMPLE, later.calibration).exported.module()(EXAMPLE)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def blocks(kept):
    """Two linear layers; the second has one scale for 16 of 64 input channels, of which some stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    config = [{"op_names": ["2"], "target_names": ["weight"], "quant_dtype": "int4", "granularity": [1, 16]}]
    quantizer = PtqQuantizer(model, config)
    quantizer.compress()
    mask = torch.zeros(64, 1, dtype=torch.bool)
    mask[kept] = True
    calibration = quantizer.get_calibration_config()
    return plain_of(quantizer.unwrap_model(), calibration, {"0": {"weight": mask}})


@pytest.mark.parametrize(
    ("kept", "scales"),
    [
        (torch.arange(16, 48), (3, 2)),  # two whole blocks
        (torch.cat([torch.arange(8), torch.arange(20, 28)]), (3, 2)),  # halves of two: blocks of 8
        (torch.cat([torch.arange(16), torch.arange(16, 24)]), (3, 3)),  # one and a half: blocks of 8
    ],
)
def test_blocks_of_input_channels_are_cut_finer(kept, scales):
    plain = blocks(kept)
    small = make_small(plain, torch.randn(2, 8))
    said = small.calibration["2"]["weight"]
    assert said["scale"].shape == scales
    before = plain.calibration["2"]["weight"]["scale"].repeat_interleave(16, 1)[:, kept]
    assert torch.equal(said["scale"].repeat_interleave(len(kept) // scales[1], 1), before)
    values = lower(small.model, torch.randn(2, 8), small.calibration).exported.module().state_dict()
    numbers = next(value for name, value in values.items() if name.endswith("numbers"))
    assert torch.allclose(numbers * before, plain.model[2].weight[:, kept], atol=1e-6)


def test_blocks_of_which_too_little_is_left_become_floats():
    kept = torch.arange(0, 64, 3)
    plain = blocks(kept)
    small = make_small(plain, torch.randn(2, 8))
    assert small.calibration == {}
    assert [fallback.where for fallback in small.fallbacks] == ["2.weight"]
    assert "too small to share scales" in small.fallbacks[0].reason
    assert torch.equal(small.model[2].weight, plain.model[2].weight[:, kept])
    assert len(torch.unique(small.model[2].weight[0, :5])) <= 16


def test_common_block():
    assert common_block(torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])) == 4
    assert common_block(torch.tensor([1, 1, 1])) == 3
    assert common_block(torch.tensor([0, 1, 1])) == 1


def test_masks_of_outputs_are_cut_alike():
    mask = torch.ones(1, 16, 1, 1, dtype=torch.bool)
    rows = torch.ones(16, 1, 1, 1, dtype=torch.bool)
    rows[:4] = False
    mask[:, 3:6] = False
    model = net()
    plain = plain_of(model, {}, {"stem": {"weight": rows}, "depth": {"_input_0": mask}})
    small = make_small(plain, EXAMPLE)
    (factor,) = small.activation_masks["depth"]["_input_0"].factors
    assert factor.flatten().tolist() == [False, False] + [True] * 10
    expected = copy.deepcopy(model)
    expected.stem.weight.data[:6] = 0
    for parameter in (expected.norm.weight, expected.norm.bias):
        parameter.data[:6] = 0
    expected.depth.weight.data[:, :6] = 0
    torch.testing.assert_close(simulated(small)(EXAMPLE), expected(EXAMPLE), rtol=1e-4, atol=1e-5)


def test_round_to_leaves_multiples_and_keeps_the_rest_masked():
    pruned = [{"op_names": ["stem"], "sparse_ratio": 0.7}]
    plain = plain_copy(quantized([LAYERS], pruned=pruned))
    assert make_small(plain, EXAMPLE).model.stem.out_channels == 5
    small = make_small(plain, EXAMPLE, round_to=8)
    assert small.model.stem.out_channels == 8
    assert shapes(small)["stem.weight"] == (8, 1, 1, 1)
    assert int((~small.masks["stem"]["weight"].flatten(1).any(1)).sum()) == 3
    assert int((small.model.stem.weight.flatten(1).abs().sum(1) == 0).sum()) == 3


class Literal(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

    def forward(self, x):
        return self.second(self.first(x).view(-1, 288))


@pytest.mark.filterwarnings("ignore:Sizes stand in the code of forward")
def test_a_graph_with_other_sizes_is_lowered_as_well():
    compressor = quantized(
        [{"op_types": ["Conv2d", "Linear"]}],
        model=Literal().eval(),
        pruned=[{"op_names": ["first"], "sparse_ratio": 0.5}],
    )
    small = make_small(plain_copy(compressor), EXAMPLE)
    assert isinstance(small.model, torch.fx.GraphModule)
    assert small.model.second.in_features == 144
    outputs = lower(small.model, EXAMPLE, small.calibration).exported.module()(EXAMPLE)
    expected = outputs_of(compressor.model, EXAMPLE)[0]
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_quantized_while_training():
    model = net()
    config = [{**LAYERS, "quant_dtype": "int8", "fuse_names": auto_fuse(model, EXAMPLE)}]
    pruner = L1NormPruner(model, PRUNED, example_inputs=EXAMPLE)
    quantizer = QATQuantizer.from_compressor(pruner, config)
    quantizer.start()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        quantizer.loss(model(EXAMPLE).square().mean()).backward()
        optimizer.step()
        quantizer.step()
    quantizer.finish()
    model.eval()
    small = make_small(plain_copy(quantizer), EXAMPLE)
    assert small.model.up.out_channels == 12
    expected = outputs_of(model, EXAMPLE)[0]
    torch.testing.assert_close(simulated(small)(EXAMPLE), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_wrong_small_model_is_refused(monkeypatch):
    plain = plain_copy(quantized([LAYERS, {"op_names": ["relu2"], "target_names": ["_output_"]}]))
    halved = {**plain.calibration["relu2"]["_output_0"]}
    halved["scale"] = halved["scale"] / 2
    cut = lambda said, left: halved if float(said["scale"].sum()) == float(2 * halved["scale"]) else dict(said)  # noqa: E731
    monkeypatch.setattr("tersor.deploy.small._cut_activation", cut)
    with pytest.raises(VerificationError, match="simulation differs from the masked one's"):
        make_small(plain, EXAMPLE)
    assert make_small(plain, EXAMPLE, verify=False).model.stem.out_channels == 8


def test_grouped_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    quantizer = PtqQuantizer(model, [{"op_types": ["Conv2d"], "quant_dtype": "int8"}], calibration=[EXAMPLE])
    quantizer.compress()
    calibration = quantizer.get_calibration_config()
    masks = groups(quantizer.unwrap_model(), EXAMPLE).random_masks(0.5)
    small = make_small(plain_of(model, calibration, masks), EXAMPLE)
    assert small.model[1].groups == 4
    assert [shapes(small)[f"{name}.weight"] for name in ("0", "1", "3")] == [(4, 1, 1, 1)] * 3


def test_masks_of_another_model_and_wrapped_models_are_refused():
    with pytest.raises(MaskError, match=r"missing\.weight"):
        plain_of(net(), {}, {"missing": {"weight": torch.ones(1)}})
    with pytest.raises(MaskError, match=r"stem\.weight: a mask of shape"):
        plain_of(net(), {}, {"stem": {"weight": torch.ones(4, 1, 1, 1)}})
    with pytest.raises(WrapError, match="wrapped"):
        plain_of(quantized([LAYERS]).model, {}, {})
    model = net()
    assert make_small(Plain(model, {}, {}), EXAMPLE).model is model


def test_pruned_and_quantized_models_are_made_small_on_their_way_to_the_engine():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    compressor = quantized([LAYERS])
    speedup = QuantizationSpeedup(compressor, EXAMPLE, engine="onnxruntime", threads=1)
    compiled = speedup.compile()
    assert speedup.program.targets["stem.weight"].scale.shape == (8,)
    assert compiled.report.simulation_snr >= 40
    expected = outputs_of(compressor.model, EXAMPLE)[0]
    assert agreement([compiled(EXAMPLE)], [expected]).snr >= 40
    calibration, masks = compressor.get_calibration_config(), compressor.wrappers.masks()
    model = compressor.unwrap_model()
    faster = [replace(own, milliseconds=1e-9) for own in compiled.report.operators]
    before = replace(compiled.report, operators=tuple(faster))
    again = QuantizationSpeedup(
        model, EXAMPLE, calibration, "onnxruntime", masks=masks, unpruned=before, dynamic_batch=False, threads=1
    )
    with pytest.warns(UserWarning, match=r"of 4 convolutions and products are not faster than before pruning"):
        later = again.compile()
    assert agreement([later(EXAMPLE)], [expected]).snr >= 40
    with pytest.raises(InvalidValueError, match="masks of its own"):
        QuantizationSpeedup(compressor, EXAMPLE, masks=masks)


def test_where_it_cannot_be_made_small_the_masked_model_is_lowered_if_asked(monkeypatch):
    pytest.importorskip("onnxruntime")

    def refuse(*args, **kwargs):
        raise VerificationError("the small model is another one", where="make_small")

    monkeypatch.setattr("tersor.deploy.quantization_speedup.make_small", refuse)
    compressor = quantized([LAYERS])
    with pytest.raises(VerificationError, match="another one"):
        QuantizationSpeedup(compressor, EXAMPLE, engine="onnxruntime").lower()
    with pytest.warns(UserWarning, match="keeps its size, masked"):
        program = QuantizationSpeedup(compressor, EXAMPLE, engine="onnxruntime", on_failure="warn").lower()
    assert program.targets["stem.weight"].scale.shape == (16,)
    assert "keeps its size" in program.fallbacks[0].reason
