from collections import OrderedDict
from dataclasses import dataclass

import torch

from tersor.graph.values import attributes, is_plain, leaves, rebuilt


@dataclass(slots=True)
class Slotted:
    """No __dict__."""

    x: int
    y: list


class Node:
    """Holds itself."""

    def __init__(self):
        self.itself, self.value = self, 3


class Output(OrderedDict):
    """Items, and the same as attributes."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)


def test_attributes_of_all_kinds_of_objects():
    assert attributes(Slotted(1, [2])) == {"x": 1, "y": [2]}
    assert attributes(torch.nn.ReLU()) == attributes(Slotted) == attributes(print) == {}


def test_leaves_are_found_however_deep_and_cycles_end():
    assert list(leaves({"a": [1, (2,)], "b": Slotted(3, [4])})) == [1, 2, 3, 4]
    assert list(leaves(Node())) == [3]
    number = type("Number", (int,), {})(4)
    number.node = Node()
    assert list(leaves([number])) == [4]


def test_plain_values_hold_no_state():
    assert is_plain(((torch.ones(1), [1.0, None]), {"k": "v"}))
    assert not is_plain(([Node()],))


def test_objects_are_made_again_without_their_constructor():
    made = rebuilt(Slotted, {"x": 5, "y": []})
    assert (made.x, made.y) == (5, [])
    output = rebuilt(Output, {"extra": 1}, [("logits", 2)])
    assert (list(output.items()), output.logits, output.extra) == ([("logits", 2)], 2, 1)
