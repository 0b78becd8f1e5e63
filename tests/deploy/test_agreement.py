"""How far outputs are apart."""

import math

import pytest
import torch

from tersor.deploy.agreement import agreement, snr


def test_signal_to_noise():
    reference = torch.tensor([3.0, 4.0])
    assert snr(reference + torch.tensor([0.0, 0.05]), reference) == pytest.approx(40.0, abs=1e-4)  # 25 / 0.0025
    assert snr(reference, reference) == math.inf
    assert snr(torch.tensor([3.0, math.nan]), reference) == -math.inf
    assert snr(torch.zeros(3), reference) == -math.inf
    assert snr(torch.ones(2), torch.zeros(2)) == -math.inf


def test_infinities_of_masks_are_equal():
    reference = torch.tensor([-math.inf, 1.0])
    assert snr(reference.clone(), reference) == math.inf
    assert snr(torch.tensor([0.0, 1.0]), reference) == -math.inf


def test_the_worst_output_counts():
    reference = [torch.tensor([[1.0, 2.0]]), torch.tensor([10.0])]
    found = agreement([reference[0], torch.tensor([11.0])], reference)
    assert found.snr == pytest.approx(20.0)
    assert found.top1 == 1


def test_largest_values():
    reference = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert agreement([reference.flip(1)[:, :]], [reference]).top1 == 0
    assert agreement([torch.tensor([[0.0, 1.0]] * 4)], [reference]).top1 == 0.5


def test_integers():
    classes = torch.arange(100)
    other = classes.clone()
    other[7] = 3
    found = agreement([other], [classes])
    assert found.snr == pytest.approx(20.0)  # one of a hundred differs
    assert found.top1 == pytest.approx(0.99)
    assert agreement([classes], [classes]).snr == math.inf
    assert agreement([torch.ones(2), other], [torch.ones(2), classes]).snr == math.inf
