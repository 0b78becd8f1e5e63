"""One lifecycle for pruners, quantizers and distillers, alone and fused in every order."""

import copy
from itertools import permutations

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch.nn.utils.parametrize import is_parametrized

from tersor.distillation import Distiller
from tersor.errors import ConflictError, InvalidValueError, TrainingError, UnmatchedError, WrapError
from tersor.pruning import L1NormPruner, LevelPruner
from tersor.quantization import FakeQuantize, Quantizer, straight_through
from tersor.training import TorchEvaluator
from tests.networks import IMAGE, Plain, randomize


class MidRise(FakeQuantize):
    """Rounds to the middle of steps, of an eighth at first: like no masked value, its values are never zero."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.tensor(0.125))

    def forward(self, value):
        return straight_through(value, ((value / self.step).floor() + 0.5) * self.step)

    def calibration(self):
        return {"scale": self.step.item()}

    def load_calibration(self, calibration):
        self.step.fill_(calibration["scale"])


class ToyQuantizer(Quantizer):
    def fake_quantize(self, target):
        return MidRise()


class ToyDistiller(Distiller):
    """Draws every observed value to zero."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def distillation_loss(self, observed, batch):
        self.seen.append({name: value.detach().clone() for name, value in observed.items()})
        return sum(value.square().mean() for value in observed.values())


KINDS = {"prune": L1NormPruner, "quantize": ToyQuantizer, "distil": ToyDistiller}
FOLLOW = {"weight": {}, "_output_0": {"align": {"target_name": "weight", "dims": [0]}}}
CONFIGS = {
    "prune": [{"op_names": ["0"], "sparse_ratio": 0.5, "target_settings": FOLLOW}],
    "quantize": [{"op_names": ["0"], "target_names": ["weight", "_output_0"]}],
    "distil": [{"op_names": ["0"]}],
}
ORDERS = list(permutations(KINDS))
X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def fuse(model, order, evaluator=None):
    """The compressors of these kinds, each made from the one before."""
    made = []
    for kind in order:
        if made:
            made.append(KINDS[kind].from_compressor(made[-1], CONFIGS[kind]))
        else:
            made.append(KINDS[kind](model, CONFIGS[kind], evaluator, example_inputs=X))
    return dict(zip(order, made, strict=True))


def evaluator_of(model, losses=None, dummy_input=None):
    def training_func(model, optimizer, training_step, lr_schedulers, max_steps, max_epochs):
        while True:
            optimizer.zero_grad()
            loss = training_step(X, model)
            loss.backward()
            optimizer.step()
            if losses is not None:
                losses.append(loss.item())

    def training_step(batch, model):
        return model(batch).abs().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return TorchEvaluator(training_func, optimizer, training_step, dummy_input=dummy_input, progress=False)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before, after):
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_quantize_then_mask_then_observe_in_every_order(order):
    model = randomize(Plain())
    before, weight = state(model), model[0].weight.detach().clone()
    fused = fuse(model, order)
    last = fused[order[-1]]
    last.start()
    kept = fused["prune"].get_masks()["0"]["weight"]
    simulated = model[0].weight.detach()
    assert not simulated[~kept].any()
    torch.testing.assert_close(simulated[kept], ((weight[kept] * 8).floor() + 0.5) / 8)
    out = model[0](X)
    channels = kept.any((1, 2, 3))
    assert int(channels.sum()) == 4
    assert not out[:, ~channels].any()
    assert (out[:, channels] != 0).all()
    last.loss(torch.zeros(()))
    assert torch.equal(fused["distil"].seen[0]["0._output_0"], out)
    last.unwrap_model()
    assert same(before, state(model))


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
@pytest.mark.parametrize("started_from", [0, -1], ids=["first", "last"])
def test_one_training_run_serves_all(order, started_from):
    model, losses = randomize(Plain()), []
    fused = fuse(model, order, evaluator_of(model, losses))
    started = fused[order[started_from]]
    result = started.compress(max_steps=3)
    out, seen = model(X), fused["distil"].seen
    started.unwrap_model()
    assert len(losses) == len(seen) == 3
    assert losses[0] > losses[2]
    if order[started_from] == "distil":
        assert result is model
    else:
        assert result[0] is model
    masks, calibration = fused["prune"].get_masks(), fused["quantize"].get_calibration_config()
    assert list(masks) == ["0"]
    assert calibration == {"0": {"weight": {"scale": 0.125}, "_output_0": {"scale": 0.125}}}
    assert not seen[-1]["0._output_0"][:, ~masks["0"]["bias"]].any()
    assert not torch.equal(out, model(X))


