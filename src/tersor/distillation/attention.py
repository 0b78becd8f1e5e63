"""AttentionTransferDistiller: the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from torch import Tensor

from tersor.distillation.layerwise import LayerwiseDistiller, Link, nearest
from tersor.distillation.losses import attention_transfer
from tersor.errors import TrainingError
from tersor.targets.channels import activation_channel_dim


@final
class AttentionTransferDistiller(LayerwiseDistiller):
    """Draws the attention maps of the student, the mean of squares over channels, to the teacher's.

    The numbers of channels may differ, all other sizes may not. Arguments: see :class:`LayerwiseDistiller`; of several
    links the nearest counts.

    Paper: Zagoruyko, Komodakis: Paying More Attention to Attention: Improving the Performance of Convolutional Neural
    Networks via Attention Transfer (ICLR 2017), section 3.1.
    """

    methods: ClassVar[tuple[str, ...]] = ("mse",)

    def link_loss(self, link: Link, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """The least distance of maps."""
        known = activation_channel_dim(link.module, student.dim())
        channels = student.dim() - 1 if known is None and student.dim() == 3 else 1 if known is None else known
        sizes = [size for dim, size in enumerate(student.shape) if dim != channels % student.dim()]
        for teacher in teachers:
            if [size for dim, size in enumerate(teacher.shape) if dim != channels % teacher.dim()] != sizes:
                raise TrainingError(
                    f"shapes {tuple(student.shape)} and {tuple(teacher.shape)} differ in more than their channels",
                    where=link.name,
                    remedy="Link to a layer of the same height and width, or as many tokens.",
                )
        return nearest([attention_transfer(student, teacher, channels) for teacher in teachers])
