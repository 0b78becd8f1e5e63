"""The base of all distillers: what the student's targets held in the last forward pass, and a loss on it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.training.timeline import Event
from tersor.wrapping import Stage, Transform


class Observer(Transform):
    """Remembers the last value of a target, behind fake quantization and mask, with its gradient."""

    stage = Stage.OBSERVE

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "value": None}  # torch copies no tensor that has a history

    def forward(self, value: Tensor) -> Tensor:
        """The value, untouched."""
        self.value = value
        return value


class Distiller(Compressor):
    """Base of all distillers. A new one says what the observed values cost, in one file.

    ``compress()`` returns the model, which stays wrapped.
    """

    mode = "distillation"
    needs_training = True
    works_on_shards = True

    @abstractmethod
    def distillation_loss(self, observed: Mapping[str, Tensor], batch: Any) -> Tensor:
        """What is added to the user's loss.

        Args:
            observed: ``module.target`` to the value that it had in this forward pass.
            batch: as the training loop got it.
        """

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The user's loss and the distillation loss."""
        return loss + self.distillation_loss(self.observed(), batch)

    def observed(self) -> dict[str, Tensor]:
        """The values of this forward pass; targets that it did not reach are left out."""
        values: dict[str, Tensor] = {}
        for planned in self.plan.targets:
            transform = self.wrappers[planned.config.module_name].stack(planned.config.target_name).find(Stage.OBSERVE)
            assert isinstance(transform, Observer)
            if transform.value is not None:
                values[planned.name] = transform.value
                transform.value = None
        return values

    def events(self) -> Iterable[Event]:
        """It adds to each loss."""
        yield Event(f"adds what {len(self.plan.targets)} targets are apart from the teacher", 0, every=1)

    def result(self) -> nn.Module:
        """The wrapped model."""
        return self.model

    def _wrap_targets(self) -> None:
        for planned in self.plan.targets:
            self.wrappers[planned.config.module_name].stack(planned.config.target_name).add(Observer())
