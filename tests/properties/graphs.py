"""Random programs in a small language, drawn by hypothesis, and the models that they describe.

A program is a list of steps. Each names a word of ``operators.py``, says which earlier value it reads, counted back
from the latest, and holds a few numbers that decide its details. Every list of steps is a program: a value of another
rank is brought into the rank that a word reads, and a step that cannot be built on its value is skipped. So
hypothesis may leave out steps and make numbers smaller until what is left is the least program that fails, which is
printed as the code that makes it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.properties import operators
from tests.properties.layers import Apply, Choices

LARGEST = 3000
"""Elements of a value; a step that makes more is skipped."""
HIGHEST = 1e3
"""Largest absolute value; a step that goes beyond it is skipped."""

RANKS = {"image": 4, "tokens": 3, "vector": 2}
TABLES = {"image": operators.IMAGE, "tokens": operators.TOKENS, "vector": operators.VECTOR}
ANYWHERE = {**operators.NOT_ZERO_AT_ZERO, **operators.ANYWHERE}
UNARY = {f"{kind}.{name}": maker for kind, table in TABLES.items() for name, maker in table.items()} | ANYWHERE
BINARY = {**operators.PAIRS, **{f"tokens.{name}": maker for name, maker in operators.OTHERS.items()}}
"""Words that read one value and two. Those that read images, tokens or vectors only say so."""
AGAIN = "again"
"""The word for an earlier layer, shared, on another value."""

EXAMPLES = {"image": ((3, 6, 4), (4, 4, 4)), "tokens": ((5, 6), (4, 4)), "vector": ((5,), (4,))}
"""Shapes of one sample of the model's input, by what the program starts from."""


class Step(NamedTuple):
    """One word: what it reads, counted back from the latest value, and what decides its details."""

    word: str
    source: int = 0
    partner: int = 0
    numbers: tuple[int, ...] = ()


class Program(NamedTuple):
    """What a model is made of; ``Network(program)`` makes it."""

    start: str
    steps: tuple[Step, ...]
    variant: int = 0
    batch: int = 2


