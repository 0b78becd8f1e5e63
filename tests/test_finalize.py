"""Finished compressors become a small model that simulates the same, trains on, is saved, loaded and deployed."""

import copy

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn
from torch.nn import functional as F

import tersor
from tersor import TorchEvaluator, finalize
from tersor.deploy.plain import plain_of
from tersor.deploy.small import simulated
from tersor.distillation import DynamicLayerwiseDistiller
from tersor.errors import InvalidValueError
from tersor.pruning import AGPPruner, FixedPruner, L1NormPruner, LevelPruner
from tersor.quantization import (
    BNNQuantizer,
    DoReFaQuantizer,
    GPTQQuantizer,
    LsqPlusQuantizer,
    LsqQuantizer,
    PtqQuantizer,
    QATQuantizer,
)
from tersor.speedup.verify import outputs_of, relative_error
from tersor.wrapping import ModelWrappers

X = torch.randn(32, 2, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
INT8 = [
    {"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": "int8"},
    {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_"], "quant_dtype": "uint8", "quant_scheme": "affine"},
]


SYMMETRIC = {"op_types": ["Conv2d", "Linear"], "target_names": ["_input_"], "quant_dtype": "int8"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def unwrapped(monkeypatch):
    """Every model is unwrapped at the end, so that what is left behind then is found."""
    made = []
    first = ModelWrappers.__init__

    def watched(self, *args, **kwargs):
        first(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ModelWrappers, "__init__", watched)
    yield
    for wrappers in made:
        wrappers.detach()


def evaluator_of(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    return TorchEvaluator.from_loader([(X[:16], Y[:16]), (X[16:], Y[16:])], F.cross_entropy, optimizer, progress=False)


def fused(kind, config=INT8, steps=6, norms=False):
    model = Net()
    evaluator = evaluator_of(model)
    pruner = L1NormPruner(model, [{"op_names": ["conv", "conv2"], "sparse_ratio": 0.5}], evaluator, example_inputs=X)
    schedule = AGPPruner(pruner, 2, 2)
    if norms:
        config = [*config, {"op_names": ["conv"], "target_names": ["_output_"], "fuse_names": [("conv", "norm")]}]
    arguments = {"calibration": [(X, Y)]} if kind in (PtqQuantizer, GPTQQuantizer) else {}
    quantizer = kind.from_compressor(schedule, config, **arguments)
    distiller = DynamicLayerwiseDistiller.from_compressor(
        quantizer, [{"op_names": ["fc"], "apply_method": "kl"}], copy.deepcopy(Net()).eval()
    )
    distiller.compress(max_steps=steps)
    return distiller


def signs():
    return [{"op_names": ["conv2"], "target_names": ["weight"], "quant_dtype": "int1"}]


CASES = {
    "qat": (QATQuantizer, INT8, False),
    "qat with a folded norm": (QATQuantizer, INT8, True),
    "ptq": (PtqQuantizer, INT8, False),
    "lsq": (LsqQuantizer, [{**INT8[0], "quant_dtype": "int4"}, SYMMETRIC], False),
    "lsq plus": (LsqPlusQuantizer, [{**INT8[0], "quant_dtype": "int4"}, INT8[1]], False),
    "dorefa": (DoReFaQuantizer, [{**INT8[0], "quant_dtype": "int4"}], False),
    "bnn": (BNNQuantizer, signs(), False),
    "gptq": (GPTQQuantizer, [{**INT8[0], "quant_dtype": "int4"}], False),
}


@pytest.mark.parametrize("case", CASES)
def test_the_small_model_simulates_what_the_masked_one_does(case):
    kind, config, norms = CASES[case]
    compressor = fused(kind, config, norms=norms)
    final = finalize(compressor, X)
    assert final.error < 1e-12  # the last digits of float32 would now and then round a value the other way
    assert final.model.conv.weight.shape == (4, 2, 3, 3)
    assert final.model.conv2.weight.shape == (4, 4, 3, 3)
    with torch.no_grad():
        big, small = compressor.model.eval()(X), final.model.eval()(X)
    assert relative_error([small], [big]) < 2e-2  # single precision: values may be rounded the other way
    # The same, from the weights and the calibration alone.
    reference = simulated(plain_of(final.plain(bake=True), final.calibration, {}))
    assert relative_error(outputs_of(reference.double(), X.double()), [big.double()]) < 2e-2


def test_latent_weights_are_cut_and_not_rounded():
    compressor = fused(QATQuantizer)
    latent = copy.deepcopy(compressor.model)
    masks = compressor.chain[0].get_masks()["conv"]["weight"]
    kept = masks.flatten(1).any(1)
    final = finalize(compressor, X)
    before = latent.conv.parametrizations["weight"].original[kept]
    assert torch.equal(final.model.conv.parametrizations["weight"].original, before)
    assert not torch.equal(final.model.conv.weight, before)


@pytest.mark.parametrize("kind", [QATQuantizer, LsqQuantizer])
def test_it_trains_on_with_the_scales_that_it_has(kind):
    final = finalize(fused(kind, INT8 if kind is QATQuantizer else [INT8[0], SYMMETRIC]), X)
    evaluator = evaluator_of(final.model)
    scale = final.calibration["conv2"]["_input_0"]["scale"].clone()
    with torch.no_grad():
        before = F.cross_entropy(final.model.eval()(X), Y).item()
    final.compressor.evaluator = evaluator
    final.compressor.compress(max_steps=1)
    after = final.compressor.get_calibration_config()["conv2"]["_input_0"]["scale"]
    assert after != scale
    assert after.item() == pytest.approx(scale.item(), rel=0.05)  # one step of a moving average, or of Adam
    final.compressor.compress(max_steps=40)
    with torch.no_grad():
        assert F.cross_entropy(final.model.eval()(X), Y).item() < before
    assert len(final.compressor.model.conv.weight[0].unique()) <= 255


def test_it_is_saved_and_loaded(tmp_path):
    final = finalize(fused(QATQuantizer), X)
    folder = final.save(tmp_path / "small")
    loaded, calibration = tersor.load(Net, folder), tersor.load_calibration(folder / "calibration.safetensors")
    with torch.no_grad():
        expected = final.model.eval()(X)
    found = outputs_of(simulated(plain_of(loaded, calibration)), X)[0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_it_is_saved_again_in_the_same_folder(tmp_path):
    final = finalize(fused(QATQuantizer), X)
    final.save(tmp_path / "small")
    folder = final.save(tmp_path / "small", metadata={"accuracy": 0.5})
    assert tersor.checkpoint.read_architecture(folder).metadata == {"accuracy": 0.5}
    assert tersor.load_calibration(folder / "calibration.safetensors").keys() == final.calibration.keys()
    tersor.save(Net(), folder)  # one that is not quantized
    assert sorted(path.name for path in folder.iterdir()) == ["architecture.json", "model.safetensors"]


def test_masks_that_could_not_leave_stay_while_it_trains_on():
    model = Net()
    pruner = LevelPruner(model, [{"op_names": ["conv2"], "sparse_ratio": 0.75}], example_inputs=X)
    quantizer = PtqQuantizer.from_compressor(pruner, INT8, calibration=[(X, Y)])
    quantizer.compress()
    final = finalize(quantizer, X)
    zeros = final.model.conv2.weight == 0
    assert zeros.float().mean() >= 0.75
    assert isinstance(final.compressor, FixedPruner)
    evaluator_of(final.model).train(final.model, final.compressor, max_steps=4)
    assert bool((final.model.conv2.weight[zeros] == 0).all())
    assert bool((final.plain().conv2.weight[zeros.detach()] == 0).float().mean() > 0.7)


def test_a_model_that_is_only_pruned_is_plain():
    model = Net()
    pruner = L1NormPruner(model, [{"op_names": ["conv"], "sparse_ratio": 0.5}], example_inputs=X)
    pruner.compress()
    final = finalize(pruner)
    assert final.compressor is None
    assert final.calibration == {}
    with torch.no_grad():
        assert torch.allclose(final.model(X), model.eval()(X), atol=1e-5)
    assert final.model.conv.weight.shape[0] == 4


def test_what_cannot_be_finalized():
    model = Net()
    pruner = L1NormPruner(model, [{"op_names": ["conv"], "sparse_ratio": 0.5}])
    pruner.compress()
    with pytest.raises(InvalidValueError, match="nothing to run the model on"):
        finalize(pruner)
    quantizer = QATQuantizer.from_compressor(pruner, INT8)
    with pytest.raises(InvalidValueError, match="has no scales yet"):
        finalize(quantizer, X)
    quantizer.unwrap_model()
    with pytest.raises(InvalidValueError, match="unwrapped"):
        finalize(quantizer, X)


def test_masks_of_outputs_stay():
    model = Net()
    config = [{"op_names": ["conv2"], "target_names": ["_output_"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, config, example_inputs=X)
    quantizer = PtqQuantizer.from_compressor(pruner, INT8, calibration=[(X, Y)])
    quantizer.compress()
    final = finalize(quantizer, X)
    with torch.no_grad():
        assert relative_error([final.model.eval()(X)], [model.eval()(X)]) < 2e-2


@pytest.mark.parametrize("inputs", [False, True])
def test_double_precision_compares_the_stored_values(inputs):
    """Off by a last digit of float32, weights and inputs make deep models round the other way."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=x)
    pruner.compress()
    entries = [{**entry, "op_types": ["Linear"]} for entry in (INT8 if inputs else INT8[:1])]
    quantizer = PtqQuantizer.from_compressor(pruner, entries, calibration=[x])
    quantizer.compress()
    before = {name: own.clone() for name, own in model.state_dict().items() if own.is_floating_point()}
    assert finalize(quantizer).error < 1e-14
    assert all(torch.equal(own, model.state_dict()[name]) for name, own in before.items())
    assert len(model[0].weight[0].unique()) <= 8
