"""Training with Transformers: an evaluator around a ``Trainer``, and a callback for one's own call of ``train``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any, final

import torch
from torch.nn import Module

from tersor.errors import CheckpointError, InvalidValueError, TrainingError
from tersor.extras import require
from tersor.storage import replacing_file
from tersor.training.batches import length_of
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
from tersor.training.functions import described, number_of
from tersor.training.prepared import take_back_forward, unprepared
from tersor.training.resuming import load_compressed, state_of_compressed
from tersor.training.steps import CountedSteps, bare_optimizer

require("training with Transformers", "tersor[transformers]", "transformers", "accelerate")
from transformers import TrainerCallback  # noqa: E402 - what it needs is checked first
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: E402

_METRICS = ("eval_default", "eval_accuracy")
_FILE = "tersor.pt"


class _Following(TrainerCallback):
    """Takes hooks along while a trainer trains.

    Steps are seen by the step hooks of the optimizer itself: gradients are then accumulated and clipped, and a step
    that a gradient scaler leaves out is none.
    """

    def __init__(self, hooks: TrainingHooks, max_epochs: int | None = None) -> None:
        self.steps = CountedSteps(None, hooks)
        self._max_epochs = max_epochs
        self._epochs = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the steps of the optimizer."""
        self._epochs = 0
        self.steps.follow(bare_optimizer(kwargs["optimizer"]))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the limit where the trainer cannot know it, because its data has no length."""
        self._epochs += 1
        if self._epochs == self._max_epochs:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the optimizer as it was."""
        self.steps.leave()


@final
class CompressionCallback(_Following):
    """Compresses while ``trainer.train`` trains: for those who call it themselves, not ``compressor.compress()``.

    It starts the compressors when the training begins, tells them of each step of the optimizer, and finishes them at
    the end. A callback does not see the loss. Compressors that add to it (all distillers, some pruners) therefore need
    the trainer, whose ``compute_loss`` is watched while it trains.

    Beside each checkpoint of the trainer's it keeps ``tersor.pt``, what the compressors know by then and the simulated
    model: make model and compressors as before, and ``trainer.train(resume_from_checkpoint=True)`` goes on with all.

    After an error the compressors stay unfinished. A trainer tells its callbacks of no error, so what one leaves behind
    elsewhere than in a compressor or a training step (in loading data, or in any step where no trainer is given) is
    taken back by :meth:`leave`, or when the next training begins.

    Args:
        compressor: any of those fused on the model. It needs no evaluator.
        trainer: that this callback is added to.

    Raises:
        TrainingError: when training begins: the loss is needed and there is no trainer; the model is another one; or
            the trainer shards parameters.
        CheckpointError: when it is resumed from a checkpoint without ``tersor.pt``.

    Example:
        >>> from tersor.pruning import LevelPruner  # doctest: +SKIP
        >>> pruner = LevelPruner(trainer.model, config_list)  # doctest: +SKIP
        >>> trainer.add_callback(CompressionCallback(pruner, trainer))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(self, compressor: CompressorLike, trainer: Any = None) -> None:
        super().__init__(_Guarded(compressor, self.leave))
        if trainer is not None:
            check_trainer(trainer)
        self._compressor = compressor
        self._trainer = trainer
        self._own: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the compressors."""
        self.leave()
        model, compressor = kwargs["model"], self._compressor
        if not any(module is compressor.model for module in model.modules()):
            raise TrainingError(
                f"it works on a {type(compressor.model).__name__} that is no part of the model that is trained.",
                where="compressor",
                remedy="Make the compressor on trainer.model.",
            )
        if self._trainer is not None:
            check_trainable(self._trainer)
            self._watch(self._trainer)
        elif compressor.changes_loss:
            raise TrainingError(
                "a compressor adds to the loss, which a callback does not see.",
                where="CompressionCallback",
                remedy="Give it the trainer too: CompressionCallback(compressor, trainer).",
            )
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step:
            load_compressed(compressor, self._saved(args, state.global_step))
        else:
            compressor.start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the compressors know, with the simulated model, beside what the trainer keeps."""
        if state.is_world_process_zero:
            with replacing_file(_checkpoint(args.output_dir, state.global_step) / _FILE) as temporary:
                torch.save(state_of_compressed(self._compressor), temporary)

    def _saved(self, args: Any, step: int) -> Any:
        """What was kept at this step."""
        given = args.resume_from_checkpoint
        places = [_checkpoint(args.output_dir, step), *([Path(given)] if isinstance(given, (str, Path)) else [])]
        for place in places:
            if (place / _FILE).exists():
                return torch.load(place / _FILE, weights_only=True)
        raise CheckpointError(
            f"training goes on from step {step}, and what the compressors knew then is not there",
            where=str(places[0] / _FILE),
            remedy="Add this callback from the first step on, and resume from a checkpoint in the output_dir.",
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish them, on the model's own ``forward``: not the one in half precision that the accelerator put there."""
        self.leave()
        take_back_forward(kwargs["model"])
        self._compressor.finish()

    def leave(self) -> None:
        """Let go of the trainer and its optimizer."""
        self.steps.leave()
        if self._own:
            for name in ("compute_loss", "training_step"):
                vars(self._trainer).pop(name, None)
            vars(self._trainer).update({name: own for name, own in self._own.items() if own is not None})
            self._own = {}

    def _watch(self, trainer: Any) -> None:
        """See its losses, and be gone after an error."""
        self._own = {name: vars(trainer).get(name) for name in ("compute_loss", "training_step")}
        trainer.compute_loss = watched_loss(trainer, self.steps)
        trainer.training_step = _or_else(trainer.training_step, self.leave)


