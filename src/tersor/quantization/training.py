"""The base of quantizers whose rounding takes part in the training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tersor.compressor import Compressor
from tersor.config import values
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import ConflictError
from tersor.quantization.base import Quantizer, spec_of
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.timeline import Event


class TrainingQuantizer(Quantizer):
    """Base of quantizers whose rounding takes part in the training.

    It knows when each target begins to be rounded.

    Args:
        model: the model; it is wrapped in place.
        config_list: what is quantized and how; an entry's ``quant_start_step`` stands for the argument.
        evaluator: how the model is trained; or use a loop of your own.
        quant_start_step: how many optimizer steps pass before values are rounded.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        InvalidValueError: a number out of its range.

    Attributes:
        steps: how many optimizer steps there have been.
        keeps_scales: whether the next training begins with the scales that are there, and does not look for new ones.
    """

    needs_training = True
    keeps_scales: bool = False

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        quant_start_step: int = 0,
        *,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("quant_start_step"):
            self.quant_start_step = values.whole(quant_start_step, "number of steps", low=0)
        self.steps = 0
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def due(self, target: PlannedTarget) -> bool:
        """Whether a target is rounded by now."""
        own = self.plan.entries[target.config.entry_index].quant_start_step
        return self.steps >= (self.quant_start_step if own is None else own)

    def events(self) -> Iterable[Event]:
        """It rounds from some step on."""
        begins: dict[int, int] = {}
        for target in self._quantized():
            own = self.plan.entries[target.config.entry_index].quant_start_step
            step = self.quant_start_step if own is None else own
            begins[step] = begins.get(step, 0) + 1
        for step, count in begins.items():
            yield Event(f"rounds {count} targets, {self.types()}", step, every=1)

    @torch.no_grad()
    def look_at_parameters(self) -> None:
        """Compute every simulated parameter once, for the transforms on it that watch."""
        for wrapper in self.wrappers.by_module.values():
            for name in wrapper.stacks:
                if not is_activation(name):
                    getattr(wrapper.module, name)

    def on_start(self) -> None:
        """Count from here."""
        self.steps, self.unreached = 0, frozenset()

    def on_step(self) -> None:
        """Count."""
        self.steps += 1

    def own_state(self) -> dict[str, Any]:
        """The state of each simulation, and how many steps there have been."""
        return {**super().own_state(), "steps": self.steps}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`own_state` was asked."""
        super().load_own_state(state)
        self.steps = state["steps"]

    def _refuse_observer(self, target: PlannedTarget, *used: str) -> None:
        """Refuse an observer that would do nothing.

        Raises:
            ConflictError: one is asked for that is not among those used.
        """
        asked = spec_of(target).observer
        if asked not in (None, *used):
            raise ConflictError(
                f"{type(self).__name__} finds ranges while it trains, and does not use {asked!r}",
                where=f"{target.config.where}['observer'] on {target.name}",
                remedy="Leave it out.",
            )
