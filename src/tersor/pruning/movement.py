"""Movement pruning: blocks whose weights move towards zero while the model is fine-tuned leave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config import PruningSpec, values
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import ConflictError, TrainingError
from tersor.pruning.base import Pruner
from tersor.pruning.decision import Setting
from tersor.targets.granularity import Blocks
from tersor.targets.planned import PlannedTarget
from tersor.training import Evaluator
from tersor.training.learned import Learned, Learner, put_on
from tersor.training.timeline import Event
from tersor.wrapping import Mask


@final
class MovementPruner(Pruner):
    r"""Removes the blocks (by default output channels) of least learned score, a few more after each step of training.

    The forward pass uses masked weights :math:`W' = W \odot M(S)`; the gradient goes straight through the mask to the
    score of each block :math:`b`, whether it is masked or not:

    .. math:: \frac{\partial L}{\partial S_b} = \sum_{i \in b} \frac{\partial L}{\partial W'_i} W_i

    So a score falls where weights move towards zero, and a block that was masked can come back. A ratio grows from 0
    after ``warmup_step`` steps to the whole at ``cooldown_begin_step``, by :math:`1 - (1 - t)^3`; then the model
    recovers, while scores go on. With ``sparse_threshold`` in place of a ratio (soft movement pruning) blocks of
    :math:`\sigma(S)` below the threshold leave, and :math:`\lambda` times the mean over targets of the mean of
    :math:`\sigma(S)` is added to the loss; threshold and penalty grow by the same schedule.

    Use it where a pretrained model is fine-tuned on a task of its own: what the weights do there says more than what
    they are. Heads of attention leave whole with ``granularity: [head size, -1]``, or with ``example_inputs``. Until
    ``cooldown_begin_step`` only the targets themselves are masked, since no gradient reaches a channel that nothing
    reads; from then on also what follows by the graph.

    Paper: Sanh, Wolf, Rush: Movement Pruning: Adaptive Sparsity by Fine-Tuning (NeurIPS 2020); with blocks, Lagunas,
    Charlaix, Sanh, Rush: Block Pruning for Faster Transformers (EMNLP 2021).

    Args:
        model: the model; it is wrapped in place.
        config_list: targets with ``sparse_ratio``, or ``sparse_threshold`` from 0 to 1. Of inputs and outputs
            :math:`W` is what passes.
        evaluator: how the model is trained; None for a training loop of your own.
        warmup_step: optimizer steps before the first block leaves.
        cooldown_begin_step: steps after which the whole ratio has left; the training must reach it.
        regular_scale: :math:`\lambda`, only for thresholds.
        learning_rate: of the scores' own Adam.
        example_inputs: see :class:`tersor.compressor.Compressor`.
        previous: see :meth:`tersor.compressor.Compressor.from_compressor`.

    Raises:
        ConflictError: a target is not multiplied by its mask.
        InvalidValueError: a number out of its range.

    Example:
        >>> layer = nn.Linear(4, 8)
        >>> pruner = MovementPruner(layer, [{"op_types": ["Linear"], "sparse_ratio": 0.5}], None, 5, 20)
        >>> optimizer, x = torch.optim.SGD(layer.parameters(), lr=0.1), torch.randn(16, 4)
        >>> pruner.start()
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     pruner.loss(layer(x)[:, 4:].square().mean() - layer(x)[:, :4].square().mean()).backward()
        ...     pruner.before_step()
        ...     optimizer.step()
        ...     pruner.step()
        >>> pruner.finish()
        >>> pruner.get_masks()[""]["bias"].tolist()  # the loss draws the last four to zero
        [True, True, True, True, False, False, False, False]
    """

    works_on_shards = True
    needs_training = True

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        evaluator: Evaluator | None,
        warmup_step: int,
        cooldown_begin_step: int,
        regular_scale: float = 1.0,
        *,
        learning_rate: float = 1e-2,
        example_inputs: Any = None,
        previous: Compressor | None = None,
    ) -> None:
        with values.at("warmup_step"):
            self.warmup_step = values.whole(warmup_step, "number of steps", 0)
        with values.at("cooldown_begin_step"):
            self.cooldown_begin_step = values.whole(cooldown_begin_step, "number of steps", self.warmup_step + 1)
        with values.at("regular_scale"):
            self.regular_scale = values.number(regular_scale, "weight of a penalty", low=0)
        with values.at("learning_rate"):
            self.learning_rate = values.number(learning_rate, "learning rate", low=0)
        self._steps = 0
        self._decided: Mapping[str, Tensor] = {}
        super().__init__(model, config_list, evaluator, example_inputs=example_inputs, previous=previous)

    def on_start(self) -> None:
        """Begin anew: scores of 0, nothing masked."""
        self.refuse_impossible()
        self._steps, self.completes = 0, False
        for learned in self._learner.learned.values():
            learned.value.detach().zero_()
        self._apply({})
        self._learner.start()

    def on_train(self, max_steps: int | None, max_epochs: int | None) -> bool:
        """Refuse a training that is too short before it begins."""
        if max_steps is not None:
            self._refuse_short(max_steps)
        return False

    def events(self) -> Iterable[Event]:
        """It learns scores, and prunes by them ever more."""
        yield Event("learns scores", 0, self.cooldown_begin_step, 1)
        asked = ", ".join(f"{ratio:.3g}" for ratio in self.asked())
        yield Event(f"prunes, 0 -> {asked}", self.warmup_step + 1, self.cooldown_begin_step, 1)

    def on_loss(self, loss: Tensor, batch: Any) -> Tensor:
        """Add the penalty on the scores of targets with a threshold."""
        soft = [mean.to(loss) for mean in self._soft_means()] if self._learner.learning and self._share else []
        return loss + self.regular_scale * self._share * torch.stack(soft).mean() if soft else loss

    def on_gradients(self) -> None:
        """A step of the scores' Adam."""
        if self._learner.learning:
            self._learner.step()

    def on_step(self) -> None:
        """Mask what the schedule asks for by now."""
        if not self._learner.learning:
            return
        self._steps += 1
        if self._steps == self.cooldown_begin_step:
            self.completes, self._decided = True, {}
        if self._steps > self.warmup_step:
            self.prune(self._by_now)

    def _by_now(self, asked: float, target: PlannedTarget, setting: Setting = "sparse_ratio", /) -> float:
        return asked if setting == "max_sparse_ratio" else asked * self._share

    def on_finish(self) -> None:
        """Scores stay as they are.

        Raises:
            TrainingError: the training ended before the whole ratio had left.
        """
        self._learner.stop()
        self._refuse_short(self._steps)

    def collect(self) -> dict[str, Tensor]:
        """The scores; of targets with a threshold, through the sigmoid.

        Raises:
            TrainingError: none was learned yet.
        """
        if not self._steps:
            raise TrainingError(
                "the scores have not been learned yet, so all blocks are worth the same",
                where="generate_masks",
                remedy="Call compress(max_steps=...).",
            )
        scores = {name: own.value.detach() for name, own in self._learner.learned.items()}
        return {t.name: scores[t.name].sigmoid() if _is_soft(t) else scores[t.name] for t in self._scored()}

    def score(self, values: Tensor, blocks: Blocks) -> Tensor:
        """The values themselves: there is one for each block."""
        return values

    def apply_decision(self, keep: Mapping[str, Tensor]) -> None:
        """Mask anew where another block lives or leaves than before."""
        if self._decided and all(torch.equal(own, self._decided[name]) for name, own in keep.items()):
            return
        super().apply_decision(keep)
        self._decided = dict(keep)

    def own_state(self) -> dict[str, Any]:
        """The masks, the scores and how far the schedule has come."""
        return {**super().own_state(), "steps": self._steps, "learner": self._learner.state()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`own_state` was asked."""
        self._steps = state["steps"]
        self.completes = self._steps >= self.cooldown_begin_step
        self._learner.load_state(state["learner"])
        super().load_own_state(state)

    @property
    def _share(self) -> float:
        return cubic_share(self._steps, self.warmup_step, self.cooldown_begin_step)

    def _soft_means(self) -> list[Tensor]:
        return [self._learner.learned[t.name].value.sigmoid().mean() for t in self._scored() if _is_soft(t)]

    def _refuse_short(self, steps: int) -> None:
        if steps < self.cooldown_begin_step:
            raise TrainingError(
                f"{steps} steps of training are less than {self.cooldown_begin_step}, when the whole ratio has left",
                where="cooldown_begin_step",
                remedy="Train longer, or lower cooldown_begin_step.",
            )

    def _apply(self, masks: dict[str, dict[str, Tensor]]) -> None:
        self._decided = {}  # these may be masks from elsewhere
        super()._apply(masks)

    def _wrap_targets(self) -> None:
        masks: dict[str, MovementMask] = {}
        for target in self._scored():
            _refuse_unmultiplied(target)
            assert target.blocks is not None
            latent = None if is_activation(target.config.target_name) else self._latent(target)
            masks[target.name] = MovementMask(target.name, target.blocks, latent)
        for target in self._scored():
            known = self.wrappers.mask(*target.place)  # another pruner's masks may reach this target by the graph
            masks[target.name].set(known.factors)
            put_on(target, masks[target.name], self.wrappers)
        self._learner = Learner({name: mask.scores for name, mask in masks.items()}, self.learning_rate)
        super()._wrap_targets()


@final
class MovementMask(Mask):
    """A mask through which a gradient reaches the scores that it was made from.

    Args:
        target: for messages.
        blocks: how the target is cut; of an input or output, one sample.
        latent: the parameter, whose device the scores share and whose type, at least float32; None for an input or
            output.
    """

    def __init__(self, target: str, blocks: Blocks, latent: Tensor | None) -> None:
        super().__init__(target)
        self.blocks = blocks
        dtype = torch.float32 if latent is None else torch.promote_types(latent.dtype, torch.float32)
        self.scores = Learned(torch.zeros(blocks.grid, dtype=dtype, device=None if latent is None else latent.device))

    def forward(self, value: Tensor) -> Tensor:
        """The masked value, same shape and dtype."""
        masked = super().forward(value)
        scores = self.scores.value
        if not (scores.requires_grad and torch.is_grad_enabled()):
            return masked
        # Zero, with the value as its derivative by the scores: added behind the mask, it goes straight through it.
        return masked + value.detach() * self.blocks.expand_compact(scores - scores.detach()).to(value)


def cubic_share(step: int, first: int, last: int) -> float:
    """How much of what is asked for is due: 0 up to the first step, 1 from the last, and quickly rising between.

    Formula: ``1 - (1 - t) ** 3`` at the share ``t`` of the way, of Zhu, Gupta: To Prune, or Not to Prune (2017).

    >>> [round(cubic_share(step, 10, 20), 3) for step in (0, 10, 15, 20, 30)]
    [0.0, 0.0, 0.875, 1.0, 1.0]
    """
    t = min(max((step - first) / (last - first), 0.0), 1.0)
    return 1 - (1 - t) ** 3


def _is_soft(target: PlannedTarget) -> bool:
    return getattr(target.config.spec, "sparse_threshold", None) is not None


def _refuse_unmultiplied(target: PlannedTarget) -> None:
    spec = target.config.spec
    assert isinstance(spec, PruningSpec)
    if spec.apply_method not in (None, "mul"):
        raise ConflictError(
            f"a score is learned through a product with the mask, and here apply_method is {spec.apply_method!r}",
            where=f"{target.config.where}['apply_method'] on {target.name}",
            remedy="Leave apply_method out.",
        )
