"""Labels: one integer for each index of each dimension of each parameter and buffer, joined where they must agree.

A label is an equivalence variable. Joining two labels says that the two indices live and die together; freezing one
says that it cannot leave. Joins and freezes are only recorded while the model runs; the classes are found at the end,
by one vectorised connected-components pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

UNKNOWN = 0
"""The label of an index that belongs to no parameter: a token, a pixel, the model's own input."""


@dataclass(frozen=True)
class Axis:
    """One dimension of one parameter or buffer, and the labels of its indices.

    Attributes:
        names: the qualified names of the tensor; several where it is tied.
        rank: the tensor's number of dimensions.
        dim: the dimension.
        size: its number of indices.
        start: the first label; the labels are ``start`` to ``start + size - 1``.
        is_parameter: False for a buffer.
    """

    names: tuple[str, ...]
    rank: int
    dim: int
    size: int
    start: int
    is_parameter: bool

    @property
    def name(self) -> str:
        """The first name of the tensor."""
        return self.names[0]

    @property
    def span(self) -> slice:
        """Where this axis stands in an array over all labels."""
        return slice(self.start, self.start + self.size)

    @property
    def labels(self) -> Tensor:
        """The labels of its indices, shape ``(size,)``."""
        return torch.arange(self.start, self.start + self.size, device="cpu")


@dataclass
class Ledger:
    """All labels of one model, and what was recorded about them while it ran."""

    axes: list[Axis] = field(default_factory=list)
    count: int = 1
    _joins: list[tuple[Tensor, Tensor, str]] = field(default_factory=list)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    _written: list[Tensor] = field(default_factory=list)
    _read: list[Tensor] = field(default_factory=list)

    def add_axis(self, names: tuple[str, ...], tensor: Tensor, dim: int) -> Tensor:
        """Make labels for one dimension of a named tensor and return them, shape ``(size,)``."""
        axis = Axis(names, tensor.dim(), dim, tensor.shape[dim], self.count, isinstance(tensor, nn.Parameter))
        self.axes.append(axis)
        self.count += axis.size
        return axis.labels

    def join(self, a: Tensor, b: Tensor, reason: str) -> None:
        """The indices of two label vectors of equal length agree, one by one.

        Where one side is unknown, the other cannot leave, for the given reason: something that no parameter controls
        has full size there.
        """
        if a is not b:
            self._joins.append((a, b, reason))

    def tie_rows(self, rows: Tensor) -> None:
        """In each row of a label matrix, all indices live and die together."""
        for column in range(1, rows.shape[1]):
            self._joins.append((rows[:, 0], rows[:, column], ""))

    def freeze(self, vector: Tensor, reason: str) -> None:
        """These indices stay."""
        self._frozen.append((vector, reason))

    def mark_written(self, vector: Tensor) -> None:
        """A contraction computes these indices of its output from this parameter's rows."""
        self._written.append(vector)

    def mark_read(self, vector: Tensor) -> None:
        """A contraction sums over these indices."""
        self._read.append(vector)

    def solve(self) -> tuple[np.ndarray, dict[int, str], np.ndarray, np.ndarray]:
        """Classes of all labels.

        Returns:
            the class of each label (the least label in it), shape ``(count,)``; why a class is frozen (first reason);
            which labels are written and which are read by a contraction, boolean, shape ``(count,)``.
        """
        a = _concatenated([a for a, _, _ in self._joins])
        b = _concatenated([b for _, b, _ in self._joins])
        known = (a != UNKNOWN) & (b != UNKNOWN)
        classes = connected_components(self.count, a[known], b[known])
        frozen = [(torch.zeros(1, dtype=torch.int64, device="cpu"), "no parameter controls it"), *self._frozen]
        frozen += self._met_unknown(a, b, known)
        owner = np.repeat(np.arange(len(frozen)), [len(vector) for vector, _ in frozen])
        labels, first = np.unique(classes[_concatenated([vector for vector, _ in frozen])], return_index=True)
        reasons = {label: frozen[owner[place]][1] for label, place in zip(labels.tolist(), first.tolist(), strict=True)}
        return classes, reasons, self._flags(self._written), self._flags(self._read)

    def _met_unknown(self, a: np.ndarray, b: np.ndarray, known: np.ndarray) -> Iterator[tuple[Tensor, str]]:
        """Labels that were joined with an unknown index, and the reason of that join."""
        ends = np.cumsum([len(pair[0]) for pair in self._joins])
        places = np.flatnonzero(~known)
        for number in np.unique(np.searchsorted(ends, places, side="right")).tolist():
            inside = slice(int(ends[number]) - len(self._joins[number][0]), int(ends[number]))
            labels = np.maximum(a[inside], b[inside])[~known[inside]]
            yield torch.from_numpy(labels[labels != UNKNOWN]), self._joins[number][2]

    def _flags(self, vectors: list[Tensor]) -> np.ndarray:
        flags = np.zeros(self.count, dtype=bool)
        flags[_concatenated(vectors)] = True
        flags[UNKNOWN] = False
        return flags


def _concatenated(vectors: list[Tensor]) -> np.ndarray:
    return torch.cat(vectors).numpy() if vectors else np.zeros(0, np.int64)


def connected_components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The least member of each vertex's component, in a graph of ``count`` vertices with the edges ``a[i] - b[i]``.

    Vectorised hooking and pointer jumping (Shiloach and Vishkin, 1982).

    >>> connected_components(5, np.array([1, 3]), np.array([2, 2])).tolist()
    [0, 1, 1, 1, 4]
    """
    parent = np.arange(count)
    while True:
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        open_edges = low != high
        if not open_edges.any():
            return parent
        a, b, low, high = a[open_edges], b[open_edges], low[open_edges], high[open_edges]
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, parent[parent]):
            parent = parent[parent]
