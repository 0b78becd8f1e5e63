"""The base of pruners whose scores come out of steps of training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.errors import InvalidValueError, TrainingError
from tersor.pruning.base import Pruner
from tersor.pruning.decision import RatioNow, as_asked
from tersor.targets.activations import watch_activation
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.snapshot import Snapshot
from tersor.training.timeline import Event


class LearningPruner(Pruner):
    """Base of pruners that watch some steps of training before they score.

    With an evaluator ``compress()`` trains for ``training_steps`` first, then prunes, and then trains for as long as it
    was asked to, with the masks. In a training loop of the user's own, the first ``training_steps`` steps are watched
    and the masks are there after the last of them. Under a schedule each round is watched.

    A subclass says what it looks at (:meth:`begin`, :meth:`look_at`) and what it sees at each step (:meth:`observe`),
    adds it up (:meth:`add`), and gives it to :meth:`score` by :meth:`collect`.

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
        self._sums: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def events(self) -> Iterable[Event]:
        """It watches, and prunes."""
        if self._trainer is not None:
            yield Event(f"watches {self.watched_steps} steps of a training before this one, and prunes")
            return
        yield Event("watches", 0, self.watched_steps, 1)
        yield from (replace(event, first=self.watched_steps) for event in super().events())

    @property
    def watched_steps(self) -> int:
        """How many steps are watched before a decision."""
        return self.training_steps

    def begin(self) -> None:
        """Steps are about to be watched, and nothing of earlier ones is known any more."""

    @abstractmethod
    def observe(self) -> None:
        """One step's gradients are complete, the parameters still old."""

    def look_at(self, target: PlannedTarget, name: str, look: Callable[[Tensor], None]) -> None:
        """See an input or output of a target's module whenever it is called, until no more steps are watched.

        Args:
            target: whose module it is.
            name: which input or output, such as ``_output_0``.
            look: what to do with its value; what is no tensor is passed over.
        """

        def pass_on(value: Any) -> Any:
            if isinstance(value, Tensor) and self.collecting:
                look(value)
            return value

        self._handles.append(watch_activation(target.config.module, name, pass_on))

    def add(self, target: PlannedTarget, seen: Tensor) -> None:
        """Add to the sum of what was seen of a target.

        Raises:
            TrainingError: it has another shape than what was seen before.
        """
        if not self.collecting:  # a backward pass that comes late
            return
        known = self._sums.get(target.name)
        if known is not None and known.shape != seen.shape:
            raise TrainingError(
                f"it has values of shape {tuple(known.shape[1:])} in one batch and {tuple(seen.shape[1:])} in another",
                where=target.name,
                remedy="Give batches of one size, or make the weight of a layer the target.",
            )
        self._sums[target.name] = seen if known is None else known.to(seen.device) + seen

    def sum_of(self, target: PlannedTarget, *, missing: str, remedy: str) -> Tensor:
        """The sum of what was seen of a target.

        Args:
            target: one of those that are scored.
            missing: what to say if nothing was.
            remedy: and what to do about it.

        Raises:
            TrainingError: nothing was.
        """
        if target.name not in self._sums:
            raise TrainingError(f"{missing} in the watched steps", where=target.name, remedy=remedy)
        return self._sums[target.name]

    def watch(self) -> None:
        """Watch the next steps of whatever training goes on."""
        self.on_stop()
        self._sums, self._watched = {}, 0
        self.collecting = True
        self.begin()

    def on_stop(self) -> None:
        """Watch no longer."""
        self.collecting = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

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
            back.callback(self.on_stop)
            self.watch()
            evaluator.train(self.model, _Alone(self), max_steps=self.watched_steps)
        if self._watched < self.watched_steps:
            raise self._ended_too_soon("training_func")

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
            self.on_stop()
            if self._prunes_when_watched:
                self._prunes_when_watched = False
                self.prune()

    def on_finish(self) -> None:
        """Refuse a loop of the user's own that ended too soon.

        Raises:
            TrainingError: the watching was not over, so nothing has been pruned.
        """
        if self._prunes_when_watched:
            self._prunes_when_watched = False
            raise self._ended_too_soon("finish")

    def prune(self, ratio_now: RatioNow = as_asked) -> None:
        """Collect, score, allocate, mask; see :meth:`tersor.pruning.base.Pruner.prune`.

        Raises:
            TrainingError: no step has been watched.
        """
        if not self._watched:
            raise TrainingError(
                f"{type(self).__name__} has not watched any step of training yet",
                where="prune",
                remedy="Call compress(), or gather() before generate_masks().",
            )
        super().prune(ratio_now)

    def own_state(self) -> dict[str, Any]:
        """The masks, how far the watching has come, and what was seen."""
        progress = (self.collecting, self._watched, self._prunes_when_watched)
        return {**super().own_state(), "progress": progress, "sums": self._sums}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on watching where :meth:`own_state` was asked."""
        super().load_own_state(state)
        collecting, watched, self._prunes_when_watched = state["progress"]
        if collecting:
            self.watch()
        else:
            self.on_stop()
        self._watched, self._sums = watched, dict(state["sums"])

    def _ended_too_soon(self, where: str) -> TrainingError:
        return TrainingError(
            f"the training ended after {self._watched} of {self.watched_steps} steps, over which scores are collected",
            where=where,
            remedy="Give an evaluator, or train for so long between start() and finish()."
            if where == "finish"
            else "Lower training_steps, or let the function train until max_steps.",
        )


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
