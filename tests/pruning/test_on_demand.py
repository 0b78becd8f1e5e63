"""Scores are computed when they are asked for, and no more than one target's are kept."""

import gc
import weakref

import torch
from torch import nn

from tersor.pruning import LevelPruner
from tersor.pruning.on_demand import OnDemand


def test_only_the_last_value_is_kept():
    made = []

    def make():
        value = torch.ones(3)
        made.append(weakref.ref(value))
        return value

    scores = OnDemand({"a": make, "b": make})
    assert torch.equal(scores["a"], scores["a"])
    assert len(made) == 1
    assert set(scores) == {"a", "b"}
    assert len(made) == 1
    assert scores["b"].sum() == 3
    gc.collect()
    assert [reference() is None for reference in made] == [True, False]


def test_a_pruner_holds_the_scores_of_no_more_than_two_layers_at_a_time():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    pruner = LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    alive, scored = [], pruner.score

    def score(values, blocks):
        gc.collect()
        assert sum(reference() is not None for reference in alive) <= 1
        found = scored(values, blocks)
        alive.append(weakref.ref(found))
        return found

    pruner.score = score
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert len(alive) == 4
    assert all(int(masks[str(number)]["weight"].sum()) == 32 for number in range(4))