class Network(nn.Module):
    """The model of a program: one layer a step, and a head for each value that no step reads.

    Attributes:
        example: an input, in float64.
        words: which words were built, in order.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        shape = EXAMPLES[program.start][program.variant % 2]
        self.example = normal((program.batch, *shape), seed=0)
        self.layers, self.heads = nn.ModuleList(), nn.ModuleList()
        self.places: list[tuple[int, ...]] = []
        self.words: list[str] = []
        values = [self.example]
        with torch.no_grad():
            for step in program.steps:
                values = self._added(step, values)
        read = {place for places in self.places for place in places}
        self.ends = tuple(place for place in range(len(values)) if place not in read)
        for place in self.ends:
            rank, channels = values[place].dim(), channels_of(values[place])
            head = nn.Conv2d(channels, 2, 1) if rank == 4 else nn.Linear(channels, 2)
            self.heads.append(randomized(head, seed=place))
        self.eval()

    def _added(self, step: Step, values: list[Tensor]) -> list[Tensor]:
        """The values after a step, which may have been skipped."""
        layers, places, words = list(self.layers), list(self.places), list(self.words)
        rank = RANKS.get(step.word.partition(".")[0])
        place = len(values) - 1 - step.source % len(values)
        try:
            if rank not in (None, values[place].dim()):
                self._append(Apply(CONVERSIONS[values[place].dim(), rank]), (place,), f"to{rank}")
                values = self.values(self.example)
                place = len(values) - 1
            layer, reads = self._layer(step, values, place)
            if layer is not None:
                self._append(layer, reads, step.word)
                new = self.values(self.example)
                if all(is_sound(value) for value in new[len(values) :]):
                    return new
        except (
            RuntimeError,
            ValueError,
            AssertionError,
            IndexError,
            UserWarning,
        ):  # too small for this kernel, not divisible
            pass
        self.layers, self.places, self.words = nn.ModuleList(layers), places, words
        return self.values(self.example)

    def _append(self, layer: nn.Module, places: tuple[int, ...], word: str) -> None:
        known = any(layer is other for other in self.layers)
        self.layers.append(layer if known else randomized(layer, seed=len(self.layers)))
        self.places.append(places)
        self.words.append(word)

    def _layer(self, step: Step, values: list[Tensor], place: int) -> tuple[nn.Module | None, tuple[int, ...]]:
        x, choices = values[place], Choices(step.numbers)
        if step.word == AGAIN:
            uses = zip(self.layers, self.places, strict=True)
            known = [layer for layer, (first, *more) in uses if not more and values[first].dim() == x.dim()]
            return (known[-1 - step.partner % len(known)], (place,)) if known else (None, ())
        if step.word in UNARY:
            return UNARY[step.word](choices, x), (place,)
        near = [other for other in reversed(range(len(values))) if is_partner(step.word, x, values[other])]
        if not near:
            return None, ()
        partner = near[(step.partner + 1) % len(near)]
        return BINARY[step.word](choices, x, values[partner]), (place, partner)

    def values(self, x: Tensor) -> list[Tensor]:
        """The input and the results of every step; some steps write into earlier ones, some return several."""
        values = [x.clone()]
        for layer, places in zip(self.layers, self.places, strict=True):
            result = layer(*(values[place] for place in places))
            values.extend(result if isinstance(result, (tuple, list)) else [result])
        return values

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = self.values(x)
        return {f"{place}": head(values[place]) for place, head in zip(self.ends, self.heads, strict=True)}


CONVERSIONS = {
    (4, 3): lambda x: x.flatten(2).transpose(1, 2),
    (4, 2): lambda x: x.mean((2, 3)),
    (3, 4): lambda x: x.transpose(1, 2).unsqueeze(3),
    (3, 2): lambda x: x.mean(1),
    (2, 4): lambda x: x[:, :, None, None],
    (2, 3): lambda x: x.unsqueeze(1).repeat(1, 2, 1),
}
"""How a value gets another rank, where a step asks for it."""


def is_partner(word: str, x: Tensor, other: Tensor) -> bool:
    """Whether a step can read the other value beside ``x``."""
    if word in operators.PAIRS:
        joined = 1 if word == "cat" and x.dim() != 3 else x.dim() - 1 if word == "cat" else None
        return [s for d, s in enumerate(x.shape) if d != joined] == [
            s for d, s in enumerate(other.shape) if d != joined
        ] and x.dim() == other.dim()
    return other.dim() == 3


def is_sound(value: Tensor) -> bool:
    """Whether a value is one that the language knows: a batch of images, tokens or vectors of moderate size."""
    fits = value.is_floating_point() and value.dim() in (2, 3, 4) and 0 < value.numel() <= LARGEST
    return fits and bool((value.abs() < HIGHEST).all())


def channels_of(x: Tensor) -> int:
    """The size of the dimension that a head reads."""
    return x.shape[1 if x.dim() == 4 else -1]


def normal(shape: tuple[int, ...], *, seed: int) -> Tensor:
    """Normal values in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomized(layer: nn.Module, *, seed: int) -> nn.Module:
    """A layer in float64 and eval mode, every parameter, buffer and statistic drawn: no shift is zero."""
    layer.double().eval()
    for number, (name, tensor) in enumerate([*layer.named_parameters(), *layer.named_buffers()]):
        if tensor.is_floating_point():
            drawn = normal(tuple(tensor.shape), seed=1000 * seed + number)
            scale = 1.5 / math.sqrt(max(1, tensor[0].numel())) if tensor.dim() > 1 else 0.5
            tensor.data.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn * scale)
    return layer


WEIGHTS = {
    **dict.fromkeys(operators.NOT_ZERO_AT_ZERO, 3), **dict.fromkeys(operators.PAIRS, 3), AGAIN: 2,
    "image.conv": 8, "image.grouped": 2, "image.batch_norm": 2, "tokens.linear": 6, "tokens.attention": 10,
    "tokens.feed": 2, "vector.linear": 3,
}  # fmt: skip
"""Words that are drawn more often than others: what joins, and what is not zero at zero."""


def _words(*kinds: str) -> list[str]:
    """Words to draw from, each as often as it weighs."""
    words = [AGAIN, *(word for word in (*UNARY, *BINARY) if "." not in word or word.partition(".")[0] in kinds)]
    return [word for word in words for _ in range(WEIGHTS.get(word, 1))]


def programs() -> st.SearchStrategy[Program]:
    """Programs of 2 to 12 steps that start from images, tokens or vectors and mostly stay there."""
    numbers = st.lists(st.integers(0, 11), max_size=8).map(tuple)
    return st.one_of(
        st.builds(
            Program,
            st.just(start),
            st.lists(
                st.builds(
                    Step, st.sampled_from(words), st.sampled_from([0, 0, 0, 0, 1, 2, 4]), st.integers(0, 5), numbers
                ),
                min_size=1,
                max_size=12,
            ).map(tuple),
            st.integers(0, 1),
            st.sampled_from([2, 1, 3]),
        )
        for start, words in (
            ("image", _words("image")),
            ("image", _words("image")),
            ("tokens", _words("tokens")),
            ("tokens", _words("tokens")),
            ("image", _words(*RANKS)),
            ("tokens", _words(*RANKS)),
            ("vector", _words("tokens", "vector")),
        )
    )
