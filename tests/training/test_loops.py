"""Our own loop over a data loader."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.pruning import ADMMPruner
from tersor.training import TorchEvaluator
from tests.training import hand_written

X = torch.linspace(-1, 1, 30).reshape(10, 3)
Y = X.sum(dim=1, keepdim=True)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)  # batches of 4, 4 and 2


class Recorder:
    def __init__(self):
        self.calls = []
        self.batches = []

    def loss(self, loss, batch):
        self.calls.append("loss")
        self.batches.append(batch)
        return loss * 2

    def before_step(self):
        self.calls.append("before")

    def after_step(self):
        self.calls.append("after")


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, strict=True)


def make(lr=0.1):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def by_hand(steps, scale=1):
    model, optimizer = make()
    batches = list(LOADER) * 10
    for inputs, targets in batches[:steps]:
        optimizer.zero_grad()
        (mse_loss(model(inputs), targets) * scale).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("limits", "steps", "epochs"),
    [
        ({"max_epochs": 2}, 6, 2),
        ({"max_steps": 1}, 1, 0),
        ({"max_steps": 5}, 5, 1),
        ({"max_steps": 6}, 6, 2),
        ({"max_steps": 5, "max_epochs": 1}, 3, 1),
        ({"max_steps": 2, "max_epochs": 9}, 2, 0),
    ],
)
def test_limits_are_exact(limits, steps, epochs):
    model, optimizer = make()
    result = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer).train(model, **limits)
    assert (result.steps, result.epochs, result.stopped) == (steps, epochs, False)
    for value, other in zip(model.parameters(), by_hand(steps).parameters(), strict=True):
        assert torch.equal(value, other)
        assert torch.equal(value.grad, other.grad)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_loader_without_a_length():
    model, optimizer = make()
    evaluator = TorchEvaluator.from_loader(DataLoader(Stream(), batch_size=4), mse_loss, optimizer)
    result = evaluator.train(model, max_steps=5)
    assert (result.steps, result.epochs) == (5, 1)
    assert torch.equal(model.weight, by_hand(5).weight)


def test_hooks():
    model, optimizer = make()
    hooks = Recorder()
    TorchEvaluator.from_loader(LOADER, mse_loss, optimizer).train(model, hooks, max_epochs=1)
    assert hooks.calls == ["loss", "before", "after"] * 3
    assert torch.equal(hooks.batches[2][0], X[8:])
    assert torch.equal(model.weight, by_hand(3, scale=2).weight)


@pytest.mark.parametrize(("interval", "rate"), [("epoch", 0.25), ("step", 0.5**7)])
def test_scheduler_interval(interval, rate):
    model, optimizer = make(lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    evaluator = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, scheduler, scheduler_interval=interval)
    evaluator.train(model, max_steps=7)
    assert optimizer.param_groups[0]["lr"] == rate


def test_a_scheduler_that_watches_the_loss():
    model, optimizer = make(lr=0.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=0)
    expected = sum(mse_loss(model(inputs), targets).item() for inputs, targets in LOADER) / 3
    TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, [scheduler]).train(model, max_epochs=1)
    assert scheduler.best == pytest.approx(expected)


def test_several_optimizers():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()]
    TorchEvaluator.from_loader(LOADER, mse_loss, optimizers).train(model, max_steps=4)
    assert torch.equal(model.weight, by_hand(4).weight)
    assert torch.equal(model.bias, by_hand(4).bias)


def test_modes():
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))
    model.eval()
    model[1].train()
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(module.training))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluator = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, eval_loader=LOADER, metric=mse_loss)
    evaluator.train(model, max_steps=1)
    mean = model[1].running_mean.clone()
    evaluator.evaluate(model)
    handle.remove()
    assert seen == [True, False, False, False]
    assert torch.equal(model[1].running_mean, mean)
    assert [module.training for module in model.modules()] == [False, False, True]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, a, b):
        return self.layer(a - b)


def test_two_inputs():
    torch.manual_seed(0)
    pair = Pair()
    loader = DataLoader(TensorDataset(2 * X, X, Y), batch_size=4)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1, momentum=0.9)
    evaluator = TorchEvaluator.from_loader(loader, mse_loss, optimizer)
    evaluator.train(pair, max_steps=3)
    torch.testing.assert_close(pair.layer.weight, by_hand(3).weight)
    first, second = evaluator.dummy_input
    assert torch.equal(first, 2 * X[:4])
    assert torch.equal(second, X[:4])


class Labelled(nn.Module):
    """Computes its own loss, like a Transformers model."""

    def __init__(self, answer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.answer = answer

    def forward(self, inputs, labels):
        outputs = self.layer(inputs)
        return self.answer(loss=mse_loss(outputs, labels), logits=outputs)


@pytest.mark.parametrize("answer", [SimpleNamespace, dict])
def test_a_mapping_whose_model_knows_the_loss(answer):
    model = Labelled(answer)
    batches = [{"inputs": inputs, "labels": targets} for inputs, targets in LOADER]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    evaluator = TorchEvaluator.from_loader(batches, None, optimizer)
    assert evaluator.train(model, max_epochs=2).epochs == 2
    assert torch.equal(model.layer.weight, by_hand(6).weight)
    assert list(evaluator.dummy_input) == ["inputs", "labels"]


def test_a_mapping_with_a_loss_function_gets_the_batch_as_targets():
    model = Labelled(SimpleNamespace)
    batches = [{"inputs": inputs, "labels": targets} for inputs, targets in LOADER]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    TorchEvaluator.from_loader(
        batches, lambda outputs, batch: mse_loss(outputs.logits, batch["labels"]), optimizer
    ).train(model, max_steps=2)
    assert torch.equal(model.layer.weight, by_hand(2).weight)


def test_looking_at_the_first_batch_does_not_disturb_a_seeded_run():
    _, optimizer = make()
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert TorchEvaluator.from_loader(loader, mse_loss, optimizer).dummy_input.shape == (4, 3)
    assert torch.equal(torch.rand(1), expected)


def test_a_given_dummy_input_is_kept():
    _, optimizer = make()
    assert TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, dummy_input=Y).dummy_input is Y


def test_batches_are_moved_to_the_device():
    model = nn.Linear(3, 1, device="meta")
    seen = []

    def probe(outputs, targets):
        seen.append(targets.device.type)
        return outputs.sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for device in (None, "meta"):
        evaluator = TorchEvaluator.from_loader(LOADER, probe, optimizer, device=device)
        with pytest.raises(RuntimeError, match="meta"):  # a meta tensor has no value to read
            evaluator.train(model, max_steps=1)
    assert seen == ["meta", "meta"]
    assert evaluator.dummy_input.device.type == "meta"


def test_evaluation_weighs_samples_not_batches():
    model, optimizer = make()
    evaluator = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, eval_loader=LOADER, metric=mse_loss)
    assert evaluator.evaluate(model) == pytest.approx(mse_loss(model(X), Y).item(), rel=1e-6)


def test_accuracy_is_the_default_metric():
    torch.manual_seed(1)
    model = nn.Linear(3, 4)
    classes = torch.arange(10) % 4
    loader = DataLoader(TensorDataset(X, classes), batch_size=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluator = TorchEvaluator.from_loader(loader, cross_entropy, optimizer, eval_loader=loader)
    right = sum(int(row.argmax() == label) for row, label in zip(model(X), classes, strict=True))
    assert evaluator.evaluate(model) == pytest.approx(right / 10)


def test_an_evaluating_func_of_the_user():
    model, optimizer = make()
    evaluator = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, evaluating_func=lambda model: 0.5)
    assert evaluator.evaluate(model) == 0.5
    assert TorchEvaluator.from_loader(LOADER, mse_loss, optimizer).evaluate(model) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_step_and_spoils_nothing(value):
    model, optimizer = make()
    inputs = X.clone()
    inputs[9] = value
    loader = DataLoader(TensorDataset(inputs, Y), batch_size=4)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step 3\."):
        TorchEvaluator.from_loader(loader, mse_loss, optimizer).train(model, max_epochs=1)
    assert torch.equal(model.weight, by_hand(2).weight)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("loader", "loss_fn", "message"),
    [
        ([], mse_loss, "train_loader: it gave no batch"),
        ([X], mse_loss, "data loader: a batch is a Tensor: inputs and targets cannot be told apart"),
        ([[X]], mse_loss, "data loader: a batch is a list of 1:"),
        (LOADER, lambda outputs, targets: (outputs - targets) ** 2, r"loss_fn: the loss is a tensor of shape \(4, 1\)"),
        (LOADER, lambda outputs, targets: 0.5, "loss_fn: the loss is a float"),
        (LOADER, None, "the model: the loss is a NoneType.* Give a loss_fn"),
    ],
)
def test_what_cannot_be_trained(loader, loss_fn, message):
    model, optimizer = make()
    with pytest.raises(TrainingError, match=message):
        TorchEvaluator.from_loader(loader, loss_fn, optimizer).train(model, max_epochs=1)
    assert torch.equal(model.weight, by_hand(0).weight)


def test_a_limit_is_needed():
    model, optimizer = make()
    with pytest.raises(InvalidValueError, match="neither max_steps nor max_epochs"):
        TorchEvaluator.from_loader(LOADER, mse_loss, optimizer).train(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train_loader": iter(LOADER)}, InvalidValueError, "train_loader: .* once an epoch"),
        ({"train_loader": 3}, InvalidValueError, "train_loader: the int cannot"),
        ({"eval_loader": iter(LOADER)}, InvalidValueError, "eval_loader: "),
        ({"scheduler_interval": "batch"}, InvalidValueError, "scheduler_interval: 'batch' .*'epoch', 'step'"),
        ({"eval_loader": LOADER, "evaluating_func": lambda model: 1}, ConflictError, "both given"),
        ({"metric": mse_loss}, ConflictError, "metric is given without eval_loader"),
        ({"loss_fn": "mse"}, InvalidValueError, "loss_fn: the str 'mse' cannot be called"),
        ({"loss_fn": lambda outputs: 0}, TrainingError, r"loss_fn .*called as loss_fn\(outputs, targets\)"),
        ({"eval_loader": LOADER, "metric": 3}, InvalidValueError, "metric: the int 3 cannot be called"),
    ],
)
def test_wrong_options(options, error, message):
    _, optimizer = make()
    with pytest.raises(error, match=message):
        TorchEvaluator.from_loader(**{"train_loader": LOADER, "loss_fn": mse_loss, "optimizers": optimizer, **options})


@pytest.mark.parametrize(
    ("loader", "message"),
    [(LOADER, r"metric: accuracy needs .*metric\(outputs, targets\)"), ([], "eval_loader: it gave no sample")],
)
def test_what_cannot_be_evaluated(loader, message):
    model, optimizer = make()
    evaluator = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, eval_loader=loader)
    with pytest.raises(TrainingError, match=message):
        evaluator.evaluate(model)


@pytest.mark.parametrize(("limits", "steps", "epochs"), [({"max_epochs": 2}, 4, 2), ({"max_steps": 3}, 3, 1)])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_and_clipping(limits, steps, epochs, clip):
    model = hand_written.Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hooks = hand_written.Hooks(model)
    evaluator = TorchEvaluator.from_loader(hand_written.loader(), mse_loss, optimizer, accumulate=2, clip_norm=clip)
    result = evaluator.train(model, hooks, **limits)
    assert (result.steps, result.epochs) == (steps, epochs)
    _, expected, seen = hand_written.by_hand(steps=steps, accumulate=2, hooks=True, clip=clip)
    hand_written.assert_agrees(hooks, seen)
    hand_written.assert_same(model, expected)
    if clip is not None:
        norms = [torch.cat([g.flatten() for g in gradients]).norm().item() for gradients in hooks.gradients]
        assert norms == pytest.approx([clip] * steps, rel=1e-4)


def test_schedulers_step_once_for_each_accumulated_step():
    model, optimizer = make(lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    evaluator = TorchEvaluator.from_loader(
        LOADER, mse_loss, optimizer, scheduler, scheduler_interval="step", accumulate=2
    )
    evaluator.train(model, max_epochs=2)
    assert optimizer.param_groups[0]["lr"] == 0.5**4


def test_a_loader_without_a_length_accumulates():
    model, optimizer = make()
    stream = DataLoader(Stream(), batch_size=4)
    result = TorchEvaluator.from_loader(stream, mse_loss, optimizer, accumulate=2).train(model, max_epochs=2)
    assert (result.steps, result.epochs) == (4, 2)


def test_autocast():
    model, optimizer = make()
    kinds = []

    def loss(outputs, targets):
        kinds.append(outputs.dtype)
        return mse_loss(outputs, targets)

    evaluator = TorchEvaluator.from_loader(
        LOADER, loss, optimizer, autocast=torch.bfloat16, eval_loader=LOADER, metric=loss
    )
    evaluator.train(model, max_steps=3)
    assert kinds == [torch.bfloat16] * 3
    expected, by_user = make()
    for inputs, targets in LOADER:
        by_user.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = mse_loss(expected(inputs), targets)
        value.backward()
        by_user.step()
    assert torch.equal(model.weight, expected.weight)
    assert not torch.equal(model.weight, by_hand(3).weight)
    evaluator.evaluate(model)
    assert kinds[3:] == [torch.float32] * 3


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_averaged_weights_are_those_of_pytorch(decay):
    model, optimizer = make()
    TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, ema_decay=decay).train(model, max_steps=5)
    expected, by_user = make()
    averaged = AveragedModel(expected, avg_fn=get_ema_avg_fn(decay))
    for inputs, targets in (list(LOADER) * 2)[:5]:
        by_user.zero_grad()
        mse_loss(expected(inputs), targets).backward()
        by_user.step()
        averaged.update_parameters(expected)
    for value, other in zip(model.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)


def test_the_average_is_what_is_evaluated_while_training_goes_on():
    model, optimizer = make()
    values, weights = [], []

    class Looking(Recorder):
        def loss(self, loss, batch):
            if self.calls:
                before = model.weight.detach().clone()
                values.append(evaluator.evaluate(model))
                assert torch.equal(model.weight, before)
            self.calls.append("loss")
            weights.append(model.weight.detach().clone())
            return loss

    evaluator = TorchEvaluator.from_loader(
        LOADER, mse_loss, optimizer, ema_decay=0.5, evaluating_func=lambda model: model.weight[0, 0].item()
    )
    evaluator.train(model, Looking(), max_steps=3)
    first, second = weights[1][0, 0].item(), weights[2][0, 0].item()
    assert values == pytest.approx([first, 0.5 * first + 0.5 * second])
    assert evaluator.evaluate(model) == model.weight[0, 0].item()


def test_a_failed_training_leaves_the_weights_as_they_were_last():
    model, optimizer = make()

    class Failing(Recorder):
        def after_step(self):
            super().after_step()
            if self.calls.count("after") == 3:
                raise ZeroDivisionError

        def loss(self, loss, batch):
            return loss

    evaluator = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, ema_decay=0.9)
    with pytest.raises(ZeroDivisionError):
        evaluator.train(model, Failing(), max_steps=9)
    assert torch.equal(model.weight, by_hand(3).weight)
    assert torch.equal(evaluator.dummy_input, X[:4])
    evaluator.train(model, max_steps=1)


def test_averages_of_a_model_that_is_wrapped():
    model, optimizer = make()
    evaluator = TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, ema_decay=0.5)
    pruner = ADMMPruner(
        model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], evaluator, training_steps=2, iterations=2
    )
    pruner.compress(max_steps=2)
    assert pruner.unwrap_model(bake=True).weight.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate: 0 is no number of batches"),
        ({"accumulate": True}, "accumulate: True"),
        ({"autocast": torch.float16}, "autocast: torch.float16 cannot be trained in"),
        ({"clip_norm": -1.0}, r"clip_norm: -1\.0 is no length"),
        ({"ema_decay": 1.0}, r"ema_decay: 1\.0 is no share"),
    ],
)
def test_settings_outside_their_range(options, message):
    _, optimizer = make()
    with pytest.raises(InvalidValueError, match=message):
        TorchEvaluator.from_loader(LOADER, mse_loss, optimizer, **options)
