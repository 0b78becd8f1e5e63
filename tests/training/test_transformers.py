"""Transformers: the evaluator and the callback agree with the loop written by hand."""

import functools
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from tersor.errors import CheckpointError, InvalidValueError, TrainingError
from tersor.pruning import ADMMPruner, LevelPruner
from tests.torchvision_stub import import_torchvision
from tests.training.hand_written import (
    LIMITS,
    SIZE,
    Hooks,
    Net,
    X,
    Y,
    assert_agrees,
    assert_no_hook,
    assert_same,
    by_hand,
    fused,
    loader,
)

if find_spec("torchvision"):
    import_torchvision()  # the trainer wants it where it is installed
pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import Trainer, TrainingArguments

from tersor.training.transformers import CompressionCallback, TransformersEvaluator

CONFIG = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
ROWS = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class Model(nn.Module):
    """Returns its loss, as the models of Transformers do."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, labels=None):
        outputs = self.net(x)
        return {"loss": mse_loss(outputs, labels), "logits": outputs}


class Scaled(Model):
    """Takes part in the scaling of the loss: the sum over a batch by the items of all batches of a step."""

    def forward(self, x, labels=None, num_items_in_batch=None, **kwargs):
        outputs = self.net(x)
        total = mse_loss(outputs, labels, reduction="sum")
        return {
            "loss": total / (labels.numel() if num_items_in_batch is None else num_items_in_batch),
            "logits": outputs,
        }


class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(ROWS)


def plain_sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class Unshuffled(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(tmp_path, model=None, *, rows=ROWS, own=True, metrics=None, eval_rows=None, kind=Unshuffled, **options):
    model = Model() if model is None else model
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    options = {"max_grad_norm": 0.0, "per_device_train_batch_size": SIZE, **quiet, **options}
    args = TrainingArguments(str(tmp_path), **options)
    optimizers = plain_sgd(model) if own else (None, None)
    return kind(model, args, train_dataset=rows, eval_dataset=eval_rows, optimizers=optimizers, compute_metrics=metrics)


def assert_untouched(ready, optimizer):
    assert ready.accelerator.gradient_state.active_dataloader is None
    assert "compute_loss" not in vars(ready)
    assert "training_step" not in vars(ready)
    assert ready.optimizer is optimizer
    if optimizer is not None:
        assert_no_hook(optimizer)
    assert (ready.args.max_steps, ready.args.num_train_epochs) == (-1, 3.0)
    assert all("Following" not in type(callback).__name__ for callback in ready.callback_handler.callbacks)


@pytest.mark.parametrize(("limits", "steps", "epochs"), LIMITS)
def test_limits_are_exact(tmp_path, limits, steps, epochs):
    ready = trainer(tmp_path)
    optimizer = ready.optimizer
    result = TransformersEvaluator(ready).train(ready.model, **limits)
    assert (result.steps, result.epochs, result.stopped) == (steps, epochs, False)
    assert_same(ready.model.net, by_hand(steps=steps)[1])
    assert_untouched(ready, optimizer)


def test_the_user_s_optimizer_goes_on(tmp_path):
    ready = trainer(tmp_path)
    evaluator = TransformersEvaluator(ready)
    for _ in range(2):
        evaluator.train(ready.model, max_steps=3)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        by_hand(steps=3, model=model, optimizer=optimizer)
    assert_same(ready.model.net, model)


class Seen(Model):
    """Remembers in which type it computed."""

    dtypes = ()

    def forward(self, x, labels=None):
        outputs = self.net(x)
        self.dtypes = (*self.dtypes, outputs.dtype)
        return {"loss": mse_loss(outputs.float(), labels), "logits": outputs}


def test_half_precision_ends_with_the_training(tmp_path):
    ready = trainer(tmp_path, Seen(), bf16=True, eval_rows=ROWS)
    evaluator = TransformersEvaluator(ready, metric="loss")
    evaluator.evaluate(ready.model)
    own = set(vars(ready.model)) | {"dtypes"}
    evaluator.train(ready.model, max_steps=3)
    evaluator.train(ready.model, max_steps=1)
    evaluator.evaluate(ready.model)
    assert len(ready.model.dtypes) > 5
    assert set(ready.model.dtypes) == {torch.bfloat16}
    assert set(vars(ready.model)) == own
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & own
    ready.model(X, Y)
    assert ready.model.dtypes[-1] == torch.float32


@pytest.mark.parametrize("patched", [False, True])
def test_the_callback_ends_half_precision(tmp_path, patched):
    ready = trainer(tmp_path, Seen(), bf16=True)
    if patched:
        own = ready.model.forward
        ready.model.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    forward = vars(ready.model).get("forward")
    pruner = LevelPruner(ready.model, CONFIG)
    ready.add_callback(CompressionCallback(pruner, ready))
    for _ in range(2):
        ready.model.dtypes = ()
        ready.train()
        assert set(ready.model.dtypes) == {torch.bfloat16}
        assert vars(ready.model).get("forward") is forward
        ready.model(X, Y)
        assert ready.model.dtypes[-1] == torch.float32
    pruner.unwrap_model()


def test_an_optimizer_of_the_trainer_s_is_made_anew(tmp_path):
    ready = trainer(tmp_path, own=False, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd")
    evaluator = TransformersEvaluator(ready)
    for _ in range(2):
        assert evaluator.train(ready.model, max_steps=3).steps == 3
        assert_untouched(ready, None)
    assert ready.lr_scheduler is None
    model = Net()
    for _ in range(2):
        by_hand(steps=3, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert_same(ready.model.net, model)


def test_without_a_limit_the_arguments_decide(tmp_path):
    ready = trainer(tmp_path)
    assert TransformersEvaluator(ready).train(ready.model).steps == 9


def test_data_without_a_length(tmp_path):
    ready = trainer(tmp_path, rows=Rows(), kind=Trainer, max_steps=99)
    evaluator = TransformersEvaluator(ready)
    assert evaluator.train(ready.model, max_steps=2).steps == 2
    assert evaluator.train(ready.model, max_steps=50, max_epochs=2).steps == 6
    with pytest.raises(TrainingError, match="train_dataset: its length is unknown"):
        evaluator.train(ready.model, max_epochs=2)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_hooks_see_what_the_loop_by_hand_sees(tmp_path, accumulate, clip):
    ready = trainer(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=clip)
    hooks = Hooks(ready.model.net)
    result = TransformersEvaluator(ready).train(ready.model, hooks, max_epochs=2)
    made, model, seen = by_hand(epochs=2, accumulate=accumulate, hooks=True, clip=clip or None)
    assert result.steps == made
    assert result.epochs == 2
    assert_agrees(hooks, seen)
    assert_same(ready.model.net, model, rtol=1e-6, atol=1e-6)
    assert torch.equal(hooks.batches[1]["labels"], Y[SIZE : 2 * SIZE])


def test_what_is_added_to_a_loss_over_the_whole_step_has_the_weight_of_its_share(tmp_path):
    class Adding(Hooks):
        def loss(self, loss, batch):
            return loss + model.net[0].weight.square().sum()

    model = Scaled()
    ready = trainer(tmp_path, model, gradient_accumulation_steps=2)
    assert ready.model_accepts_loss_kwargs
    TransformersEvaluator(ready).train(model, Adding(model.net, 1.0), max_steps=1)
    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    (mse_loss(plain(X[:8]), Y[:8]) + plain[0].weight.square().sum()).backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.clamp_(-0.5, 0.5)
    assert_same(model.net, plain, rtol=1e-6, atol=1e-6)


def test_evaluation_during_training_is_no_training(tmp_path):
    ready = trainer(tmp_path, eval_strategy="steps", eval_steps=1, eval_rows=ROWS)
    hooks = Hooks(ready.model.net, scale=1.0)
    TransformersEvaluator(ready).train(ready.model, hooks, max_steps=3)
    assert hooks.calls.count("loss") == 3


@pytest.mark.parametrize("moment", ["loss", "before_step", "after_step"])
def test_an_error_leaves_everything_as_it_was(tmp_path, moment):
    ready = trainer(tmp_path)
    optimizer = ready.optimizer
    ready.model.eval()
    hooks = Hooks(ready.model.net)

    def fail(*_):
        raise ZeroDivisionError

    setattr(hooks, moment, fail)
    evaluator = TransformersEvaluator(ready)
    with pytest.raises(ZeroDivisionError):
        evaluator.train(ready.model, hooks, max_steps=3)
    assert_untouched(ready, optimizer)
    assert not ready.is_in_train
    assert not any(part.training for part in ready.model.modules())
    assert evaluator.train(ready.model, max_steps=3).steps == 3


def test_evaluation(tmp_path):
    def metrics(prediction):
        return {"accuracy": float(abs(prediction.predictions - prediction.label_ids).mean())}

    ready = trainer(tmp_path, eval_rows=ROWS, metrics=metrics)
    wanted = (ready.model.net(X) - Y).abs().mean().item()
    assert TransformersEvaluator(ready, X).evaluate(ready.model) == pytest.approx(wanted, rel=1e-5)
    loss = mse_loss(ready.model.net(X), Y).item()
    assert TransformersEvaluator(ready, metric="eval_loss").evaluate(ready.model) == pytest.approx(loss, rel=1e-5)
    assert TransformersEvaluator(ready, metric="loss").evaluate(ready.model) == pytest.approx(loss, rel=1e-5)
    assert TransformersEvaluator(ready, X).dummy_input is X
    with pytest.raises(TrainingError, match=r"metric: there is no number under 'f1' or 'eval_f1'.* Legal: 'eval_loss'"):
        TransformersEvaluator(ready, metric="f1").evaluate(ready.model)
    assert TransformersEvaluator(trainer(tmp_path, ready.model)).evaluate(ready.model) is None


def by_user(pruner, model, steps):
    """The bare loop."""
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1, momentum=0.9)
    pruner.start()
    for x, y in (list(loader()) * 9)[:steps]:
        optimizer.zero_grad()
        pruner.loss(model(x, y)["loss"], {"x": x, "labels": y}).backward()
        pruner.before_step()
        optimizer.step()
        pruner.after_step()
    pruner.finish()
    return pruner.unwrap_model(bake=True)


def test_the_callback_compresses_while_the_user_trains(tmp_path):
    ready = trainer(tmp_path, max_steps=7)
    pruner = ADMMPruner(ready.model, CONFIG, training_steps=2)
    callback = CompressionCallback(pruner, ready)
    ready.add_callback(callback)
    optimizer = ready.optimizer
    ready.train()
    assert callback.steps.count == 7
    assert "compute_loss" not in vars(ready)
    assert "training_step" not in vars(ready)
    assert_no_hook(optimizer)
    model = Model()
    expected = by_user(ADMMPruner(model, CONFIG, training_steps=2), model, 7)
    assert_same(pruner.unwrap_model(bake=True), expected)
    assert int((ready.model.net[0].weight == 0).sum()) == 6


def test_a_training_goes_on_from_a_checkpoint(tmp_path, unwrapped):
    def train(folder, *, resume=None, **options):
        ready = trainer(folder, max_steps=9, save_strategy="steps", save_steps=4, **options)
        quantizer, last = fused(ready.model, {"x": X[:1], "labels": Y[:1]})
        ready.add_callback(CompressionCallback(last, ready))
        ready.train(resume_from_checkpoint=resume)
        scales = {name: said["weight"]["scale"] for name, said in quantizer.get_calibration_config().items()}
        return {**last.unwrap_model().state_dict(), **scales}

    class Killed(Unshuffled):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 5:
                raise ZeroDivisionError
            return super().training_step(*args, **kwargs)

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "killed", kind=Killed)
    found = train(tmp_path / "killed", resume=True)
    expected = train(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    (tmp_path / "killed" / "checkpoint-4" / "tersor.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4.tersor.pt: training goes on from step 4"):
        train(tmp_path / "killed", resume=str(tmp_path / "killed" / "checkpoint-4"))


def test_a_callback_alone_serves_those_who_leave_the_loss_as_it_is(tmp_path):
    ready = trainer(tmp_path, max_steps=2)
    pruner = LevelPruner(ready.model, CONFIG)
    ready.add_callback(CompressionCallback(pruner))
    ready.train()
    assert int((ready.model.net[0].weight == 0).sum()) == 6
    pruner.unwrap_model()
    adding = ADMMPruner(ready.model, CONFIG, training_steps=2)
    other = trainer(tmp_path, ready.model, max_steps=2)
    other.add_callback(CompressionCallback(adding))
    with pytest.raises(TrainingError, match=r"a callback does not see. Give it the trainer too"):
        other.train()
    adding.unwrap_model()


@pytest.mark.parametrize(
    ("moment", "given"),
    [("on_loss", True), *((of, given) for of in ("on_gradients", "on_step", "forward") for given in (True, False))],
)
def test_the_callback_is_gone_after_an_error(tmp_path, moment, given):
    ready = trainer(tmp_path, max_steps=2)
    pruner = LevelPruner(ready.model, CONFIG)
    callback = CompressionCallback(pruner, ready if given else None)
    ready.add_callback(callback)
    optimizer = ready.optimizer

    def fail(*_, **__):
        raise ZeroDivisionError

    setattr(ready.model.net if moment == "forward" else pruner, moment, fail)
    with pytest.raises(ZeroDivisionError):
        ready.train()
    if moment == "forward" and not given:
        callback.leave()
    assert "compute_loss" not in vars(ready)
    assert "training_step" not in vars(ready)
    assert_no_hook(optimizer)
    pruner.unwrap_model()


def test_what_is_refused(tmp_path):
    ready = trainer(tmp_path)
    with pytest.raises(TrainingError, match="trainer: it trains a Model that is not the Net given"):
        TransformersEvaluator(ready).train(Net(), max_steps=1)
    with pytest.raises(InvalidValueError, match="trainer: the int 3 is no trainer"):
        TransformersEvaluator(3)
    with pytest.raises(InvalidValueError, match="max_epochs: 0 is no number"):
        TransformersEvaluator(ready).train(ready.model, max_epochs=0)
    ready.model_init = Model
    with pytest.raises(TrainingError, match="model_init"):
        TransformersEvaluator(ready).train(ready.model, max_steps=1)
    ready.model_init = None
    ready.is_fsdp_enabled = True
    with pytest.raises(TrainingError, match="trainer: it shards or flattens parameters"):
        TransformersEvaluator(ready).train(ready.model, max_steps=1)
    ready.is_fsdp_enabled = False
    stranger = Model()
    pruner = LevelPruner(stranger, CONFIG)
    ready.add_callback(CompressionCallback(pruner, ready))
    with pytest.raises(TrainingError, match="compressor: it works on a Model that is no part"):
        ready.train()
    pruner.unwrap_model()
