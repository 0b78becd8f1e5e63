"""What the suite of distillers is made of: a student and a teacher, alone, fused, in a loop of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.distillation import Distiller
from tersor.pruning import FixedPruner
from tersor.testing.checks import Masks, values_of
from tersor.testing.lifecycle import Entry, Way
from tersor.testing.toys import BATCHES, EXAMPLE, Batch, ToyNetwork, ToyQuantizer, ToyTraining, calm
from tersor.training import Evaluator

TEACHER = 7
"""The seed of the teacher; students have others, where they are not to be like it."""


@dataclass(frozen=True)
class Distilling:
    """One network that is being distilled.

    Attributes:
        model: the student, wrapped.
        teacher: who teaches it.
        training: how it is trained.
        distiller: the one under test.
    """

    model: nn.Module
    teacher: nn.Module
    training: ToyTraining
    distiller: Distiller

    @property
    def compressor(self) -> Distiller:
        """The distiller."""
        return self.distiller

    def loss(self, batch: Batch) -> Tensor:
        """What the distiller alone adds, after a forward pass."""
        return self.distiller.loss(self.model(batch[0]).sum() * 0, batch)

    def mean_loss(self) -> float:
        """The same over all batches, in eval mode; the mode is as before."""
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            losses = [self.loss(batch).item() for batch in self.training.batches]
        self.model.train(training)
        return sum(losses) / len(losses)

    def result(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """What was learned beside the student; and what the student holds once it is unwrapped."""
        learned = tensors_in(self.distiller.state_dict(), "learned")
        self.distiller.unwrap_model()
        parameters = dict(self.model.named_parameters())
        return learned | {name: of for name, of in values_of(self.model).items() if buffers or name in parameters}


class DistillationScenarios(ABC):
    """A distiller that is tested, and what is done with it.

    Attributes:
        has_teacher: whether it is drawn to one, which all tests of a teacher need.
        distance: whether its loss is a distance: never less than 0, and 0 where the student is the teacher.
        agrees: whether its loss is least where the student is the teacher; not where it begins with a projection,
            between other widths, that knows nothing yet.
        exact: whether the gradient is that of the loss; not where parts of it are held fixed on purpose.
        modules: whose values are looked at, of ``stem``, ``left``, ``right`` (convolutions), ``hidden``, ``head``.
        targets: of each of them, ``_output_0`` or ``_input_0``.
        setting: keys of each entry of the config list: its links and its method.
        steps: of training.
        falls: to which share of what it was the loss falls at least, in 20 steps.
        tolerance: the largest loss where the student is the teacher, relative to that of a student that is not.
        batches: inputs and classes; each of two processes has half of them.
    """

    has_teacher: bool = True
    distance: bool = True
    agrees: bool = True
    exact: bool = True
    modules: tuple[str, ...] = ("left", "hidden")
    targets: tuple[str, ...] = ("_output_0",)
    setting: Mapping[str, Any] = MappingProxyType({})
    steps: int = 6
    falls: float = 0.9
    tolerance: float = 1e-6
    batches: tuple[Batch, ...] = BATCHES

    @abstractmethod
    def distiller(
        self,
        model: nn.Module,
        config_list: list[Entry],
        evaluator: Evaluator | None,
        teacher: nn.Module | None,
        **kwargs: Any,
    ) -> Distiller:
        """The distiller that is tested.

        Args:
            model: a small network, the student.
            config_list: what is looked at.
            evaluator: how it is trained; None for a training loop of one's own, or where ``previous`` has one.
            teacher: a network that is built alike; None where a test looks at what becomes of that.
            **kwargs: ``example_inputs`` or ``previous``, for the constructor.
        """

    def _config(self) -> list[Entry]:
        return [{"op_names": list(self.modules), "target_names": list(self.targets), **self.setting}]

    @contextmanager
    def _distilling(
        self,
        way: Way = "evaluator",
        *,
        seed: int = 0,
        rank: int | None = None,
        alone: bool = False,
        prepare: Callable[[nn.Module], object] = lambda model: None,
    ) -> Iterator[Distilling]:
        """A student that has just been wrapped, and is unwrapped in the end.

        Args:
            way: whether there is an evaluator.
            seed: of the student.
            rank: which of two processes this is: each has batches, and a seed of torch, of its own.
            alone: whether nothing but the distiller gives a loss.
            prepare: is done to student and teacher first.
        """
        with calm(0 if rank is None else rank):
            model, teacher = ToyNetwork(seed), ToyNetwork(TEACHER)
            for network in (model, teacher):
                prepare(network)
            batches = self.batches if rank is None else BATCHES[rank::2]
            dtype = next(model.parameters()).dtype
            batches = tuple((images.to(dtype), classes) for images, classes in batches)
            training = ToyTraining(model, batches, _nothing if alone else F.cross_entropy)
            evaluator = training.evaluator if way == "evaluator" else None
            distiller = self.distiller(model, self._config(), evaluator, teacher, example_inputs=EXAMPLE.to(dtype))
            try:
                yield Distilling(model, teacher, training, distiller)
            finally:
                distiller.unwrap_model()

    @contextmanager
    def _fused(self, *, first: bool) -> Iterator[tuple[Distilling, Masks]]:
        """The distiller with a pruner and a quantizer of what it looks at, made first or last of the three."""
        with calm(seed=0):
            model, teacher, masks = ToyNetwork(), ToyNetwork(TEACHER), self._masks()
            training = ToyTraining(model, self.batches)
            quantized = [{"op_names": list(self.modules), "target_names": list(self.targets)}]
            if first:
                distiller = self.distiller(model, self._config(), training.evaluator, teacher, example_inputs=EXAMPLE)
                FixedPruner(model, masks, previous=ToyQuantizer.from_compressor(distiller, quantized))
            else:
                pruner = FixedPruner(model, masks, training.evaluator, example_inputs=EXAMPLE)
                quantizer = ToyQuantizer.from_compressor(pruner, quantized)
                distiller = self.distiller(model, self._config(), None, teacher, previous=quantizer)
            try:
                yield Distilling(model, teacher, training, distiller), masks
            finally:
                distiller.unwrap_model()

    def _masks(self) -> Masks:
        """Every other channel or feature of what is looked at."""
        seen: dict[str, dict[str, Tensor]] = {}
        model = ToyNetwork()
        for name in self.modules:

            def look(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                for target in self.targets:
                    value = output if target == "_output_0" else args[0]
                    kept = torch.arange(value.shape[1]) % 2 == 0
                    seen.setdefault(name, {})[target] = kept.reshape(1, -1, *[1] * (value.dim() - 2))

            model.get_submodule(name).register_forward_hook(look)
        model(EXAMPLE)
        for module in model.modules():
            module._forward_hooks.clear()
        return seen


def tensors_in(state: Any, name: str) -> dict[str, Tensor]:
    """Copies of all tensors in mappings and sequences, by where they lie.

    >>> tensors_in({"a": [torch.ones(1)], "b": 2}, "x")
    {'x.a.0': tensor([1.])}
    """
    if isinstance(state, Tensor):
        return {name: state.detach().clone()}
    pairs: Sequence[tuple[Any, Any]] = (
        list(state.items())
        if isinstance(state, Mapping)
        else list(enumerate(state))
        if isinstance(state, list | tuple)
        else []
    )
    return {key: tensor for part, own in pairs for key, tensor in tensors_in(own, f"{name}.{part}").items()}


def _nothing(outputs: Tensor, classes: Tensor) -> Tensor:
    return outputs.sum() * 0
