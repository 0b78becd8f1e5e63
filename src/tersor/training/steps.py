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

    Attributes:
        count: the steps made so far.
        stopped: whether the loop had to be ended.
    """

    def __init__(
        self, optimizer: Optimizer, hooks: TrainingHooks, max_steps: int | None, progress: TrainingProgress
    ) -> None:
        self.count = 0
        self.stopped = False
        self._optimizer = optimizer
        self._hooks = hooks
        self._max_steps = max_steps
        self._progress = progress
        self._loss: Tensor | None = None
        self._handles: tuple[RemovableHandle, ...] = ()

    def __enter__(self) -> CountedSteps:
        self._handles = (
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        for handle in self._handles:
            handle.remove()
        self.stopped = isinstance(error, _LimitReached) and error.steps is self
        return self.stopped

    def watch(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """The `training_step` to hand to the loop: its loss goes through the hooks, the rest of its result is kept."""

        @functools.wraps(training_step)
        def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._leave_if_done()
            result = training_step(batch, *args, **kwargs)
            own = _loss_of(result, training_step)
            loss = self._hooks.loss(own, batch)
            self._loss = loss.detach()
            return result if loss is own else _with_loss(result, loss)

        return watched

    def _leave_if_done(self) -> None:
        if self.count == self._max_steps:
            raise _LimitReached(self)

    def _before_step(self, *_: Any) -> None:
        self._leave_if_done()
        self._hooks.before_step()

    def _after_step(self, *_: Any) -> None:
        self.count += 1
        self._hooks.after_step()
        self._progress.advance(self._loss, getattr(self._hooks, "status", dict))


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
