"""ADMM pruning: training draws the weights towards their own pruned selves before they are pruned."""

from __future__ import annotations

from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import PruningSpec
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import ConflictError, InvalidValueError
from tersor.pruning.decision import decide
from tersor.pruning.learning import LearningPruner
from tersor.pruning.scores import block_norm
from tersor.targets.choices import choices
from tersor.targets.granularity import Blocks
from tersor.targets.planned import ELEMENTS, OUT_CHANNEL, PlannedTarget
from tersor.training import Evaluator


@final
class ADMMPruner(LearningPruner):
    r"""Trains with a penalty that draws each weight to the nearest pruned one, then prunes.

    "Train so that W is sparse" is split in two by the alternating direction method of multipliers: the loss is
    minimised over W, with the penalty :math:`\frac{\rho}{2} \lVert W - Z + U \rVert_F^2`; then Z becomes the projection
    of W + U onto what the config list allows (the weakest blocks zero), and U grows by W - Z. After ``iterations``
    rounds of ``training_steps`` steps W is nearly sparse, and little is lost when its weakest blocks leave for good.

    Paper: Zhang, Ye, Zhang, Tang, Wen, Fardad, Wang: A Systematic DNN Weight Pruning Framework using Alternating
    Direction Method of Multipliers (ECCV 2018).

    Args:
        model: the model; it is wrapped in place.
        config_list: parameters with ``sparse_ratio``, and ``rho`` where one needs another than the rest.
        evaluator: how the model is trained; without one see :class:`tersor.pruning.learning.LearningPruner`.
        iterations: rounds of training and projection.
        training_steps: optimizer steps of each.
        granularity: ``fine-grained`` prunes single elements, ``coarse-grained`` output channels, where the config list
            says nothing.
        rho: weight of the penalty.
        restores: whether the weights are put back before they are pruned, which would make all of this void.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: an input or output decides by itself: there is nothing to draw towards anything.
        InvalidValueError: an unknown granularity, or a number that is not positive.
    """

    penalizes = True
    restores_by_default = False

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None = None,
        iterations: int = 3,
        training_steps: int = 100,
        granularity: Literal["fine-grained", "coarse-grained"] = "fine-grained",
        *,
        rho: float = 1e-4,
        restores: bool | None = None,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        defaults = {"fine-grained": ELEMENTS, "coarse-grained": OUT_CHANNEL}
        if granularity not in defaults:
            raise InvalidValueError(f"{granularity!r} is unknown.", where="granularity", legal=map(repr, defaults))
        if not isinstance(iterations, int) or iterations < 1:
            raise InvalidValueError(
                f"{iterations!r} is no number of iterations.", where="iterations", legal=("1, 2, ...",)
            )
        if not rho > 0:
            raise InvalidValueError(f"{rho!r} is no weight of a penalty.", where="rho", legal=("a number above 0",))
        self.default_granularity = defaults[granularity]
        self.iterations = iterations
        self.rho = rho
        self._auxiliary: dict[str, Tensor] = {}
        self._dual: dict[str, Tensor] = {}
        super().__init__(
            model,
            config_list,
            evaluator,
            training_steps,
            restores=restores,
            example_inputs=example_inputs,
            previous=previous,
        )

    @property
    def watched_steps(self) -> int:
        """All rounds together."""
        return self.iterations * self.training_steps

    def begin(self) -> None:
        """Z is the projection of W, U is zero."""
        self._auxiliary = self._projected({target.name: self._latent(target) for target in self._scored()})
        self._dual = {name: torch.zeros_like(auxiliary) for name, auxiliary in self._auxiliary.items()}

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """The loss and the penalty, while steps are watched."""
        if not self.collecting:
            return loss
        for target in self._scored():
            weight = self.wrappers[target.config.module_name].tensor(target.config.target_name)
            distance = weight - self._auxiliary[target.name] + self._dual[target.name]
            loss = loss + self._rho(target) / 2 * distance.square().sum()
        return loss

    def observe(self) -> None:
        """Nothing: the weights are looked at when a round is over."""

    def on_step(self) -> None:
        """After each round, project and grow the dual."""
        if self.collecting and (self._watched + 1) % self.training_steps == 0:
            with torch.no_grad():
                weights = {target.name: self._latent(target) for target in self._scored()}
                shifted = {name: weight + self._dual[name] for name, weight in weights.items()}
                self._auxiliary = self._projected(shifted)
                self._dual = {name: value - self._auxiliary[name] for name, value in shifted.items()}
        super().on_step()

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """L2 norm of each block: what a projection that zeroes the lowest keeps most of."""
        return block_norm(values, blocks, p=2)

    def own_state(self) -> dict[str, Any]:
        """The masks, the progress, Z and U."""
        return {**super().own_state(), "auxiliary": self._auxiliary, "dual": self._dual}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on from Z and U."""
        super().load_own_state(state)
        self._auxiliary, self._dual = dict(state["auxiliary"]), dict(state["dual"])

    def _wrap_targets(self) -> None:
        for target in self._scored():
            if is_activation(target.config.target_name):
                raise ConflictError(
                    "an input or output has no latent value that training could draw towards a pruned one",
                    where=f"{target.config.where} on {target.name}",
                    remedy="Prune the weight, or let the output follow it by align.",
                )
        super()._wrap_targets()

    def _rho(self, target: PlannedTarget) -> float:
        spec = target.config.spec
        return spec.rho if isinstance(spec, PruningSpec) and spec.rho is not None else self.rho

    @torch.no_grad()
    def _projected(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The nearest values that the config list allows."""
        blocks = {target.name: target.blocks for target in self._scored() if target.blocks is not None}
        keep = decide(choices(self.plan.targets), {name: self.score(values[name], of) for name, of in blocks.items()})
        return {name: values[name] * of.expand_compact(keep[name].view(of.grid)) for name, of in blocks.items()}
