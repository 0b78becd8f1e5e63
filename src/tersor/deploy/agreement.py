"""How far one model's outputs are from another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Agreement:
    """How far outputs are from those of a reference.

    Attributes:
        snr: signal to noise in dB: ten times the logarithm of the reference's power over the difference's; the least
            of all outputs in floating point. Infinite where they are equal, and not a number never: a value that is
            none counts as noise. Where all outputs are integers (classes, token ids), the ratio of all elements to
            those that differ.
        top1: the share of samples with the same largest value in the first output; of an output of integers, the share
            of equal elements.
    """

    snr: float
    top1: float


def agreement(outputs: Sequence[Tensor], reference: Sequence[Tensor]) -> Agreement:
    """Compare outputs with those of a reference.

    Args:
        outputs: tensors.
        reference: of the same shapes.

    >>> agreement([torch.tensor([[1.0, 1.01]])], [torch.tensor([[1.0, 1.0]])]).snr
    43.0...
    """
    pairs = list(zip(outputs, reference, strict=True))
    ratios = [snr(own, other) for own, other in pairs if other.is_floating_point()]
    if not ratios:
        ratios = [snr((own.cpu() == other.cpu()).float(), torch.ones(other.shape)) for own, other in pairs]
    first = next((pair for pair in pairs if pair[1].dim() and pair[1].numel()), None)
    return Agreement(min(ratios, default=math.inf), 1.0 if first is None else _share_of_equal(*first))


def _share_of_equal(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().cpu(), reference.detach().cpu()
    if value.shape != reference.shape:
        return 0.0
    if reference.is_floating_point():
        value, reference = value.argmax(-1), reference.argmax(-1)
    return float((value == reference).float().mean())


def snr(value: Tensor, reference: Tensor) -> float:
    """Signal to noise of one tensor, in dB."""
    reference, value = reference.detach().cpu().double(), value.detach().cpu().double()
    if reference.shape != value.shape:
        return -math.inf
    same = (reference == value) | (reference.isnan() & value.isnan())  # infinities of masks among them
    difference = torch.where(same, 0.0, value - reference)
    signal = torch.where(reference.isfinite(), reference, 0.0).square().sum()
    noise = difference.square().sum()
    if not bool(noise.isfinite()):
        return -math.inf
    if float(noise) == 0:
        return math.inf
    return 10 * math.log10(float(signal / noise)) if float(signal) > 0 else -math.inf


def decibels(ratio: float | None) -> str:
    """A signal to noise ratio for people.

    >>> decibels(41.26), decibels(math.inf), decibels(None)
    ('41.3 dB', 'exact', '')
    """
    if ratio is None:
        return ""
    return "exact" if ratio == math.inf else f"{ratio:.1f} dB"
