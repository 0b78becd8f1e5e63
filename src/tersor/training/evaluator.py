"""What a compressor needs of a user's training and evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from tersor.errors import InvalidValueError


class TrainingHooks(Protocol):
    """What a compressor does while somebody else trains the model.

    For every forward pass the evaluator calls ``loss``; for every optimizer step ``before_step`` and then, with the
    parameters updated, ``after_step``. With gradient accumulation ``loss`` is called several times a step.
    """

    def loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The loss to descend, from the user's ``loss`` on ``batch``: a distiller or a regulariser adds its term."""
        ...

    def before_step(self) -> None:
        """Called with the gradients complete and the parameters still old."""
        ...

    def after_step(self) -> None:
        """Called when the parameters are new: masks are scheduled and latent weights clipped here."""
        ...


class CompressorLike(TrainingHooks, Protocol):
    """What those who train need of a compressor, and of all that are fused with it."""

    model: Module

    @property
    def changes_loss(self) -> bool:
        """Whether ``loss`` gives anything but the user's loss."""
        ...

    def start(self) -> None:
        """Called before training."""
        ...

    def finish(self) -> None:
        """Called after training."""
        ...

    def wrap_model(self) -> Module:
        """Simulate; called in place of ``start`` where a training is gone on with."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it knows by now."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that over."""
        ...


class Loop(Protocol):
    """A training loop that can be left after any step and gone on with later, in another process."""

    on_complete: Callable[[], None] | None
    """Called after each step, when optimizers, schedulers and averages belong together."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, for ``torch.save``."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next run, with the same limits, go on there."""
        ...


class NoHooks:
    """Trains as if no compressor were there."""

    def loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The user's loss, untouched."""
        return loss

    def before_step(self) -> None:
        """Nothing."""

    def after_step(self) -> None:
        """Nothing."""


@dataclass(frozen=True)
class TrainingResult:
    """How a training went.

    Attributes:
        steps: optimizer steps that were made (of the first optimizer, where there are several), those from before a
            crash included.
        epochs: whole passes over the data, or None where only the user's function knows.
        seconds: wall time.
        stopped: whether the library ended the user's function because ``max_steps`` was reached; False where the
            function came to its own end, be it sooner than ``max_steps`` or exactly there.
    """

    steps: int
    epochs: int | None
    seconds: float
    stopped: bool


class Evaluator(ABC):
    """The one object through which a compressor trains and evaluates a model.

    A subclass says how one training framework is called. The same evaluator can serve any number of compressors.
    """

    @abstractmethod
    def train(
        self,
        model: Module,
        hooks: TrainingHooks | None = None,
        *,
        max_steps: int | None = None,
        max_epochs: int | None = None,
    ) -> TrainingResult:
        """Train `model` in place.

        Args:
            model: the model; wrapped or plain.
            hooks: what to do at each loss and step; None trains plainly.
            max_steps: the most optimizer steps; None for no limit.
            max_epochs: the most passes over the data; None for no limit.

        Raises:
            InvalidValueError: a limit is not a positive int.
            TrainingError: the training cannot be run as it was given.
        """

    @abstractmethod
    def evaluate(self, model: Module) -> float | None:
        """The metric of `model` (higher or lower is better: the user knows), or None where there is none.

        Raises:
            TrainingError: what came back is not a number.
        """

    def state_dict(self) -> dict[str, Any]:
        """The state of what trains: optimizers and schedulers; nothing where a framework keeps them to itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Put back what `state_dict` gave."""

    @property
    def resumable(self) -> Loop | None:
        """The loop that `train` runs, where it can be gone on with after a crash; None where only its framework can."""
        return None

    @property
    @abstractmethod
    def dummy_input(self) -> Any:
        """Inputs that the model can be run on: one tensor, a tuple of arguments, a dict of them, or None."""


def check_limits(max_steps: int | None, max_epochs: int | None) -> None:
    """Refuse a limit that is not a positive int.

    >>> check_limits(100, None)
    >>> check_limits(None, 0)
    Traceback (most recent call last):
        ...
    tersor.errors.InvalidValueError: max_epochs: 0 is no number of epochs. Legal: a positive int, None.

    Raises:
        InvalidValueError: for zero, a negative number, a float or a bool.
    """
    for name, value in (("max_steps", max_steps), ("max_epochs", max_epochs)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and value > 0):
            unit = name.removeprefix("max_")
            raise InvalidValueError(f"{value!r} is no number of {unit}.", where=name, legal=("a positive int", None))


@contextmanager
def modes_kept(model: Module) -> Iterator[None]:
    """Give every module its train or eval flag back at the end, whatever happened in between."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def attributes_kept(thing: object, *names: str) -> Iterator[None]:
    """Give an object its own attributes of these names back at the end, or none where it had none.

    >>> class Loop:
    ...     def step(self): ...
    >>> loop = Loop()
    >>> with attributes_kept(loop, "step"):
    ...     loop.step = print
    >>> vars(loop)
    {}
    """
    own = vars(thing)
    before = {name: own[name] for name in names if name in own}
    try:
        yield
    finally:
        for name in names:
            own.pop(name, None)
        own.update(before)
