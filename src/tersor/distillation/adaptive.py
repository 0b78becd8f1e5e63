"""Adaptive1dLayerwiseDistiller: a trainable projection where student and teacher are not of one width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from tersor.distillation.layerwise import LayerwiseDistiller, Link
from tersor.distillation.projection import Projections
from tersor.errors import InvalidValueError
from tersor.targets.resolve import TargetConfig


@final
class Adaptive1dLayerwiseDistiller(LayerwiseDistiller):
    """Draws each target of the student, projected to the teacher's width, to the teacher's.

    .. math:: d(s_i) = d(W_i s_i + b_i, t_i)

    The projection works along the one dimension in which the shapes differ (features, or channels of a convolution) and
    is learned by an Adam of its own; where the shapes are equal there is none. It is no part of the model, and is
    thrown away with the distiller.

    Paper: Romero et al.: FitNets: Hints for Thin Deep Nets (ICLR 2015), section 2.2.

    Args:
        *args: see :class:`LayerwiseDistiller`; one link for each target.
        learning_rate: of the projections' Adam.
        **kwargs: likewise.

    Raises:
        InvalidValueError: a target has several links.
    """

    def __init__(self, *args: Any, learning_rate: float = 1e-3, **kwargs: Any) -> None:
        self.projections = Projections(learning_rate)
        super().__init__(*args, **kwargs)

    def link_of(self, config: TargetConfig) -> Link:
        """What one target is compared with: one module."""
        link = super().link_of(config)
        if len(link.teachers) != 1:
            raise InvalidValueError(
                f"is linked to {len(link.teachers)} modules, and has one projection",
                where=link.name,
                remedy="Give one link, or take DynamicLayerwiseDistiller.",
            )
        return link

    def link_loss(self, link: Link, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """The distance of the projected value."""
        return self.compare(link, self.projections.apply(link.name, student, teachers[0]), teachers[0])

    def on_start(self) -> None:
        """Projections of an earlier run go on learning."""
        self.projections.start()

    def on_step(self) -> None:
        """The projections make a step."""
        self.projections.step()

    def on_stop(self) -> None:
        """They stay as they are."""
        super().on_stop()
        self.projections.stop()

    def own_state(self) -> dict[str, Any]:
        """The projections."""
        return {"projections": self.projections.state()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The projections."""
        self.projections.load_state(state["projections"])
