"""Batch norm statistics against numpy over all data, corrected biases against the means that they are to restore."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.errors import InvalidValueError
from tersor.pruning import L1NormPruner
from tersor.training.recovery import correct_bias, output_moments, reestimate_batch_norm
from tests.networks import IMAGE, Dense, Plain, Residual, Separable, Tokens, Upsampling, randomize


def draw(*sizes, count=3, spread=2.0):
    """Batches of 7, 7 and 4 samples, each with a mean of its own."""
    return [torch.randn(7 if i < count - 1 else 4, *sizes, dtype=torch.float64) * spread + 3 * i for i in range(count)]


def statistics(values):
    """Mean and unbiased variance of each channel (dimension 1), by numpy."""
    channels = np.moveaxis(np.asarray(values), 1, 0).reshape(values.shape[1], -1)
    return channels.mean(1), channels.var(1, ddof=1)


def assert_statistics(norm, values, rtol=1e-12):
    mean, variance = statistics(values)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=rtol, atol=1e-14)
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=rtol, atol=1e-14)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_state(model, before):
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    ("norm", "sizes"),
    [
        (nn.BatchNorm1d(5), (5,)),
        (nn.BatchNorm1d(5), (5, 6)),
        (nn.BatchNorm2d(5, affine=False), (5, 3, 4)),
        (nn.BatchNorm3d(5), (5, 2, 3, 2)),
        (nn.SyncBatchNorm(5), (5, 3)),
    ],
)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_all_values(norm, sizes, momentum):
    norm = randomize(copy.deepcopy(norm)).double()
    norm.momentum = momentum
    weights = {name: tensor.clone() for name, tensor in norm.named_parameters()}
    batches = draw(*sizes)
    assert reestimate_batch_norm(norm, batches) == 3
    assert_statistics(norm, torch.cat(batches))
    assert norm.momentum == momentum
    assert norm.num_batches_tracked == 3
    assert all(torch.equal(tensor, weights[name]) for name, tensor in norm.named_parameters())


def test_one_batch_gives_what_pytorch_accumulates():
    norm, (batch,) = nn.BatchNorm2d(5, momentum=None).double(), draw(5, 3, 3, count=1)
    theirs = copy.deepcopy(norm).train()
    theirs(batch)
    reestimate_batch_norm(norm.eval(), [batch])
    torch.testing.assert_close(norm.running_var, theirs.running_var, rtol=1e-13, atol=0)
    torch.testing.assert_close(norm.running_mean, theirs.running_mean, rtol=1e-13, atol=0)


def test_the_variance_between_the_batches_counts():
    norm = nn.BatchNorm1d(1).double()
    reestimate_batch_norm(norm, [torch.full((2, 1), value, dtype=torch.float64) for value in (-1.0, 1.0)])
    assert norm.running_var.item() == pytest.approx(4 / 3)  # each batch alone has none


def test_a_deeper_norm_sees_inputs_normalised_by_batch():
    first, second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    model = randomize(nn.Sequential(first, nn.ReLU(), second)).double()
    batches = draw(4)
    reestimate_batch_norm(model, batches)
    inner = []
    for batch in batches:
        values = batch.numpy()
        normal = (values - values.mean(0)) / np.sqrt(values.var(0) + first.eps)
        inner.append(np.maximum(normal * first.weight.detach().numpy() + first.bias.detach().numpy(), 0))
    assert_statistics(first, torch.cat(batches))
    assert_statistics(second, np.concatenate(inner), rtol=1e-10)


def test_nothing_but_batch_norm_trains():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4), nn.Dropout(0.9), nn.BatchNorm1d(4, momentum=0.3)).double()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    batches = draw(4)
    torch.manual_seed(5)
    reestimate_batch_norm(model, batches)
    assert_statistics(model[1], torch.cat(batches))
    assert [module.training for module in model.modules()] == modes
    assert all(norm.track_running_stats for norm in (model[1], model[3]))
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_come_as_in_training_and_no_more_than_asked():
    batches = draw(4)
    taken = []

    def loader():
        for batch in batches:
            taken.append(len(batch))
            yield {"input": batch} if len(taken) == 1 else (batch, torch.zeros(7))

    norm = nn.BatchNorm1d(4).double()
    assert reestimate_batch_norm(norm, loader(), max_batches=2) == 2
    assert taken == [7, 7]
    assert_statistics(norm, torch.cat(batches[:2]))


def test_a_masked_model_is_measured_as_masked():
    model = randomize(Plain()).double()
    pruner = L1NormPruner(
        model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=torch.zeros(IMAGE, dtype=torch.float64)
    )
    masks = pruner.compress()[1]
    batches = draw(3, 8, 8)
    reestimate_batch_norm(model, batches)
    alive = masks["0"]["weight"].flatten(1).any(1)
    pruner.unwrap_model()
    outputs = F.conv2d(torch.cat(batches), model[0].weight, model[0].bias, padding=1).detach()
    assert_statistics(model[1], outputs * alive[:, None, None], rtol=1e-11)
    assert alive.sum() == 4
    assert not model[1].running_var[~alive].any()


def test_half_precision_is_measured_in_float32():
    norm, batches = nn.BatchNorm1d(4).half(), [batch.half() for batch in draw(4)]
    reestimate_batch_norm(norm, batches)
    mean, variance = statistics(torch.cat(batches).double())
    np.testing.assert_array_equal(norm.running_mean.numpy(), mean.astype(np.float16))
    np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-3)


@pytest.mark.parametrize(
    ("model", "batches", "settings", "message"),
    [
        (nn.Linear(4, 2), [torch.ones(2, 4)], {}, "no batch norm"),
        (nn.BatchNorm1d(4, track_running_stats=False), [torch.ones(2, 4)], {}, "no batch norm"),
        (nn.InstanceNorm1d(4, track_running_stats=True), [torch.ones(2, 4, 3)], {}, "no batch norm"),
        (nn.BatchNorm1d(4), [], {}, "batches: there is no batch"),
        (nn.BatchNorm1d(4), torch.ones(2, 4), {}, "a Tensor holds no batches"),
        (nn.BatchNorm1d(4), {"input": torch.ones(2, 4)}, {}, "a dict holds no batches"),
        (nn.BatchNorm1d(4), [torch.ones(2, 4)], {"max_batches": 0}, "max_batches: 0 is no number of batches"),
        (nn.BatchNorm1d(4), [torch.ones(2, 4)], {"max_batches": 1.0}, "max_batches: 1.0 is no number"),
    ],
)
def test_statistics_that_cannot_be_measured(model, batches, settings, message):
    before = state(model)
    with pytest.raises(InvalidValueError, match=message):
        reestimate_batch_norm(model, batches, **settings)
    assert_state(model, before)


class Auxiliary(nn.Module):
    """Has a batch norm that runs in training only."""

    def __init__(self, main):
        super().__init__()
        self.main, self.side = main, nn.BatchNorm1d(4)

    def forward(self, x):
        return self.main(x) + (self.side(x) if self.training else 0)


def test_what_does_not_run_keeps_its_statistics():
    model = randomize(Auxiliary(nn.BatchNorm1d(4))).double()
    before, batches = state(model.side), draw(4)
    reestimate_batch_norm(model, batches)
    assert_statistics(model.main, torch.cat(batches))
    assert_state(model.side, before)
    with pytest.raises(InvalidValueError, match="runs none of its batch norms"):
        reestimate_batch_norm(Auxiliary(nn.Identity()), [torch.ones(2, 4)])


def test_a_norm_that_was_told_not_to_track_is_passed_over():
    model = randomize(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))).double()
    model[1].track_running_stats = False
    before, batches = state(model[1]), draw(4)
    reestimate_batch_norm(model, batches)
    assert_statistics(model[0], torch.cat(batches))
    assert_state(model[1], before)
    assert not model[1].track_running_stats


def test_an_error_in_the_middle_leaves_the_statistics():
    model = randomize(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))).double().train()
    model[0].eval()
    before = state(model)
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(model, [*draw(4), torch.ones(2, 5, dtype=torch.float64)])
    assert_state(model, before)
    assert [module.training for module in model] == [False, True, True]
    assert all(norm.track_running_stats for norm in (model[0], model[2]))


def output_means(model, names, batches):
    """The mean of each channel of each module's outputs; channels are last in linear layers, else second."""
    outputs = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: outputs[name].append(output))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    means = {}
    for name, parts in outputs.items():
        dim = -1 if isinstance(model.get_submodule(name), nn.Linear) else 1
        rows = [np.moveaxis(part.numpy(), dim, 0).reshape(part.shape[dim], -1) for part in parts]
        means[name] = np.concatenate(rows, 1).mean(1)
    return means


