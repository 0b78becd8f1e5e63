import copy
import math
import pickle

import pytest
import torch
from torch import fx

from tersor.graph.sizes import Shape, TracedFloat, TracedInt, plain, traced


class Notes:
    """Evaluates what is recorded, for sizes that are other than those of the example."""

    def __init__(self, **sizes):
        self.graph, self.is_open, self.decisions, self.values = fx.Graph(), True, [], {}
        for name, value in sizes.items():
            self.values[self.graph.placeholder(name)] = value

    def compute(self, function, operands):
        node = self.graph.call_function(function, tuple(getattr(value, "node", value) for value in operands))
        self.values[node] = function(*(self.values.get(argument, argument) for argument in node.args))
        return node

    def decide(self, what, node, value=None):
        self.decisions.append((what, value))


@pytest.fixture
def sizes():
    notes = Notes(a=10, b=3)
    return notes, *(traced(value, node, notes) for value, node in zip((7, 2), notes.values, strict=True))


@pytest.mark.parametrize(
    "compute",
    [
        lambda a, b: a + b * 2 - 1,
        lambda a, b: 100 - a,
        lambda a, b: 3 * a // b % 5,
        lambda a, b: -a // -b,
        lambda a, b: divmod(a, b)[1] + divmod(a, 2)[0],
        lambda a, b: a**2 + 2**b,
        lambda a, b: (a << b) | (a >> 1) ^ (a & 6) + ~a,
        lambda a, b: round(a / b) + math.ceil(a / 4) + math.floor(0.3 * (a / 1)) + math.trunc(a / 3),
        lambda a, b: math.prod(Shape((a, b))) + Shape((a, b, 4)).numel() + Shape((a, b))[:1].numel(),
        lambda a, b: sum((Shape((a, b)) + Shape((b,)))[1:]),
        lambda a, b: abs(+a),
    ],
)
def test_arithmetic_is_recorded(sizes, compute):
    notes, a, b = sizes
    result = compute(a, b)
    assert type(result) is TracedInt
    assert plain(result) == compute(7, 2)
    assert notes.values[result.node] == compute(10, 3)
    assert notes.decisions == []


@pytest.mark.parametrize("compute", [lambda a, b: a**-0.5, lambda a, b: a / b * 0.5, lambda a, b: 1.0 / (a / 1)])
def test_floats_are_recorded(sizes, compute):
    notes, a, b = sizes
    result = compute(a, b)
    assert type(result) is TracedFloat
    assert plain(result) == compute(7, 2)
    assert notes.values[result.node] == compute(10, 3)


@pytest.mark.parametrize(
    ("decide", "what", "value"),
    [
        (lambda a, b: a > b, "a size in 'gt'", True),
        (lambda a, b: b == 7, "a size in 'eq'", False),
        (lambda a, b: min(a, 5), "a size in 'gt'", True),
        (lambda a, b: bool(a), "a size in 'bool'", 7),
        (lambda a, b: int(a), "a size in 'int'", 7),
        (lambda a, b: math.sqrt(a), "a size in 'float'", 7),
        (lambda a, b: [0] * b, "a size in the length of a list", 2),
        (lambda a, b: a.bit_length(), "a size in 'bit_length'", 7),
    ],
)
def test_decisions_are_noted(sizes, decide, what, value):
    notes, a, b = sizes
    decide(a, b)
    assert notes.decisions[0] in ((what, value), (what, not value))
    assert len(notes.decisions) == 1


def test_a_size_is_itself_without_a_decision(sizes):
    notes, a, _ = sizes
    assert a == a
    assert notes.decisions == []


def test_equal_sizes_are_one_key_and_other_types_are_never_equal(sizes):
    notes, a, _ = sizes
    assert {7: "seven"}[a] == "seven"
    assert (a == None, a == "7", a != "7") == (False, False, True)  # noqa: E711
    assert [what for what, _ in notes.decisions] == ["a size in 'eq'"]


def test_a_number_that_outlives_the_trace_is_an_ordinary_number(sizes):
    notes, a, b = sizes
    before, notes.is_open = len(notes.graph.nodes), False
    assert type(a + b) is int
    assert a > b
    assert len(notes.graph.nodes) == before
    assert notes.decisions == []
    assert type(pickle.loads(pickle.dumps(a))) is int  # noqa: S301
    assert copy.deepcopy(a) is a


def test_torch_takes_traced_numbers(sizes):
    _, a, b = sizes
    assert torch.zeros(a, b).shape == (7, 2)
    assert (torch.ones(1) * a).item() == 7
    assert (a / torch.ones(1)).item() == 7
