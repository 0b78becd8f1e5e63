"""Accelerate: the evaluator agrees with the loop written by hand."""

import os

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.testing.processes import in_two_processes, why_not_two
from tests.training.hand_written import (
    LIMITS,
    Hooks,
    Net,
    X,
    Y,
    assert_agrees,
    assert_no_hook,
    assert_same,
    by_hand,
    loader,
)

pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tersor.training.accelerate import AccelerateEvaluator


@pytest.fixture(autouse=True)
def own_state():
    """Settings of one accelerator hold for the whole process."""
    for turn in range(2):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if turn == 0:
            yield


def make(lr=0.1, model=None):
    model = Net() if model is None else model
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def accelerator(accumulate=1, **options):
    return Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **options)


def step(batch, model):
    return {"loss": mse_loss(model(batch[0]), batch[1])}


def own_loop(ready, batches):
    def training(model, optimizer, training_step, scheduler, max_steps, max_epochs):
        model.train()
        while True:
            for batch in batches:
                with ready.accumulate(model):
                    ready.backward(training_step(batch, model)["loss"])
                    if ready.sync_gradients:
                        ready.clip_grad_norm_(model.parameters(), 0.1)
                    optimizer.step()
                    if scheduler is not None:
                        scheduler.step()
                    optimizer.zero_grad()

    return training


def assert_untouched(ready, model, optimizer):
    assert (ready._models, ready._optimizers, ready._schedulers) == ([], [], [])
    assert ready.gradient_state.active_dataloader is None
    assert ready.gradient_state.sync_gradients
    assert ready.step == 0
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & vars(model).keys()
    assert_no_hook(optimizer)


@pytest.mark.parametrize(("limits", "steps", "epochs"), LIMITS)
def test_limits_are_exact(limits, steps, epochs):
    ready = accelerator()
    model, optimizer = make()
    result = AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizer).train(model, **limits)
    assert (result.steps, result.epochs, result.stopped) == (steps, epochs, False)
    assert_same(model, by_hand(steps=steps)[1])
    assert_untouched(ready, model, optimizer)


@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 3}, {"max_steps": 4}])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_hooks_see_what_the_loop_by_hand_sees(limits, clip):
    ready = accelerator(accumulate=2)
    model, optimizer = make()
    hooks = Hooks(model)
    evaluator = AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizer, clip_norm=clip)
    result = evaluator.train(model, hooks, **limits)
    wanted = {name.removeprefix("max_"): limit for name, limit in limits.items()}
    made, expected, seen = by_hand(**wanted, accumulate=2, rest="always", hooks=True, clip=clip)
    assert result.steps == made
    assert_agrees(hooks, seen)
    assert_same(model, expected, rtol=1e-6, atol=1e-6)
    assert_untouched(ready, model, optimizer)


def test_a_loop_of_the_user_s_that_would_never_end():
    ready = accelerator(accumulate=2)
    model, optimizer = make()
    scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
    batches = ready.prepare(loader())
    hooks = Hooks(model)
    evaluator = AccelerateEvaluator(ready, own_loop(ready, batches), optimizer, step, scheduler)
    result = evaluator.train(model, hooks, max_steps=3)
    assert (result.steps, result.epochs, result.stopped) == (3, None, True)
    seen = by_hand(steps=2, accumulate=2, rest="always", hooks=True, clip=0.1)[2]
    for own, other in zip(hooks.gradients[:2], seen.gradients, strict=True):
        for value, wanted in zip(own, other, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert_untouched(ready, model, optimizer)


def test_several_optimizers_and_a_list_stays_a_list():
    ready = accelerator()
    model = Net()
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()]
    hooks = Hooks(model)
    result = AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizers).train(model, hooks, max_steps=4)
    assert result.steps == hooks.calls.count("after") == 4
    assert_untouched(ready, model, optimizers[0])


@pytest.mark.parametrize(("interval", "rate"), [("epoch", 0.25), ("step", 0.5**4)])
def test_schedulers(interval, rate):
    ready = accelerator(accumulate=2)
    model, optimizer = make(lr=1.0)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    evaluator = AccelerateEvaluator.from_loader(
        ready, loader(), mse_loss, optimizer, scheduler, scheduler_interval=interval
    )
    assert evaluator.train(model, max_epochs=2).steps == 4
    assert optimizer.param_groups[0]["lr"] == rate


def test_bfloat16():
    ready = accelerator(mixed_precision="bf16")
    model, optimizer = make()
    AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizer).train(model, max_steps=3)
    expected, by_user = make()
    for x, y in loader():
        by_user.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = expected(x)
        mse_loss(outputs.float(), y).backward()
        by_user.step()
    assert_same(model, expected)
    assert_untouched(ready, model, optimizer)
    assert model(X).dtype == torch.float32


