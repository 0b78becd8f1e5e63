"""LSQ: gradients against the paper's formula in float64 and PyTorch's own kernel, and what a training learns."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn
from torch.nn import functional as F

from tersor.errors import CheckpointError, ConflictError, InvalidValueError, NumericalError
from tersor.pruning import L1NormPruner
from tersor.quantization import LsqPlusQuantizer, LsqQuantizer, QATQuantizer
from tersor.quantization.learned_step import lsq
from tersor.quantization.learned_uniform import LearnedUniform
from tersor.quantization.lsq import first_step
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.testing.toys import BATCHES, FRESH, ToyNetwork, ToyTraining

ALL = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight", "_input_0", "_output_0"]}]
LAYER = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int3"}]
BOTH = pytest.mark.parametrize("kind", [LsqQuantizer, LsqPlusQuantizer])


@pytest.fixture
def made():
    """Makes quantizers whose models are given back at the end."""
    quantizers = []

    def make(*args, kind=LsqQuantizer, **kwargs):
        quantizers.append(kind(*args, **kwargs))
        return quantizers[-1]

    yield make
    for quantizer in quantizers:
        quantizer.unwrap_model()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, quantizer, optimizer, batches, forward=None):
    for x, y in batches:
        optimizer.zero_grad()
        out = model(x) if forward is None else forward(x)
        F.cross_entropy(out.float(), y).backward()
        quantizer.before_step()
        optimizer.step()
        quantizer.after_step()


def values(quantizer):
    return {
        f"{module}.{target} {key}".removeprefix("."): own[key]
        for module, targets in quantizer.get_calibration_config().items()
        for target, own in targets.items()
        for key in ("scale", "zero_point")
    }


@pytest.mark.parametrize("grid", [(), (3, 1)])
def test_values_and_gradients_are_the_papers(grid):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, generator=generator, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    scale = torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64) if grid else torch.tensor(0.4, dtype=torch.float64)
    scale.requires_grad_()
    out = lsq(x, scale, -4, 3, 0.25)
    out.backward(upstream)
    v, s, g = (each.detach().numpy() for each in (x, scale, upstream))
    np.testing.assert_allclose(out.detach().numpy(), np.round(np.clip(v / s, -4, 3)) * s, rtol=1e-12)
    inside = (v / s > -4) & (v / s < 3)
    by_step = np.where(inside, np.round(v / s) - v / s, np.where(v / s <= -4, -4, 3))
    np.testing.assert_allclose(x.grad.numpy(), g * inside, rtol=1e-12)
    expected = (g * by_step).sum(1, keepdims=True) if grid else (g * by_step).sum()
    np.testing.assert_allclose(scale.grad.numpy(), 0.25 * expected, rtol=1e-10)


def test_values_and_gradients_are_those_of_pytorchs_kernel():
    """But for the half step beyond each end, where the paper clips and the kernel still rounds."""
    x = torch.randn(500, generator=torch.Generator().manual_seed(1))
    x = x[((x / 0.3 + 4).abs() > 0.6) & ((x / 0.3 - 3).abs() > 0.6)]
    results = []
    for function in (
        lambda x, s: lsq(x, s, -4, 3, 0.5),
        lambda x, s: torch._fake_quantize_learnable_per_tensor_affine(x, s, torch.zeros(1), -4, 3, 0.5),
    ):
        own, step = x.clone().requires_grad_(), torch.full((1,), 0.3).requires_grad_()
        out = function(own, step)
        out.square().sum().backward()
        results.append((out.detach(), own.grad, step.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_half_types_are_computed_in_float32():
    x = torch.linspace(-3, 3, 101).bfloat16().requires_grad_()
    step = torch.tensor(0.0371, requires_grad=True)
    out = lsq(x, step, -128, 127)
    expected = ((x.detach().float() * (1 / 0.0371)).round().clamp(-128, 127) * 0.0371).bfloat16()
    assert torch.equal(out, expected)
    out.sum().backward()
    assert (x.grad.dtype, step.grad.dtype) == (torch.bfloat16, torch.float32)


def test_the_first_step_is_twice_the_mean_magnitude_over_the_root_of_the_greatest_level(made):
    layer = nn.Linear(6, 2)
    quantizer = made(layer, [{**LAYER[0], "target_names": ["weight", "_input_0"]}])
    quantizer.start()
    x = torch.randn(5, 6).relu()
    layer(x).sum().backward()
    with pytest.warns(UserWarning, match=r"no value below zero has been seen at _input_0.*unsigned"):
        quantizer.step()
    config = quantizer.get_calibration_config()[""]
    latent = layer.parametrizations.weight.original
    torch.testing.assert_close(config["weight"]["scale"], 2 * latent.abs().mean(1, keepdim=True) / 3**0.5)
    torch.testing.assert_close(config["_input_0"]["scale"], 2 * x.abs().mean() / 3**0.5)
    assert (config["weight"]["quant_min"], config["weight"]["quant_max"]) == (-4, 3)
    pruned = torch.tensor([[1.0, 0.0, -3.0, 0.0]])
    assert first_step(pruned, 4, zeros_count=False)[0].item() == 2
    assert first_step(torch.zeros(2, 3), 4, zeros_count=False)[0].tolist() == [0, 0]


def test_three_steps_follow_the_formulas(made):
    """Weights by SGD, the logarithm of each step by Adam on the paper's gradient, both by hand in float64."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 2, bias=False), torch.randn(7, 5)
    w, inputs = layer.weight.detach().double().numpy().copy(), x.double().numpy()
    quantizer = made(layer, LAYER, learning_rate=0.05)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    quantizer.start()
    first = 2 * np.abs(w).mean(1, keepdims=True) / np.sqrt(3)
    log, mean, square = np.zeros((2, 1)), np.zeros((2, 1)), np.zeros((2, 1))
    for step in range(4):
        s = first * np.exp(log)
        inside = (w / s > -4) & (w / s < 3)
        level = np.clip(np.round(w / s), -4, 3)
        out = inputs @ (level * s).T
        np.testing.assert_allclose(layer(x).detach().numpy(), out, rtol=1e-4, atol=1e-5)
        gradient = 2 * out.T @ inputs / out.size
        if step:  # scales are learned from the step after that in which they began
            by_log = s * (gradient * np.where(inside, level - w / s, level)).sum(1, keepdims=True) / np.sqrt(5 * 3)
            mean, square = 0.9 * mean + 0.1 * by_log, 0.999 * square + 0.001 * by_log**2
            log = log - 0.05 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        w = w - 0.1 * gradient * inside
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        quantizer.before_step()
        optimizer.step()
        quantizer.after_step()
    np.testing.assert_allclose(layer.parametrizations.weight.original.detach().numpy(), w, rtol=1e-4, atol=1e-5)
    quantizer.finish()
    scale = quantizer.get_calibration_config()[""]["weight"]["scale"]
    np.testing.assert_allclose(scale.numpy(), first * np.exp(log), rtol=1e-4)
    assert np.abs(log).min() > 0.01