def _checkpoint(folder: str, step: int) -> Path:
    """Where a trainer keeps its checkpoint of a step."""
    return Path(folder) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


class _Guarded:
    """Hooks after whose errors nothing is left behind."""

    def __init__(self, hooks: TrainingHooks, leave: Callable[[], None]) -> None:
        self.loss = _or_else(hooks.loss, leave)
        self.before_step = _or_else(hooks.before_step, leave)
        self.after_step = _or_else(hooks.after_step, leave)


def _or_else(call: Callable[..., Any], leave: Callable[[], None]) -> Callable[..., Any]:
    """The `call`, with `leave` before an error goes on."""

    @functools.wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except BaseException:
            leave()
            raise

    return guarded


@final
class TransformersEvaluator(Evaluator):
    """Trains the model of a ready ``transformers.Trainer``.

    The compressor is made on ``trainer.model``. The trainer's arguments decide on all but the length: batch size,
    accumulation, precision, clipping, learning rates. Of an optimizer that the trainer makes itself, each training has
    a new one; one that it was given goes on. Without any limit the trainer's own arguments hold.

    Args:
        trainer: the trainer; its arguments, callbacks and all else are as before when the training is over.
        dummy_input: inputs that the model can be run on (a tensor, a tuple of arguments, a dict of them).
        metric: the key in what ``trainer.evaluate()`` gives by which models are compared; by default
            ``"eval_default"``, or else ``"eval_accuracy"``.

    Raises:
        InvalidValueError: what is given is no trainer.

    Example:
        >>> import tempfile, torch
        >>> from transformers import Trainer, TrainingArguments
        >>> class Line(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def forward(self, x, labels):
        ...         return {"loss": torch.nn.functional.mse_loss(self.layer(x), labels)}
        >>> data = [{"x": [value / 8], "labels": [3 * value / 8]} for value in range(-8, 8)]
        >>> arguments = TrainingArguments(
        ...     tempfile.mkdtemp(), per_device_train_batch_size=16, use_cpu=True, report_to=[], disable_tqdm=True
        ... )
        >>> line = Line()
        >>> optimizer = torch.optim.SGD(line.parameters(), lr=0.5)
        >>> constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        >>> trainer = Trainer(line, arguments, train_dataset=data, optimizers=(optimizer, constant))
        >>> result = TransformersEvaluator(trainer).train(line, max_steps=20)  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> result.steps, result.epochs, round(line.layer.weight.item(), 2)
        (20, 20, 3.0)
    """

    def __init__(self, trainer: Any, dummy_input: Any = None, *, metric: str | None = None) -> None:
        check_trainer(trainer)
        self.trainer = trainer
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
        """Train `model` in place; see `Evaluator.train`.

        Raises:
            InvalidValueError: a limit is not a positive int.
            TrainingError: the trainer has another model, or makes it anew, or shards parameters; or its data has no
                length and only `max_epochs` is given.
        """
        check_limits(max_steps, max_epochs)
        trainer = self.trainer
        self._check_model(model)
        check_trainable(trainer)
        following = _Following(NoHooks() if hooks is None else hooks, max_epochs)
        # What the trainer makes for one training is not kept: an optimizer of its own, and prepared ones of the user's.
        made = ("optimizer", "lr_scheduler", "_created_lr_scheduler", "model_wrapped", "is_in_train", "compute_loss")
        loaders = trainer.accelerator.gradient_state.dataloader_references
        begun = perf_counter()
        with (
            modes_kept(model),
            unprepared(trainer.accelerator, model),
            attributes_kept(trainer, *made),
            attributes_kept(trainer.args, "max_steps", "num_train_epochs"),
            attributes_kept(trainer.callback_handler, "callbacks", "optimizer", "lr_scheduler", "train_dataloader"),
        ):
            length = self._limit(max_steps, max_epochs)
            trainer.callback_handler.callbacks = [*trainer.callback_handler.callbacks, following]
            trainer.compute_loss = watched_loss(trainer, following.steps)
            try:
                trainer.train()
            finally:
                following.steps.leave()
                trainer.accelerator.gradient_state.dataloader_references = loaders  # a trainer ends before its loader
        epochs = None if length is None else following.steps.count // self._steps_of(length)
        return TrainingResult(following.steps.count, epochs, perf_counter() - begun, stopped=False)

    def _limit(self, max_steps: int | None, max_epochs: int | None) -> int | None:
        """Set the trainer's limits, of which steps would overrule epochs; the number of batches, where it is known."""
        args = self.trainer.args
        with torch.random.fork_rng(devices=[]):  # to make a loader draws a seed for its sampler
            length = length_of(self.trainer.get_train_dataloader())
        if length is None and max_steps is None and max_epochs is not None:
            raise TrainingError(
                "its length is unknown, so the trainer cannot plan by epochs.",
                where="train_dataset",
                remedy="Give max_steps too: training ends with whichever comes first.",
            )
        if max_epochs is not None and length is not None:
            steps = self._steps_of(length) * max_epochs
            max_steps = None if max_steps is None or max_steps >= steps else max_steps
        if max_steps is not None:
            args.max_steps = max_steps
        elif max_epochs is not None:
            args.max_steps, args.num_train_epochs = -1, max_epochs
        return length

    def _steps_of(self, batches: int) -> int:
        return max(1, math.ceil(batches / self.trainer.args.gradient_accumulation_steps))

    def evaluate(self, model: Module) -> float | None:
        """The metric in what ``trainer.evaluate()`` gives, or None where the trainer has no ``eval_dataset``.

        Raises:
            TrainingError: the trainer has another model, or there is no number under the metric's key.
        """
        self._check_model(model)
        if self.trainer.eval_dataset is None:
            return None
        with modes_kept(model), unprepared(self.trainer.accelerator, model):
            results: Mapping[str, Any] = self.trainer.evaluate()
        wanted = _METRICS if self.metric is None else (self.metric, f"eval_{self.metric}")
        for name in wanted:
            value = number_of(results.get(name))
            if value is not None:
                return value
        raise TrainingError(
            f"there is no number under {' or '.join(map(repr, wanted))} in what trainer.evaluate() gives.",
            where="metric",
            legal=tuple(repr(name) for name in results),
            remedy="Give the trainer a compute_metrics, or name another key: TransformersEvaluator(..., metric=...).",
        )

    def _check_model(self, model: Module) -> None:
        if model is not self.trainer.model:
            raise TrainingError(
                f"it trains a {type(self.trainer.model).__name__} that is not the {type(model).__name__} given.",
                where="trainer",
                remedy="Make the compressor on trainer.model, or set trainer.model to the model.",
            )

    @property
    def dummy_input(self) -> Any:
        """What was given."""
        return self._dummy_input