def test_steps_that_a_gradient_scaler_leaves_out_are_none():
    class Scaler(torch.amp.GradScaler):
        skipped = 0

        def _maybe_opt_step(self, optimizer, state, *args, **kwargs):
            if Scaler.skipped < 2:
                Scaler.skipped += 1
                return None
            return optimizer.step(*args, **kwargs)

    ready = accelerator()
    ready.scaler = Scaler("cpu", init_scale=8.0)
    model, optimizer = make()
    hooks = Hooks(model, scale=1.0)
    result = AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizer).train(model, hooks, max_epochs=1)
    assert result.steps == 1
    assert hooks.calls == ["loss", "loss", "loss", "before", "after"]
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize("moment", ["loss", "before_step", "after_step"])
def test_an_error_leaves_everything_as_it_was(moment):
    ready = accelerator(accumulate=2, mixed_precision="bf16")
    model, optimizer = make()
    model.eval()
    hooks = Hooks(model)

    def fail(*_):
        raise ZeroDivisionError

    setattr(hooks, moment, fail)
    evaluator = AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizer)
    with pytest.raises(ZeroDivisionError):
        evaluator.train(model, hooks, max_steps=3)
    assert_untouched(ready, model, optimizer)
    assert not any(part.training for part in model.modules())
    assert evaluator.train(model, max_steps=3).steps == 3


def test_evaluation_and_inputs():
    ready = accelerator()
    model, optimizer = make()
    evaluator = AccelerateEvaluator.from_loader(
        ready, loader(), mse_loss, optimizer, eval_loader=loader(), metric=mse_loss
    )
    assert evaluator.evaluate(model) == pytest.approx(mse_loss(model(X), Y).item(), rel=1e-6)
    assert torch.equal(evaluator.dummy_input, X[:4])
    assert ready.gradient_state.active_dataloader is None
    state = evaluator.state_dict()
    assert list(state) == ["optimizers", "lr_schedulers"]


def test_what_is_refused():
    ready = accelerator()
    model, optimizer = make()
    with pytest.raises(InvalidValueError, match="accelerator: the int 3 is no accelerator"):
        AccelerateEvaluator(3, own_loop(ready, []), optimizer, step)
    with pytest.raises(InvalidValueError, match="train_loader: the list cannot be prepared"):
        AccelerateEvaluator.from_loader(ready, [(X, Y)], mse_loss, optimizer)
    with pytest.raises(InvalidValueError, match=r"optimizers: .* is no optimizer"):
        AccelerateEvaluator(ready, own_loop(ready, []), 3, step)
    with pytest.raises(ConflictError, match="metric is given without eval_loader"):
        AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizer, metric=mse_loss)
    evaluator = AccelerateEvaluator.from_loader(ready, loader(), mse_loss, optimizer)
    with pytest.raises(TrainingError, match="none of their 4 parameters belongs to this Net"):
        evaluator.train(Net(), max_steps=1)
    from accelerate.utils import DistributedType

    ready.state.distributed_type = DistributedType.FSDP
    with pytest.raises(TrainingError, match="accelerator: FSDP shards parameters"):
        evaluator.train(model, max_steps=1)


@pytest.mark.skipif(why_not_two() is not None, reason=str(why_not_two()))
def test_two_processes_train_as_one_does_on_both_halves():
    def work(rank):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "ACCELERATE_USE_CPU": True}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}  # asked for, and not used: the group is there already
        os.environ.update({name: str(value) for name, value in place.items()})
        ready = accelerator()
        model, optimizer = make()
        scheduler = StepLR(optimizer, step_size=4, gamma=0.5)
        batches = DataLoader(TensorDataset(X[:8], Y[:8]), batch_size=2)
        hooks = Hooks(model)
        evaluator = AccelerateEvaluator.from_loader(
            ready, batches, mse_loss, optimizer, scheduler, scheduler_interval="step"
        )
        result = evaluator.train(model, hooks, max_epochs=2)
        assert ready.num_processes == 2
        told = torch.tensor([result.steps, result.epochs, optimizer.param_groups[0]["lr"]])
        return {**model.state_dict(), "told": told}

    model, optimizer = make()
    for number in range(4):
        part = slice(4 * (number % 2), 4 * (number % 2) + 4)
        optimizer.zero_grad()
        (2 * mse_loss(model(X[part]), Y[part])).backward()
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.5, 0.5)
        if number % 2:
            optimizer.param_groups[0]["lr"] *= 0.5
    for result in in_two_processes(work):
        assert result.pop("told").tolist() == pytest.approx([4, 2, 0.025])
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6)
