"""What a compiled model takes and gives."""

import json
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tersor.deploy.structure import Signature, describe, plain_nesting
from tersor.errors import InvalidValueError

Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: Tensor
    nothing: object = None
    states: tuple = ()


class Many(nn.Module):
    def forward(self, x, scale, flag=True, *more, shift=None, **others):
        return x


def signature(example, output=None, **arguments):
    output = torch.zeros(1) if output is None else output
    made = Signature.of(Many(), example, output, **{"dynamic_batch": True, **arguments})
    return Signature.from_dict(json.loads(json.dumps(made.to_dict())))


def test_outputs_keep_their_nesting():
    tensors = [torch.randn(size) for size in (1, 2, 3, 4, 5)]
    output = {
        "z": tensors[0],
        "a": [tensors[1], None, 3, "text"],
        "p": Pair(tensors[2], tensors[3]),
        "o": Output(tensors[4]),
    }
    rebuilt = signature((torch.zeros(2), torch.zeros(3)), output).unflatten(tensors)
    assert list(rebuilt) == ["z", "a", "p", "o"]
    assert rebuilt["a"] == [tensors[1], None, 3, "text"]
    assert rebuilt["p"] == (tensors[2], tensors[3])
    assert rebuilt["o"] == {"logits": tensors[4], "nothing": None, "states": ()}
    assert describe(output) == describe(plain_nesting(output))


class Cache:
    def __init__(self):
        self.keys = torch.zeros(1)

    def get_seq_length(self):
        return 1


def test_a_cache_is_no_output():
    assert plain_nesting(Output(torch.ones(1), Cache())) == {"logits": torch.ones(1), "nothing": None, "states": ()}


def test_arguments_by_position_and_by_name():
    x, scale = torch.randn(4, 3), torch.ones(3)
    taken = signature((x, scale))
    assert [own.shape for own in taken.inputs] == [(None, 3), (3,)]
    for tensors in (taken.flatten((x[:2], scale), {}), taken.flatten((x[:2],), {"scale": scale}),
                    taken.flatten((), {"scale": scale, "x": x[:2]})):  # fmt: skip
        assert torch.equal(tensors[0], x[:2])
        assert torch.equal(tensors[1], scale)


def test_arguments_of_any_number():
    x = torch.randn(4, 3)
    taken = signature((x, x + 1, True, x + 2, x + 3))
    assert [own.name for own in taken.inputs] == ["x", "scale", "more_0", "more_1"]
    assert torch.equal(taken.flatten((x, x, True, x, x + 9), {})[3], x + 9)
    named = signature({"x": x, "scale": x, "own": x, "shift": x})
    assert [own.name for own in named.inputs] == ["x", "scale", "shift", "own"]
    assert torch.equal(named.flatten((x,), {"own": x + 5, "scale": x, "shift": x})[3], x + 5)


def test_constants_are_part_of_what_was_compiled():
    x = torch.randn(4, 3)
    taken = signature((x, x, False))
    assert taken.constants == {"flag": False}
    assert len(taken.flatten((x, x), {})) == len(taken.flatten((x, x, False), {})) == 2
    with pytest.raises(InvalidValueError, match=r"flag: True is not what it was compiled for\. Legal: False"):
        taken.flatten((x, x, True), {})
    with pytest.raises(InvalidValueError, match="flag: a tensor is not"):
        taken.flatten((x, x, x), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(2, 3),), {}, "called with 1 positional"),
        ((torch.zeros(2, 3), torch.zeros(3), torch.zeros(3)), {}, "called with 3 positional"),
        ((torch.zeros(2, 3), torch.zeros(3)), {"x": torch.zeros(2, 3)}, "called with 2 positional"),
        ((torch.zeros(2, 3), torch.zeros(3)), {"other": 1}, r"called with 2 .*\['other'\]"),
        ((torch.zeros(2, 4), torch.zeros(3)), {}, r"x: float32 \(2, 4\) is not what .*float32 \('any', 3\)"),
        ((torch.zeros(3), torch.zeros(3)), {}, "x: float32"),
        ((torch.zeros(2, 3).double(), torch.zeros(3)), {}, r"x: float64 \(2, 3\)"),
        ((torch.zeros(2, 3), [1.0]), {}, "scale: a float is no tensor|scale: a list is no tensor"),
    ],
)
def test_calls_that_do_not_fit(args, kwargs, message):
    with pytest.raises(InvalidValueError, match=message):
        signature((torch.zeros(4, 3), torch.zeros(3))).flatten(args, kwargs)


def test_batches_of_different_sizes():
    x = torch.zeros(4, 3)
    with pytest.raises(InvalidValueError, match=r"batches of different sizes: \[2, 4\]"):
        signature((x, x)).flatten((x, x[:2]), {})
    with pytest.raises(InvalidValueError, match="x: float32"):
        signature((x, x), dynamic_batch=False).flatten((x[:2], x[:2]), {})
