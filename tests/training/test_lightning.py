"""Lightning: the evaluator and the callback agree with the loop written by hand."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from tersor.errors import InvalidValueError, TrainingError
from tersor.pruning import ADMMPruner, AGPPruner, LevelPruner, TaylorPruner
from tests.torchvision_stub import import_torchvision
from tests.training.hand_written import (
    DATA,
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
    import_torchvision()  # torchmetrics, which Lightning imports, wants it where it is installed
pytest.importorskip("lightning", reason="lightning is not installed")
import lightning.pytorch as pl
import pytorch_lightning as older

from tersor.training.lightning import CompressionCallback, LightningEvaluator

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
CONFIG = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]


def module_of(package):
    class Module(package.LightningModule):
        def __init__(self, form=lambda loss: loss):
            super().__init__()
            self.net = Net()
            self.form = form
            self.optimizer = None

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return self.form(mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
            return self.optimizer

    class Data(package.LightningDataModule):
        def train_dataloader(self):
            return loader()

    return Module, Data


Module, Data = module_of(pl)


class ValidationData(Data):
    def val_dataloader(self):
        return loader()


class Validated(Module):
    def validation_step(self, batch, batch_idx):
        self.log("default", mse_loss(self.net(batch[0]), batch[1]), batch_size=len(batch[0]))


def trainer(package=pl, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "accelerator": "cpu",
    }
    return package.Trainer(**quiet, **options)


def assert_untouched(module):
    assert "training_step" not in vars(module)
    assert_no_hook(module.optimizer)


@pytest.mark.parametrize(("limits", "steps", "epochs"), LIMITS)
def test_limits_are_exact_and_count_from_where_the_trainer_stands(limits, steps, epochs):
    ready = trainer(max_epochs=7)
    evaluator, module = LightningEvaluator(ready, Data()), Module()
    result = evaluator.train(module, **limits)
    assert (result.steps, result.epochs, result.stopped) == (steps, epochs, False)
    assert_same(module.net, by_hand(steps=steps)[1])
    again = evaluator.train(module, **limits)
    assert (again.steps, again.epochs) == (steps, epochs)
    twice = by_hand(steps=steps, model=by_hand(steps=steps)[1])[1]
    assert_same(module.net, twice)
    assert (ready.max_epochs, ready.max_steps, ready.callbacks) == (7, -1, ready.callbacks)
    assert all("Following" not in type(callback).__name__ for callback in ready.callbacks)
    assert_untouched(module)


def test_without_a_limit_the_trainer_decides():
    evaluator = LightningEvaluator(trainer(max_steps=4), Data())
    assert [evaluator.train(Module()).steps for _ in range(2)] == [4, 4]


@pytest.mark.parametrize("form", [lambda loss: loss, lambda loss: {"loss": loss, "other": 1}])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_see_what_the_loop_by_hand_sees(form, clip, accumulate):
    module = Module(form)
    hooks = Hooks(module.net)
    ready = trainer(gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    result = LightningEvaluator(ready, Data()).train(module, hooks, max_epochs=2)
    made, model, seen = by_hand(epochs=2, accumulate=accumulate, rest="always", hooks=True, clip=clip)
    assert result.steps == made
    assert_agrees(hooks, seen)
    assert_same(module.net, model, rtol=1e-6, atol=1e-6)
    assert torch.equal(hooks.batches[1][0], X[SIZE : 2 * SIZE])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_is_skipped():
    module = Module()
    own = module.training_step
    module.training_step = lambda batch, batch_idx: None if batch_idx == 1 else own(batch, batch_idx)
    hooks = Hooks(module.net, scale=1.0)
    hooks.before_step = lambda: hooks.calls.append("before")  # there are no gradients to look at
    given = module.training_step
    LightningEvaluator(trainer(), Data()).train(module, hooks, max_epochs=1)
    assert hooks.calls == ["loss", "before", "after", "before", "after", "loss", "before", "after"]
    assert module.training_step is given


@pytest.mark.parametrize("moment", ["loss", "before_step", "after_step"])
def test_an_error_leaves_everything_as_it_was(moment):
    module = Module().eval()
    ready = trainer(max_epochs=7)
    callbacks = list(ready.callbacks)
    hooks = Hooks(module.net)

    def fail(*_):
        raise ZeroDivisionError

    setattr(hooks, moment, fail)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="eval mode"):
        LightningEvaluator(ready, Data()).train(module, hooks, max_steps=3)
    assert_untouched(module)
    assert ready.callbacks == callbacks
    assert (ready.max_epochs, ready.max_steps) == (7, -1)
    assert not any(part.training for part in module.modules())
    module.train()
    assert LightningEvaluator(ready, Data()).train(module, max_steps=3).steps == 3


def test_evaluation():
    module = Validated().eval()
    evaluator = LightningEvaluator(trainer(), ValidationData(), dummy_input=X)
    assert evaluator.evaluate(module) == pytest.approx(mse_loss(module.net(X), Y).item(), rel=1e-6)
    assert not module.training
    assert evaluator.dummy_input is X
    with pytest.raises(TrainingError, match=r"validation_step: it logs no number as 'f1'\. Legal: 'default'"):
        LightningEvaluator(trainer(), ValidationData(), metric="f1").evaluate(module)
    assert LightningEvaluator(trainer(), Data()).evaluate(module) is None


def test_a_pruner_through_the_evaluator_and_through_the_loop_by_hand():
    module, plain = Module(), Module()
    evaluator = LightningEvaluator(trainer(), Data(), dummy_input=X)
    config = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]
    first = TaylorPruner(module, config, evaluator, training_steps=4)
    _, masks = first.compress()
    pruner = TaylorPruner(plain, config, training_steps=4)
    pruner.start()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for x, y in [*loader(), *loader()][:4]:
        optimizer.zero_grad()
        pruner.loss(mse_loss(plain.net(x), y), (x, y)).backward()
        pruner.before_step()
        optimizer.step()
        pruner.step()
    pruner.finish()
    for name, targets in pruner.result()[1].items():
        for target, mask in targets.items():
            assert torch.equal(mask, masks[name][target])
    first.unwrap_model()
    pruner.unwrap_model()


@pytest.mark.parametrize("packages", [(pl, pl), (older, older)])
def test_the_callback_compresses_while_the_user_fits(packages):
    module = module_of(packages[0])[0]()
    plain = copy.deepcopy(module)
    pruner = AGPPruner(ADMMPruner(module, CONFIG, training_steps=2), interval_steps=6, total_times=2)
    callback = CompressionCallback(pruner)
    ready = trainer(packages[1], max_steps=13, callbacks=[callback])
    ready.fit(module, loader())
    assert callback.count == 13
    assert_untouched(module)
    by_user = AGPPruner(ADMMPruner(plain, CONFIG, training_steps=2), interval_steps=6, total_times=2)
    optimizer = torch.optim.SGD(plain.net.parameters(), lr=0.1, momentum=0.9)
    by_user.start()
    for batch in (list(loader()) * 5)[:13]:
        optimizer.zero_grad()
        by_user.loss(mse_loss(plain.net(batch[0]), batch[1]), batch).backward()
        by_user.before_step()
        optimizer.step()
        by_user.after_step()
    by_user.finish()
    assert_same(module.net, plain.net)
    assert torch.equal(module.net[0].weight, plain.net[0].weight)
    assert int((module.net[0].weight == 0).sum()) == 6
    pruner.unwrap_model()
    by_user.unwrap_model()


class Stopped(pl.Callback):
    """Ends the process, so to say, in the step after a checkpoint."""

    def __init__(self, path, steps):
        self.path, self.steps = path, steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            raise ZeroDivisionError


@pytest.mark.parametrize("steps", [3, 6])
def test_a_fit_goes_on_from_a_checkpoint(tmp_path, unwrapped, steps):
    def fit(*callbacks, **where):
        module = Module()
        quantizer, last = fused(module, X[:1])
        trainer(max_steps=9, callbacks=[CompressionCallback(last), *callbacks]).fit(module, loader(), **where)
        assert_untouched(module)
        assert not {"on_load_checkpoint", "training_step"} & vars(module).keys()
        return module, quantizer.get_calibration_config(), last.unwrap_model()

    path = tmp_path / "fit.ckpt"
    with pytest.raises(ZeroDivisionError):
        fit(Stopped(path, steps))
    module, calibration, _ = fit(ckpt_path=path)
    whole, expected, _ = fit()
    assert torch.equal(calibration["net.0"]["weight"]["scale"], expected["net.0"]["weight"]["scale"])
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_the_callback_is_gone_after_an_error():
    module = Module()
    pruner = LevelPruner(module, CONFIG)
    pruner.on_step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer(max_steps=5, callbacks=[CompressionCallback(pruner)]).fit(module, loader())
    assert_untouched(module)
    pruner.unwrap_model()


def test_what_is_refused():
    class Manual(Module):
        automatic_optimization = False

    class Idle(Module):
        def configure_optimizers(self):
            return None

    evaluator = LightningEvaluator(trainer(), Data())
    with pytest.raises(TrainingError, match="Manual: it optimizes manually"):
        evaluator.train(Manual(), max_steps=1)
    with pytest.raises(TrainingError, match="a Net and no LightningModule"):
        evaluator.train(Net(), max_steps=1)
    with (
        pytest.raises(TrainingError, match="optimizers: none of their 0 parameters belongs to this Idle"),
        pytest.warns(UserWarning, match="will run with no optimizer"),
    ):
        evaluator.train(Idle(), max_steps=1)
    with pytest.raises(InvalidValueError, match="max_steps: 0 is no number"):
        evaluator.train(Module(), max_steps=0)
    with pytest.raises(InvalidValueError, match="trainer: the int 3 is no trainer"):
        LightningEvaluator(3, Data())
    with pytest.raises(InvalidValueError, match=r"data_module: .* is no data module"):
        LightningEvaluator(trainer(), DataLoader(DATA))
    stranger = Net()
    pruner = LevelPruner(stranger, CONFIG)
    with pytest.raises(TrainingError, match="compressor: it works on a Net that is no part of the Module"):
        trainer(max_steps=1, callbacks=[CompressionCallback(pruner)]).fit(Module(), loader())
    pruner.unwrap_model()


def test_strategies_that_shard_or_copy_are_refused():
    ready = trainer()

    class FSDPStrategy:
        launcher = None

    class Spawning:
        class _MultiProcessingLauncher:
            pass

        launcher = _MultiProcessingLauncher()

    from tersor.training.lightning import check_trainable

    class Holder:
        strategy = FSDPStrategy()

    with pytest.raises(TrainingError, match="FSDPStrategy: it shards or flattens"):
        check_trainable(Holder, Module())
    Holder.strategy = Spawning()
    with pytest.raises(TrainingError, match="in copies of this process"):
        check_trainable(Holder, Module())
    check_trainable(ready, Module())