def zeroed(model, share=0.5):
    """A copy with random weights set to zero."""
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in damaged.parameters():
            if tensor.dim() > 1:
                tensor.mul_(torch.rand(tensor.shape) > share)
    return damaged


def images(*sizes):
    return draw(*(sizes or IMAGE[1:]))


@pytest.mark.parametrize("network", [Plain, Residual, Dense, Separable, Upsampling, Tokens])
def test_each_layer_has_the_means_of_the_reference(network):
    reference = randomize(network()).double()
    model = zeroed(reference)
    batches = [torch.randint(11, (size, 5)) for size in (6, 3)] if network is Tokens else images()
    before, weights = state(reference), state(model)
    names = correct_bias(model, reference, batches)
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d)
    assert set(names) == {name for name, module in model.named_modules() if isinstance(module, kinds)}
    wanted, found = output_means(reference, names, batches), output_means(model, names, batches)
    damaged = output_means(zeroed(reference), names, batches)
    for name in names:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-10, atol=1e-10, err_msg=name)
        assert np.abs(damaged[name] - wanted[name]).max() > 1e-2
    assert_state(reference, before)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])]
    assert {name.removesuffix(".bias") for name in changed} <= set(names)


def test_the_formula_of_a_linear_layer():
    reference = randomize(nn.Linear(6, 4)).double()
    model, batches = zeroed(reference), draw(6)
    correct_bias(model, reference, iter(batches), max_batches=2)
    lost = (reference.weight - model.weight).detach().numpy()
    expected = reference.bias.detach().numpy() + lost @ torch.cat(batches[:2]).numpy().mean(0)
    np.testing.assert_allclose(model.bias.detach().numpy(), expected, rtol=1e-12)


