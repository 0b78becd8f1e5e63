"""CoFiDistiller: each layer of the teacher teaches the student's layer that is nearest to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor

from tersor.distillation.layerwise import LayerwiseDistiller, Link, nearest, wide
from tersor.distillation.projection import Projections


@final
class CoFiDistiller(LayerwiseDistiller):
    r"""Draws, for each layer of the teacher that is linked to, the nearest of the student's layers to it.

    .. math:: L_\text{layer} = \sum_{j} d\bigl(W s_{m(j)}, t_j\bigr), \quad m(j) = \arg\min_i d(W s_i, t_j)

    So a layer that is being pruned away need not be like any of the teacher's. :math:`W` is one projection for all,
    which begins as the identity where both widths are equal, and is learned by an Adam of its own. Each link is
    weighted with the ``lambda`` of the layer that was nearest.

    Paper: Xia, Zhong, Chen: Structured Pruning Learns Compact and Accurate Models (ACL 2022).

    Args:
        *args: see :class:`LayerwiseDistiller`: the student's layers, each with ``link`` naming all layers of the
            teacher that it may learn from.
        learning_rate: of the projection's Adam.
        **kwargs: likewise.

    Attributes:
        nearest: which layer of the student was nearest to each of the teacher's, in the last forward pass.
    """

    def __init__(self, *args: Any, learning_rate: float = 1e-3, **kwargs: Any) -> None:
        self.projection = Projections(learning_rate, identity=True)
        self.nearest: dict[str, str] = {}
        super().__init__(*args, **kwargs)

    def distillation_loss(self, observed: Mapping[str, Tensor], batch: Any) -> Tensor:
        """The sum over the teacher's layers of the distance of the nearest student's layer."""
        shown = self.teacher_values(batch)
        pairs: dict[str, list[tuple[Tensor, Link]]] = {}
        for link in self.reached(observed):
            student = wide(observed[link.name])
            for name, teacher in zip(link.teachers, self.candidates(link, student, shown), strict=True):
                projected = self.projection.apply("layers", student, teacher)
                pairs.setdefault(name, []).append((self.compare(link, projected, teacher), link))
        chosen = {name: min(found, key=lambda pair: pair[0].item()) for name, found in pairs.items()}
        self.nearest = {name: link.name for name, (_, link) in chosen.items()}
        return self.total({name: (link.weight, loss) for name, (loss, link) in chosen.items()})

    def link_loss(self, link: Link, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """The distance of one layer to the nearest of the teacher's."""
        return nearest([self.compare(link, self.projection.apply("layers", student, own), own) for own in teachers])

    def on_start(self) -> None:
        """The projection of an earlier run goes on learning."""
        self.projection.start()

    def on_step(self) -> None:
        """The projection makes a step."""
        self.projection.step()

    def on_stop(self) -> None:
        """It stays as it is."""
        super().on_stop()
        self.projection.stop()

    def own_state(self) -> dict[str, Any]:
        """The projection."""
        return {"projection": self.projection.state()}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The projection."""
        self.projection.load_state(state["projection"])
