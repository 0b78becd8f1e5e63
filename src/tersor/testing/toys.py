"""Toys that conformance suites work with: a network, its data and training, a quantizer and a distiller."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.compressor import Compressor
from tersor.config.parse import ConfigList
from tersor.distillation import Distiller
from tersor.quantization import FakeQuantize, Quantizer, straight_through
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator, TorchEvaluator
from tersor.training.ranks import mean_over_processes

Batch = tuple[Tensor, Tensor]


def _batches(count: int, size: int, seed: int) -> tuple[Batch, ...]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count * size, 2, 4, 4, generator=generator)
    return tuple(zip(images.split(size), (torch.arange(count * size) % 3).split(size), strict=True))


BATCHES = _batches(count=4, size=8, seed=0)
"""What :class:`ToyNetwork` is trained on."""
EXAMPLE, FRESH = (_batches(count=1, size=size, seed=size)[0][0] for size in (2, 5))
"""What it is traced with, and what nothing has seen before, at another batch size."""


@final
class ToyNetwork(nn.Module):
    """A residual convolutional network of 1,181 parameters, no two of them alike.

    Channels of ``left`` (6) and features of ``hidden`` (10) leave each by itself, those of ``stem`` and ``right`` (8)
    only together; ``head`` is the model's output.

    Args:
        seed: of all values.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem, self.stem_norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.left, self.left_norm = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.right = nn.Conv2d(6, 8, 3, padding=1)
            self.hidden, self.head = nn.Linear(8, 10), nn.Linear(10, 3)
            for norm in (self.stem_norm, self.left_norm):
                for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    if tensor is not None:
                        nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """Three scores for each image."""
        x = self.stem_norm(self.stem(x)).relu()
        x = x + self.right(self.left_norm(self.left(x)).relu())
        return self.head(self.hidden(x.relu().mean((2, 3))).relu())


@final
class Halves(nn.Module):
    """Cuts features in two, and gives the halves by name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``low`` and ``high``."""
        low, high = x.chunk(2, -1)
        return {"low": low, "high": high}


@final
class ToyHalves(nn.Module):
    """A network of 51 parameters in which a module, ``halves``, gives its outputs by name.

    Args:
        seed: of all values.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.halves, self.head = Halves(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Three scores for each image."""
        halves = self.halves(x=x.flatten(1))
        return self.head(halves["low"] - halves["high"])


@final
class ToyTraining:
    """Gradient descent over the same batches in the same order, for an evaluator or as a loop of one's own.

    Where several processes train, each on batches of its own, gradients are averaged.

    Args:
        model: the model.
        batches: inputs and classes.
        loss_fn: of the model's outputs and the classes.

    Attributes:
        optimizer: SGD with momentum.
        evaluator: trains with :meth:`run`.
        runs: the losses of each run so far.
        before_each: is called before each step.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch] = BATCHES,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> None:
        self.model, self.batches, self.loss_fn = model, tuple(batches), loss_fn
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        self.evaluator = TorchEvaluator(
            self.run, self.optimizer, self.training_step, dummy_input=EXAMPLE, progress=False
        )
        self.runs: list[list[float]] = []
        self.before_each: Callable[[], object] = lambda: None

    def training_step(self, batch: Batch, model: nn.Module) -> Tensor:
        """The loss on a batch."""
        return self.loss_fn(model(batch[0]), batch[1])

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        training_step: Callable[..., Tensor],
        lr_schedulers: Any,
        max_steps: int | None,
        max_epochs: int | None,
    ) -> None:
        """What the evaluator calls."""
        steps = max_steps if max_steps is not None else (max_epochs or 1) * len(self.batches)
        model.train()
        self.runs.append([])
        for batch in islice(cycle(self.batches), steps):
            self.before_each()
            optimizer.zero_grad()
            loss = training_step(batch, model)
            loss.backward()
            self._average()
            optimizer.step()
            self.runs[-1].append(loss.item())

    def step(self, compressor: Compressor, number: int) -> None:
        """Step ``number``, from 0, of a training loop of one's own; :class:`Compressor` says what is called in it."""
        batch = self.batches[number % len(self.batches)]
        self.model.train()
        self.optimizer.zero_grad()
        compressor.loss(self.training_step(batch, self.model), batch).backward()
        self._average()
        compressor.before_step()
        self.optimizer.step()
        compressor.step()

    def save(self, compressor: Compressor) -> bytes:
        """What a run that may crash keeps."""
        file = io.BytesIO()
        objects = {"compressor": compressor, "model": self.model, "optimizer": self.optimizer}
        torch.save({name: of.state_dict() for name, of in objects.items()}, file)
        return file.getvalue()

    def load(self, compressor: Compressor, saved: bytes) -> None:
        """Go on from there, with a compressor that was made in the same way."""
        state = torch.load(io.BytesIO(saved), weights_only=True)
        compressor.load_state_dict(state["compressor"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _average(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad = mean_over_processes(parameter.grad)


@final
class MidRise(FakeQuantize):
    """Rounds to the middle of steps of an eighth: no value but a masked one is zero behind it."""

    def forward(self, value: Tensor) -> Tensor:
        """The middle of the step that each value lies in."""
        return straight_through(value, ((value * 8).floor() + 0.5) / 8)

    def calibration(self) -> dict[str, Any]:
        """The width of a step."""
        return {"scale": 0.125}

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Nothing: steps are an eighth."""


@final
class ToyQuantizer(Quantizer):
    """Quantizes every target by :class:`MidRise`."""

    def fake_quantize(self, target: PlannedTarget) -> FakeQuantize:
        """Steps of an eighth."""
        return MidRise()


@final
class ToyDistiller(Distiller):
    """Draws every observed value to zero.

    Attributes:
        losses: what was added to the user's loss, call by call.
    """

    def __init__(
        self, model: nn.Module, config_list: ConfigList, evaluator: Evaluator | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, config_list, evaluator, **kwargs)
        self.losses: list[float] = []

    def distillation_loss(self, observed: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The sum over targets of their mean squares."""
        loss = torch.stack([value.square().mean() for value in observed.values()]).sum()
        self.losses.append(loss.item())
        return loss


@contextmanager
def calm(seed: int) -> Iterator[None]:
    """A seed of its own, and one thread: with so little to compute, several would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
