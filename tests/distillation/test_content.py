"""What a value holds, as a checksum."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from tersor.distillation import content_of
from tersor.distillation.content import checksum
from tersor.errors import InvalidValueError

Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Box:
    content: object


class Image:
    """As images of PIL: no array, but NumPy takes it for one."""

    def __init__(self, values):
        self.__array_interface__ = np.asarray(values, dtype=np.uint8).__array_interface__
        self.values = values


VALUES = [
    None,
    True,
    1,
    1.0,
    0.0,
    -0.0,
    1j,
    "1",
    b"1",
    "",
    [],
    [1],
    [[1]],
    [1, 1],
    ["ab", "c"],
    ["a", "bc"],
    {},
    {"a": 1},
    {"b": 1},
    {"a": 1, "b": 2},
    {"a": 2, "b": 1},
    {1: "a"},
    {"1": "a"},
    Box(1),
    Box(2),
    np.zeros(2, dtype=np.float32),
    np.zeros(2, dtype=np.float64),
    np.zeros((2, 1), dtype=np.float64),
    np.float64(1.0),
    np.array(["a", None], dtype=object),
    np.array([], dtype=np.float32),
    Image([[1, 2]]),
    Image([[1], [2]]),
    torch.zeros(2),
    torch.zeros(2, 1),
    torch.zeros(4, dtype=torch.float16),
    torch.zeros(4, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.bool),
    torch.tensor(0.0),
    torch.tensor(0),
    torch.zeros(0),
    torch.zeros(2, dtype=torch.complex64),
    torch.tensor([0, 1.0]),
    torch.tensor([1.0, 0]),
]


def test_no_two_values_have_one_checksum():
    assert len({content_of(value) for value in VALUES}) == len(VALUES)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((1, 2), [1, 2]),
        (Pair(1, 2), (1, 2)),
        ({"a": 1, "b": 2}, OrderedDict(b=2, a=1)),
        (torch.arange(6).reshape(2, 3).T, torch.tensor([[0, 3], [1, 4], [2, 5]])),
        (np.arange(6).reshape(2, 3).T, np.array([[0, 3], [1, 4], [2, 5]])),
        (torch.ones(3).expand(2, 3), torch.ones(2, 3)),
        (nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (Image([1, 2]), np.array([1, 2], dtype=np.uint8)),
    ],
)
def test_equal_values_have_one(one, other):
    assert content_of(one) == content_of(other)


def test_a_checksum_is_the_same_in_any_process():
    assert content_of([torch.arange(3), "a", {"b": None}]) == "c0e673e8c6318ceeba8c3c6b1b95ab83"


def test_a_models_weights():
    model = nn.Linear(2, 2)
    before = content_of(model.state_dict())
    assert content_of(model.state_dict()) == before
    model.weight.data[0, 0] += 1
    assert content_of(model.state_dict()) != before


def test_what_nobody_knows():
    with pytest.raises(InvalidValueError, match=r"a object cannot be told.*by='index'"):
        content_of([1, object()])
    assert checksum([1, object()], strict=False) == checksum([1, object()], strict=False)
    assert checksum([1, object()], strict=False) != checksum([2, object()], strict=False)