def watched_loss(trainer: Any, steps: CountedSteps) -> Callable[..., Any]:
    """The trainer's ``compute_loss``, whose loss goes through hooks where it is trained on.

    A loss that is a mean over all batches of a step, as models with ``num_items_in_batch`` give it, is only a share of
    one; what is added to it must be such a share too.
    """
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def watched(model: Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = {**inputs}  # the trainer takes labels out of the inputs
        result = compute_loss(model, inputs, *args, **kwargs)
        if not torch.is_grad_enabled():
            return result
        items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        share = trainer.current_gradient_accumulation_steps if _is_share(trainer, items) else 1
        own = result[0] if isinstance(result, tuple) else result
        loss = steps.loss(own, batch) if share == 1 else steps.loss(own * share, batch) / share
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    return watched


def _is_share(trainer: Any, items: Any) -> bool:
    """Whether a loss is already divided by the number of batches of its step, so that the trainer will not do it."""
    told = getattr(trainer, "loss_is_scaled_for_ga", None)
    if told is not None:
        return bool(told)
    return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None


def check_trainer(trainer: Any) -> None:
    """Refuse what is no trainer.

    Raises:
        InvalidValueError: naming it.
    """
    if not all(callable(getattr(trainer, name, None)) for name in ("train", "evaluate", "compute_loss")):
        raise InvalidValueError(
            f"{described(trainer)} is no trainer.", where="trainer", legal=("a transformers.Trainer",)
        )


def check_trainable(trainer: Any) -> None:
    """Refuse a trainer whose parameters are not whole, or not those of the compressor.

    Raises:
        TrainingError: saying what, and what to do instead.
    """
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise TrainingError(
            "it shards or flattens parameters, and masks and scales need them whole.",
            where="trainer",
            remedy="Train without fsdp and deepspeed in its arguments, or with DeepspeedTorchEvaluator.",
        )
    if trainer.model_init is not None:
        raise TrainingError(
            "it has a model_init and makes its model anew for each training.",
            where="trainer",
            remedy="Make the trainer of a model instead.",
        )
