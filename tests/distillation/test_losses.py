"""Losses against formulas written out in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from tersor.distillation.losses import (
    attention_map,
    attention_transfer,
    kl,
    pairwise_angles,
    pairwise_distances,
    relational,
)


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_is_the_formula_and_a_mean_over_positions(temperature):
    student, teacher = draws(3, 5, 7), draws(3, 5, 7, seed=1)
    total = 0.0
    for own, other in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        p, q = ([math.exp(value / temperature) for value in row] for row in (other, own))
        p, q = [value / sum(p) for value in p], [value / sum(q) for value in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl(student, teacher, temperature).item() == pytest.approx(temperature**2 * total / 15, rel=1e-12)


def test_the_gradient_of_kl_does_not_shrink_with_the_temperature():
    teacher, sizes = draws(64, 10, seed=1), []
    for temperature in (1.0, 10.0):
        student = draws(64, 10).requires_grad_()
        kl(student, teacher, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert 0.5 < sizes[1] / sizes[0] < 2


def test_attention_maps_have_length_one_and_any_number_of_channels():
    student, teacher = draws(2, 4, 3, 3), draws(2, 8, 3, 3, seed=1)
    maps = [value.pow(2).mean(1).reshape(2, 9) for value in (student, teacher)]
    maps = [each / each.pow(2).sum(1, keepdim=True).sqrt() for each in maps]
    assert torch.allclose(attention_map(student, 1), maps[0], rtol=1e-12)
    expected = (maps[0] - maps[1]).pow(2).sum(1).mean()
    assert attention_transfer(student, teacher, 1).item() == pytest.approx(expected.item(), rel=1e-12)
    tokens = [value.flatten(2).transpose(1, 2) for value in (student, teacher)]
    assert attention_transfer(*tokens, -1).item() == pytest.approx(expected.item(), rel=1e-12)


def test_distances_and_angles_pair_by_pair():
    value = draws(4, 3)
    distances, angles = pairwise_distances(value), pairwise_angles(value)
    mean = sum((value[i] - value[j]).norm() for i in range(4) for j in range(4) if i != j) / 12
    for i in range(4):
        for j in range(4):
            assert distances[i, j].item() == pytest.approx(((value[i] - value[j]).norm() / mean).item(), abs=1e-12)
            for k in range(4):
                if len({i, j, k}) == 3:
                    cosine = F.cosine_similarity(value[i] - value[j], value[k] - value[j], dim=0)
                    assert angles[j, i, k].item() == pytest.approx(cosine.item(), abs=1e-12)


def test_relations_do_not_see_turns_and_sizes_and_have_a_gradient_where_samples_are_equal():
    value = draws(6, 4)
    turned = 3 * value @ torch.linalg.qr(draws(4, 4, seed=2))[0]
    assert relational(turned, value).item() == pytest.approx(0, abs=1e-12)
    assert relational(draws(6, 9), value).item() > 0.01
    same = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    relational(same, draws(3, 4)).backward()
    assert same.grad.isfinite().all()


def test_samples_that_coincide_have_no_direction_and_no_endless_gradient():
    value = draws(4, 3)
    value[1] = value[0]
    value.requires_grad_()
    angles = pairwise_angles(value)
    assert angles[0, 1].tolist() == angles[1, 0].tolist() == [0.0] * 4
    relational(value, draws(4, 3, seed=1)).backward()
    # By central differences of what does not coincide, the gradient of the others is the loss's own.
    with torch.no_grad():
        for index in ((2, 0), (3, 2)):
            moved = [value.clone() for _ in range(2)]
            for sign, own in zip((1, -1), moved, strict=True):
                own[index] += sign * 1e-6
            slope = (relational(moved[0], draws(4, 3, seed=1)) - relational(moved[1], draws(4, 3, seed=1))) / 2e-6
            assert value.grad[index].item() == pytest.approx(slope.item(), rel=1e-5)
    assert value.grad.abs().max() < 10
