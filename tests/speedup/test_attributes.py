"""Sizes that modules keep as numbers, set in the modules themselves."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn

from tersor.speedup.attributes import repair_attributes
from tersor.speedup.small_graph import Repair


def repair(module, old, new):
    return Repair("view", module, "args[1]", old, new, ((old, new),))


Heads = namedtuple("Heads", "query key")


class Projection(nn.Module):
    def __init__(self, rows, /, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, 4))
        self.__dict__.update(attributes)

    def forward(self, x):
        return (x @ self.weight.t()).view(-1, self.size)


def is_small(width):
    calls = []

    def is_right(model):
        calls.append(1)
        try:
            return all(model(torch.ones(n, 4)).shape == (n, width) for n in (2, 3))
        except RuntimeError:
            return False

    return is_right, calls


def test_the_attribute_of_that_value_is_set():
    model = nn.Sequential(Projection(8, size=16, other=12), nn.Identity())
    is_right, calls = is_small(8)
    assert repair_attributes(model, [repair("0", 16, 8)], is_right) == {"0.size": (16, 8)}
    assert (model[0].size, model[0].other, len(calls)) == (8, 12, 1)


def test_the_likeliest_name_is_tried_first_and_the_next_one_then():
    class Other(Projection):
        def forward(self, x):
            return (x @ self.weight.t()).view(-1, self.reach)

    is_right, calls = is_small(8)
    model = nn.Sequential(Other(8, reach=16, head_dim=16), nn.Identity())
    model[0].size = 16
    assert repair_attributes(model, [repair("0", 16, 8)], is_right) == {"0.reach": (16, 8)}
    assert (model[0].reach, model[0].head_dim, model[0].size, len(calls)) == (8, 16, 16, 3)


def test_all_of_them_where_one_is_not_enough():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_dim = self.split_size = 6

        def forward(self, x):
            a, b = x.split(self.split_size, 1)
            return torch.cat([a, b], 1).view(-1, 2, self.embed_dim)

    model = Twice()

    def is_right(small):
        try:
            return small(torch.ones(5, 6)).shape == (5, 2, 3)
        except (RuntimeError, ValueError):
            return False

    found = repair_attributes(model, [repair("", 6, 3)], is_right)
    assert found == {"split_size": (6, 3), "embed_dim": (6, 3)}


@pytest.mark.parametrize(
    ("kept", "wanted", "path", "after"),
    [
        ((7, 16), (16, 8), "size[1]", (7, 8)),
        ([16, 16], ((16, 16), (8, 4)), "size", [8, 4]),
        (Heads(16, 2), (16, 8), "size[0]", Heads(8, 2)),
    ],
)
def test_sizes_in_containers_that_others_share(kept, wanted, path, after):
    model, config = Projection(8, size=kept), kept
    before = copy.copy(config)
    found = repair_attributes(model, [repair("", *wanted)], lambda small: True)
    assert found == {path: wanted}
    assert model.size == after
    assert type(model.size) is type(before)
    assert config == before


def test_everything_is_put_back_where_nothing_is_right():
    sizes = [16, 3]
    model = Projection(8, size=16, width=16, sizes=sizes, flag=True)
    before = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    assert repair_attributes(model, [repair("", 16, 8), repair("", 1, 2)], lambda small: False) is None
    assert {name: value for name, value in vars(model).items() if not name.startswith("_")} == before
    assert model.sizes is sizes


def test_everything_is_put_back_where_the_check_raises():
    model = Projection(8, size=16)

    def is_right(small):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair_attributes(model, [repair("", 16, 8)], is_right)
    assert model.size == 16


def test_at_most_eight_choices_are_run():
    names = [f"size_{number}" for number in range(20)]
    model = Projection(8, size=4, **dict.fromkeys(names, 16))
    is_right, calls = is_small(8)
    assert repair_attributes(model, [repair("", 16, 8)], is_right) is None
    assert len(calls) == 8


def test_blocks_of_one_class_share_the_choice():
    class Block(Projection):
        def forward(self, x):
            return (x @ self.weight.t()).view(-1, self.reach)

    model = nn.ModuleList([Block(8, reach=16, head_dim=16) for _ in range(6)] + [Block(4, reach=16, head_dim=16)])
    runs = []

    def is_right(blocks):
        runs.append(1)
        return [block.reach for block in blocks] == [8] * 6 + [4] and all(block.head_dim == 16 for block in blocks)

    repairs = [repair(str(number), 16, 8) for number in range(6)] + [repair("6", 16, 4)]
    assert len(repair_attributes(model, repairs, is_right)) == 7
    assert len(runs) <= 3


def test_numbers_that_no_attribute_holds_are_left_to_the_graph():
    is_right, calls = is_small(8)
    assert repair_attributes(Projection(8, size=16), [repair("", 99, 8), repair("gone", 16, 8)], is_right) is None
    assert not calls
