"""A trainable projection between values of different widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from tersor.errors import TrainingError
from tersor.training.learned import Learned, Learner
from tersor.training.ranks import of_first_process


@final
class Projections:
    """Linear maps by name, made when they are first needed, learned by an Adam of their own.

    A map works along the one dimension in which student and teacher differ. Each process begins with the same.

    Args:
        learning_rate: of Adam.
        seed: of the first values, which are drawn as those of ``nn.Linear``.
        identity: begin with the identity where both widths are equal.
    """

    def __init__(self, learning_rate: float, *, seed: int = 0, identity: bool = False) -> None:
        self.learning_rate, self.seed, self.identity = learning_rate, seed, identity
        self._learners: dict[str, Learner] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._learners

    def apply(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's value, as wide as the teacher's.

        Args:
            name: whose map it is.
            student: its value.
            teacher: of the same shape but for one dimension at the most.

        Raises:
            TrainingError: the shapes differ in more.
        """
        dim = differing(student, teacher, name)
        if dim is None and not self.identity:
            return student
        dim = student.dim() - 1 if dim is None else dim
        if name not in self._learners:
            self._learners[name] = self._made(name, teacher.shape[dim], student.shape[dim], student)
        weight, bias = (self._learners[name].learned[key].to(student.device).value for key in ("weight", "bias"))
        moved = student.movedim(dim, -1) @ weight.to(student.dtype).T + bias.to(student.dtype)
        return moved.movedim(-1, dim)

    def _made(self, name: str, wide: int, narrow: int, like: Tensor) -> Learner:
        draws = torch.Generator().manual_seed(self.seed + len(self._learners))
        bound = 1 / math.sqrt(narrow)
        weight, bias = (
            torch.empty(*shape).uniform_(-bound, bound, generator=draws) for shape in ((wide, narrow), (wide,))
        )
        if self.identity and wide == narrow:
            weight, bias = torch.eye(wide), torch.zeros(wide)
        return self._learner({"weight": weight, "bias": bias}, like.device)

    def _learner(self, values: Mapping[str, Tensor], device: torch.device) -> Learner:
        learned = {key: Learned(of_first_process(value.to(device))) for key, value in values.items()}
        learner = Learner(learned, self.learning_rate)
        learner.start()
        return learner

    def step(self) -> None:
        """One step of each."""
        for learner in self._learners.values():
            learner.step()

    def stop(self) -> None:
        """Learn no more."""
        for learner in self._learners.values():
            learner.stop()

    def start(self) -> None:
        """Learn again."""
        for learner in self._learners.values():
            learner.start()

    def state(self) -> dict[str, Any]:
        """What is learned, and what Adam remembers."""
        return {name: learner.state() for name, learner in self._learners.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        for name, own in state.items():
            if name not in self._learners:
                self._learners[name] = self._learner(own["values"], own["values"]["weight"].device)
            self._learners[name].load_state(own)


def differing(student: Tensor, teacher: Tensor, name: str) -> int | None:
    """The dimension in which two values differ; None where they are of one shape.

    >>> differing(torch.zeros(2, 8, 5), torch.zeros(2, 16, 5), "conv._output_0")
    1

    Raises:
        TrainingError: they differ in more than one, or in the number of samples.
    """
    if student.dim() == teacher.dim():
        dims = [dim for dim in range(student.dim()) if student.shape[dim] != teacher.shape[dim]]
        if not dims:
            return None
        if len(dims) == 1 and dims[0] > 0:
            return dims[0]
    raise TrainingError(
        f"shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ in more than their width",
        where=name,
        remedy="Link to a layer at the same place: as many samples, tokens and positions.",
    )
