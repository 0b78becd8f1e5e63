"""How far a student's values are from a teacher's: pure functions of two tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of squared differences over all elements.

    >>> mse(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
    tensor(2.)
    """
    return F.mse_loss(student, teacher)


def kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    r"""How far softened distributions are apart, :math:`T^2 \, KL(\sigma(t / T) \,\|\, \sigma(s / T))`.

    The factor keeps the size of gradients whatever the temperature. It is the mean over all positions.

    Paper: Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network (2015), section 2.

    Args:
        student: logits, classes along the last dimension.
        teacher: likewise.
        temperature: larger ones show more of what the teacher thinks of wrong classes.

    >>> kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor(0.)
    """
    log_student, log_teacher = (F.log_softmax(value / temperature, dim=-1) for value in (student, teacher))
    each = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * each.mean()


def attention_map(value: Tensor, channel_dim: int) -> Tensor:
    """Where a layer looks: the mean of squares over channels, one row a sample, each of length 1.

    Args:
        value: shape (batch, ...).
        channel_dim: which dimension holds the channels.

    >>> attention_map(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), 1)
    tensor([[0.4903, 0.8716]])
    """
    return F.normalize(value.square().mean(dim=channel_dim).flatten(1), dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, channel_dim: int = 1) -> Tensor:
    """The squared distance of attention maps, a mean over samples; the numbers of channels may differ.

    Paper: Zagoruyko, Komodakis: Paying More Attention to Attention (ICLR 2017), equation 2 with the square of the norm,
    which has a gradient where both maps are equal.

    Args:
        student: shape (batch, ...).
        teacher: of the same shape but for the channels.
        channel_dim: which dimension holds the channels.
    """
    difference = attention_map(student, channel_dim) - attention_map(teacher, channel_dim)
    return difference.square().sum(dim=1).mean()


def pairwise_distances(value: Tensor) -> Tensor:
    """The distances of all pairs of different samples, by their mean; shape (batch, batch), 0 on the diagonal.

    >>> pairwise_distances(torch.tensor([[0.0], [1.0], [3.0]]))
    tensor([[0.0000, 0.5000, 1.5000],
            [0.5000, 0.0000, 1.0000],
            [1.5000, 1.0000, 0.0000]])
    """
    rows = value.flatten(1)
    squares = (rows[:, None] - rows[None]).square().sum(dim=-1)
    apart = squares > 0
    distances = torch.where(apart, squares, 1.0).sqrt() * apart  # the root has no gradient at zero
    mean = distances.sum() / apart.sum().clamp(min=1)
    return distances / torch.where(mean > 0, mean, 1.0)


def pairwise_angles(value: Tensor) -> Tensor:
    """The cosine of the angle at one sample between two others; shape (batch, batch, batch), the vertex first.

    >>> pairwise_angles(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))[1, 0, 2]
    tensor(0.)
    """
    rows = value.flatten(1)
    edges = rows[None] - rows[:, None]  # [vertex, other]
    squares = edges.square().sum(dim=-1, keepdim=True)
    apart = squares > 0  # two samples that coincide lie in no direction: 0, and no gradient, which would be endless
    edges = edges / torch.where(apart, squares, 1.0).sqrt() * apart
    return edges @ edges.transpose(1, 2)


def relational(student: Tensor, teacher: Tensor, distance: float = 1.0, angle: float = 2.0) -> Tensor:
    """How samples lie to each other, in distances and angles: the widths of student and teacher may differ.

    Paper: Park, Kim, Lu, Cho: Relational Knowledge Distillation (CVPR 2019), equations 5 to 9; weights as there.

    Args:
        student: shape (batch, ...); a batch of one says nothing.
        teacher: likewise.
        distance: the weight of distances.
        angle: the weight of angles.
    """
    return distance * F.smooth_l1_loss(pairwise_distances(student), pairwise_distances(teacher)) + angle * (
        F.smooth_l1_loss(pairwise_angles(student), pairwise_angles(teacher))
    )
