"""The user's own training and evaluating functions."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from tersor.errors import InvalidValueError, TrainingError
from tersor.training import TorchEvaluator, TrainingResult

X = torch.linspace(-1, 1, 24).reshape(8, 3)
Y = X.sum(dim=1, keepdim=True)


class Recorder:
    """Hooks that write down when they are called and what the weight is then."""

    def __init__(self, model=None, scale=1.0):
        self.calls = []
        self.weights = []
        self.batches = []
        self.scale = scale
        self._model = model

    def loss(self, loss, batch):
        self.calls.append("loss")
        self.batches.append(batch)
        return loss * self.scale

    def before_step(self):
        self._note("before")

    def after_step(self):
        self._note("after")

    def _note(self, name):
        self.calls.append(name)
        if self._model is not None:
            self.weights.append(self._model.weight.detach().clone())


def make(lr=0.1, **options):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=lr, **options)


def step(batch, model):
    return mse_loss(model(batch[0]), batch[1])


def loop(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs, total=30):
    for _ in range(total):
        optimizer.zero_grad()
        training_step((X, Y), model).backward()
        optimizer.step()
        if lr_scheduler is not None:
            lr_scheduler.step()


def by_hand(steps, scale=1.0, **options):
    model, optimizer = make(**options)
    for _ in range(steps):
        optimizer.zero_grad()
        (mse_loss(model(X), Y) * scale).backward()
        optimizer.step()
    return model


def assert_same(model, expected):
    for value, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other)


def assert_no_hook(optimizer):
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("max_steps", "steps", "stopped"), [(1, 1, True), (7, 7, True), (30, 30, False), (99, 30, False)]
)
def test_steps_are_exact(max_steps, steps, stopped):
    model, optimizer = make(momentum=0.9)
    result = TorchEvaluator(loop, optimizer, step).train(model, max_steps=max_steps)
    assert (result.steps, result.epochs, result.stopped) == (steps, None, stopped)
    assert result.seconds > 0
    assert_same(model, by_hand(steps, momentum=0.9))
    assert_no_hook(optimizer)


def test_without_a_limit_the_function_decides():
    model, optimizer = make()
    assert TorchEvaluator(loop, optimizer, step).train(model).steps == 30


def test_hooks_are_called_in_order_and_change_the_loss():
    model, optimizer = make()
    hooks = Recorder(model, scale=2.0)
    start = model.weight.detach().clone()
    TorchEvaluator(loop, optimizer, step).train(model, hooks, max_steps=3)
    assert hooks.calls == ["loss", "before", "after"] * 3
    assert hooks.batches[0][0] is X
    assert torch.equal(hooks.weights[0], start)
    assert torch.equal(hooks.weights[5], model.weight)
    assert_same(model, by_hand(3, scale=2.0))


def test_a_loop_without_training_step_ends_before_the_next_optimizer_step():
    model, optimizer = make()

    def own(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        while True:
            optimizer.zero_grad()
            mse_loss(model(X), Y).backward()
            optimizer.step()

    hooks = Recorder()
    result = TorchEvaluator(own, optimizer, step).train(model, hooks, max_steps=4)
    assert (result.steps, result.stopped) == (4, True)
    assert hooks.calls == ["before", "after"] * 4
    assert_same(model, by_hand(4))


def test_what_follows_the_last_step_still_runs():
    model, optimizer = make(lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    TorchEvaluator(loop, optimizer, step, scheduler).train(model, max_steps=3)
    assert scheduler.last_epoch == 3
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_accumulation_counts_optimizer_steps():
    model, optimizer = make()

    def accumulating(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        while True:
            optimizer.zero_grad()
            for part in (slice(0, 4), slice(4, 8)):
                (training_step((X[part], Y[part]), model) / 2).backward()
            optimizer.step()

    hooks = Recorder()
    assert TorchEvaluator(accumulating, optimizer, step).train(model, hooks, max_steps=3).steps == 3
    assert hooks.calls == ["loss", "loss", "before", "after"] * 3
    for value, other in zip(model.parameters(), by_hand(3).parameters(), strict=True):
        torch.testing.assert_close(value, other)


def test_several_optimizers_count_by_the_first_and_all_make_their_last_step():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)]

    def both(model, given, training_step, lr_schedulers, max_steps, max_epochs):
        assert given is optimizers
        while True:
            model.zero_grad()
            training_step((X, Y), model).backward()
            for optimizer in given:
                optimizer.step()

    hooks = Recorder()
    assert TorchEvaluator(both, optimizers, step).train(model, hooks, max_steps=5).steps == 5
    assert hooks.calls.count("after") == 5
    assert_same(model, by_hand(5))
    for optimizer in optimizers:
        assert_no_hook(optimizer)


def test_an_optimizer_with_a_closure():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closing(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        def closure():
            optimizer.zero_grad()
            loss = training_step((X, Y), model)
            loss.backward()
            return loss

        while True:
            optimizer.step(closure)

    hooks = Recorder()
    assert TorchEvaluator(closing, optimizer, step).train(model, hooks, max_steps=2).steps == 2
    assert hooks.calls == ["loss", "before", "loss", "after"] * 2  # gradients are complete after the closure


def test_a_training_within_a_training_ends_only_itself():
    model, optimizer = make()
    inner_model, inner_optimizer = make()
    inner = TorchEvaluator(loop, inner_optimizer, step)
    results = []

    class Nested(Recorder):
        def after_step(self):
            results.append(inner.train(inner_model, max_steps=2))

    outer = TorchEvaluator(loop, optimizer, step).train(model, Nested(), max_steps=3)
    assert [result.steps for result in results] == [2, 2, 2]
    assert outer.steps == 3


Named = namedtuple("Named", ["loss", "extra"])


@pytest.mark.parametrize(
    "form", [lambda loss: (loss, "x"), lambda loss: Named(loss, "x"), lambda loss: {"loss": loss, "extra": "x"}]
)
def test_the_loss_is_replaced_inside_its_container(form):
    model, optimizer = make()
    given, received = [], []

    def forming(batch, model, *, factor):
        given.append(form(step(batch, model) * factor))
        return given[-1]

    def once(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        received.append(training_step((X, Y), model, factor=3))

    TorchEvaluator(once, optimizer, forming).train(model, Recorder(scale=2.0))
    expected = step((X, Y), model)
    own, new = given[0], received[0]
    assert type(new) is type(own)
    first, rest = (new["loss"], new["extra"]) if isinstance(new, dict) else new
    kept = own["loss"] if isinstance(own, dict) else own[0]
    assert torch.equal(first, expected * 3 * 2)
    assert torch.equal(kept, expected * 3)
    assert rest == "x"


def test_without_hooks_the_result_is_passed_through():
    model, optimizer = make()
    result = {"loss": torch.zeros((), requires_grad=True)}
    received = []

    def once(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        received.append(training_step((X, Y), model))

    TorchEvaluator(once, optimizer, lambda batch, model: result).train(model)
    assert received[0] is result


def test_modes_are_restored():
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)).eval()
    model[1].train()
    flags = [module.training for module in model.modules()]

    def training(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        model.train()
        loop(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs)

    def evaluating(model):
        model.eval()
        return 0.5

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    evaluator = TorchEvaluator(training, optimizer, step, evaluating_func=evaluating)
    evaluator.train(model, max_steps=1)
    assert [module.training for module in model.modules()] == flags
    assert evaluator.evaluate(model) == 0.5
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize("result", [0.25, {"default": 0.25, "f1": 1}, torch.tensor(0.25), torch.tensor([0.25])])
def test_evaluate(result):
    model, optimizer = make()
    value = TorchEvaluator(loop, optimizer, step, evaluating_func=lambda model: result).evaluate(model)
    assert isinstance(value, float)
    assert value == 0.25


@pytest.mark.parametrize("function", [None, lambda model: None])
def test_there_may_be_no_metric(function):
    model, optimizer = make()
    assert TorchEvaluator(loop, optimizer, step, evaluating_func=function).evaluate(model) is None


def test_dummy_input_is_what_was_given():
    _, optimizer = make()
    assert TorchEvaluator(loop, optimizer, step, dummy_input=X).dummy_input is X
    assert TorchEvaluator(loop, optimizer, step).dummy_input is None


@pytest.mark.parametrize("limit", [0, -3, 2.0, True, "5", float("nan")])
@pytest.mark.parametrize("name", ["max_steps", "max_epochs"])
def test_limits_are_positive_ints(name, limit):
    model, optimizer = make()
    with pytest.raises(InvalidValueError, match=f"{name}: .*positive int"):
        TorchEvaluator(loop, optimizer, step).train(model, **{name: limit})
    assert_same(model, by_hand(0))


def test_errors_of_the_user_come_through_and_leave_no_hook():
    model, optimizer = make()
    error = KeyError("mine")

    def failing(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        loop(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs, total=2)
        raise error

    with pytest.raises(KeyError) as caught:
        TorchEvaluator(failing, optimizer, step).train(model, Recorder(), max_steps=5)
    assert caught.value is error
    assert_no_hook(optimizer)


def test_a_loop_that_swallows_errors_changes_no_more_parameters():
    model, optimizer = make()

    def careless(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        for _ in range(10):
            try:
                optimizer.zero_grad()
                training_step((X, Y), model).backward()
                optimizer.step()
            except Exception:  # noqa: BLE001
                continue

    assert TorchEvaluator(careless, optimizer, step).train(model, max_steps=4).steps == 4
    assert_same(model, by_hand(4))


def test_errors_of_a_hook_come_through_and_leave_no_hook():
    model, optimizer = make()

    class Failing(Recorder):
        def after_step(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TorchEvaluator(loop, optimizer, step).train(model, Failing(), max_steps=5)
    assert_no_hook(optimizer)


@pytest.mark.parametrize("result", [None, "loss", 0.5, (), (None, 1), {"losses": 1}, [torch.zeros(())]])
def test_a_training_step_without_a_loss(result):
    model, optimizer = make()

    def bad_step(batch, model):
        return result

    with pytest.raises(
        TrainingError, match=r"training_step .*bad_step: it returned .* Legal: the loss tensor"
    ) as caught:
        TorchEvaluator(loop, optimizer, bad_step).train(model, max_steps=1)
    assert repr(result) in str(caught.value)
    assert_no_hook(optimizer)


@pytest.mark.parametrize("result", [[0.5], "high", {"accuracy": 0.5}, torch.zeros(2), 1j])
def test_an_evaluation_without_a_metric(result):
    model, optimizer = make()

    def bad_metric(model):
        return result

    with pytest.raises(TrainingError, match=r"evaluating_func .*bad_metric: it returned .* Legal: a number"):
        TorchEvaluator(loop, optimizer, step, evaluating_func=bad_metric).evaluate(model)


def test_an_optimizer_of_another_model():
    model, optimizer = make()
    other = copy.deepcopy(model)
    with pytest.raises(TrainingError, match="optimizers: none of their 2 parameters belongs to this Linear"):
        TorchEvaluator(loop, optimizer, step).train(other, max_steps=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"training_func": lambda model: None}, TrainingError, r"training_func .*lambda.*: it takes \(model\), but"),
        ({"training_func": lambda a, b, c, d, e, f, g: 0}, TrainingError, "missing a required argument: 'g'"),
        ({"training_step": lambda batch: None}, TrainingError, r"training_step .*called as .*\(batch, model, ...\)"),
        ({"evaluating_func": lambda: 0.5}, TrainingError, r"evaluating_func .*too many positional"),
        ({"training_func": 3}, InvalidValueError, "training_func: the int 3 cannot be called"),
        ({"optimizers": torch.optim.SGD}, InvalidValueError, "optimizers: .*SGD.*is no optimizer"),
        ({"optimizers": []}, InvalidValueError, "optimizers: there is none"),
        ({"lr_schedulers": 0.1}, InvalidValueError, "lr_schedulers: the float 0.1 is no scheduler"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"training_func": loop, "optimizers": make()[1], "training_step": step}
    with pytest.raises(error, match=message):
        TorchEvaluator(**{**arguments, **change})


def test_a_result_is_frozen():
    with pytest.raises(AttributeError):
        TrainingResult(steps=1, epochs=None, seconds=0.1, stopped=False).steps = 2  # type: ignore[misc]
