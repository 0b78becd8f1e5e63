"""What the evaluators share that are given a training function, a training step and an evaluating function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.training.evaluation import LoaderEvaluation
from tersor.training.evaluator import Evaluator, modes_kept
from tersor.training.functions import check_function, described, name_of, number_of
from tersor.training.loops import LoaderLoop, listed


class FunctionEvaluator(Evaluator):
    """Base of those that call the user's own functions; a subclass says how they are called.

    Args:
        training_func: ``training_func(model, optimizers, training_step, lr_schedulers, max_steps, max_epochs)``.
        training_step: ``training_step(batch, model, *args, **kwargs)`` returns the loss tensor, a tuple that begins
            with it, or a dict with it under ``"loss"``.
        optimizers: one or a list of them.
        lr_schedulers: None, one or a list of them.
        dummy_input: inputs that the model can be run on.
        evaluating_func: ``evaluating_func(model)`` returns the metric as a number, or a dict with it under
            ``"default"``; None if it only runs the model.

    Raises:
        InvalidValueError: a function cannot be called.
        TrainingError: a function does not take the arguments that it will get.
    """

    def __init__(
        self,
        training_func: Callable[..., Any],
        training_step: Callable[..., Any],
        optimizers: Any,
        lr_schedulers: Any,
        dummy_input: Any,
        evaluating_func: Callable[[Module], Any] | None,
    ) -> None:
        arguments = ("model", "optimizers", "training_step", "lr_schedulers", "max_steps", "max_epochs")
        check_function("training_func", training_func, arguments)
        check_function("training_step", training_step, ("batch", "model"), more=True)
        if evaluating_func is not None:
            check_function("evaluating_func", evaluating_func, ("model",))
        self._training_func = training_func
        self._training_step = training_step
        self._optimizers = optimizers
        self._lr_schedulers = lr_schedulers
        self._dummy_input = dummy_input
        self._evaluating_func = evaluating_func
        # Only our own loop can say how long it will take, how many epochs it made and what its batches hold.
        self._loop = training_func if isinstance(training_func, LoaderLoop) else None

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
        value = number_of(result.get("default") if isinstance(result, Mapping) else result)
        if value is not None:
            return value
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
        """What was given; with ``from_loader`` else the inputs of the first batch."""
        if self._dummy_input is None and self._loop is not None:
            self._dummy_input = self._loop.first_inputs()
        return self._dummy_input


def evaluation_of(
    evaluating_func: Callable[[Module], Any] | None,
    eval_loader: Iterable[Any] | None,
    metric: Callable[..., float] | None,
    device: torch.device | str | None,
) -> Callable[[Module], Any] | None:
    """How ``from_loader`` is to evaluate: by a function, or by a metric over a loader.

    Raises:
        ConflictError: two ways at once, or a metric without data.
    """
    if eval_loader is not None:
        if evaluating_func is not None:
            raise ConflictError(
                "evaluating_func and eval_loader are both given.", where="from_loader", remedy="Keep one of them."
            )
        return LoaderEvaluation(eval_loader, metric, device)
    if metric is not None:
        raise ConflictError("metric is given without eval_loader.", where="from_loader", remedy="Give both.")
    return evaluating_func


def check_optimizers(optimizers: Any, lr_schedulers: Any) -> None:
    """Refuse what is no optimizer or no scheduler.

    Raises:
        InvalidValueError: naming it.
    """
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
    for scheduler in listed(lr_schedulers):
        if not callable(getattr(scheduler, "step", None)):
            raise InvalidValueError(f"{described(scheduler)} is no scheduler.", where="lr_schedulers")


def check_ownership(model: Module, optimizers: Any) -> None:
    """Refuse optimizers that hold no parameter of the model.

    Raises:
        TrainingError: the model would not change.
    """
    groups = [group for optimizer in listed(optimizers) for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise TrainingError(
            f"none of their {len(held)} parameters belongs to this {type(model).__name__}, which would not change.",
            where="optimizers",
            remedy="Make the optimizer of the model that is trained: Adam(model.parameters()); and a new one after "
            "the model was copied or made smaller.",
        )