def test_the_loss_is_the_users_and_the_distillers():
    model, losses = randomize(Plain()), []
    distiller = ToyDistiller(model, CONFIGS["distil"], evaluator_of(model, losses))
    own = model(X).abs().mean().item()
    distiller.compress(max_steps=1)
    distiller.unwrap_model()
    assert losses[0] == pytest.approx(own + distiller.seen[0]["0._output_0"].square().mean().item())


def test_a_loop_of_ones_own():
    model = randomize(Plain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    latent = model[0].weight.detach().clone()
    fused = fuse(model, ("prune", "distil"))
    compressor = fused["distil"]
    compressor.start()
    for _ in range(2):
        optimizer.zero_grad()
        compressor.loss(model(X).abs().mean(), X).backward()
        optimizer.step()
        compressor.step()
    compressor.finish()
    masks = fused["prune"].get_masks()
    compressor.unwrap_model()
    kept = masks["0"]["weight"]
    assert len(fused["distil"].seen) == 2
    assert torch.equal(model[0].weight[~kept], latent[~kept])
    assert (model[0].weight[kept] != latent[kept]).any()


def test_an_optimizer_made_before_goes_on():
    model = randomize(Plain())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(X).sum().backward()
    optimizer.step()
    held, weight = list(model.parameters()), model[0].weight
    fused = fuse(model, ("quantize", "prune"))
    fused["prune"].start()
    optimizer.zero_grad()
    model(X).sum().backward()
    optimizer.step()
    fused["prune"].unwrap_model()
    assert model[0].weight is weight
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert all(int(optimizer.state[parameter]["step"]) == 2 for parameter in held)


def test_the_evaluator_gives_the_example_inputs():
    model = randomize(Plain())
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], evaluator_of(model, dummy_input=X))
    assert pruner.plan.coupling is not None
    pruner.unwrap_model()


def test_only_the_second_has_an_evaluator():
    model, losses = randomize(Plain()), []
    first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    second = ToyDistiller.from_compressor(first, CONFIGS["distil"], evaluator=evaluator_of(model, losses))
    first.compress(max_steps=2)
    assert len(losses) == len(second.seen) == 2
    with pytest.raises(ConflictError, match="evaluator already"):
        ToyQuantizer.from_compressor(first, CONFIGS["quantize"], evaluator=evaluator_of(model))
    second.unwrap_model()


