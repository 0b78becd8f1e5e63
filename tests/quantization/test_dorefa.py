"""DoReFa: its formulas against numpy in float64, and what the quantizer does on a model."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import CheckpointError, ConflictError, InvalidValueError
from tersor.pruning import L1NormPruner
from tersor.quantization.dorefa import DoReFaQuantizer, binary_weight, mean_magnitude, weight_levels
from tersor.quantization.low_bit_gradients import low_bit_gradient, quantized_gradient
from tersor.storage import load_calibration, save_calibration
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.testing.toys import BATCHES, EXAMPLE, FRESH, ToyNetwork, ToyTraining


def paper_weight(weight, bits):
    """Equation 9 of the paper."""
    squashed = np.tanh(weight.double().numpy())
    unit = squashed / (2 * np.abs(squashed).max()) + 0.5
    steps = 2**bits - 1
    return 2 * np.round(steps * unit) / steps - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_weights_follow_the_paper(bits):
    weight = 2 * torch.randn(12, 7)
    for exact in (weight.double(), weight):
        levels = weight_levels(exact, exact.tanh().abs().max(), bits).double().numpy()
        far = np.abs(2 * levels / (2**bits - 1) - 1 - paper_weight(exact, bits)).max() * (2**bits - 1) / 2
        assert far < 1e-9 or (exact is weight and bits == 16 and far < 1.1)  # float32 can miss one level of 65,536
    weight[0, 0] = -9
    assert weight_levels(weight, torch.tensor(9.0).tanh(), bits)[0, 0] == 0
    assert weight_levels(-weight, torch.tensor(9.0).tanh(), bits)[0, 0] == 2**bits - 1


def test_the_gradient_of_weights_passes_through_the_rounding():
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    largest = weight.detach().tanh().abs().max()
    upstream = torch.randn(5, 4, dtype=torch.float64)
    (2 / 7 * weight_levels(weight, largest, 3) * upstream).sum().backward()
    by_hand = upstream * (1 - weight.detach().tanh() ** 2) / largest
    torch.testing.assert_close(weight.grad, by_hand)


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    weight = torch.randn(6, 5)
    weight[0, 0] = 0
    weight.requires_grad_(True)
    scale = mean_magnitude(weight.detach().flatten())
    mean = np.abs(weight.detach().double().numpy()).sum() / 29  # zero is no weight, but masked
    assert scale.item() == pytest.approx(mean, rel=1e-6)
    binary = binary_weight(weight, scale)
    signs = np.where(weight.detach().numpy() < 0, -1, 1)
    np.testing.assert_array_equal(binary.detach().numpy(), signs * scale.numpy())
    binary.sum().backward()
    assert torch.equal(weight.grad, torch.ones(6, 5))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gradients_lie_on_levels_of_each_sample(bits):
    gradient = torch.randn(3, 4, 5)
    quantized = quantized_gradient(gradient, bits)
    largest = gradient.abs().amax((1, 2), keepdim=True)
    levels = (quantized / (2 * largest) + 0.5) * (2**bits - 1)
    torch.testing.assert_close(levels, levels.round(), atol=2e-5 * 2**bits, rtol=0)
    assert (quantized.abs() <= largest * (1 + 1e-6)).all()
    assert ((quantized - gradient).abs() <= 2 * largest / (2**bits - 1) + 1e-6).all()


def test_gradients_are_right_on_average():
    """Each is rounded up or down between two levels, so the deviation of the mean of n draws is step / (2 sqrt(n))."""
    gradient, draws = torch.tensor([[1.0, 0.3, -0.55, 0.0]]), 40_000
    mean = quantized_gradient(gradient.expand(draws, 4), bits=2).mean(0)
    torch.testing.assert_close(mean, gradient[0], atol=5 * (2 / 3) / 2 / draws**0.5, rtol=0)


def test_the_noise_is_of_the_paper():
    """With the same draws as the formula of the paper, in float64."""
    gradient = torch.randn(6, 9)
    torch.manual_seed(3)
    quantized = quantized_gradient(gradient, bits=3)
    torch.manual_seed(3)
    noise = torch.rand(6, 9).double().numpy() - 0.5
    exact = gradient.double().numpy()
    largest = np.abs(exact).max(1, keepdims=True)
    unit = np.round(7 * (exact / (2 * largest) + 0.5 + noise / 7)) / 7
    np.testing.assert_allclose(quantized.numpy(), 2 * largest * (unit - 0.5), rtol=1e-5, atol=1e-6)


def test_gradients_of_zero_of_one_dimension_and_not_finite():
    assert torch.equal(quantized_gradient(torch.zeros(2, 3), 2), torch.zeros(2, 3))
    assert torch.equal(quantized_gradient(torch.tensor(2.0), 1), torch.tensor(2.0))
    assert set(quantized_gradient(torch.tensor([4.0, 0.1, -4.0]), 1).tolist()) == {4.0, -4.0}  # one sample
    broken = quantized_gradient(torch.tensor([[torch.inf, 1.0], [1.0, 1.0]]), 2)
    assert not broken[0].isfinite().any()
    assert torch.equal(broken[1], torch.ones(2))
    assert quantized_gradient(torch.randn(2, 3, dtype=torch.bfloat16), 4).dtype is torch.bfloat16


def test_a_low_bit_gradient_leaves_the_value():
    value = torch.randn(4, 3, requires_grad=True)
    passed = low_bit_gradient(value, 1)
    assert torch.equal(passed, value)
    passed.relu_()  # an activation in place comes behind many convolutions
    (2 * passed).sum().backward()
    alive = value.detach() > 0
    assert set(value.grad.unique().tolist()) <= {-2.0, 2.0}
    assert (value.grad[alive] == 2).all()
    assert not low_bit_gradient(torch.ones(2), 1).requires_grad


def entry(bits="int2", *targets, names=("left", "hidden"), **keys):
    return {"op_names": list(names), "target_names": list(targets or ("weight",)), "quant_dtype": bits, **keys}


@pytest.fixture
def quantize():
    """Makes quantizers, each of a network of its own, and gives the models back in the end."""
    made = []

    def make(*config, model=None, way="loop", **kwargs):
        model = ToyNetwork() if model is None else model
        training = ToyTraining(model)
        evaluator = training.evaluator if way == "evaluator" else None
        made.append(DoReFaQuantizer(model, list(config), evaluator, **kwargs))
        return made[-1], training

    yield make
    for quantizer in made:
        quantizer.unwrap_model()


def test_a_linear_layer_by_hand(quantize):
    layer = nn.Linear(5, 3)
    weight, bias, x = layer.weight.detach().clone(), layer.bias.detach().clone(), torch.randn(7, 5)
    expected = torch.from_numpy(paper_weight(weight, 3))
    quantizer, _ = quantize(entry("int3", names=[""]), entry("uint2", "_input_0", names=[""]), model=layer)
    torch.testing.assert_close(layer(x), x @ weight.T + bias)  # nothing yet
    quantizer.start()
    torch.testing.assert_close(layer.weight.detach().double(), expected, atol=1e-7, rtol=0)
    by_hand = (x.clamp(0, 1) * 3).round() / 3 @ expected.float().T + bias
    torch.testing.assert_close(layer(x), by_hand)


def test_activations_take_no_gradient_where_they_are_clipped(quantize):
    layer = nn.Linear(4, 1, bias=False)
    quantizer, _ = quantize(entry("uint4", "_input_0", names=[""]), model=layer)
    quantizer.start()
    x = torch.tensor([[-0.001, 0.0, 0.52, 1.001]], requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach() * torch.tensor([0, 1, 1, 0]))


@pytest.mark.parametrize("dtype", ["int1", "uint1", "int2", "uint3", "int8", "uint16"])
@pytest.mark.parametrize("granularity", ["default", "out_channel"])
def test_stored_integers_give_the_weights_back_exactly(quantize, tmp_path, dtype, granularity):
    """What ``(q - zero point) * scale`` comes to, with whole numbers of the type, is what is simulated."""
    quantizer, training = quantize(entry(dtype, granularity=granularity))
    quantizer.start()
    training.step(quantizer, 0)
    quantizer.finish()
    calibration = load_calibration(save_calibration(quantizer.get_calibration_config(), tmp_path / "c"))
    for target, _ in quantizer.transforms():
        values = calibration[target.place[0]]["weight"]
        simulated = target.config.module.weight.detach()
        count, rows = 2 ** values["quant_bits"], len(simulated)
        assert values["scale"].numel() == (rows if granularity == "out_channel" else 1)
        stored = (simulated.double() / values["scale"].double() + values["zero_point"].double()).round()
        legal = [-1, 1] if dtype == "int1" else range(values["quant_min"], values["quant_min"] + count)
        assert set(stored.flatten().tolist()) <= set(legal)
        assert torch.equal((stored.float() - values["zero_point"]) * values["scale"], simulated)


def test_masked_weights_are_zero_and_measured_by_nobody(quantize):
    """The largest weights are masked: the others are normalised by the largest of themselves."""
    model = ToyNetwork()
    mask = torch.rand(10, 8) < 0.5
    with torch.no_grad():
        model.hidden.weight[~mask] += 3
    kept = model.hidden.weight.detach()[mask]
    quantizer, _ = quantize(entry("int3", names=["hidden"]), model=model)
    pruner = L1NormPruner.from_compressor(quantizer, [{"op_names": ["hidden"], "sparse_ratio": 0.5}])
    quantizer.start()
    pruner.update_masks({"hidden": {"weight": mask}})
    simulated = model.hidden.weight.detach()
    assert not simulated[~mask].any()
    np.testing.assert_allclose(simulated[mask].double().numpy(), paper_weight(kept, 3), atol=1e-7)


def test_channels_that_are_all_masked_stay_zero(quantize):
    model = ToyNetwork()
    mask = torch.ones(10, 8, dtype=torch.bool)
    mask[3] = False
    quantizer, _ = quantize(entry("int3", names=["hidden"], granularity="out_channel"), model=model)
    pruner = L1NormPruner.from_compressor(quantizer, [{"op_names": ["hidden"], "sparse_ratio": 0.1}])
    quantizer.start()
    pruner.update_masks({"hidden": {"weight": mask}})
    loss = model(EXAMPLE).square().sum()
    loss.backward()
    assert not model.hidden.weight.detach()[3].any()
    assert model.hidden.weight.detach()[0].any()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradients_of_a_module_are_computed_from_low_bits(quantize):
    layer = nn.Linear(4, 6, bias=False)
    quantizer, _ = quantize(entry("int2", names=[""]), model=layer, gradient_bits=1)
    quantizer.start()
    x, upstream = torch.randn(5, 4, requires_grad=True), torch.randn(5, 6)
    torch.manual_seed(7)
    (layer(x) * upstream).sum().backward()
    torch.manual_seed(7)
    quantized = quantized_gradient(upstream, 1)
    assert torch.equal(quantized.abs(), upstream.abs().amax(1, keepdim=True).expand(5, 6))
    torch.testing.assert_close(x.grad, quantized @ layer.weight.detach())
    quantizer.finish()
    x.grad = None
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(x.grad, upstream @ layer.weight.detach())  # nothing is left behind


def train(quantizer, training, numbers):
    for number in numbers:
        training.step(quantizer, number)
    quantizer.finish()
    simulated = {name: of.detach().clone() for name, of in training.model.state_dict().items()}
    return simulated | {"output": training.model.eval()(FRESH).detach()}


def test_a_run_with_noisy_gradients_goes_on_bit_for_bit(quantize):
    config = [entry("int2"), entry("uint3", "_input_0")]
    quantizer, training = quantize(*config, gradient_bits=4)
    quantizer.start()
    for number in range(2):
        training.step(quantizer, number)
    saved = io.BytesIO()
    objects = {"quantizer": quantizer, "model": training.model, "optimizer": training.optimizer}
    torch.save({name: of.state_dict() for name, of in objects.items()}, saved)
    expected = train(quantizer, training, range(2, 5))
    torch.manual_seed(99)
    quantizer, training = quantize(*config, model=ToyNetwork(seed=1), gradient_bits=4)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    quantizer.load_state_dict(state["quantizer"])
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    found = train(quantizer, training, range(2, 5))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_training_brings_the_loss_down(quantize):
    quantizer, training = quantize(
        entry("int2"), entry("uint4", "_input_0"), way="evaluator", gradient_bits=6, example_inputs=EXAMPLE
    )
    model, calibration = quantizer.compress(max_steps=60)
    assert model is training.model
    assert sum(training.runs[-1][-8:]) < 0.9 * sum(training.runs[-1][:8])
    assert set(calibration) == {"left", "hidden"}
    assert calibration["left"]["_input_0"]["scale"].item() == pytest.approx(1 / 15)


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be:DeprecationWarning")  # by torch itself
def test_a_compiled_step_is_the_eager_one(quantize):
    config = [entry("int2", names=["0"], granularity="out_channel"), entry("uint4", "_input_0", names=["2"])]
    layers = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))
    quantizer, _ = quantize(*config, entry("int1", names=["2"]), model=layers, gradient_bits=8)
    quantizer.start()
    x, found = torch.randn(5, 4), []
    for run in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        layers.zero_grad()
        torch.manual_seed(1)
        run(x).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in layers.parameters()])
    torch.compiler.reset()
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_bfloat16_rounds_what_float32_gives(quantize):
    model = ToyNetwork().bfloat16()
    latent = model.hidden.weight.detach().clone()
    quantizer, _ = quantize(entry("int4"), entry("uint4", "_input_0"), model=model, gradient_bits=4)
    quantizer.start()
    expected = torch.from_numpy(paper_weight(latent, 4)).bfloat16()
    assert torch.equal(model.hidden.weight.detach(), expected)
    model(EXAMPLE.bfloat16()).sum().backward()
    assert all(parameter.grad.dtype is torch.bfloat16 for parameter in model.parameters())


def test_a_calibration_goes_to_a_fresh_quantizer(quantize, tmp_path):
    config = [entry("int1", granularity="out_channel"), entry("uint4", "_output_0"), entry("int5", names=["right"])]
    quantizer, training = quantize(*config, way="evaluator")
    _, calibration = quantizer.compress(max_steps=3)
    expected = training.model.eval()(FRESH)
    quantizer.unwrap_model()
    model = ToyNetwork(seed=1).eval()
    model.load_state_dict(training.model.state_dict())
    other, _ = quantize(*config, model=model)
    other.update_calibration_config(load_calibration(save_calibration(calibration, tmp_path / "c")))
    assert torch.equal(model(FRESH), expected)
    wrong = {"left": {"weight": calibration["left"]["weight"] | {"scale": torch.ones(3)}}}
    with pytest.raises(CheckpointError, match=r"left.weight: scale is of shape \(3,\) in the calibration"):
        other.update_calibration_config(wrong)
    wrong = {"right": {"weight": calibration["right"]["weight"] | {"scale": torch.tensor(0.3)}}}
    with pytest.raises(CheckpointError, match=r"right.weight: scale is 0.3\d* in the calibration, and 0.06"):
        other.update_calibration_config(wrong)


@pytest.mark.skipif(why_not_two() is not None, reason="two processes cannot be joined here")
def test_two_processes_come_to_the_same(quantize):
    def on_half(rank):
        torch.manual_seed(rank)
        model = ToyNetwork()
        training = ToyTraining(model, BATCHES[rank::2])
        quantizer = DoReFaQuantizer(model, [entry("int1"), entry("uint3", "_input_0")], gradient_bits=4)
        quantizer.start()
        for number in range(3):
            training.step(quantizer, number)
        quantizer.finish()
        scales = {name: of["weight"]["scale"] for name, of in quantizer.get_calibration_config().items()}
        return scales | {name: of.detach() for name, of in model.named_parameters()}

    first, second = in_two_processes(on_half)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


REFUSED = [
    (entry("int1", "_input_0"), InvalidValueError, r"\['quant_dtype'\] on left._input_0: 'int1'.*0 or 1: uint1"),
    (entry("int17"), InvalidValueError, r"left.weight: 'int17'.*Legal: int1 to int16, uint1 to uint16"),
    (entry("fp8_e4m3"), InvalidValueError, "'fp8_e4m3' is no type for this target"),
    (entry("int4", quant_range="narrow"), InvalidValueError, r"\['quant_range'\] on left.weight: the method uses all"),
    (entry("int4", observer="mse"), ConflictError, r"\['observer'\] on left.weight: 'observer' has no meaning"),
    (entry("uint4", "_input_0", dynamic=True), ConflictError, "'dynamic' has no meaning here"),
    (entry("uint4", "_output_0", granularity="per_channel"), ConflictError, r"every activation is \[0, 1\]"),
    (entry("int4", "bias"), ConflictError, "left.bias: DoReFaQuantizer does not keep the size"),
    (entry("int4", apply_method="lsq_clamp_round"), ConflictError, "Legal: clamp_round, bypass, dorefa_clamp_round_o"),
]


@pytest.mark.parametrize(("config", "error", "message"), REFUSED)
def test_what_makes_no_sense_is_refused(config, error, message):
    model = ToyNetwork()
    with pytest.raises(error, match=message):
        DoReFaQuantizer(model, [config])
    assert not hasattr(model.left, "parametrizations")


@pytest.mark.parametrize("bits", [0, 17, 2.5, "4"])
def test_gradient_bits_are_a_number_of_bits(bits):
    with pytest.raises(InvalidValueError, match=r"gradient_bits: .* is no number of bits. Legal: 1 to 16, None"):
        DoReFaQuantizer(ToyNetwork(), [entry()], gradient_bits=bits)
