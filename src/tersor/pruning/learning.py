"""The base of pruners whose scores come out of steps of training."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any, ClassVar

from torch import Tensor

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.errors import InvalidValueError, TrainingError
from tersor.pruning.base import Pruner
from tersor.training import Evaluator
from tersor.training.snapshot import Snapshot


class LearningPruner(Pruner):
    """Base of pruners that watch some steps of training before they score.

    With an evaluator ``compress()`` trains for ``training_steps`` first, then prunes, and then trains for as long as it
    was asked to, with the masks. In a training loop of the user's own, the first ``training_steps`` steps are watched
    and the masks are there after the last of them. Under a schedule each round is watched.

    A subclass says what it remembers (:meth:`begin`), what it sees at each step (:meth:`observe`), and gives it to
    :meth:`score` by :meth:`collect`.

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio`` (or ``sparse_threshold``, on the score).
        evaluator: how the model is trained; without one, see above.
        training_steps: how many optimizer steps are watched.
        restores: whether the model, the optimizers and the schedulers are put back after the watched steps; by default
            where the algorithm does not learn anything that belongs to the trained weights.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        InvalidValueError: the number of steps is no positive int.

    Attributes:
        collecting: whether steps are watched at the moment.
    """

    restores_by_default: ClassVar[bool] = True

    def __init__(
        self,
        model: Any,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        training_steps: int = 100,
        *,
        restores: bool | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        if not isinstance(training_steps, int) or isinstance(training_steps, bool) or training_steps < 1:
            raise InvalidValueError(
                f"{training_steps!r} is no number of steps.", where="training_steps", legal=("a positive int",)
            )
        self.training_steps = training_steps
        self.restores = self.restores_by_default if restores is None else restores
        self.collecting = False
        self._watched = 0
        self._prunes_when_watched = False
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    @property
    def watched_steps(self) -> int:
        """How many steps are watched before a decision."""
        return self.training_steps

    @abstractmethod
    def begin(self) -> None:
        """Forget what was seen."""

    @abstractmethod
    def observe(self) -> None:
        """One step's gradients are complete, the parameters still old."""

    def end(self) -> None:
        """No more steps are seen."""

    def watch(self) -> None:
        """Watch the next steps of whatever training goes on."""
        self.begin()
        self.collecting, self._watched = True, 0

    def _stop(self) -> None:
        if self.collecting:
            self.collecting = False
            self.end()

    def gather(self) -> None:
        """Train for the steps that are watched, with this pruner alone taking part.

        Raises:
            TrainingError: there is no evaluator, or the user's function ended before.
        """
        evaluator = self._trainer
        if evaluator is None:
            raise TrainingError(
                f"{type(self).__name__} watches {self.watched_steps} steps of training, and there is no evaluator",
                where="gather",
                remedy="Give a TorchEvaluator, or run your own loop: start(), then loss(), before_step() and step().",
            )
        with ExitStack() as back:
            if self.restores:
                back.callback(Snapshot(self.model, evaluator).restore)
            self.watch()
            back.callback(self._stop)
            evaluator.train(self.model, _Alone(self), max_steps=self.watched_steps)
        if self._watched < self.watched_steps:
            raise TrainingError(
                f"it ended after {self._watched} of {self.watched_steps} steps, over which scores are collected",
                where="training_func",
                remedy="Lower training_steps, or let the function train until max_steps.",
            )

    def on_start(self) -> None:
        """Watch and prune; without an evaluator, watch the steps of the user's loop."""
        self.refuse_impossible()
        if self._trainer is None:
            self._prunes_when_watched = True
            self.watch()
        else:
            super().on_start()

    def on_gradients(self) -> None:
        """See a step."""
        if self.collecting:
            self.observe()

    def on_step(self) -> None:
        """Count the steps that were seen."""
        if not self.collecting:
            return
        self._watched += 1
        if self._watched == self.watched_steps:
            self._stop()
            if self._prunes_when_watched:
                self._prunes_when_watched = False
                self.prune()

    def own_state(self) -> dict[str, Any]:
        """The masks, and how far the watching has come; a subclass adds what it has seen."""
        progress = (self.collecting, self._watched, self._prunes_when_watched)
        return {**super().own_state(), "progress": progress}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on watching where :meth:`own_state` was asked."""
        super().load_own_state(state)
        if state["progress"][0]:
            self.begin()
        self.collecting, self._watched, self._prunes_when_watched = state["progress"]


class _Alone:
    """The training hooks of one compressor, without those that it is fused with."""

    def __init__(self, pruner: Pruner) -> None:
        self._pruner = pruner

    def loss(self, loss: Tensor, batch: Any) -> Tensor:
        return self._pruner.on_loss(loss, batch)

    def before_step(self) -> None:
        self._pruner.on_gradients()

    def after_step(self) -> None:
        self._pruner.on_step()
