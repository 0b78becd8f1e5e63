"""DynamicLayerwiseDistiller: each target is drawn to the nearest of its candidates in the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from tersor.distillation.layerwise import LayerwiseDistiller, Link, nearest


@final
class DynamicLayerwiseDistiller(LayerwiseDistiller):
    r"""Draws each target of the student to the teacher's value that is nearest to it in this forward pass.

    .. math:: d(s_i) = \min_{j \in \text{link}(i)} d(s_i, t_j)

    With one link it is plain layer-wise distillation. All candidates need the shape of the student's value. Arguments:
    see :class:`LayerwiseDistiller`.

    Paper: it is the layer matching of Xia, Zhong, Chen: Structured Pruning Learns Compact and Accurate Models (ACL
    2022) seen from the student; that paper's own, which asks each layer of the teacher, is :class:`CoFiDistiller`.

    Example:
        >>> import copy
        >>> import torch
        >>> from torch import nn
        >>> student = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> teacher = copy.deepcopy(student)
        >>> config_list = [{"op_names": ["0"], "link": ["0", "1"]}, {"op_names": ["2"], "apply_method": "kl"}]
        >>> distiller = DynamicLayerwiseDistiller(student, config_list, teacher_model=teacher)
        >>> batch = torch.ones(3, 4), torch.zeros(3, 2)
        >>> loss = nn.functional.mse_loss(student(batch[0]), batch[1])
        >>> bool(distiller.loss(loss, batch) == loss)  # it is its teacher
        True
        >>> list(distiller.losses)
        ['0._output_0', '2._output_0']
    """

    def link_loss(self, link: Link, student: Tensor, teachers: Sequence[Tensor]) -> Tensor:
        """The least distance."""
        return nearest([self.compare(link, student, teacher) for teacher in teachers])
