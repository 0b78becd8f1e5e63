"""RelationalDistiller: samples lie to each other as they do for the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

from torch import Tensor

from tersor.distillation.layerwise import LayerwiseDistiller, Link, nearest
from tersor.distillation.losses import relational


@final
class RelationalDistiller(LayerwiseDistiller):
    """Draws the distances and angles between the samples of a batch to those that the teacher's values have.

    Widths and shapes may differ. Its cost grows with the cube of the batch. Of several links the nearest counts.

    Paper: Park, Kim, Lu, Cho: Relational Knowledge Distillation (CVPR 2019).

    Args:
        *args: see :class:`LayerwiseDistiller`.
        distance: the weight of distances.
        angle: the weight of angles.
        **kwargs: likewise.
    """

    methods: ClassVar[tuple[str, ...]] = ("mse",)

    def __init__(self, *args: Any, distance: float = 1.0, angle: float = 2.0, **kwargs: Any) -> None:
        self.distance, self.angle = distance, angle
        super().__init__(*args, **kwargs)

    def link_loss(self, link: Link, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """The least relational distance."""
        return nearest([relational(student, teacher, self.distance, self.angle) for teacher in teachers])
