"""Calls the training and evaluating functions of a plain PyTorch user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.training.evaluator import Evaluator, NoHooks, TrainingHooks, TrainingResult, check_limits, modes_kept
from tersor.training.functions import check_function, described, name_of
from tersor.training.loops import LoaderEvaluation, LoaderLoop, SchedulerInterval, listed
from tersor.training.progress import TrainingProgress
from tersor.training.steps import CountedSteps


class TorchEvaluator(Evaluator):
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
        arguments = ("model", "optimizers", "training_step", "lr_schedulers", "max_steps", "max_epochs")
        check_function("training_func", training_func, arguments)
        check_function("training_step", training_step, ("batch", "model"), more=True)
        if evaluating_func is not None:
            check_function("evaluating_func", evaluating_func, ("model",))
        _check_optimizers(optimizers)
        for scheduler in listed(lr_schedulers):
            if not callable(getattr(scheduler, "step", None)):
                raise InvalidValueError(f"{described(scheduler)} is no scheduler.", where="lr_schedulers")
        self._training_func = training_func
        self._optimizers = optimizers
        self._training_step = training_step
        self._lr_schedulers = lr_schedulers
        self._dummy_input = dummy_input
        self._evaluating_func = evaluating_func
        self._progress = progress
        # Only our own loop can say how long it will take, how many epochs it made and what its batches hold.
        self._loop = training_func if isinstance(training_func, LoaderLoop) else None

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
        progress: bool = True,
    ) -> TorchEvaluator:
        """Train with the usual loop, in train mode, over a data loader.

        `max_steps` and `max_epochs` are both kept exactly, and one of them must be given. A loss that is not finite
        ends the training before it can spoil the parameters.

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
            progress: whether to show a bar on a terminal.

        Raises:
            InvalidValueError: a loader that can be passed over only once, or an unknown interval.
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
        if eval_loader is not None:
            if evaluating_func is not None:
                raise ConflictError(
                    "evaluating_func and eval_loader are both given.", where="from_loader", remedy="Keep one of them."
                )
            evaluating_func = LoaderEvaluation(eval_loader, metric, device)
        elif metric is not None:
            raise ConflictError("metric is given without eval_loader.", where="from_loader", remedy="Give both.")
        loop = LoaderLoop(train_loader, loss_fn, device=device, scheduler_interval=scheduler_interval)
        return cls(loop, optimizers, loop.training_step, lr_schedulers, dummy_input, evaluating_func, progress=progress)

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
        self._check_ownership(model)
        planned = self._loop.planned_steps(max_steps, max_epochs) if self._loop else max_steps
        begun = perf_counter()
        epochs = None
        with (
            modes_kept(model),
            TrainingProgress(planned, shown=self._progress) as progress,
            CountedSteps(
                listed(self._optimizers)[0], NoHooks() if hooks is None else hooks, max_steps, progress
            ) as steps,
        ):
            step = steps.watch(self._training_step)
            returned = self._training_func(model, self._optimizers, step, self._lr_schedulers, max_steps, max_epochs)
            epochs = returned if self._loop else None
        return TrainingResult(steps.count, epochs, perf_counter() - begun, steps.stopped)

    def evaluate(self, model: Module) -> float | None:
        """The metric of `model`, or None where there is no evaluating function or it returned None.

        Raises:
            TrainingError: what came back is no number.
        """
        if self._evaluating_func is None:
            return None
        with modes_kept(model):
            result = self._evaluating_func(model)
        if result is None:
            return None
        value = result.get("default") if isinstance(result, Mapping) else result
        if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
            return float(value)
        raise TrainingError(
            f"it returned {described(result)}, which is no metric.",
            where=f"evaluating_func {name_of(self._evaluating_func)}",
            legal=("a number", "a dict with a number under 'default'", "None for a calibration only"),
            remedy="Return one number: the one by which models are compared.",
        )

    def state_dict(self) -> dict[str, Any]:
        """The states of all optimizers and schedulers, in order; of the tensors no copies."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in listed(self._optimizers)],
            "lr_schedulers": [scheduler.state_dict() for scheduler in listed(self._lr_schedulers)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave; what belongs to a parameter that has become smaller since is left out."""
        for optimizer, own in zip(listed(self._optimizers), state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
            for parameter in [*optimizer.state]:
                values = optimizer.state[parameter].values()
                if any(isinstance(of, Tensor) and of.dim() and of.shape != parameter.shape for of in values):
                    del optimizer.state[parameter]
        for scheduler, own in zip(listed(self._lr_schedulers), state["lr_schedulers"], strict=True):
            scheduler.load_state_dict(own)

    @property
    def dummy_input(self) -> Any:
        """What was given; with `from_loader` else the inputs of the first batch."""
        if self._dummy_input is None and self._loop is not None:
            self._dummy_input = self._loop.first_inputs()
        return self._dummy_input

    def _check_ownership(self, model: Module) -> None:
        groups = [group for optimizer in listed(self._optimizers) for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise TrainingError(
                f"none of their {len(held)} parameters belongs to this {type(model).__name__}, which would not change.",
                where="optimizers",
                remedy="Make the optimizer of the model that is trained: Adam(model.parameters()); and a new one after "
                "the model was copied or made smaller.",
            )


def _check_optimizers(optimizers: Any) -> None:
    many = listed(optimizers)
    for optimizer in many:
        if not isinstance(optimizer, Optimizer):
            raise InvalidValueError(
                f"{described(optimizer)} is no optimizer.",
                where="optimizers",
                legal=("a torch.optim.Optimizer", "a list of them"),
            )
    if not many:
        raise InvalidValueError("there is none.", where="optimizers", remedy="Give at least one.")