def test_moments_from_before_are_as_good_as_a_copy():
    reference, batches = randomize(Residual()).double(), images()
    by_copy = zeroed(reference)
    model = copy.deepcopy(reference)
    before = output_moments(model, batches)
    model.load_state_dict(by_copy.state_dict())
    assert correct_bias(model, before, batches) == correct_bias(by_copy, reference, batches)
    assert_state(model, state(by_copy))


class Backwards(nn.Module):
    """Runs its layers in another order than it has them."""

    def __init__(self):
        super().__init__()
        self.last, self.norm, self.first = nn.Linear(5, 3), nn.BatchNorm1d(5), nn.Conv1d(4, 5, 2, bias=False)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))).mean(2))


def test_layers_are_corrected_as_they_run_and_a_norm_for_the_layer_without_bias():
    reference = randomize(Backwards()).double()
    model, batches = zeroed(reference), images(4, 6)
    model.train()
    assert correct_bias(model, reference, batches) == ["norm", "last"]
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in reference.modules())
    wanted = output_means(reference, ["norm", "last"], batches)
    for name, found in output_means(model.eval(), ["norm", "last"], batches).items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-10, atol=1e-12)


def test_removed_channels_stay_zero():
    reference = randomize(Plain()).double()
    model, batches = copy.deepcopy(reference), images()
    pruner = L1NormPruner(
        model, [{"op_names": ["0", "3", "7"], "sparse_ratio": 0.5}], example_inputs=torch.zeros_like(batches[0])
    )
    pruner.compress()
    simulated = pruner.get_masks(completed=True)
    names = correct_bias(model, reference, batches)
    assert names == ["0", "1", "3", "7", "9"]
    wanted, found = output_means(reference, names, batches), output_means(model, names, batches)
    dead = 0
    for name in names:
        alive = simulated.get(name, {}).get("bias", torch.ones(len(wanted[name]), dtype=torch.bool)).numpy()
        dead += (~alive).sum()
        assert not found[name][~alive].any()
        np.testing.assert_allclose(found[name][alive], wanted[name][alive], rtol=1e-10, atol=1e-10)
        np.testing.assert_array_equal(
            pruner.wrappers[name].tensor("bias").detach()[~alive], reference.get_submodule(name).bias.detach()[~alive]
        )
    assert dead == 4 + 4 + 3 + 3
    pruner.unwrap_model()


def test_a_masked_weight_leaves_its_mean_in_the_bias():
    reference = randomize(Plain()).double()
    model, batches = copy.deepcopy(reference), images()
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5, "target_names": ["weight"]}])
    gone = ~pruner.compress()[1]["0"]["weight"].flatten(1).any(1)
    assert not reference[0].bias.detach()[gone].eq(0).any()
    pruner.update_masks({"0": {"weight": ~gone[:, None, None, None]}})
    correct_bias(model, reference, batches)
    pruner.unwrap_model()
    wanted = output_means(reference, ["0"], batches)["0"]
    np.testing.assert_allclose(model[0].bias.detach().numpy()[gone], wanted[gone], rtol=1e-12)


