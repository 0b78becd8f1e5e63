"""What the suite of pruners is made of: a network that is pruned alone, fused, scheduled, in a loop of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from unittest import SkipTest

from torch import Tensor, nn

from tersor.pruning import AGPPruner, LinearPruner, Pruner
from tersor.pruning.schedule import ScheduledPruner
from tersor.testing.checks import assert_exact, decided, flat, mask_of, removed, values_of
from tersor.testing.lifecycle import AfterEach, Entry, Way, assert_goes_on, nothing, run_loop
from tersor.testing.toys import BATCHES, EXAMPLE, Batch, ToyDistiller, ToyNetwork, ToyQuantizer, ToyTraining, calm
from tersor.training import Evaluator

Schedule = Callable[[Pruner], ScheduledPruner]
RATIO = 0.75
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Pruning:
    """One network that is being pruned.

    Attributes:
        model: the network, wrapped.
        training: how it is trained.
        pruner: the one under test, or the schedule over it.
    """

    model: nn.Module
    training: ToyTraining
    pruner: Pruner

    @property
    def compressor(self) -> Pruner:
        """The pruner."""
        return self.pruner

    def history(self) -> list[int]:
        """A list that will hold, for each step of training, how many elements of the targets were masked before it."""
        seen: list[int] = []

        def look() -> None:
            masks = self.pruner.get_masks()
            seen.append(sum(removed(mask_of(masks, target)) for target in decided(self.pruner)))

        self.training.before_each = look
        return seen

    def result(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """The masks, and what the model holds once it is unwrapped."""
        masks = {f"mask of {name}": mask for name, mask in flat(self.pruner.get_masks()).items()}
        self.pruner.unwrap_model()
        parameters = dict(self.model.named_parameters())
        return masks | {name: of for name, of in values_of(self.model).items() if buffers or name in parameters}


class PruningScenarios(ABC):
    """A pruner that is tested, and what is done with it.

    Attributes:
        learns: whether it changes weights: it trains for itself, or corrects those that stay.
        trains: whether ``compress`` must be given a length, because masks are made while the model trains.
        steps: of training, after which the masks are there: the length for ``compress``, and of a loop of one's own.
            More than it asks for is well.
        needs_evaluator: whether it cannot do without one, not even in a training loop of one's own.
        schedulable: whether :class:`tersor.pruning.LinearPruner` and the like can be put over it.
        modules: what is pruned, of ``left`` (a convolution), ``left_norm`` (behind it) and ``hidden`` (a linear layer).
        joined: two modules that a dependency group makes leave together; empty where it cannot.
        channels: keys of an entry of the config list with which it removes whole output channels; None where it cannot.
        groups: whether it ranks targets against each other, as a global group asks.
        tolerance: the largest difference of an output, relative to the largest output.
        batches: inputs and classes, for a pruner that is given data; each of two processes has half of them.
    """

    learns: bool = False
    trains: bool = False
    steps: int = 6
    needs_evaluator: bool = False
    schedulable: bool = True
    modules: tuple[str, ...] = ("left", "hidden")
    joined: tuple[str, ...] = ("stem", "right")
    channels: Mapping[str, Any] | None = NOTHING
    groups: bool = True
    tolerance: float = 1e-5
    batches: tuple[Batch, ...] = BATCHES

    @abstractmethod
    def pruner(self, model: nn.Module, config_list: list[Entry], evaluator: Evaluator | None, **kwargs: Any) -> Pruner:
        """The pruner that is tested, set for few steps.

        Args:
            model: a small network.
            config_list: what is pruned.
            evaluator: how it is trained; None for a training loop of one's own, or where ``previous`` has one.
            **kwargs: ``example_inputs`` or ``previous``, for the constructor.
        """

    @property
    def _may_learn(self) -> bool:
        return self.learns or self.trains

    def _config(self, ratio: float = RATIO, **keys: Any) -> list[Entry]:
        return [{"op_names": list(self.modules), "sparse_ratio": ratio, **keys}]

    def _by_channels(self, **keys: Any) -> list[Entry]:
        if self.channels is None:
            raise SkipTest("it removes no whole channels")
        return self._config(**self.channels, **keys)

    def _schedules(self, **kwargs: Any) -> list[Schedule]:
        if not self.schedulable:
            raise SkipTest("no schedule can be put over it")
        return [lambda pruner, made=made: made(pruner, **kwargs) for made in (LinearPruner, AGPPruner)]

    @contextmanager
    def _pruning(
        self,
        config_list: list[Entry],
        way: Way = "evaluator",
        *,
        seed: int = 0,
        rank: int | None = None,
        schedule: Schedule | None = None,
    ) -> Iterator[Pruning]:
        """A network that has just been wrapped, and is unwrapped in the end.

        Args:
            config_list: what is pruned.
            way: whether there is an evaluator.
            seed: of the network, and of torch.
            rank: which of two processes this is: each has batches, and a seed of torch, of its own.
            schedule: what is put over the pruner.
        """
        with calm(seed if rank is None else rank):
            model = ToyNetwork(seed)
            if rank is not None:
                self.batches = BATCHES[rank::2]
            training = ToyTraining(model, self.batches)
            evaluator = training.evaluator if way == "evaluator" or self.needs_evaluator else None
            pruner = self.pruner(model, config_list, evaluator, example_inputs=EXAMPLE)
            try:
                yield Pruning(model, training, pruner if schedule is None else schedule(pruner))
            finally:
                pruner.unwrap_model()

    @contextmanager
    def _pruned(self, config_list: list[Entry]) -> Iterator[Pruning]:
        """A network that has been compressed."""
        with self._pruning(config_list) as pruning:
            self._compress(pruning.pruner)
            yield pruning

    @contextmanager
    def _fused(self, *, first: bool) -> Iterator[tuple[Pruning, ToyDistiller]]:
        """The pruner with a quantizer and a distiller, made first or last of the three."""
        with calm(seed=0):
            model = ToyNetwork()
            training = ToyTraining(model)
            quantized = [{"op_names": list(self.modules), "target_names": ["weight", "_output_0"]}]
            distilled = [{"op_names": list(self.modules)}]
            if first:
                pruner = self.pruner(model, self._config(), training.evaluator, example_inputs=EXAMPLE)
                quantizer = ToyQuantizer.from_compressor(pruner, quantized)
                distiller = ToyDistiller.from_compressor(quantizer, distilled)
            else:
                distiller = ToyDistiller(model, distilled, training.evaluator, example_inputs=EXAMPLE)
                quantizer = ToyQuantizer.from_compressor(distiller, quantized)
                pruner = self.pruner(model, self._config(), None, previous=quantizer)
            try:
                yield Pruning(model, training, pruner), distiller
            finally:
                pruner.unwrap_model()

    def _compress(self, pruner: Pruner) -> None:
        pruner.compress(max_steps=self.steps if self.trains else None)

    def _loop(self, pruning: Pruning, numbers: range, after_each: AfterEach = nothing) -> None:
        """A training loop of one's own, with masks at its end."""
        run_loop(pruning, numbers, after_each)
        assert_exact(pruning.pruner, RATIO)

    def _assert_goes_on(self, steps: int, crashes: list[int], schedule: Schedule | None = None) -> None:
        """A loop that ends after some of its steps and goes on in objects that are made anew comes to the same."""
        assert_goes_on(
            lambda seed: self._pruning(self._config(), "loop", seed=seed, schedule=schedule), self._loop, steps, crashes
        )
