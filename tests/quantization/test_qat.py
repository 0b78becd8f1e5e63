"""Quantization-aware training: ranges and gradients against the formulas in float64, and what training does to them."""

import copy

import numpy as np
import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn
from torch.nn import functional as F

from tersor.config import QuantizationSpec
from tersor.errors import ConflictError, InvalidValueError, NumericalError, TrainingError
from tersor.pruning import L1NormPruner
from tersor.quantization import Format, QATQuantizer
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.testing.toys import BATCHES, EXAMPLE, FRESH, ToyNetwork, ToyTraining

ALL = [{"op_types": ["Conv2d", "Linear"], "target_names": ["weight", "_input_0", "_output_0"]}]
LAYER = [{"op_types": ["Linear"], "target_names": ["weight", "_input_0"], "quant_dtype": "int4"}]


@pytest.fixture
def made():
    """Makes quantizers whose models are given back at the end."""
    quantizers = []

    def make(*args, **kwargs):
        quantizers.append(QATQuantizer(*args, **kwargs))
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


def transform_of(quantizer, name):
    return next(transform for target, transform in quantizer.transforms() if target.name == name)


def rounded(x, scale):
    return np.clip(np.round(x / scale), -7, 7) * scale


def test_three_steps_follow_the_formulas(made):
    """A layer by hand in float64: moving averages of the input, the weight's own range, clipped gradients, SGD."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 3, bias=False).double()
    weight = layer.weight.detach().numpy().copy()
    batches = [torch.randn(6, 5, dtype=torch.float64) * scale for scale in (1.0, 2.0, 0.5)]
    quantizer = made(layer, LAYER, decay=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    quantizer.start()
    low = high = None
    for batch in batches:
        x = batch.numpy()
        low = x.min() if low is None else 0.5 * low + 0.5 * x.min()
        high = x.max() if high is None else 0.5 * high + 0.5 * x.max()
        scale = max(-low, high) / 7
        scales = np.abs(weight).max(1, keepdims=True) / 7
        seen, simulated = rounded(x, scale), rounded(weight, scales)
        out = seen @ simulated.T
        batch.requires_grad_()
        optimizer.zero_grad()
        result = layer(batch)
        result.square().sum().backward()
        optimizer.step()
        quantizer.step()
        np.testing.assert_allclose(result.detach().numpy(), out, rtol=1e-5, atol=1e-6)
        clipped = np.abs(np.round(x / scale)) > 7
        gradient = (2 * out @ simulated) * ~clipped
        np.testing.assert_allclose(batch.grad.numpy(), gradient, rtol=1e-5, atol=1e-6)
        assert (batch is not batches[2]) or not clipped.any()
        weight = weight - 0.1 * (2 * out.T @ seen)
    np.testing.assert_allclose(layer.parametrizations.weight.original.detach().numpy(), weight, rtol=1e-5, atol=1e-6)
    quantizer.finish()
    values = quantizer.get_calibration_config()[""]
    np.testing.assert_allclose(values["_input_0"]["scale"], scale, rtol=1e-6)
    np.testing.assert_allclose(values["weight"]["scale"], np.abs(weight).max(1, keepdims=True) / 7, rtol=1e-5)


def test_values_that_a_batch_throws_out_of_the_average_are_clipped(made):
    layer = nn.Linear(4, 2)
    quantizer = made(layer, LAYER, decay=0.99)
    quantizer.start()
    layer(torch.tensor([[0.0, 0.0, 7.0, -7.0]]))
    x = torch.tensor([[0.0, 1.0, 107.0, -9.0]], requires_grad=True)
    layer(x).sum().backward()
    assert transform_of(quantizer, "_input_0").scale.item() == pytest.approx((0.99 * 7 + 0.01 * 107) / 7)
    assert (x.grad != 0).tolist() == [[True, True, False, False]]


def test_ranges_move_in_training_alone(made):
    model = ToyNetwork()
    quantizer = made(model, ALL)
    plain = model.eval()(FRESH)
    quantizer.start()
    weights = [{**entry, "target_names": ["weight"]} for entry in ALL]
    reference = ToyNetwork().eval()
    other = made(reference, weights)
    other.start()
    torch.testing.assert_close(model(FRESH), reference(FRESH))  # no range of an activation is known yet
    assert not torch.equal(model(FRESH), plain)
    model.train()
    train(model, quantizer, sgd(model), BATCHES)
    before = copy.deepcopy(quantizer.get_calibration_config())
    model.eval()(FRESH * 100)
    after = quantizer.get_calibration_config()
    assert all(
        torch.equal(values["scale"], after[module][target]["scale"])
        for module, targets in before.items()
        for target, values in targets.items()
        if target != "weight"
    )


def test_a_later_start_watches_meanwhile(made):
    model, plain = ToyNetwork(), ToyNetwork()
    config = [*ALL, {"op_names": ["head"], "target_names": ["weight"], "quant_start_step": 3}]
    quantizer = made(model, config, None, 2)
    quantizer.start()
    optimizer, plainly = sgd(model), sgd(plain)
    for step, (x, y) in enumerate(BATCHES):
        out, expected = model(x), plain(x)
        assert torch.equal(out, expected) == (step < 2)
        scale = transform_of(quantizer, "stem._input_0").scale.item()
        low, high = -BATCHES[0][0].min(), BATCHES[0][0].max()
        if step == 0:
            assert scale == pytest.approx(max(low, high).item() / 127)
        assert transform_of(quantizer, "head.weight").enabled == (step >= 3)
        F.cross_entropy(out, y).backward()
        F.cross_entropy(expected, y).backward()
        for each in (optimizer, plainly):
            each.step()
            each.zero_grad()
        quantizer.step()


def test_what_was_found_makes_a_fresh_quantizer_equal(made):
    model = ToyNetwork()
    training = ToyTraining(model)
    quantizer = made(model, ALL, training.evaluator)
    _, calibration = quantizer.compress(max_steps=6)
    expected = model.eval()(FRESH)
    trained = quantizer.unwrap_model().state_dict()
    fresh = ToyNetwork()
    fresh.load_state_dict(trained)
    other = made(fresh.eval(), ALL)
    other.update_calibration_config(calibration)
    assert torch.equal(fresh(FRESH), expected)
    weight = trained["hidden.weight"]
    torch.testing.assert_close(calibration["hidden"]["weight"]["scale"], weight.abs().amax(1, keepdim=True) / 127)
    assert torch.equal(fresh.train()(FRESH * 9), fresh(FRESH * 9))  # nothing moves any more
    stored = fresh.hidden.weight / calibration["hidden"]["weight"]["scale"]
    torch.testing.assert_close(stored, stored.round())


@pytest.mark.parametrize("crash", [1, 3])
def test_it_goes_on_after_a_crash_bit_for_bit(made, crash):
    config = [{**ALL[0], "quant_start_step": 2}]
    model = ToyNetwork()
    quantizer, optimizer = made(model, config), sgd(model)
    quantizer.start()
    train(model, quantizer, optimizer, BATCHES[:crash])
    saved = copy.deepcopy((quantizer.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, quantizer, optimizer, BATCHES[crash:])
    quantizer.finish()
    other = ToyNetwork(seed=1)
    resumed, again = made(other, config), sgd(other)
    for item, state in zip((resumed, other, again), saved, strict=True):
        item.load_state_dict(state)
    train(other, resumed, again, BATCHES[crash:])
    resumed.finish()
    assert torch.equal(other.eval()(FRESH), model.eval()(FRESH))


@pytest.mark.parametrize("first", ["prune", "quantize"])
def test_masked_weights_are_zero_and_do_not_widen_ranges(made, first):
    model = ToyNetwork()
    prune = [{"op_names": ["hidden"], "target_names": ["weight"], "sparse_ratio": 0.5, "granularity": "in_channel"}]
    config = [{"op_names": ["hidden"], "target_names": ["weight"], "quant_scheme": "affine"}]
    if first == "prune":
        pruner = L1NormPruner(model, prune)
        quantizer = QATQuantizer.from_compressor(pruner, config)
    else:
        quantizer = made(model, config)
        pruner = L1NormPruner.from_compressor(quantizer, prune)
    pruner.start()
    train(model, quantizer, sgd(model), BATCHES[:2])
    quantizer.finish()
    mask = pruner.get_masks()["hidden"]["weight"]
    weight = model.hidden.weight
    assert not weight[~mask].any()
    kept = model.hidden.parametrizations.weight.original * mask
    width = kept.amax(1).clamp(min=0) - kept.amin(1).clamp(max=0)
    torch.testing.assert_close(quantizer.get_calibration_config()["hidden"]["weight"]["scale"][:, 0], width / 255)
    pruner.unwrap_model()


@pytest.mark.parametrize("granularity", ["default", "per_channel", [1, 4]])
def test_granularities(made, granularity):
    layer = nn.Linear(8, 6)
    quantizer = made(layer, [{"op_types": ["Linear"], "target_names": ["weight"], "granularity": granularity}])
    quantizer.start()
    grid = {"default": (6, 1), "per_channel": (6, 1)}.get(str(granularity), (6, 2))
    scale = layer.parametrizations.weight.original.detach().view(*grid, -1).abs().amax(-1) / 127
    expected = (layer.parametrizations.weight.original.view(*grid, -1) / scale[..., None]).round() * scale[..., None]
    torch.testing.assert_close(layer.weight, expected.view(6, 8), rtol=0, atol=1e-6)


def test_channels_of_an_input(made):
    model = ToyNetwork()
    quantizer = made(model, [{"op_names": ["left"], "target_names": ["_input_0"], "granularity": "per_channel"}])
    quantizer.start()
    train(model, quantizer, sgd(model), BATCHES[:1])
    quantizer.finish()
    assert quantizer.get_calibration_config()["left"]["_input_0"]["scale"].shape == (1, 8, 1, 1)


class Twice(nn.Module):
    """A tied weight, and a module that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.score = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.score.weight = self.embed.weight

    def forward(self, tokens):
        return self.score(self.mix(self.mix(self.embed(tokens)).relu()))


