"""Training with Accelerate: mixed precision, accumulation and several processes around one's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any, NamedTuple, final

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from tersor.errors import InvalidValueError, TrainingError
from tersor.extras import require
from tersor.training.evaluator import (
    NoHooks,
    TrainingHooks,
    TrainingResult,
    attributes_kept,
    check_limits,
    modes_kept,
)
from tersor.training.function_evaluator import FunctionEvaluator, check_optimizers, check_ownership, evaluation_of
from tersor.training.functions import described
from tersor.training.loops import LoaderLoop, SchedulerInterval, finite, listed
from tersor.training.prepared import LEFT
from tersor.training.progress import TrainingProgress
from tersor.training.steps import CountedSteps, bare_optimizer

_SHARDING = ("DEEPSPEED", "FSDP", "TP", "MEGATRON_LM", "XLA")
"""The kinds of training in which parameters are cut, flattened or copied, by Accelerate's names."""


class Prepared(NamedTuple):
    """What ``accelerator.prepare`` made, as one thing or a list as it was given."""

    model: Any
    optimizers: Any
    lr_schedulers: Any


@final
class AccelerateEvaluator(FunctionEvaluator):
    """Trains with the user's own function and a ready ``accelerate.Accelerator``, or with a loop of ours.

    Model, optimizers and schedulers are given as they are. For each training they are prepared by
    ``accelerator.prepare``, and the function gets what came of that; afterwards they, and the accelerator, are as
    before. Compressors work on the model underneath, on each process alike. A step is one of the first optimizer: with
    ``accelerator.accumulate`` the one that is really made, with a gradient scaler one that is not left out.

    Args:
        accelerator: the accelerator. Its settings decide on precision, accumulation and devices.
        training_func: ``training_func(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)`` trains
            the prepared model, with ``accelerator.backward``, on a loader that is prepared. It must call the
            `training_step` and the optimizers that it is handed, and keep `max_epochs` itself.
        optimizers: one optimizer or a list.
        training_step: ``training_step(batch, model, *args, **kwargs)`` returns the loss tensor, a tuple that begins
            with it, or a dict with it under ``"loss"``.
        lr_schedulers: None, one scheduler or a list.
        dummy_input: inputs that the model can be run on.
        evaluating_func: ``evaluating_func(model)`` gets the model itself; see `TorchEvaluator`.
        progress: whether to show a bar on a terminal of the main process.

    Raises:
        MissingExtraError: Accelerate is not installed.
        InvalidValueError: an argument is no accelerator, optimizer, scheduler or function.
        TrainingError: a function does not take the arguments that it will get.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> model = torch.nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 16).unsqueeze(1)
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 3 * x), batch_size=8)
        >>> evaluator = AccelerateEvaluator.from_loader(
        ...     Accelerator(cpu=True, gradient_accumulation_steps=2),
        ...     loader,
        ...     torch.nn.functional.mse_loss,
        ...     torch.optim.SGD(model.parameters(), lr=0.5),
        ... )
        >>> result = evaluator.train(model, max_epochs=20)
        >>> result.steps, result.epochs, round(model.weight.item(), 2)
        (20, 20, 3.0)
    """

    def __init__(
        self,
        accelerator: Any,
        training_func: Callable[..., Any],
        optimizers: Optimizer | Sequence[Optimizer],
        training_step: Callable[..., Any],
        lr_schedulers: LRScheduler | Sequence[LRScheduler] | None = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[Module], Any] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        require("AccelerateEvaluator", "tersor[transformers]", "accelerate")
        if not all(callable(getattr(accelerator, name, None)) for name in ("prepare", "backward", "accumulate")):
            raise InvalidValueError(
                f"{described(accelerator)} is no accelerator.",
                where="accelerator",
                legal=("an accelerate.Accelerator",),
            )
        check_optimizers(optimizers, lr_schedulers)
        super().__init__(training_func, training_step, optimizers, lr_schedulers, dummy_input, evaluating_func)
        self.accelerator = accelerator
        self._progress = progress

    @classmethod
    def from_loader(
        cls,
        accelerator: Any,
        train_loader: Iterable[Any],
        loss_fn: Callable[..., Tensor] | None,
        optimizers: Optimizer | Sequence[Optimizer],
        lr_schedulers: LRScheduler | Sequence[LRScheduler] | None = None,
        *,
        dummy_input: Any = None,
        evaluating_func: Callable[[Module], Any] | None = None,
        eval_loader: Iterable[Any] | None = None,
        metric: Callable[..., float] | None = None,
        scheduler_interval: SchedulerInterval = "epoch",
        clip_norm: float | None = None,
        progress: bool = True,
    ) -> AccelerateEvaluator:
        """Train with the usual loop, in train mode, over a data loader; the accelerator prepares the loader.

        `max_steps` and `max_epochs` are both kept exactly, and one of them must be given. Batches are accumulated as
        the accelerator says; at the end of the loader a step is made of what there is, with each loss divided by the
        accelerator's number all the same.

        Args:
            accelerator: the accelerator.
            train_loader: a ``DataLoader`` of batches as for ``TorchEvaluator.from_loader``.
            loss_fn: ``loss_fn(outputs, targets)``; None where the model returns its loss: ``model(**batch).loss``.
            optimizers: one optimizer or a list; all of them step together.
            lr_schedulers: None, one scheduler or a list. Those that step by step are prepared too, so that they advance
                by one for each process, as Accelerate means it.
            dummy_input: inputs that the model can be run on; by default those of the first batch.
            evaluating_func: as above; not together with `eval_loader`.
            eval_loader: batches to evaluate on, all of them on each process.
            metric: ``metric(outputs, targets)`` returns the mean over one batch; accuracy by default.
            scheduler_interval: ``"epoch"`` or ``"step"``: after what a scheduler steps.
            clip_norm: the longest that the gradient of all parameters together may be; compressors see it clipped.
            progress: whether to show a bar on a terminal of the main process.

        Raises:
            InvalidValueError: no ``DataLoader``, or a setting outside its range.
            ConflictError: two ways to evaluate at once, or a metric without data.
        """
        require("AccelerateEvaluator", "tersor[transformers]", "accelerate")
        evaluating = evaluation_of(evaluating_func, eval_loader, metric, accelerator.device)
        loop = _AcceleratedLoop(
            accelerator, train_loader, loss_fn, scheduler_interval=scheduler_interval, clip_norm=clip_norm
        )
        step = loop.training_step
        return cls(accelerator, loop, optimizers, step, lr_schedulers, dummy_input, evaluating, progress=progress)

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
            TrainingError: no optimizer holds a parameter of this model; the accelerator shards parameters; a training
                step returned no loss, or in our own loop a loss was not finite.
        """
        check_limits(max_steps, max_epochs)
        check_ownership(model, self._optimizers)
        self._check_whole()
        planned = self._loop.planned_steps(max_steps, max_epochs) if self._loop else max_steps
        shown = self._progress and self.accelerator.is_main_process
        first = bare_optimizer(listed(self._optimizers)[0])
        begun = perf_counter()
        epochs = None
        with (
            modes_kept(model),
            self._prepared(model) as ready,
            TrainingProgress(planned, shown=shown) as progress,
            CountedSteps(first, NoHooks() if hooks is None else hooks, max_steps, progress) as steps,
        ):
            step = steps.watch(self._training_step)
            returned = self._training_func(*ready[:2], step, ready.lr_schedulers, max_steps, max_epochs)
            epochs = returned if self._loop else None
        return TrainingResult(steps.count, epochs, perf_counter() - begun, steps.stopped)

    @contextmanager
    def _prepared(self, model: Module) -> Iterator[Prepared]:
        """What the accelerator makes of model, optimizers and schedulers, for as long as a training takes."""
        optimizers, schedulers = listed(self._optimizers), listed(self._lr_schedulers)
        by_epoch = isinstance(self._loop, _AcceleratedLoop) and self._loop.interval == "epoch"
        preparable = [] if by_epoch else schedulers  # a prepared one steps with the optimizer, and once a process
        with ExitStack() as stack:
            stack.enter_context(_accelerator_kept(self.accelerator))
            stack.enter_context(attributes_kept(model, *LEFT))
            for optimizer in optimizers:  # a gradient scaler puts a step of its own there
                stack.enter_context(attributes_kept(bare_optimizer(optimizer), "step"))
            made = listed(self.accelerator.prepare(model, *optimizers, *preparable))
            ready, rest = made[1 : len(optimizers) + 1], made[len(optimizers) + 1 :] or schedulers
            yield Prepared(made[0], _like(self._optimizers, ready), _like(self._lr_schedulers, rest))

    def _check_whole(self) -> None:
        kind = self.accelerator.distributed_type
        if kind.name in _SHARDING:
            raise TrainingError(
                f"{kind.name} shards parameters or trains copies of them, and masks and scales need them whole.",
                where="accelerator",
                remedy="Let each process have the whole model; for ZeRO use DeepspeedTorchEvaluator.",
            )


class _AcceleratedLoop(LoaderLoop):
    """The usual loop, with everything that an accelerator does in it."""

    def __init__(
        self,
        accelerator: Any,
        loader: Iterable[Any],
        loss_fn: Callable[..., Tensor] | None,
        *,
        scheduler_interval: SchedulerInterval,
        clip_norm: float | None,
    ) -> None:
        if not isinstance(loader, DataLoader):
            raise InvalidValueError(
                f"the {type(loader).__name__} cannot be prepared.",
                where="train_loader",
                legal=("a torch.utils.data.DataLoader",),
                remedy="The accelerator must know where its batches end and which are whose.",
            )
        prepared = accelerator.prepare(loader)
        super().__init__(
            prepared,
            loss_fn,
            device=accelerator.device,
            scheduler_interval=scheduler_interval,
            accumulate=accelerator.gradient_accumulation_steps,
            clip_norm=clip_norm,
        )
        self.interval = scheduler_interval
        self._accelerator = accelerator

    def first_inputs(self) -> Any:
        """As the base; the accelerator forgets that the loader was begun."""
        with _accelerator_kept(self._accelerator):
            return super().first_inputs()

    def _parts(self) -> Iterator[list[Any]]:
        """One batch at a time: the accelerator itself sees how many make a step, and where the loader ends."""
        for batch in self._loader:
            yield [batch]

    def _stepped(self) -> bool:
        return self._accelerator.sync_gradients and not self._accelerator.optimizer_step_was_skipped

    def _descend(
        self,
        model: Module,
        optimizers: Sequence[Optimizer],
        training_step: Callable[..., Tensor],
        batches: Sequence[Any],
        number: int,
    ) -> list[float]:
        accelerator = self._accelerator
        with accelerator.accumulate(model):
            loss = training_step(batches[0], model)
            value = finite(loss, number)
            accelerator.backward(loss)
            if self._clip_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), self._clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        return [value]


@contextmanager
def _accelerator_kept(accelerator: Any) -> Iterator[None]:
    """Let an accelerator forget what it is given meanwhile, and loaders that were left before their end."""
    kinds = ("_models", "_optimizers", "_schedulers", "_dataloaders")
    before = {name: [*getattr(accelerator, name)] for name in kinds}
    state = accelerator.gradient_state
    step, syncing, loaders = accelerator.step, state.sync_gradients, state.dataloader_references
    try:
        yield
    finally:
        for name in kinds:
            setattr(accelerator, name, before[name])
        accelerator.step, state.sync_gradients, state.dataloader_references = step, syncing, loaders


def _like(given: Any, things: Sequence[Any]) -> Any:
    """The `things` as a list where a list was given, else the single one, or None."""
    if isinstance(given, (list, tuple)):
        return list(things)
    return things[0] if things else None
