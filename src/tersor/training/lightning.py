"""Training with Lightning: an evaluator around a ``Trainer``, and a callback for those who call ``fit`` themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, final

from torch.nn import Module

from tersor.errors import InvalidValueError, MissingExtraError, TrainingError
from tersor.extras import missing
from tersor.training.evaluator import (
    CompressorLike,
    Evaluator,
    NoHooks,
    TrainingHooks,
    TrainingResult,
    attributes_kept,
    check_limits,
    modes_kept,
)
from tersor.training.function_evaluator import check_ownership
from tersor.training.functions import described, number_of
from tersor.training.loops import device_of
from tersor.training.steps import CountedSteps

if missing("lightning") and missing("pytorch_lightning"):
    raise MissingExtraError(
        "not installed: lightning",
        where="training with Lightning",
        remedy="Install it: pip install 'tersor[lightning]'.",
    )
if TYPE_CHECKING or not missing("lightning"):
    from lightning.pytorch import Callback
else:  # the same code under its older name; a trainer of either takes callbacks of both
    from pytorch_lightning import Callback

_PACKAGES = ("lightning", "pytorch_lightning")
_KEY = "tersor"
_SHARDING = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class _Following(Callback):
    """Takes hooks along while a trainer fits, and is gone from the module and its optimizer afterwards.

    Lightning runs ``training_step`` and ``backward`` within the optimizer's step, as its closure, and clips gradients
    there too; so the step hooks of the optimizer, which see the end of the closure, see what is really applied.

    Attributes:
        epochs: whole passes over the data.
    """

    def __init__(self, hooks: TrainingHooks) -> None:
        self.epochs = 0
        self._steps = CountedSteps(None, hooks)
        self._module: Module | None = None
        self._own: dict[str, Any] = {}

    @property
    def count(self) -> int:
        """The steps of the optimizer."""
        return self._steps.count

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See the loss of each ``training_step``."""
        check_trainable(trainer, pl_module)
        self._module = pl_module
        self._own = {name: of for name, of in vars(pl_module).items() if name == "training_step"}
        pl_module.training_step = self._steps.watch(pl_module.training_step, may_skip=True)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """See the steps of the optimizer."""
        check_ownership(pl_module, trainer.optimizers)  # without any, Lightning takes one of no parameters
        self._steps.follow(trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the epochs that come to their end."""
        self.epochs += bool(trainer.is_last_batch)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave module and optimizer as they were."""
        self.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Likewise."""
        self.leave()

    def leave(self) -> None:
        """Let go of the module and its optimizer."""
        self._steps.leave()
        if self._module is not None:
            vars(self._module).pop("training_step", None)
            vars(self._module).update(self._own)
            self._module = None


@final
class CompressionCallback(_Following):
    """Compresses while ``trainer.fit`` trains: for those who call it themselves, in place of ``compressor.compress()``.

    It starts the compressors when the fit starts, takes the loss of each ``training_step`` through them, tells them of
    each step of the optimizer, and finishes them when the fit has ended. After an error they stay unfinished, and the
    module is free of hooks. Checkpoints hold what the compressors know by then: make module and compressors as before,
    and ``trainer.fit(module, ckpt_path=...)`` goes on with both.

    Args:
        compressor: any of those fused on the module, or on a part of it. It needs no evaluator.

    Raises:
        TrainingError: when the fit starts: the module optimizes manually, its model is another one, or the strategy
            shards parameters or trains in copies of this process.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from tersor.pruning import LevelPruner, LinearPruner
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(4, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return self.layer(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> line = Line()
        >>> pruner = LevelPruner(line, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
        >>> schedule = LinearPruner(pruner, interval_steps=2, total_times=2)
        >>> trainer = Trainer(max_steps=4, callbacks=[CompressionCallback(schedule)], barebones=True, accelerator="cpu")
        >>> trainer.fit(line, torch.utils.data.DataLoader(torch.ones(8, 4), batch_size=2))
        >>> int((line.layer.weight == 0).sum())
        2
        >>> _ = pruner.unwrap_model()
    """

    def __init__(self, compressor: CompressorLike) -> None:
        super().__init__(compressor)
        self._compressor = compressor
        self._goes_on = False
        self._loads: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap the module as it was before Lightning reads its state from a checkpoint."""
        self._goes_on = False
        self._loads = {name: own for name, own in vars(pl_module).items() if name == "on_load_checkpoint"}
        pl_module.on_load_checkpoint = partial(self._load, pl_module.on_load_checkpoint)

    def _load(self, own: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
        own(checkpoint)
        if _KEY in checkpoint:
            self._compressor.wrap_model()
            self._compressor.load_state_dict(checkpoint[_KEY])
            self._goes_on = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        vars(pl_module).pop("on_load_checkpoint", None)
        vars(pl_module).update(self._loads)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Likewise."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what the compressors know beside what Lightning keeps."""
        checkpoint[_KEY] = self._compressor.state_dict()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the compressors, or go on with them."""
        check_contains(pl_module, self._compressor.model)
        super().on_fit_start(trainer, pl_module)
        if not self._goes_on:
            self._compressor.start()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish them."""
        super().on_fit_end(trainer, pl_module)
        self._compressor.finish()


@final
class LightningEvaluator(Evaluator):
    """Trains a ``LightningModule`` with a ready ``Trainer``.

    The module itself is the model that compressors are made on. Its optimizers are made by ``configure_optimizers`` for
    each training anew, as Lightning does with each ``fit``. The trainer goes on counting its epochs and steps; limits
    count from where it stands. Without any limit it trains for as long as it was made for.

    Manual optimization is refused: which of its losses, and which of its steps, would be the compressor's is for the
    user to say, by :meth:`Compressor.loss`, ``before_step`` and ``step`` within ``training_step``.

    Args:
        trainer: a ``Trainer`` of ``lightning`` or ``pytorch_lightning``. Its limits, callbacks and all else are as
            before when the training is over.
        data_module: a ``LightningDataModule``.
        dummy_input: inputs that the module can be run on (a tensor, a tuple of arguments, a dict of them).
        metric: what is logged in validation, or in test where there is no validation, and compares models. Where
            ``"default"`` is not logged and one other metric is, it is that one.

    Raises:
        InvalidValueError: what is given is no trainer, or no data module.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningDataModule, LightningModule, Trainer
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         inputs, targets = batch
        ...         return torch.nn.functional.mse_loss(self.layer(inputs), targets)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.5)
        >>> x = torch.linspace(-1, 1, 16).unsqueeze(1)
        >>> class Points(LightningDataModule):
        ...     def train_dataloader(self):
        ...         return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 3 * x), batch_size=16)
        >>> evaluator = LightningEvaluator(Trainer(barebones=True, accelerator="cpu"), Points())
        >>> line = Line()
        >>> result = evaluator.train(line, max_steps=20)
        >>> result.steps, result.epochs, round(line.layer.weight.item(), 2)
        (20, 20, 3.0)
    """

    def __init__(self, trainer: Any, data_module: Any, dummy_input: Any = None, *, metric: str = "default") -> None:
        if not (callable(getattr(trainer, "fit", None)) and hasattr(trainer, "fit_loop")):
            raise InvalidValueError(
                f"{described(trainer)} is no trainer.", where="trainer", legal=("a lightning.pytorch.Trainer",)
            )
        if not callable(getattr(data_module, "train_dataloader", None)):
            raise InvalidValueError(
                f"{described(data_module)} is no data module.",
                where="data_module",
                legal=("a LightningDataModule",),
                remedy="Of data sets make one by LightningDataModule.from_datasets(...).",
            )
        self.trainer = trainer
        self.data_module = data_module
        self.metric = metric
        self._dummy_input = dummy_input

    def train(
        self,
        model: Module,
        hooks: TrainingHooks | None = None,
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> TrainingResult:
        """Fit `model` in place; see `Evaluator.train`.

        Raises:
            InvalidValueError: a limit is not a positive int.
            TrainingError: the model is no LightningModule or optimizes manually, or the trainer's strategy shards
                parameters or trains in copies of this process.
        """
        check_limits(max_steps, max_epochs)
        check_trainable(self.trainer, model)
        following = _Following(NoHooks() if hooks is None else hooks)
        begun = perf_counter()
        with _left_as_it_was(self.trainer, model):
            self.trainer.callbacks = [following, *self.trainer.callbacks]
            self._limit(max_steps, max_epochs)
            try:
                self.trainer.fit(model, datamodule=self.data_module)
            finally:
                following.leave()
        return TrainingResult(following.count, following.epochs, perf_counter() - begun, stopped=False)

    def _limit(self, max_steps: int | None, max_epochs: int | None) -> None:
        """Set the trainer's limits, from where it stands by now; -1 is its word for none."""
        loop = self.trainer.fit_loop
        steps, epochs = max_steps, max_epochs
        if steps is None and epochs is None:
            steps, epochs = loop.max_steps, loop.max_epochs
        past = loop.epoch_progress.current.processed
        loop.epoch_loop.max_steps = -1 if steps in (None, -1) else self.trainer.global_step + steps
        if epochs is None:
            loop.max_epochs = None if steps in (None, -1) else -1
        else:
            loop.max_epochs = -1 if epochs == -1 else past + epochs

    def evaluate(self, model: Module) -> float | None:
        """What ``validation_step`` logs under the metric's name, or else ``test_step``; None where there is neither.

        Raises:
            TrainingError: no such number is logged.
        """
        check_module(model)
        ways = (
            ("validation_step", "val_dataloader", self.trainer.validate),
            ("test_step", "test_dataloader", self.trainer.test),
        )
        for step, loader, run in ways:
            if _is_own(model, step) and _is_own(self.data_module, loader):
                with _left_as_it_was(self.trainer, model):
                    results = run(model, datamodule=self.data_module, verbose=False)
                return self._pick({name: value for result in results for name, value in result.items()}, step)
        return None

    def _pick(self, logged: Mapping[str, Any], step: str) -> float:
        single = self.metric == "default" and "default" not in logged and len(logged) == 1
        value = number_of(next(iter(logged.values())) if single else logged.get(self.metric))
        if value is None:
            raise TrainingError(
                f"it logs no number as {self.metric!r}.",
                where=step,
                legal=tuple(repr(name) for name in logged),
                remedy="Log the number by which models are compared under that name, or name another: "
                "LightningEvaluator(..., metric=...).",
            )
        return value

    @property
    def dummy_input(self) -> Any:
        """What was given."""
        return self._dummy_input


def check_trainable(trainer: Any, module: Module) -> None:
    """Refuse what cannot be accompanied.

    Raises:
        TrainingError: saying what, and what to do instead.
    """
    check_module(module)
    where = type(module).__name__
    if not getattr(module, "automatic_optimization", True):
        raise TrainingError(
            "it optimizes manually, so it is not known which loss and which step are the compressor's.",
            where=where,
            remedy="Let Lightning optimize, or call compressor.start() before fit, loss(), before_step() and step() in "
            "training_step, and finish() after fit.",
        )
    strategy = type(trainer.strategy)
    if any(base.__name__ in _SHARDING for base in strategy.__mro__):
        raise TrainingError(
            "it shards or flattens parameters, and masks and scales need them whole.",
            where=strategy.__name__,
            remedy="Train with strategy='ddp', or with DeepspeedTorchEvaluator.",
        )
    if type(trainer.strategy.launcher).__name__ == "_MultiProcessingLauncher":
        raise TrainingError(
            "it trains in copies of this process, so nothing would come back to the compressor.",
            where=strategy.__name__,
            remedy="Use strategy='ddp', which starts the script itself several times.",
        )


def check_module(module: Module) -> None:
    """Refuse a model that is no ``LightningModule``, of either package.

    Raises:
        TrainingError: naming its type.
    """
    if not any(base.__name__ == "LightningModule" for base in type(module).__mro__):
        raise TrainingError(
            f"the model is a {type(module).__name__} and no LightningModule, so a trainer cannot fit it.",
            where="model",
            remedy="Make the compressor on the LightningModule; names in its config list then begin with the "
            "attribute under which it holds the network.",
        )


def check_contains(whole: Module, part: Module) -> None:
    """Refuse to train a model that a compressor does not work on.

    Raises:
        TrainingError: `part` is no module of `whole`.
    """
    if not any(module is part for module in whole.modules()):
        raise TrainingError(
            f"it works on a {type(part).__name__} that is no part of the {type(whole).__name__} that is trained.",
            where="compressor",
            remedy="Make the compressor on the very model that is trained.",
        )


@contextmanager
def _left_as_it_was(trainer: Any, module: Module) -> Iterator[None]:
    """Put back the trainer's limits and callbacks, the module's modes, its methods and its device."""
    loop, device = trainer.fit_loop, device_of(module)
    with (
        modes_kept(module),
        attributes_kept(module, "training_step"),
        attributes_kept(trainer, "callbacks"),
        attributes_kept(loop, "max_epochs", "min_epochs"),
        attributes_kept(loop.epoch_loop, "max_steps", "min_steps"),
    ):
        try:
            yield
        finally:
            module.to(device)  # a trainer leaves it on the CPU


def _is_own(thing: object, name: str) -> bool:
    """Whether a method is the user's, and not the empty one of Lightning."""
    if name in vars(thing):
        return True
    owner = next((base for base in type(thing).__mro__ if name in vars(base)), None)
    return owner is not None and owner.__module__.split(".")[0] not in _PACKAGES