def test_a_tied_weight_is_rounded_under_all_of_its_names(made):
    model = Twice()
    config = [{"op_names": ["score", "mix"], "target_names": ["weight", "_input_0"], "quant_dtype": "int4"}]
    quantizer = made(model, config)
    quantizer.start()
    tokens = torch.arange(7)
    model(tokens)
    assert torch.equal(model.embed.weight, model.score.weight)
    assert not torch.equal(model.embed.weight, model.embed.parametrizations.weight.original)
    first = model.embed(tokens)
    second = model.mix(first).relu()
    high = transform_of(quantizer, "mix._input_0").observer.maximum
    assert first.max() != second.max()
    assert min(first.max(), second.max()) < high < max(first.max(), second.max())
    both = [{"op_names": ["embed", "score"], "target_names": ["weight"]}]
    with pytest.raises(ConflictError, match=r"score.weight: is the tensor of embed.weight as well.*one of its names"):
        QATQuantizer(Twice(), both)


def test_copies_and_wrapping_again(made):
    model = ToyNetwork()
    quantizer = made(model, ALL)
    quantizer.start()
    train(model, quantizer, sgd(model), BATCHES)
    twin = copy.deepcopy(model)
    quantizer.finish()
    expected = model.eval()(FRESH)
    assert torch.equal(twin.eval()(FRESH), expected)
    plain = quantizer.unwrap_model()(FRESH)
    assert not torch.equal(plain, expected)
    assert torch.equal(quantizer.wrap_model()(FRESH), expected)


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_in_bfloat16(made, how):
    model = ToyNetwork()
    quantizer = made(model, ALL)
    quantizer.start()
    if how == "bfloat16":
        model.bfloat16()
        batches = [(x.bfloat16(), y) for x, y in BATCHES]
        train(model, quantizer, sgd(model), batches)
        assert model.hidden.weight.dtype is torch.bfloat16
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            train(model, quantizer, sgd(model), BATCHES)
        assert model.hidden.weight.dtype is torch.float32
    quantizer.finish()
    scale = quantizer.get_calibration_config()["hidden"]["weight"]["scale"]
    latent = model.hidden.parametrizations.weight.original.detach().float()
    assert scale.dtype is torch.float32
    assert torch.equal(scale, (latent.abs().amax(1, keepdim=True).double() / 127).float())
    assert torch.equal(model.hidden.weight, ((latent * (1 / scale)).round() * scale).to(model.hidden.weight.dtype))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_step_is_one_graph_and_computes_the_same(made):
    torch.manual_seed(0)
    eager = nn.Sequential(nn.SiLU(), nn.Linear(4, 3))
    model, batches = copy.deepcopy(eager), [(torch.randn(5, 4), torch.arange(5) % 3) for _ in range(6)]
    config = [{**ALL[0], "op_types": ["Linear"]}]
    one, other = made(eager, config), made(model, config)
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
    torch.testing.assert_close(model[1].weight, eager[1].weight)
    for quantizer in (one, other):
        quantizer.finish()
    torch.testing.assert_close(model.eval()(batches[0][0]), eager.eval()(batches[0][0]))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    ("name", "dtype"), [("int4", torch.float32), ("int8", torch.bfloat16), ("fp8_e4m3", torch.float32)]
)
def test_compiled_gradients_stop_where_they_do_in_eager_mode(name, dtype):
    form = Format.of(QuantizationSpec(quant_dtype=name))
    x = (torch.linspace(-1.1, 1.1, 2001) * form.high).to(dtype)
    results = []
    for simulate in (form.simulate, torch.compile(form.simulate, backend="aot_eager", fullgraph=True)):
        own = x.clone().requires_grad_()
        out = simulate(own, torch.tensor(1.0), torch.tensor(0.0))
        out.backward(x)
        results.append((out.detach(), own.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    clipped = (x.round() if name.startswith("int") else x).abs() > form.high
    assert torch.equal(results[0][1], x * ~clipped)
    torch._dynamo.reset()


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_have_equal_ranges():
    def work(rank):
        model = ToyNetwork()
        quantizer = QATQuantizer(model, ALL)
        parallel = nn.parallel.DistributedDataParallel(model)
        quantizer.start()
        train(model, quantizer, sgd(model), BATCHES[rank::2][:1], parallel)
        observer = transform_of(quantizer, "stem._input_0").observer
        found = {"first": torch.stack([observer.minimum, observer.maximum])}
        train(model, quantizer, sgd(model), BATCHES[rank::2][1:], parallel)
        found |= {f"{t.name} {key}": getattr(own, key) for t, own in quantizer.transforms() for key in ("scale",)}
        quantizer.unwrap_model()
        return found

    one, other = in_two_processes(work)
    assert len(one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)
    images = torch.stack([BATCHES[rank][0] for rank in range(2)])
    expected = torch.stack([images.amin((1, 2, 3, 4)).mean(), images.amax((1, 2, 3, 4)).mean()])
    torch.testing.assert_close(one["first"], expected)


def test_dynamic_inputs_are_rounded_by_their_own_range(made):
    """For each token by itself, from the step on that is asked for, and after the training too."""
    layer = nn.Linear(4, 2)
    config = [{**LAYER[0], "target_settings": {"_input_0": {"dynamic": True, "granularity": [-1]}}}]
    quantizer = made(layer, config, None, 1)
    quantizer.start()
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    train(layer, quantizer, sgd(layer), [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))] * 2)
    quantizer.finish()
    x = torch.tensor([[7.0, 0.4, 0.6, -3.0], [0.7, 0.04, 0.06, -0.3]])
    layer.eval()(x)
    handle.remove()
    torch.testing.assert_close(seen[-1], torch.tensor([[7.0, 0.0, 1.0, -3.0], [0.7, 0.0, 0.1, -0.3]]))
    assert len(seen[0].unique()) > 15


