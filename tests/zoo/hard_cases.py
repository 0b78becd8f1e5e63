"""Small networks, one for each way in which models have defeated tracing, dependency analysis or slicing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.hard import attention, joins, layers, movement, parameters, programs, projections, sequences
from tests.zoo.rows import Row

FAMILIES: dict[str, dict[type[nn.Module], Any]] = {
    "movement": {**movement.CASES, **joins.CASES},
    "layers": {**layers.CASES, **parameters.CASES},
    "attention": {**attention.CASES, **projections.CASES},
    "sequences": sequences.CASES,
    "programs": programs.CASES,
}


def rows() -> list[Row]:
    """Every hard case; each class says in its docstring what is hard."""
    return [
        Row(f"hard/{case.__name__}", "hard", f"hard {family}", case, _inputs(example), in_sample=True)
        for family, cases in FAMILIES.items()
        for case, example in cases.items()
    ]


def _inputs(example: Any) -> Callable[[], Any]:
    """What makes the inputs: the shape of one sample, the shapes of several arguments, or a function already."""
    if callable(example):
        return example
    if isinstance(example[0], tuple):
        return lambda: tuple(_draw(shape, seed) for seed, shape in enumerate(example))
    return partial(_draw, example)


def _draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
