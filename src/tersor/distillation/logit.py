"""LogitDistiller: the student learns the teacher's softened answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, final

from torch import Tensor, nn

from tersor.config.parse import ConfigList
from tersor.distillation.layerwise import LayerwiseDistiller, Link


@final
class LogitDistiller(LayerwiseDistiller):
    r"""Draws the student's answers to the teacher's, as distributions softened by a temperature.

    .. math:: L = \lambda_0 L_\text{hard} + \lambda \, T^2 \, KL(\sigma(t / T) \,\|\, \sigma(s / T))

    Without a config list it looks at the model's own first output; of a model that returns its loss first, say which:
    ``[{"op_names": [""], "target_names": ["_output_logits"]}]``.

    Paper: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015).

    Args:
        model: the student.
        config_list: where the logits are, classes along the last dimension; None for the model's output.
        *args: see :class:`LayerwiseDistiller`.
        temperature: of both.
        **kwargs: likewise.
    """

    methods: ClassVar[tuple[str, ...]] = ("kl", "mse")

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        *args: Any,
        temperature: float = 4.0,
        **kwargs: Any,
    ) -> None:
        whole: ConfigList = [{"op_names": [""], "target_names": ["_output_0"], "apply_method": "kl"}]
        super().__init__(model, whole if config_list is None else config_list, *args, temperature=temperature, **kwargs)

    def link_loss(self, link: Link, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """To the only, or the mean of several."""
        return sum((self.compare(link, student, teacher) for teacher in teachers), student.new_zeros(())) / len(
            teachers
        )
