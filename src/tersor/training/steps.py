"""Counts the optimizer steps of somebody else's loop, calls the hooks, and ends the loop in time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tersor.errors import TrainingError
from tersor.training.evaluator import TrainingHooks
from tersor.training.functions import described, name_of
from tersor.training.progress import TrainingProgress


class _LimitReached(Exception):  # noqa: N818 (it is no error: it carries the control out of the user's loop)
    """The steps are made; `steps` is who says so, since trainings may be nested."""

    def __init__(self, steps: CountedSteps) -> None:
        super().__init__("max_steps is reached")
        self.steps = steps


class CountedSteps:
    """A context in which the steps of `optimizer` are counted and accompanied by `hooks`.

    The limit is kept without the loop's help: once `max_steps` steps are made, the next call of the watched training
    step, or failing that the next step of the optimizer, leaves the context. So what the loop does after its last step
    (a scheduler's step, a second optimizer's) is still done, and the parameters never change beyond the limit.

    Args:
        optimizer: whose steps are counted; None where it is made later and then handed to :meth:`follow`.
        hooks: what to call at each loss and step.
        max_steps: the most steps; None where the loop keeps the limit itself.
        progress: the bar to advance.
        made: steps of the same run that were made before it was broken off.

    Attributes:
        count: the steps made so far.
        stopped: whether the loop had to be ended.
    """

    def __init__(
        self,
        optimizer: Optimizer | None,
        hooks: TrainingHooks,
        max_steps: int | None = None,
        progress: TrainingProgress | None = None,
        made: int = 0,
    ) -> None:
        self.count = made
        self.stopped = False
        self._optimizer = optimizer
        self._hooks = hooks
        self._max_steps = max_steps
        self._progress = progress
        self._loss: Tensor | None = None
        self._handles: tuple[RemovableHandle, ...] = ()

    def __enter__(self) -> CountedSteps:
        if self._optimizer is not None:
            self.follow(self._optimizer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.leave()
        self.stopped = isinstance(error, _LimitReached) and error.steps is self
        return self.stopped

    def follow(self, optimizer: Optimizer) -> None:
        """Count and accompany the steps of this optimizer, and of no other, from now on."""
        self.leave()
        self._handles = (
            optimizer.register_step_pre_hook(self._on_begin),
            optimizer.register_step_post_hook(self._on_end),
        )

    def leave(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = ()

    def watch(self, training_step: Callable[..., Any], *, may_skip: bool = False) -> Callable[..., Any]:
        """The `training_step` to hand to the loop: its loss goes through the hooks, the rest of its result is kept.

        Args:
            training_step: called with the batch first.
            may_skip: whether None, in place of a loss, is the loop's word for a batch to leave out.
        """

        @functools.wraps(training_step)
        def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._leave_if_done()
            result = training_step(batch, *args, **kwargs)
            if may_skip and result is None:
                return None
            own = _loss_of(result, training_step)
            loss = self.loss(own, batch)
            return result if loss is own else _with_loss(result, loss)

        return watched

    def loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The loss to descend, for a loop that has it at hand."""
        loss = self._hooks.loss(loss, batch)
        self._loss = loss.detach()
        return loss

    def before_step(self) -> None:
        """The gradients are complete; for a loop whose optimizer has no step hooks.

        Raises:
            _LimitReached: no more steps are to be made; the context swallows it.
        """
        self._leave_if_done()
        self._hooks.before_step()

    def after_step(self) -> None:
        """The parameters are new; likewise."""
        self.count += 1
        self._hooks.after_step()
        if self._progress is not None:
            self._progress.advance(self._loss, getattr(self._hooks, "status", dict))

    def _leave_if_done(self) -> None:
        if self.count == self._max_steps:
            raise _LimitReached(self)

    def _on_begin(self, _: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """A step begins; where the optimizer computes the gradients itself, they are complete after its closure."""
        self._leave_if_done()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.before_step()
            return None
        complete = _once_after(closure, self.before_step)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": complete}
        given = [*args]
        given[1] = complete
        return tuple(given), kwargs

    def _on_end(self, *_: Any) -> None:
        self.after_step()


def bare_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer of PyTorch within what Accelerate made of it.

    >>> import torch
    >>> bare_optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1)).defaults["lr"]
    0.1
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def _once_after(closure: Callable[[], Any], then: Callable[[], None]) -> Callable[[], Any]:
    """The `closure` that, when it is called for the first time, calls `then` at its end."""
    first = [True]

    @functools.wraps(closure)
    def complete() -> Any:
        result = closure()
        if first:
            first.clear()
            then()
        return result

    return complete


def _loss_of(result: Any, training_step: Callable[..., Any]) -> Tensor:
    """The loss in what a training step returned."""
    loss = result
    if isinstance(result, tuple) and result:
        loss = result[0]
    elif isinstance(result, Mapping):
        loss = result.get("loss")
    if isinstance(loss, Tensor):
        return loss
    raise TrainingError(
        f"it returned {described(result)}, in which there is no loss tensor.",
        where=f"training_step {name_of(training_step)}",
        legal=("the loss tensor", "a tuple that begins with it", "a dict with it under 'loss'"),
        remedy="Return the tensor itself, not loss.item(), so that gradients can flow.",
    )


def _with_loss(result: Any, loss: Tensor) -> Any:
    """A copy of `result` that holds `loss` in place of the user's."""
    if isinstance(result, Tensor):
        return loss
    if isinstance(result, tuple):
        named = getattr(result, "_replace", None)
        return named(**{result._fields[0]: loss}) if named else (loss, *result[1:])  # pyright: ignore
    replaced = copy.copy(result)
    replaced["loss"] = loss
    return replaced
