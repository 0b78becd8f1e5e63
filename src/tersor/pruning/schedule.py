"""The base of pruners that prune step by step, over any other pruner."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.graph.coupling import Masks
from tersor.pruning.base import Pruner
from tersor.pruning.decision import RatioNow, Setting, as_asked
from tersor.pruning.learning import LearningPruner
from tersor.pruning.rounds import Best, MakeSmall, Round, Rounds, Stepwise
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.timeline import Event


class ScheduledPruner(Stepwise):
    """Base of schedules: another pruner decides what leaves, the schedule how much and when.

    There are two ways to run one.

    - With ``interval_steps``, inside one training run: every so many steps more is pruned, ``total_times`` times, while
      all that is fused with it goes on. ``compress(max_steps)`` must be long enough.
    - Without, in rounds: each prunes, makes the model physically small where ``speedup`` is given, trains for the
      length that is given to ``compress`` with the optimizers and schedulers as they were at the beginning, and
      evaluates. The best round's model is returned; where a later round fails, :meth:`result` gives it. With
      ``log_dir`` a killed run goes on after the last round that was finished, with the same result: build everything as
      before and call ``compress`` again.

    A subclass says by :meth:`ratio_at` how much of a ratio is reached after each round.

    Args:
        pruner: what decides, freshly made; the schedule takes its place among the fused compressors.
        interval_steps: optimizer steps between two prunings of one run; None for rounds.
        total_times: how often is pruned.
        evaluator: only where the pruner has none.
        speedup: makes the model small after each round: :class:`tersor.speedup.ModelSpeedup`, or a function of model,
            example inputs and masks that returns an object with ``speedup_model()``.
        log_dir: the folder in which rounds are kept.
        best: which round is returned: the ``latest``, or the one whose metric is highest (``maximize``) or lowest.

    Raises:
        ConflictError: settings that cannot hold together, or a pruner with a schedule of its own.
        InvalidValueError: a number that is not positive.

    Attributes:
        pruner: what decides.
        rounds: the rounds so far.
    """

    def __init__(
        self,
        pruner: Pruner,
        interval_steps: int | None = None,
        total_times: int = 10,
        evaluator: Evaluator | None = None,
        *,
        speedup: MakeSmall | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        best: Best = "latest",
    ) -> None:
        for name, value in (("interval_steps", interval_steps), ("total_times", total_times)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidValueError(f"{value!r} is no positive int.", where=name)
        self._refuse(pruner, evaluator, in_rounds=interval_steps is None)
        if interval_steps is not None and isinstance(pruner, LearningPruner) and interval_steps < pruner.watched_steps:
            raise ConflictError(
                f"{type(pruner).__name__} watches {pruner.watched_steps} steps before it prunes, and an interval has "
                f"{interval_steps}",
                where="interval_steps",
                remedy="Make the interval longer, or lower training_steps.",
            )
        self.pruner = pruner
        # It takes the pruner's place: one model, one plan, the same wrappers and the same fused compressors.
        self.model, self.example_inputs, self._chain = pruner.model, pruner.example_inputs, pruner._chain
        self.evaluator = pruner.evaluator or evaluator
        self._gradients_seen = False
        self.works_on_shards = type(self).works_on_shards and pruner.works_on_shards and interval_steps is not None
        self.share()
        self._chain[self._chain.index(pruner)] = self
        self.interval_steps, self.total_times = interval_steps, total_times
        self._steps = self._times = 0
        self._rounds: Rounds | None = None
        if interval_steps is None:
            self._rounds = Rounds(self, speedup, log_dir, best)
        elif speedup is not None or log_dir is not None or best != "latest":
            raise ConflictError(
                "speedup, log_dir and best belong to rounds, and interval_steps prunes within one training run",
                where="interval_steps",
                remedy="Leave interval_steps out: each round then trains as long as compress(...) says.",
            )

    def after_pruning(self) -> None:
        """What else happens once more is pruned."""

    def prune_now(self, left: Callable[[PlannedTarget], float] | None = None) -> None:
        """Prune once more, whatever is left of each target."""
        self._times += 1

        def now(asked: float, target: PlannedTarget, setting: Setting = "sparse_ratio", /) -> float:
            reached = asked if setting == "max_sparse_ratio" else self.ratio_at(asked, self._times)
            if left is None or setting == "sparse_threshold":
                return reached
            return max(0.0, 1 - (1 - reached) / left(target))  # a share of what is left

        self.pruner.prune(now)
        self.after_pruning()

    @property
    def rounds(self) -> list[Round]:
        """The rounds so far; none within one training run."""
        return [] if self._rounds is None else self._rounds.done

    def on_start(self) -> None:
        """Begin the first interval."""
        self.pruner.refuse_impossible()
        if self._rounds is None:
            self._steps = self._times = 0
            self._look_ahead()

    def on_train(self, max_steps: int | None, max_epochs: int | None) -> bool:
        """Run the rounds, or refuse a length that the intervals do not fit into."""
        if self._rounds is not None:
            self._rounds.run(max_steps, max_epochs)
            return True
        assert self.interval_steps is not None
        needed = self.interval_steps * self.total_times
        if max_epochs is None and (max_steps is None or max_steps < needed):
            raise TrainingError(
                f"{self.total_times} times {self.interval_steps} steps are {needed}, and {max_steps} are given",
                where="compress",
                remedy=f"Call compress(max_steps={needed}) or more, or leave interval_steps out to prune in rounds.",
            )
        return False

    @property
    def trains_in_rounds(self) -> bool:
        """Without an interval."""
        return self._rounds is not None

    def described(self) -> dict[str, Any]:
        """The schedule's, and the pruner's."""
        return {**super().described(), **self.pruner.described()}

    @property
    def adds_to_loss(self) -> bool:
        """Whether the pruner does."""
        return self.pruner.adds_to_loss

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The pruner's."""
        return self.pruner.on_loss(loss, batch)

    def on_gradients(self) -> None:
        """The pruner's."""
        self.pruner.on_gradients()

    def on_step(self) -> None:
        """The pruner's, and every so often more is pruned."""
        self.pruner.on_step()
        if self.interval_steps is None or self._times == self.total_times:
            return
        self._steps += 1
        if self._steps == self.interval_steps:
            self._steps = 0
            self.prune_now()
        self._look_ahead()

    def on_stop(self) -> None:
        """The pruner's."""
        self.pruner.on_stop()

    def on_finish(self) -> None:
        """Refuse a training that ended too soon.

        Raises:
            TrainingError: less was pruned than was asked.
        """
        self.pruner.on_finish()
        if self._rounds is not None and not self.rounds:
            raise TrainingError(
                "nothing has been pruned: rounds are run by compress()",
                where="finish",
                remedy="Give interval_steps for a training loop of your own.",
            )
        if self.interval_steps is not None and self._times < self.total_times:
            raise TrainingError(
                f"the training ended after {self._times} of {self.total_times} prunings",
                where="compress",
                remedy=f"Train for at least {self.interval_steps * self.total_times} steps.",
            )

    def result(self) -> tuple[nn.Module, dict[str, dict[str, Tensor]]]:
        """The model and its masks: the best round's."""
        return (self.model, self.get_masks()) if self._rounds is None else self._rounds.result()

    def own_state(self) -> dict[str, Any]:
        """Where the schedule stands, and the pruner's state."""
        return {"steps": self._steps, "times": self._times, "pruner": self.pruner.own_state()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps, self._times = state["steps"], state["times"]
        self.pruner.load_own_state(state["pruner"])

    def _look_ahead(self) -> None:
        """A pruner that watches training sees the last steps of an interval."""
        pruner, interval = self.pruner, self.interval_steps
        if interval is None or self._times == self.total_times or not isinstance(pruner, LearningPruner):
            return
        if self._steps == interval - pruner.watched_steps:
            pruner.watch()

    @staticmethod
    def _refuse(pruner: Pruner, evaluator: Evaluator | None, *, in_rounds: bool) -> None:
        if not isinstance(pruner, Pruner):
            raise InvalidValueError(f"a {type(pruner).__name__} is no pruner.", where="pruner")
        if isinstance(pruner, ScheduledPruner) or pruner.needs_training:
            raise ConflictError(f"{type(pruner).__name__} has a schedule of its own", where="pruner")
        if evaluator is not None and pruner._trainer not in (None, evaluator):
            raise ConflictError(
                "the pruner, or one that it is fused with, has an evaluator already",
                where="evaluator",
                remedy="Leave it out here.",
            )
        others = [item for item in pruner._chain if isinstance(item, ScheduledPruner)]
        if others and (in_rounds or any(other.interval_steps is None for other in others)):
            raise ConflictError(
                f"{others[0].title} is fused with it, and one of both prunes in rounds of its own",
                where="pruner",
                remedy="Give both interval_steps: they then prune within one training run.",
            )

    # What the pruner is asked in the schedule's place.

    @classmethod
    def from_compressor(
        cls,
        compressor: Compressor,
        config_list: ConfigList,
        *args: Any,
        evaluator: Evaluator | None = None,
        **kwargs: Any,
    ) -> Self:
        """Not this way: make the pruner from the other compressor, and the schedule of it.

        Raises:
            ConflictError: always.
        """
        raise ConflictError(
            f"{cls.__name__} is made of a pruner",
            where="from_compressor",
            remedy=f"{cls.__name__}(L1NormPruner.from_compressor(compressor, config_list), ...).",
        )

    def share(self) -> None:
        """Take over the pruner's plan and wrappers."""
        self.plan, self.wrappers = self.pruner.plan, self.pruner.wrappers

    @property
    def title(self) -> str:
        """The schedule over its pruner."""
        return f"{type(self).__name__}({self.pruner.title})"

    def events(self) -> Iterable[Event]:
        """Each of its prunings."""
        for times in range(1, self.total_times + 1):
            ratios = ", ".join(f"{asked:.3g} -> {self.ratio_at(asked, times):.3g}" for asked in self.pruner.asked())
            if self.interval_steps is None:
                yield Event(f"round {times}: prunes, {ratios}; then trains")
            else:
                yield Event(f"prunes, {ratios}", times * self.interval_steps)

    def own_masks(self) -> Masks:
        """The pruner's."""
        return self.pruner.own_masks()

    def gather(self) -> None:
        """The pruner's."""
        self.pruner.gather()

    def collect(self) -> Mapping[str, Tensor]:
        """The pruner's."""
        return self.pruner.collect()

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The pruner's."""
        return self.pruner.score(values, blocks)

    def importance(self) -> Mapping[str, Tensor]:
        """The pruner's."""
        return self.pruner.importance()

    def prune(self, ratio_now: RatioNow = as_asked) -> None:
        """The pruner's."""
        self.pruner.prune(ratio_now)

    def _apply(self, masks: dict[str, dict[str, Tensor]]) -> None:
        self.pruner._apply(masks)
