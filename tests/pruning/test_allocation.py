"""Allocation against an obvious reference in plain Python, and the arithmetic that NNI 2.x documents."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch

from tersor.errors import ConflictError, EmptyLayerError, InvalidValueError
from tersor.pruning.allocation import Request, allocate


def removed(requests: Sequence[Request]) -> dict[object, int]:
    return {key: int((~mask).sum()) for key, mask in allocate(requests).items()}


def shuffled(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float()


def test_sparsity_per_layer():
    layers = [Request("a", shuffled(500), ratio=0.8), Request("b", shuffled(1000), ratio=0.8)]
    assert removed(layers) == {"a": 400, "b": 800}


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, {"a": 499, "b": 701}), (2.0, {"a": 400, "b": 800}), (100.0, {"a": 201, "b": 999})]
)
def test_total_sparsity(scale, expected):
    layers = [
        Request("a", shuffled(500) * scale, ratio=0.8, global_group="g"),
        Request("b", shuffled(1000), ratio=0.8, global_group="g"),
    ]
    assert removed(layers) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(0.9, {"a": 450, "b": 900}), (1.0, {"a": 450, "b": 900})])
def test_max_sparsity_per_layer(ratio, expected):
    layers = [
        Request("a", shuffled(500) * 0.01, ratio=ratio, max_ratio=0.9, global_group="g"),
        Request("b", shuffled(1000), ratio=ratio, max_ratio=0.9, global_group="g"),
    ]
    assert removed(layers) == expected


def test_a_maximum_on_one_target_leaves_the_other_free():
    layers = [
        Request("capped", shuffled(100) * 0.01, ratio=0.5, max_ratio=0.6, global_group="g"),
        Request("free", shuffled(100), ratio=0.5, global_group="g"),
    ]
    assert removed(layers) == {"capped": 60, "free": 40}


def test_a_minimum_on_one_target():
    layers = [
        Request("small", shuffled(100) * 0.01, ratio=0.5, global_group="g"),
        Request("large", shuffled(100) + 10, ratio=0.5, min_ratio=0.3, global_group="g"),
    ]
    assert removed(layers) == {"small": 70, "large": 30}


@pytest.mark.parametrize(
    ("ratio", "count", "expected"), [(0.29, 100, 29), (0.9, 4, 3), (0.5, 3, 1), (0.0, 5, 0), (0.7, 10, 7)]
)
def test_ratio_to_count(ratio, count, expected):
    assert removed([Request("a", shuffled(count), ratio=ratio)]) == {"a": expected}
    assert removed([Request("a", shuffled(count), ratio=ratio, global_group="g")]) == {"a": expected}


@pytest.mark.parametrize("global_group", [None, "g"])
def test_ties_go_by_index(global_group):
    scores = torch.tensor([[1.0, 0.0, 1.0], [1.0, 2.0, 1.0]])
    mask = allocate([Request("a", scores, ratio=0.5, global_group=global_group)])["a"]
    assert mask.tolist() == [[False, False, False], [True, True, True]]


def test_ties_across_a_global_group_go_by_target():
    layers = [Request(key, torch.ones(4), ratio=0.5, global_group="g") for key in "ab"]
    assert {key: mask.tolist() for key, mask in allocate(layers).items()} == {
        "a": [False, False, False, True],
        "b": [False, True, True, True],
    }


def test_infinite_scores_are_ranked():
    scores = torch.tensor([math.inf, -math.inf, 0.0, math.inf])
    assert allocate([Request("a", scores, ratio=0.75, global_group="g")])["a"].tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_score_types(dtype):
    mask = allocate([Request("a", torch.tensor([3, 1, 2, 4], dtype=dtype), ratio=0.5)])["a"]
    assert mask.tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [({}, 40), ({"max_ratio": 0.3}, 30), ({"min_ratio": 0.55}, 55), ({"min_ratio": 0.1, "max_ratio": 0.9}, 40)],
)
def test_bounds_clamp_thresholds_and_ratios(bounds, expected):
    assert removed([Request("a", shuffled(100), threshold=40.0, **bounds)]) == {"a": expected}
    assert removed([Request("a", shuffled(100), ratio=0.4, **bounds)]) == {"a": expected}


def test_a_minimum_alone():
    assert removed([Request("a", shuffled(10), min_ratio=0.2), Request("b", shuffled(10))]) == {"a": 2, "b": 0}


def test_requests_are_left_alone_and_masks_keep_their_order():
    scores = shuffled(6).reshape(2, 3)
    before = scores.clone()
    layers = [Request("c", scores, ratio=0.5, dependency_group="d"), Request("a", scores, ratio=0.5)]
    layers.append(Request("b", scores, ratio=0.5, dependency_group="d"))
    masks = allocate(layers)
    assert list(masks) == ["c", "a", "b"]
    assert torch.equal(scores, before)
    masks["c"].fill_(False)
    assert masks["b"].sum() == 3
    assert allocate([]) == {}


def test_dependency_group_shares_the_mask_of_the_mean():
    layers = [
        Request("a", torch.tensor([[1.0], [2.0], [9.0], [8.0]]), ratio=0.5, dependency_group="d"),
        Request("b", torch.tensor([9.0, 5.0, 1.0, 8.0]), ratio=0.5, dependency_group="d"),
    ]
    masks = allocate(layers)  # means 5, 3.5, 5, 8
    assert masks["a"].tolist() == [[False], [False], [True], [True]]
    assert masks["b"].tolist() == [False, False, True, True]


def test_dependency_group_keeps_the_bounds_of_every_member():
    layers = [
        Request("a", shuffled(100), ratio=0.8, max_ratio=0.6, dependency_group="d"),
        Request("b", shuffled(100, 1), ratio=0.8, max_ratio=0.7, dependency_group="d"),
    ]
    assert removed(layers) == {"a": 60, "b": 60}


def test_internal_blocks_lose_equally_many_by_the_least_common_multiple():
    layers = [
        Request("a", torch.arange(24.0), ratio=0.5, dependency_group="d", internal_block=4),
        Request("b", torch.arange(24.0), ratio=0.5, dependency_group="d", internal_block=6),
    ]
    assert allocate(layers)["a"].view(12, 2).tolist() == [[False, True]] * 12


def test_internal_blocks_remove_nothing_that_reaches_the_threshold():
    scores = torch.tensor([0.0, 1.0, 9.0, 0.0, 9.0, 9.0])
    mask = allocate([Request("a", scores, threshold=5.0, internal_block=2)])["a"]
    assert mask.tolist() == [False, True, True, False, True, True]


def test_dependency_group_is_one_unit_of_a_global_group():
    layers = [
        Request("a", shuffled(10), block_numel=30, ratio=0.5, global_group="g", dependency_group="d"),
        Request("b", shuffled(10), block_numel=10, ratio=0.5, global_group="g", dependency_group="d"),
        Request("c", shuffled(100) + 100, block_numel=4, ratio=0.5, global_group="g"),
    ]
    # 400 of 800 elements: the pair keeps one block, 9 * 40 = 360; the rest, 40, is 10 blocks of c.
    assert removed(layers) == {"a": 9, "b": 9, "c": 10}


def slow_counts(layers: Sequence[Request]) -> list[int]:
    """How many steps each layer of one global group loses, block by block; parts step together."""
    steps, least, greatest, weights = [], [], [], []
    for layer in layers:
        parts = layer.internal_block or 1
        values = layer.scores.double().flatten().tolist()
        size = len(values) // parts
        rows = [sorted(values[i * size : (i + 1) * size]) for i in range(parts)]
        steps.append([sum(column) / parts for column in zip(*rows, strict=True)])
        least.append(math.floor((layer.min_ratio or 0) * size + 1e-6))
        greatest.append(min(size - 1, math.floor((1 if layer.max_ratio is None else layer.max_ratio) * size + 1e-6)))
        weights.append(parts * layer.block_numel)
    total = sum(weight * len(step) for weight, step in zip(weights, steps, strict=True))
    counts = list(least)
    budget = math.floor(layers[0].ratio * total + 1e-6) - sum(w * c for w, c in zip(weights, counts, strict=True))
    while True:
        free = [i for i in range(len(layers)) if counts[i] < greatest[i]]
        cheapest = min(free, key=lambda i: (steps[i][counts[i]], i), default=None)
        if cheapest is None or weights[cheapest] > budget:
            return counts
        counts[cheapest] += 1
        budget -= weights[cheapest]


@pytest.mark.parametrize("weights", [[1], [6], [1, 4, 9]])
@pytest.mark.parametrize("seed", range(12))
def test_global_group_equals_the_slow_reference(seed, weights):
    rng = random.Random(seed)
    layers = []
    ratio = rng.choice([0.1, 0.5, 0.8, 1.0])
    for key in range(rng.randint(1, 6)):
        size, parts = rng.randint(1, 12), rng.choice([1, 1, 2, 3]) if len(weights) > 1 else 1
        least = rng.choice([None, None, 0.2])
        values = [rng.choice([rng.random(), rng.randint(0, 3)]) for _ in range(size * parts)]
        layers.append(
            Request(
                key,
                torch.tensor(values, dtype=torch.float64),
                block_numel=rng.choice(weights),
                ratio=ratio,
                min_ratio=least,
                max_ratio=rng.choice([None, None, 0.6, 0.9]),
                global_group="g",
                internal_block=parts,
            )
        )
    masks = allocate(layers)
    for layer, count in zip(layers, slow_counts(layers), strict=True):
        parts = layer.internal_block or 1
        for scores, mask in zip(layer.scores.view(parts, -1), masks[layer.key].view(parts, -1), strict=True):
            ranked = sorted(range(len(scores)), key=lambda i: (float(scores[i]), i))
            assert sorted(ranked[:count]) == (~mask).nonzero().flatten().tolist()


def test_a_light_layer_is_not_emptied_to_fill_what_a_heavy_block_leaves():
    layers = [
        Request("heavy", torch.tensor([0.0, 1.0, 8.5, 9.0]), block_numel=100, ratio=0.5, global_group="g"),
        Request("light", torch.arange(3.0, 33.0), block_numel=10, ratio=0.5, global_group="g"),
    ]
    # 350 of 700 elements: heavy 0 and 1 (200), light 3 to 8 (60); then 90 are left, too few for heavy 8.5. Light 9 to
    # 17 would fit, but the heavy one is worth less.
    assert removed(layers) == {"heavy": 2, "light": 6}


def test_least_ratios_beat_the_global_ratio():
    layers = [Request(key, shuffled(10), ratio=0.1, min_ratio=0.5, global_group="g") for key in "ab"]
    assert removed(layers) == {"a": 5, "b": 5}


@pytest.mark.parametrize("internal_block", [None, 2])
def test_a_global_group_keeps_a_block_of_every_part(internal_block):
    layers = [Request(key, shuffled(6), ratio=1.0, global_group="g", internal_block=internal_block) for key in "ab"]
    kept = internal_block or 1
    assert removed(layers) == {"a": 6 - kept, "b": 6 - kept}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, r"conv: sparse_ratio 1\.0 would remove all 4 blocks.*possible is 0\.75"),
        ({"threshold": 9.0}, r"conv: sparse_threshold 9\.0 would remove all 4 blocks.*0\.75"),
        ({"min_ratio": 1.0}, r"conv: min_sparse_ratio 1\.0 would remove all 4 blocks.*0\.75"),
        ({"min_ratio": 1.0, "ratio": 0.5, "global_group": "g"}, r"min_sparse_ratio 1\.0 would remove all 4"),
        ({"ratio": 1.0, "internal_block": 2}, r"would remove all 4 blocks.*possible is 0\.5"),
    ],
)
def test_no_target_is_emptied(settings, message):
    with pytest.raises(EmptyLayerError, match=message):
        allocate([Request("conv", torch.arange(4.0), **settings)])


def test_the_greatest_ratio_named_is_possible():
    for count in (3, 7, 10, 999):
        assert removed([Request("a", shuffled(count), ratio=(count - 1) / count)]) == {"a": count - 1}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"ratio": 0.5}, {"ratio": 0.6}, r"sparse_ratio is 0\.5 for a but 0\.6 for b"),
        ({"ratio": 0.5}, {}, r"sparse_ratio is 0\.5 for a but None for b"),
        ({"threshold": 1.0}, {"threshold": 2.0}, r"sparse_threshold is 1\.0 for a but 2\.0 for b"),
        ({"ratio": 0.5, "global_group": "g"}, {"ratio": 0.5}, r"global_group_id is g for a but None for b"),
        ({"min_ratio": 0.5}, {"max_ratio": 0.25}, r"a, b: of 4 blocks, at least 2 must go and at most 1 may"),
    ],
)
def test_dependency_group_conflicts(first, second, message):
    layers = [Request(key, shuffled(4), dependency_group="d", **keys) for key, keys in (("a", first), ("b", second))]
    with pytest.raises(ConflictError, match=message):
        allocate(layers)


def test_dependency_group_of_unequal_sizes():
    layers = [Request(key, shuffled(count), ratio=0.5, dependency_group="d") for key, count in (("a", 4), ("b", 6))]
    with pytest.raises(ConflictError, match=r"'d'.*equally many blocks \(a: 4, b: 6\)"):
        allocate(layers)


def test_global_group_conflicts():
    with pytest.raises(ConflictError, match=r"sparse_ratio is 0\.5 for a but 0\.6 for b.*global group"):
        allocate([Request(key, shuffled(4), ratio=r, global_group="g") for key, r in (("a", 0.5), ("b", 0.6))])
    with pytest.raises(ConflictError, match=r"'g' \(a\).*none is set.*sparse_threshold needs no group"):
        allocate([Request("a", shuffled(4), threshold=2.0, global_group="g")])


def test_single_target_errors():
    with pytest.raises(ConflictError, match=r"a: sparse_ratio 0\.5 and sparse_threshold 1\.0"):
        allocate([Request("a", shuffled(4), ratio=0.5, threshold=1.0)])
    with pytest.raises(InvalidValueError, match=r"a: a score is NaN"):
        allocate([Request("a", torch.tensor([1.0, math.nan]), ratio=0.5)])
    with pytest.raises(InvalidValueError, match=r"6 blocks cannot be cut into 4 equal parts\. Legal: 1, 2, 3, 6\."):
        allocate([Request("a", shuffled(6), ratio=0.5, internal_block=4)])


def test_scores_relative_to_their_mean_are_ranked_together():
    small, large = torch.tensor([1.0, 2.0, 3.0, 6.0]) / 1000, torch.tensor([1.0, 3.9, 5.0, 6.0])
    for normalize, expected in ((False, (3, 1)), (True, (2, 2))):
        requests = [
            Request(name, scores, ratio=0.5, global_group="all", max_ratio=0.75, normalize=normalize)
            for name, scores in (("small", small), ("large", large))
        ]
        removed = tuple(int((~mask).sum()) for mask in allocate(requests).values())
        assert removed == expected