def test_a_gradient_that_asks_for_negative_steps_does_not_get_them(made):
    layer = nn.Linear(4, 2)
    quantizer = made(layer, LAYER, learning_rate=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    quantizer.start()
    begun = values(quantizer)["weight scale"]
    for _ in range(20):
        optimizer.zero_grad()
        (layer.weight.abs().sum() * 100).backward()
        quantizer.before_step()
        optimizer.step()
        quantizer.after_step()
    scale = quantizer.get_calibration_config()[""]["weight"]["scale"]
    assert (scale > 0).all()
    assert (scale.log() - begun.log()).abs().min() > 3  # 19 steps of the logarithm, by up to 1 each


def test_two_bits_are_learned_better_than_ranges_are_followed(made):
    """Regression with 2-bit weights on data that a teacher of full precision made."""
    torch.manual_seed(0)
    x, teacher = torch.randn(256, 16), nn.Linear(16, 8)
    student = copy.deepcopy(teacher)
    config = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int2"}]
    errors = {}
    for kind in (LsqQuantizer, QATQuantizer):
        model = copy.deepcopy(student)
        quantizer = made(model, config, kind=kind, **({"learning_rate": 0.01} if kind is LsqQuantizer else {}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        quantizer.start()
        for _ in range(150):
            optimizer.zero_grad()
            F.mse_loss(model(x), teacher(x).detach()).backward()
            quantizer.before_step()
            optimizer.step()
            quantizer.after_step()
        quantizer.finish()
        errors[kind] = F.mse_loss(model(x), teacher(x)).item()
        assert all(len(row.unique()) <= 4 for row in model.weight)
    assert errors[LsqQuantizer] < 0.7 * errors[QATQuantizer]


def test_a_later_start_begins_with_all_that_was_seen(made):
    model = ToyNetwork()
    quantizer = made(model, ALL, None, 3)
    quantizer.start()
    untouched = ToyNetwork().train()(BATCHES[0][0])
    assert torch.equal(model(BATCHES[0][0]), untouched)
    for item in (quantizer, model):  # what was looked at before does not count
        item.start() if item is quantizer else item.load_state_dict(item.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train(model, quantizer, optimizer, BATCHES[:3])
    expected = torch.stack([x.abs().mean() for x, _ in BATCHES[:3]]).mean() * 2 / 127**0.5
    torch.testing.assert_close(values(quantizer)["stem._input_0 scale"], expected)
    assert not quantizer._learner.state()["values"]["stem._input_0 scale"]
    train(model, quantizer, optimizer, BATCHES[3:])
    assert quantizer._learner.state()["values"]["stem._input_0 scale"] != 0


@BOTH
def test_what_was_learned_makes_a_fresh_quantizer_equal(made, kind):
    model = ToyNetwork()
    quantizer = made(model, ALL, ToyTraining(model).evaluator, kind=kind)
    _, calibration = quantizer.compress(max_steps=6)
    expected = model.eval()(FRESH)
    fresh = ToyNetwork()
    fresh.load_state_dict(quantizer.unwrap_model().state_dict())
    other = made(fresh.eval(), ALL, kind=kind)
    other.update_calibration_config(calibration)
    assert torch.equal(fresh(FRESH), expected)


@BOTH
@pytest.mark.parametrize("crash", [1, 3])
def test_it_goes_on_after_a_crash_bit_for_bit(made, kind, crash):
    config = [*ALL, {"op_names": ["left"], "target_names": ["_input_0"], "granularity": "per_channel"}]
    model = ToyNetwork()
    quantizer, optimizer = made(model, config, kind=kind), sgd(model)
    quantizer.start()
    train(model, quantizer, optimizer, BATCHES[:crash])
    saved = copy.deepcopy((quantizer.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, quantizer, optimizer, BATCHES[crash:])
    quantizer.finish()
    other = ToyNetwork(seed=1)
    resumed, again = made(other, config, kind=kind), sgd(other)
    for item, state in zip((resumed, other, again), saved, strict=True):
        item.load_state_dict(state)
    train(other, resumed, again, BATCHES[crash:])
    resumed.finish()
    assert torch.equal(other.eval()(FRESH), model.eval()(FRESH))
    assert all(torch.equal(value, values(resumed)[name]) for name, value in values(quantizer).items())


@BOTH
def test_masked_weights_are_zero(made, kind):
    model = ToyNetwork()
    pruner = L1NormPruner(
        model,
        [{"op_names": ["hidden"], "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": "in_channel"}],
    )
    config = [{"op_names": ["hidden"], "target_names": ["weight"], "quant_scheme": "affine"}]
    if kind is LsqQuantizer:
        del config[0]["quant_scheme"]
    quantizer = kind.from_compressor(pruner, config)
    pruner.start()
    kept = pruner.get_masks()["hidden"]["weight"]
    latent = model.hidden.parametrizations.weight.original.detach()[kept].view(10, 4)
    if kind is LsqQuantizer:
        torch.testing.assert_close(values(quantizer)["hidden.weight scale"], 2 * latent.abs().mean(1, True) / 127**0.5)
    train(model, quantizer, sgd(model), BATCHES)
    assert not model.hidden.weight[~kept].any()
    assert model.hidden.weight[kept].any()
    pruner.unwrap_model()


class Twice(nn.Module):
    """A tied weight, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.score = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, tokens):
        return self.score(self.mix(self.mix(self.embed(tokens)).relu()))


@BOTH
def test_a_tied_weight_has_one_step(made, kind):
    model = Twice()
    quantizer = made(model, [{"op_names": ["score", "mix"], "target_names": ["weight", "_output_0"]}], kind=kind)
    quantizer.start()
    batches = [(torch.arange(7), torch.arange(7))] * 4
    train(model, quantizer, sgd(model), batches)
    assert torch.equal(model.embed.weight, model.score.weight)
    scales = quantizer._learner.state()["values"]
    assert len([name for name in scales if "scale" in name]) == 4
    assert all(bool((value != 0).any()) for name, value in scales.items() if "scale" in name)
    with pytest.raises(ConflictError, match=r"is the tensor of embed.weight as well"):
        kind(Twice(), [{"op_names": ["embed", "score"], "target_names": ["weight"]}])


@BOTH
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_values_of_any_size_begin_with_the_same_grid(made, kind, scheme):
    if kind is LsqQuantizer and scheme == "affine":
        pytest.skip("LSQ has no affine scheme")
    x, scales = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), []
    for size in (1.0, 2.0**-30, 2.0**30):
        torch.manual_seed(0)
        layer = nn.Linear(8, 4, bias=False)
        layer.weight.data.mul_(size)
        targets = {"target_names": ["weight", "_input_0"], "quant_scheme": scheme}
        quantizer = made(layer, [{"op_types": ["Linear"], **targets}], kind=kind)
        quantizer.start()
        layer(x * size)
        quantizer.finish()
        of = quantizer.get_calibration_config()[""]
        scales.append(torch.cat([of[name]["scale"].flatten() for name in ("weight", "_input_0")]) / size)
    assert torch.equal(scales[1], scales[0])
    assert torch.equal(scales[2], scales[0])


@BOTH
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_scale_that_began_with_no_number_is_refused(made, kind, value):
    model = nn.Sequential(nn.Linear(4, 2))
    quantizer = made(model, [{"op_types": ["Linear"], "target_names": ["_input_0"]}], kind=kind)
    quantizer.start()
    model(torch.full((3, 4), value))
    with pytest.raises(NumericalError, match=r"0._input_0: the first values .* not numbers"):
        quantizer.finish()


@BOTH
def test_copies_and_wrapping_again(made, kind):
    model = ToyNetwork()
    quantizer = made(model, ALL, kind=kind)
    names = [name for name, _ in ToyNetwork().named_parameters()]
    quantizer.start()
    train(model, quantizer, sgd(model), BATCHES)
    assert len(list(model.parameters())) == len(names)
    twin = copy.deepcopy(model)
    quantizer.finish()
    expected = model.eval()(FRESH)
    assert torch.equal(twin.eval()(FRESH), expected)
    assert not expected.equal(quantizer.unwrap_model()(FRESH))
    assert torch.equal(quantizer.wrap_model()(FRESH), expected)


@BOTH
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_in_bfloat16(made, kind, how):
    model = ToyNetwork()
    quantizer = made(model, ALL, kind=kind)
    quantizer.start()
    if how == "bfloat16":
        model.bfloat16()
        train(model, quantizer, sgd(model), [(x.bfloat16(), y) for x, y in BATCHES])
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(model, quantizer, sgd(model), BATCHES)
    quantizer.finish()
    learned = quantizer._learner.state()["values"]
    assert {value.dtype for value in learned.values()} == {torch.float32}
    assert all(bool(value.any()) for name, value in learned.items() if "weight scale" in name)
    latent = model.hidden.parametrizations.weight.original.detach().float()
    scale = values(quantizer)["hidden.weight scale"]
    levels = (latent * (1 / scale)).round().clamp(-128, 127)
    assert torch.equal(model.hidden.weight, (levels * scale).to(model.hidden.weight.dtype))


@BOTH
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_step_is_one_graph_and_computes_the_same(made, kind):
    torch.manual_seed(0)
    config = [{**ALL[0], "op_types": ["Linear"]}]
    eager = nn.Sequential(nn.SiLU(), nn.Linear(4, 3))
    model, batches = copy.deepcopy(eager), [(torch.randn(5, 4), torch.arange(5) % 3) for _ in range(6)]
    one, other = made(eager, config, kind=kind), made(model, config, kind=kind)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for quantizer in (one, other):
        quantizer.start()
    train(eager, one, sgd(eager), batches)
    optimizer = sgd(model)
    train(model, other, optimizer, batches[:2], compiled)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    train(model, other, optimizer, batches[2:], compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs == 2  # the first batch begins the rounding
    assert not torch._dynamo.utils.counters["graph_break"]
    for quantizer in (one, other):
        quantizer.finish()
    for name, value in values(one).items():
        torch.testing.assert_close(value, values(other)[name])
    torch._dynamo.reset()


@BOTH
@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_learn_the_same(kind):
    def work(rank):
        model = ToyNetwork()
        quantizer = kind(model, ALL)
        parallel = nn.parallel.DistributedDataParallel(model)
        quantizer.start()
        train(model, quantizer, sgd(model), BATCHES[rank::2][:1], parallel)
        found = {"first": values(quantizer)["stem._input_0 scale"]}
        train(model, quantizer, sgd(model), BATCHES[rank::2][1:], parallel)
        found |= values(quantizer)
        quantizer.unwrap_model()
        return found

    one, other = in_two_processes(work)
    assert len(one) > 20
    assert all(torch.equal(one[name], other[name]) for name in one)
    if kind is LsqQuantizer:
        expected = torch.stack([BATCHES[rank][0].abs().mean() for rank in range(2)]).mean() * 2 / 127**0.5
        torch.testing.assert_close(one["first"], expected)


def test_unsigned_types_have_zero_as_their_lowest_level(made):
    layer = nn.Linear(4, 2)
    quantizer = made(layer, [{"op_types": ["Linear"], "target_names": ["_input_0"], "quant_dtype": "uint4"}])
    quantizer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.rand(3, 4)).sum().backward()
        quantizer.step()
    config = quantizer.get_calibration_config()[""]["_input_0"]
    assert (config["zero_point"].item(), config["quant_min"], config["quant_max"]) == (0, 0, 15)
    transform = next(own for _, own in quantizer.transforms() if isinstance(own, LearnedUniform))
    assert transform(torch.tensor([-1.0, 0.0])).tolist() == [0, 0]


class TestRefusals:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"quant_scheme": "affine"}, "no zero point.*LsqPlusQuantizer"),
            ({"quant_dtype": "fp8_e4m3"}, "integer type"),
            ({"observer": "mse"}, "does not use 'mse'"),
        ],
    )
    def test_what_cannot_be_learned(self, keys, message):
        with pytest.raises(ConflictError, match=message):
            LsqQuantizer(ToyNetwork(), [{**ALL[0], **keys}])

    def test_numbers_out_of_range(self):
        with pytest.raises(InvalidValueError, match="learning_rate: -1"):
            LsqQuantizer(ToyNetwork(), ALL, learning_rate=-1)

    def test_what_was_never_reached(self, made):
        config = [{**LAYER[0], "target_names": ["_input_0"]}]
        quantizer = made(nn.ModuleList([nn.Linear(4, 4)]), config)
        quantizer.start()
        with pytest.raises(NumericalError, match=r"0\._input_0: no value was ever seen"):
            quantizer.finish()

    def test_a_calibration_with_another_zero(self, made):
        quantizer = made(nn.Linear(4, 2), LAYER)
        quantizer.start()
        calibration = quantizer.get_calibration_config()
        calibration[""]["weight"]["zero_point"] += 1
        with pytest.raises(CheckpointError, match="only the scale is learned"):
            quantizer.update_calibration_config(calibration)