class TestRefusals:
    def test_no_training(self, made):
        with pytest.raises(TrainingError, match="QATQuantizer learns while the model trains"):
            made(ToyNetwork(), ALL).compress()

    def test_what_was_never_reached(self, made):
        quantizer = made(nn.ModuleList([nn.Linear(4, 4)]), LAYER)
        quantizer.start()
        with pytest.raises(NumericalError, match=r"0\._input_0: no value was ever seen"):
            quantizer.finish()

    def test_observers_of_calibration(self):
        with pytest.raises(ConflictError, match=r"\['observer'\] on .*does not use 'entropy'"):
            QATQuantizer(ToyNetwork(), [{**ALL[0], "observer": "entropy"}])

    @pytest.mark.parametrize(
        ("arguments", "where"), [({"quant_start_step": -1}, "quant_start_step: -1"), ({"decay": 2}, "decay: 2")]
    )
    def test_numbers_out_of_range(self, arguments, where):
        with pytest.raises(InvalidValueError, match=where):
            QATQuantizer(ToyNetwork(), ALL, **arguments)


def test_the_example_inputs_are_run_without_moving_ranges(made):
    quantizer = made(ToyNetwork(), ALL, example_inputs=EXAMPLE)
    quantizer.start()
    quantizer.track_forward()
    assert not transform_of(quantizer, "stem._input_0").enabled