class TestRefusals:
    def test_double_wrap(self):
        model = randomize(Plain())
        first = L1NormPruner(model, CONFIGS["prune"])
        with pytest.raises(WrapError, match="from_compressor"):
            ToyQuantizer(model, CONFIGS["quantize"])
        first.unwrap_model()
        second = ToyQuantizer(model, CONFIGS["quantize"])
        second.unwrap_model()

    @pytest.mark.parametrize("from_first", [True, False])
    def test_two_of_a_kind_on_one_target(self, from_first):
        model = randomize(Plain())
        first = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
        second = LevelPruner.from_compressor(first, [{"op_names": ["3"], "sparse_ratio": 0.5}])
        with pytest.raises(ConflictError, match=r"3\.bias: LevelPruner and L1NormPruner are both configured"):
            L1NormPruner.from_compressor(first if from_first else second, [{"op_names": ["3"], "sparse_ratio": 0.5}])
        _, masks = second.compress()
        assert set(masks) == {"0", "3"}
        first.unwrap_model()

    def test_a_second_evaluator(self):
        model = randomize(Plain())
        first = L1NormPruner(model, CONFIGS["prune"], evaluator_of(model), example_inputs=X)
        with pytest.raises(ConflictError, match=r"evaluator: .*already.*Leave it out"):
            ToyQuantizer.from_compressor(first, CONFIGS["quantize"], evaluator=evaluator_of(model))
        same = ToyQuantizer.from_compressor(first, CONFIGS["quantize"], evaluator=first.evaluator)
        assert same.evaluator is first.evaluator
        first.unwrap_model()

    def test_no_length_where_training_is_needed(self):
        model = randomize(Plain())
        fused = fuse(model, ("prune", "distil"), evaluator_of(model))
        with pytest.raises(TrainingError, match=r"ToyDistiller learns.*max_steps"):
            fused["prune"].compress()
        fused["prune"].unwrap_model()

    def test_a_length_without_an_evaluator(self):
        pruner = L1NormPruner(randomize(Plain()), CONFIGS["prune"], example_inputs=X)
        with pytest.raises(TrainingError, match="no evaluator"):
            pruner.compress(max_epochs=1)
        with pytest.raises(InvalidValueError, match="max_steps: 0"):
            pruner.compress(max_steps=0)
        assert pruner.get_masks() == {}
        pruner.unwrap_model()

    def test_a_quantizer_that_refuses_a_target_wraps_nothing(self):
        class Picky(ToyQuantizer):
            def fake_quantize(self, target):
                if target.name == "0._output_0":
                    raise InvalidValueError("only weights")
                return MidRise()

        model = randomize(Plain())
        before = state(model)
        with pytest.raises(InvalidValueError, match="only weights"):
            Picky(model, CONFIGS["quantize"])
        assert same(before, state(model))

    def test_a_calibration_of_another_model_changes_nothing(self):
        quantizer = ToyQuantizer(randomize(Plain()), CONFIGS["quantize"])
        before = quantizer.get_calibration_config()
        with pytest.raises(UnmatchedError, match=r"0\.wieght.*Did you mean '0\.weight'"):
            quantizer.update_calibration_config({"0": {"_output_0": {"scale": 1.0}, "wieght": {"scale": 1.0}}})
        assert quantizer.get_calibration_config() == before
        quantizer.unwrap_model()


def test_a_calibration_goes_round():
    first, second = (ToyQuantizer(randomize(Plain()), CONFIGS["quantize"]) for _ in range(2))
    calibration = {"0": {"weight": {"scale": 0.25}, "_output_0": {"scale": 0.5}}}
    first.update_calibration_config(calibration)
    second.update_calibration_config(first.get_calibration_config())
    assert second.get_calibration_config() == calibration
    assert torch.equal(first.model(X), second.model(X))
    latent = first.model[0].parametrizations.weight.original
    torch.testing.assert_close(first.model[0].weight, ((latent * 4).floor() + 0.5) / 4)
    first.unwrap_model()
    second.unwrap_model()


@pytest.mark.parametrize("order", ORDERS[:2], ids="-".join)
def test_a_wrapped_and_fused_model_is_an_ordinary_module(order):
    model = randomize(Plain())
    last = fuse(model, order)[order[-1]]
    last.start()
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), expected)
    saved = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert not torch.equal(model(X), expected)
    assert torch.equal(twin(X), expected)
    model.load_state_dict(saved)
    assert torch.equal(model(X), expected)
    last.unwrap_model()
    torch._dynamo.reset()


def test_wrap_and_unwrap_reach_all():
    model = randomize(Plain())
    plain = model(X)
    fused = fuse(model, ORDERS[0])
    fused["distil"].start()
    simulated = model(X)
    fused["prune"].unwrap_model()
    assert torch.equal(model(X), plain)
    assert not any(is_parametrized(module) for module in model.modules())
    assert fused["quantize"].wrap_model() is model
    assert torch.equal(model(X), simulated)
    fused["quantize"].unwrap_model()
