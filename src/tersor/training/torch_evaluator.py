"""Calls the training and evaluating functions of a plain PyTorch user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tersor.training.evaluator import NoHooks, TrainingHooks, TrainingResult, check_limits, modes_kept
from tersor.training.function_evaluator import FunctionEvaluator, check_optimizers, check_ownership, evaluation_of
from tersor.training.loops import LoaderLoop, SchedulerInterval, listed
from tersor.training.progress import TrainingProgress
from tersor.training.steps import CountedSteps


@final
class TorchEvaluator(FunctionEvaluator):
    """Trains with the user's own function, or with a loop of ours (`from_loader`).

    Optimizers and schedulers are ordinary objects and are used as they are: a compressor's work is done in the step
    hooks of the first optimizer, which are gone when the training is over. Give `max_steps` to `train` and the function
    is ended after that many steps of the first optimizer, also if it would go on: at its next call of
    ``training_step``, or else before the optimizer's next step. What follows the last step in the loop is still done;
    what follows the loop in the function is then not reached. Several calls of ``training_step`` before one step
    (gradient accumulation) count as one step.

    Each module has its train or eval flag back when `train` or `evaluate` is over.

    Args:
        training_func: ``training_func(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)`` trains
            the model. It must call the `training_step` and the optimizers that it is handed, and keep `max_epochs`
            itself. What it returns is ignored.
        optimizers: one optimizer or a list; the function gets what was given here.
        training_step: ``training_step(batch, model, *args, **kwargs)`` returns the loss tensor, a tuple that begins
            with it, or a dict with it under ``"loss"``.
        lr_schedulers: None, one scheduler or a list; the function gets what was given here.
        dummy_input: inputs that the model can be run on (a tensor, a tuple of arguments, a dict of them).
        evaluating_func: ``evaluating_func(model)`` returns the metric as a number, or a dict with it under
            ``"default"``; None if it only runs the model over calibration data.
        progress: whether to show a bar on a terminal; turn it off where the function shows its own.

    Raises:
        InvalidValueError: an optimizer or a scheduler is none, or a function cannot be called.
        TrainingError: a function does not take the arguments that it will get.

    Example:
        A line through noisy points, for 20 steps of a loop that would never end.

        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(1, 1)
        >>> x = torch.linspace(-1, 1, 16).unsqueeze(1)
        >>> def training_step(batch, model):
        ...     inputs, targets = batch
        ...     return torch.nn.functional.mse_loss(model(inputs), targets)
        >>> def training_func(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        ...     while True:
        ...         optimizer.zero_grad()
        ...         training_step((x, 3 * x), model).backward()
        ...         optimizer.step()
        >>> evaluator = TorchEvaluator(training_func, torch.optim.SGD(model.parameters(), lr=0.5), training_step)
        >>> result = evaluator.train(model, max_steps=20)
        >>> result.steps, result.stopped, round(model.weight.item(), 2)
        (20, True, 3.0)
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        optimizers: Optimizer | Sequence[Optimizer],
        training_step: Callable[..., Any],
        lr_schedulers: LRScheduler | Sequence[LRScheduler] | None = None,
        dummy_input: Any = None,
        evaluating_func: Callable[[Module], Any] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        super().__init__(training_func, training_step, optimizers, lr_schedulers, dummy_input, evaluating_func)
        check_optimizers(optimizers, lr_schedulers)
        self._progress = progress

    @classmethod
    def from_loader(
        cls,
        train_loader: Iterable[Any],
        loss_fn: Callable[..., Tensor] | None,
        optimizers: Optimizer | Sequence[Optimizer],
        lr_schedulers: LRScheduler | Sequence[LRScheduler] | None = None,
        *,
        dummy_input: Any = None,
        evaluating_func: Callable[[Module], Any] | None = None,
        eval_loader: Iterable[Any] | None = None,
        metric: Callable[..., float] | None = None,
        device: torch.device | str | None = None,
        scheduler_interval: SchedulerInterval = "epoch",
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        clip_norm: float | None = None,
        ema_decay: float | None = None,
        progress: bool = True,
    ) -> TorchEvaluator:
        """Train with the usual loop, in train mode, over a data loader.

        `max_steps` and `max_epochs` are both kept exactly, and one of them must be given. A step is one of the
        optimizers, however many batches it takes. A loss that is not finite ends the training before it can spoil the
        parameters.

        Args:
            train_loader: batches ``(inputs, targets)``, ``(a, b, targets)`` or a mapping of the model's arguments.
            loss_fn: ``loss_fn(outputs, targets)`` returns a scalar tensor (of a mapping the targets are the whole
                batch); None where the model returns its loss: ``model(**batch).loss``.
            optimizers: one optimizer or a list; all of them step on each batch.
            lr_schedulers: None, one scheduler or a list. A `ReduceLROnPlateau` is given the mean training loss.
            dummy_input: inputs that the model can be run on; by default those of the first batch.
            evaluating_func: as above; not together with `eval_loader`.
            eval_loader: batches to evaluate on, as the training ones.
            metric: ``metric(outputs, targets)`` returns the mean over one batch; accuracy by default.
            device: where to move the batches; by default to the model.
            scheduler_interval: ``"epoch"`` or ``"step"``: after what a scheduler steps.
            accumulate: batches for one step, whose losses are divided by their number. The last step of an epoch may
                have fewer batches.
            autocast: ``torch.bfloat16`` runs the model and `loss_fn` under autocast; the parameters stay as they are.
                What a compressor adds to the loss, and evaluation, are computed in the model's own precision.
            clip_norm: the longest that the gradient of all parameters together may be; compressors see it clipped.
            ema_decay: how much of their moving average the parameters keep at each step. The averages are what is
                evaluated, and what is in the model when `train` is over.
            progress: whether to show a bar on a terminal.

        Raises:
            InvalidValueError: a loader that can be passed over only once, or a setting outside its range.
            ConflictError: two ways to evaluate at once, or a metric without data.

        Example:
            >>> import torch
            >>> _ = torch.manual_seed(0)
            >>> x = torch.randn(64, 2)
            >>> data = torch.utils.data.TensorDataset(x, (x.sum(dim=1) > 0).long())
            >>> model = torch.nn.Linear(2, 2)
            >>> evaluator = TorchEvaluator.from_loader(
            ...     torch.utils.data.DataLoader(data, batch_size=16),
            ...     torch.nn.functional.cross_entropy,
            ...     torch.optim.Adam(model.parameters(), lr=0.1),
            ...     eval_loader=torch.utils.data.DataLoader(data, batch_size=64),
            ... )
            >>> result = evaluator.train(model, max_epochs=10)
            >>> result.steps, result.epochs, evaluator.evaluate(model) > 0.95
            (40, 10, True)
            >>> tuple(evaluator.dummy_input.shape)
            (16, 2)
        """
        evaluating = evaluation_of(evaluating_func, eval_loader, metric, device)
        loop = LoaderLoop(
            train_loader,
            loss_fn,
            device=device,
            scheduler_interval=scheduler_interval,
            accumulate=accumulate,
            autocast=autocast,
            clip_norm=clip_norm,
            ema_decay=ema_decay,
        )
        return cls(loop, optimizers, loop.training_step, lr_schedulers, dummy_input, evaluating, progress=progress)

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
            TrainingError: no optimizer holds a parameter of this model, a training step returned no loss, or in our own
                loop a loss was not finite. Errors of the user's own code come through as they are.
        """
        check_limits(max_steps, max_epochs)
        check_ownership(model, self._optimizers)
        planned = self._loop.planned_steps(max_steps, max_epochs) if self._loop else max_steps
        made = self._loop.steps_before if self._loop else 0
        first, hooks = listed(self._optimizers)[0], NoHooks() if hooks is None else hooks
        begun = perf_counter()
        epochs = None
        with (
            modes_kept(model),
            TrainingProgress(planned, shown=self._progress, made=made) as progress,
            CountedSteps(first, hooks, max_steps, progress, made) as steps,
        ):
            step = steps.watch(self._training_step)
            returned = self._training_func(model, self._optimizers, step, self._lr_schedulers, max_steps, max_epochs)
            epochs = returned if self._loop else None
        return TrainingResult(steps.count, epochs, perf_counter() - begun, steps.stopped)

    @property
    def resumable(self) -> LoaderLoop | None:
        """The loop of ``from_loader``."""
        return self._loop

    def evaluate(self, model: Module) -> float | None:
        """The metric of `model`, while it trains with averaged weights that of the averages; see the base."""
        with nullcontext() if self._loop is None else self._loop.averaged(model):
            return super().evaluate(model)
