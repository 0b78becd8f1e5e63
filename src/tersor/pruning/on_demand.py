"""Scores that are computed where they are looked at: those of single weights are as large as the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import final

from torch import Tensor


@final
class OnDemand(Mapping[str, Tensor]):
    """A mapping whose values are computed when they are asked for; only the last one is remembered.

    Args:
        functions: what computes the value of each key.

    >>> import torch
    >>> scores = OnDemand({"a": lambda: torch.ones(2), "b": lambda: torch.zeros(1)})
    >>> scores["b"], scores["b"] is scores["b"], list(scores)
    (tensor([0.]), True, ['a', 'b'])
    """

    def __init__(self, functions: Mapping[str, Callable[[], Tensor]]) -> None:
        self._functions = functions
        self._latest: tuple[str, Tensor] | None = None

    def __getitem__(self, key: str) -> Tensor:
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # before another is computed
            self._latest = key, self._functions[key]()
        return self._latest[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)
