"""Labels: one integer for each index of each dimension of each parameter and buffer, joined where they must agree.

A label is an equivalence variable. Joining two labels says that the two indices live and die together; freezing one
says that it cannot leave. Joins and freezes are only recorded while the model runs; the classes are found at the end,
by one vectorised connected-components pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

    def mask(self, kept: np.ndarray) -> Tensor:
        """A boolean vector over its indices, shape ``(size,)``, as a mask that broadcasts against the tensor."""
        return torch.from_numpy(kept).reshape([self.size if dim == self.dim else 1 for dim in range(self.rank)])


@dataclass(frozen=True)
class Classes:
    """What all joins and freezes of a model amount to.

    Attributes:
        of: the class of each label (the least label in it), shape ``(labels,)``.
        reasons: why a class may not leave (the first reason).
        bent: why removing a class changes the numbers of what stays; such a class leaves only where that is allowed.
        written: labels that a contraction computes, boolean, shape ``(labels,)``.
        read: labels that a contraction sums over, boolean, shape ``(labels,)``.
        silenced: classes that leave without harm only because they are zero where they are masked, boolean.
        coded: classes whose size the code may hold as a number that only a run of the small model brings to light,
            boolean, shape ``(labels,)``.
    """

    of: np.ndarray
    reasons: dict[int, str]
    bent: dict[int, str]
    written: np.ndarray
    read: np.ndarray
    coded: np.ndarray
    silenced: np.ndarray


@dataclass(frozen=True)
class GroupedProduct:
    """A contraction in groups, of which either whole groups leave or the same positions of every group.

    Attributes:
        inputs: labels of what is summed over, shape ``(groups, inputs of each)``.
        outputs: labels of the results, shape ``(groups, outputs of each)``.
        inner: labels along the weight's dimension within a group, shape ``(inputs of each,)``; None for a size of 1.
    """

    inputs: Tensor
    outputs: Tensor
    inner: Tensor | None

    def decided(self, classes: np.ndarray) -> bool | None:
        """True for whole groups, False for positions, None while nothing speaks for either."""
        if self.inner is None:
            return True
        if bool((self.inputs == UNKNOWN).any()):
            return False
        for labels in (self.inputs, self.outputs):
            found = classes[labels.numpy()]
            along_groups, within = (bool((found == found.take([0], dim)).all()) for dim in (0, 1))
            if along_groups != within and 1 not in found.shape:
                return within
        return None

    @property
    def default(self) -> bool:
        """Whichever gives more to choose from."""
        return self.inputs.shape[0] >= self.inputs.shape[1]


@dataclass
class Ledger:
    """All labels of one model, and what was recorded about them while it ran.

    ``clock`` numbers the operators. What is recorded under :meth:`bend` counts only where the operator's result reaches
    an output of the model.
    """

    axes: list[Axis] = field(default_factory=list)
    count: int = 1
    clock: int = 0
    elastic_from: int = 0
    _joins: list[tuple[Tensor, Tensor, str]] = field(default_factory=list)
    _frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    _bent: list[tuple[Tensor, str, int]] = field(default_factory=list)
    _fields: list[Tensor] = field(default_factory=list)
    _grouped: list[GroupedProduct] = field(default_factory=list)
    _written: list[tuple[Tensor, int]] = field(default_factory=list)
    _read: list[Tensor] = field(default_factory=list)
    _coded: list[Tensor] = field(default_factory=list)
    _silenced: list[Tensor] = field(default_factory=list)

    def add_axis(self, names: tuple[str, ...], tensor: Tensor, dim: int) -> Tensor:
        """Make labels for one dimension of a named tensor and return them, shape ``(size,)``."""
        axis = Axis(names, tensor.dim(), dim, tensor.shape[dim], self.count, isinstance(tensor, nn.Parameter))
        self.axes.append(axis)
        self.count += axis.size
        self.elastic_from = self.count
        return axis.labels

    def elastic(self, size: int) -> Tensor:
        """Labels for a dimension along which a tensor is constant (zeros, what was expanded): it follows others."""
        self.count += size
        return torch.arange(self.count - size, self.count, device="cpu")

    def is_elastic(self, vector: Tensor) -> bool:
        """Whether no label of a vector belongs to a parameter or buffer."""
        return bool((vector >= self.elastic_from).all())

    def join(self, a: Tensor, b: Tensor, reason: str) -> None:
        """The indices of two label vectors of equal length agree, one by one.

        Where one side is unknown, the other cannot leave, for the given reason: something that no parameter controls
        has full size there.
        """
        if a is not b:
            self._joins.append((a, b, reason))

    def tie(self, field: Tensor, dims: Iterable[int]) -> Tensor:
        """Along these dimensions of a field of labels, all indices live and die together.

        Returns:
            the field with size 1 along the tied dimensions.
        """
        first = field
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        if first.numel() != field.numel():
            self._joins.append((first.expand(field.shape).reshape(-1), field.reshape(-1), ""))
        return first

    def freeze(self, vector: Tensor, reason: str) -> None:
        """These indices stay."""
        self._frozen.append((vector.reshape(-1), reason))

    def bend(self, vector: Tensor, reason: str) -> None:
        """Without these indices the computation goes through, but its numbers change: a statistic runs over them."""
        self._bent.append((vector.reshape(-1), reason, self.clock))

    def must_be_product(self, field: Tensor) -> None:
        """What is left of a field over several dimensions must be a product of index sets."""
        self._fields.append(field)

    def must_agree_in_groups(self, product: GroupedProduct) -> None:
        """Whole groups leave, or the same positions of every group: decided when all else is known."""
        self._grouped.append(product)

    def mark_coded(self, vector: Tensor) -> None:
        """How many of these indices there are may stand in the model's code as a number."""
        self._coded.append(vector.reshape(-1))

    def mark_silenced(self, vector: Tensor) -> None:
        """These indices leave a sum only because they are zero where they are masked."""
        self._silenced.append(vector.reshape(-1))

    def mark_written(self, vector: Tensor) -> None:
        """A contraction computes these indices of its output from this parameter's rows."""
        self._written.append((vector, self.clock))

    def mark_read(self, vector: Tensor) -> None:
        """A contraction sums over these indices."""
        self._read.append(vector)

    def solve(self, live: np.ndarray | None = None) -> Classes:
        """Classes of all labels.

        Args:
            live: for each tick of the clock whether that operator's result reaches an output; None where all do.
        """
        a = _concatenated([a for a, _, _ in self._joins])
        b = _concatenated([b for _, b, _ in self._joins])
        known = (a != UNKNOWN) & (b != UNKNOWN)
        classes = self._as_products(connected_components(self.count, a[known], b[known]))
        frozen = [(torch.zeros(1, dtype=torch.int64, device="cpu"), "no parameter controls it"), *self._frozen]
        frozen += self._met_unknown(a, b, known)
        frozen += self._covering(classes)
        if live is not None:
            lost = "reaches no output by operators that can be followed"
            frozen += [(vector, lost) for vector, clock in self._written if not live[clock]]
        bent = [(vector, reason) for vector, reason, clock in self._bent if live is None or live[clock]]
        coded = self._flags_of_classes(classes, [*self._coded, *(labels.reshape(-1) for labels in self._fields)])
        return Classes(
            classes,
            _first_reasons(classes, frozen),
            _first_reasons(classes, bent),
            self._flags([vector for vector, _ in self._written]),
            self._flags(self._read),
            coded,
            self._flags_of_classes(classes, self._silenced),
        )

    def _as_products(self, classes: np.ndarray) -> np.ndarray:
        """Tie labels until each field is constant along all of its dimensions but one.

        Which one: the longest, so that the least is tied. A field in which heads already live and die whole, because of
        what was computed with them, is left as it is. Where a part belongs to no parameter, all of it stays.
        """
        fields = []
        for labels in {(labels.shape, labels.numpy().tobytes()): labels for labels in self._fields}.values():
            if bool((labels == UNKNOWN).any()):
                self.freeze(labels, "stands beside what no parameter controls")
            else:
                fields.append(labels.numpy())
        waiting = list(self._grouped)
        while True:
            ties = [tie for labels in fields for tie in _product_ties(classes, labels)]
            modes = {id(product): product.decided(classes) for product in waiting}
            if not ties and waiting and all(mode is None for mode in modes.values()):
                modes = {id(product): product.default for product in waiting}
            for product in waiting:
                mode = modes[id(product)]
                ties += [] if mode is None else self._in_groups(product, mode)
            waiting = [product for product in waiting if modes[id(product)] is None]
            if not ties:
                return classes
            a, b = (np.concatenate(side) for side in zip(*ties, strict=True))
            classes = connected_components(self.count, classes[a], classes[b])[classes]

    def _in_groups(self, product: GroupedProduct, whole: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """The joins that a grouped product comes to."""
        inputs, outputs = product.inputs.numpy(), product.outputs.numpy()
        if whole:
            if product.inner is not None:
                self.freeze(product.inner, "stands within a convolution's groups, which live and die whole")
            first = outputs[:, :1]
            return [_joined(first, outputs), _joined(first, inputs)]
        joins = [_joined(outputs[:1], outputs)]
        assert product.inner is not None
        if (inputs == UNKNOWN).any():
            for labels in (product.inner, product.inputs):
                self.freeze(labels[labels != UNKNOWN], "is summed with what no parameter controls")
            return joins
        return [*joins, _joined(inputs[:1], inputs), _joined(inputs[:1], product.inner.numpy()[None])]

    def _covering(self, classes: np.ndarray) -> Iterator[tuple[Tensor, str]]:
        """Axes whose indices are all of one class: nothing would be left of them."""
        for axis in self.axes:
            own = classes[axis.span]
            if (own == own[0]).all():
                yield axis.labels[:1], f"lives and dies with all of {axis.name} dim {axis.dim}"

    def _met_unknown(self, a: np.ndarray, b: np.ndarray, known: np.ndarray) -> Iterator[tuple[Tensor, str]]:
        """Labels that were joined with an unknown index, and the reason of that join."""
        ends = np.cumsum([len(pair[0]) for pair in self._joins])
        places = np.flatnonzero(~known)
        for number in np.unique(np.searchsorted(ends, places, side="right")).tolist():
            inside = slice(int(ends[number]) - len(self._joins[number][0]), int(ends[number]))
            labels = np.maximum(a[inside], b[inside])[~known[inside]]
            yield torch.from_numpy(labels[labels != UNKNOWN]), self._joins[number][2]

    def _flags_of_classes(self, classes: np.ndarray, vectors: list[Tensor]) -> np.ndarray:
        flags = np.zeros(self.count, dtype=bool)
        flags[classes[self._flags(vectors)]] = True
        return flags

    def _flags(self, vectors: list[Tensor]) -> np.ndarray:
        flags = np.zeros(self.count, dtype=bool)
        flags[_concatenated(vectors)] = True
        flags[UNKNOWN] = False
        return flags


def _first_reasons(classes: np.ndarray, entries: list[tuple[Tensor, str]]) -> dict[int, str]:
    owner = np.repeat(np.arange(len(entries)), [len(vector) for vector, _ in entries])
    labels, first = np.unique(classes[_concatenated([vector for vector, _ in entries])], return_index=True)
    return {label: entries[owner[place]][1] for label, place in zip(labels.tolist(), first.tolist(), strict=True)}


def _product_ties(classes: np.ndarray, field: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The joins that make a field constant along all dimensions but one; none where it is."""
    found = classes[field]
    constant = [bool((found == found.take([0], dim)).all()) for dim in range(found.ndim)]
    if sum(not flat for flat in constant) < 2:
        return
    keep = max((dim for dim in range(found.ndim) if not constant[dim]), key=lambda dim: found.shape[dim])
    first = field
    for dim in range(field.ndim):
        if dim != keep:
            first = first.take([0], dim)
    yield _joined(first, field)


def _joined(first: np.ndarray, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of the joins of a field with what it repeats."""
    return np.broadcast_to(first, field.shape).reshape(-1), field.reshape(-1)


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