def test_outputs_are_measured_before_other_hooks():
    reference = randomize(nn.Linear(6, 4)).double()
    model, batches = zeroed(reference), draw(6)
    with model.register_forward_hook(lambda module, args, output: output * 0):
        correct_bias(model, reference, batches)
    wanted = output_means(reference, [""], batches)[""]
    np.testing.assert_allclose(output_means(model, [""], batches)[""], wanted, rtol=1e-12)


def narrow():
    return nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("reference", "batches", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)),
            [torch.ones(2, 6)],
            "model: .*'0' has 3, not 4.* before the speedup",
        ),
        (nn.Sequential(nn.Linear(6, 2)), [torch.ones(2, 6)], "reference: has no module '2'"),
        (nn.Sequential(*(nn.Identity() for _ in range(3))), [torch.ones(2, 6)], "'0' has 3, not 6"),
        (narrow(), [], "batches: there is no batch"),
        (narrow(), torch.ones(2, 6), "a Tensor holds no batches"),
    ],
)
def test_references_that_do_not_fit(reference, batches, message):
    model = narrow()
    before = state(model)
    with pytest.raises(InvalidValueError, match=message):
        correct_bias(model, reference, batches)
    assert_state(model, before)


def test_nothing_to_correct_is_an_error():
    model = narrow()
    with pytest.raises(InvalidValueError, match="reference: is the model itself"):
        correct_bias(model, model, [torch.ones(2, 6)])
    plain = nn.Linear(6, 3, bias=False)
    with pytest.raises(InvalidValueError, match="model: has no linear layer"):
        correct_bias(plain, copy.deepcopy(plain), [torch.ones(2, 6)])
    idle = nn.ModuleDict({"unused": nn.Linear(2, 2)})
    idle.forward = lambda x: x
    with pytest.raises(InvalidValueError, match="runs no module that has a bias"):
        correct_bias(idle, copy.deepcopy(idle), [torch.ones(2, 6)])


class FailsLate(nn.Module):
    """Fails once its first bias has changed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        self.forbidden = None

    def forward(self, x):
        if self.forbidden is not None and not torch.equal(self.first.bias, self.forbidden):
            raise RuntimeError("the bias has changed")
        return self.second(self.first(x))


def test_an_error_in_the_middle_leaves_the_biases():
    reference = randomize(FailsLate()).double()
    model = zeroed(reference)
    model.forbidden = model.first.bias.detach().clone()
    before = state(model)
    with pytest.raises(RuntimeError, match="the bias has changed"):
        correct_bias(model, reference, draw(6))
    assert_state(model, before)


TWO_PROCESSES = """
import json, sys, torch
from torch import distributed, nn
from tersor.errors import InvalidValueError
from tersor.training.recovery import correct_bias, reestimate_batch_norm
rank = int(sys.argv[1])
distributed.init_process_group("gloo", store=distributed.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
values = torch.arange(40, dtype=torch.float64).view(10, 4) ** 2
mine = [[values[:3], values[3:6]], [values[6:]]][rank]
norm, reference, model = nn.BatchNorm1d(4).double(), nn.Linear(4, 2).double(), nn.Linear(4, 2).double()
for layer, value in ((reference, 1.0), (model, 0.5)):
    nn.init.constant_(layer.weight, value), nn.init.zeros_(layer.bias)
count = reestimate_batch_norm(norm, mine)
reestimate_batch_norm(norm, mine[: 1 - rank] or [])  # the second process has none
correct_bias(model, reference, mine)
first_only = norm.running_mean.tolist()
reestimate_batch_norm(norm, mine)
try:
    reestimate_batch_norm(norm, [])
except InvalidValueError as error:
    refused = str(error)
statistics = norm.running_mean.tolist(), norm.running_var.tolist()
print(json.dumps([count, *statistics, model.bias.tolist(), first_only, refused]))
distributed.destroy_process_group()
"""


def test_two_processes_pool_what_they_measure(tmp_path):
    commands = [[sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path / "store")] for rank in range(2)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    printed = [process.communicate(timeout=60)[0] for process in running]
    first, second = map(json.loads, printed)
    assert first == second
    count, mean, variance, bias, first_only, refused = first
    values = np.arange(40.0).reshape(10, 4) ** 2
    assert count == 3
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-14)
    np.testing.assert_allclose(variance, values.var(0, ddof=1), rtol=1e-13)
    np.testing.assert_allclose(bias, [values.sum(1).mean() / 2] * 2, rtol=1e-14)
    np.testing.assert_allclose(first_only, values[:3].mean(0), rtol=1e-14)
    assert "there is no batch" in refused
