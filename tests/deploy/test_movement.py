"""Where a program rounds may move in front of movement and limits, and behind; no value changes."""

import pytest
import torch
from torch import nn

from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph
from tersor.deploy.lowering import Program, export
from tersor.deploy.movement import before_pools, dequantize_late, merge_limits, quantize_early
from tersor.deploy.operators import dequantize, quantize
from tersor.deploy.placement import join_twins


class Rounds(nn.Module):
    """A function around which values are rounded; ``grid`` is a scale, a zero point and a range of uint8."""

    def __init__(self, function, before=None, after=None):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(4, 4, 1)
        self.before, self.after = before, after
        for name, grid in (("before", before), ("after", after)):
            scale, zero_point = (grid or (1.0, 0))[:2]
            self.register_buffer(f"{name}_scale", torch.tensor(scale))
            self.register_buffer(f"{name}_zero", torch.tensor(zero_point, dtype=torch.uint8))

    def round(self, x, name, grid):
        if grid is None:
            return x
        scale, zero_point = getattr(self, f"{name}_scale"), getattr(self, f"{name}_zero")
        low, high = grid[2:] or (0, 255)
        return dequantize(quantize(x, scale, zero_point, "uint8", low, high), scale, zero_point, "uint8")

    def forward(self, x):
        x = self.function(self.round(self.conv(x), "before", self.before))
        return self.round(x, "after", self.after) * 2.0


def programs(module, *passes, example=None):
    torch.manual_seed(0)
    example = torch.randn(3, 4, 8, 8) if example is None else example
    before = Program(export(module.eval().requires_grad_(False), example))
    graph = Graph(before)
    for each in passes:
        each(graph)
    after = graph.close()
    values = [program.exported.module()(example) for program in (before, after)]
    assert torch.equal(*values)
    return after


def kinds(program):
    """The calls between the convolution and the product at the end."""
    names = {QUANTIZE: "Q", DEQUANTIZE: "DQ"}
    calls = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    calls = [names.get(node.target, getattr(node.target, "__name__", "").split(".")[0]) for node in calls]
    return [call for call in calls if call != "sym_size"][1:-1]


MOVES = {
    "max_pool2d": lambda x: nn.functional.max_pool2d(x, 3, 2, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "flatten": lambda x: x.flatten(1),
    "slice": lambda x: x[:, :, 2:5],
    "unsqueeze": lambda x: x.unsqueeze(2),
    "pad": lambda x: nn.functional.pad(x, (1, 2, 0, 1)),
    "pixel_shuffle": lambda x: nn.functional.pixel_shuffle(x, 2),
    "flip": lambda x: x.flip(2),
}
MIDDLE = (0.02, 100)


@pytest.mark.parametrize("name", MOVES)
def test_values_are_rounded_in_front_of_what_moves_them(name):
    after = programs(Rounds(MOVES[name], after=MIDDLE), quantize_early)
    assert kinds(after)[:2] == ["Q", "DQ"]
    assert kinds(after)[-2:] == ["Q", "DQ"]


@pytest.mark.parametrize("name", MOVES)
def test_values_are_rounded_again_behind_what_moves_them(name):
    after = programs(Rounds(MOVES[name], before=MIDDLE), dequantize_late)
    assert kinds(after)[:2] == ["Q", "DQ"]
    assert kinds(after)[-2:] == ["Q", "DQ"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: nn.functional.avg_pool2d(x, 2),
        lambda x: nn.functional.pad(x, (1, 1), value=0.013),
        lambda x: x * 2,
        lambda x: x.sigmoid(),
    ],
    ids=["avg_pool2d", "pad", "mul", "sigmoid"],
)
def test_what_makes_other_values_is_no_movement(function):
    assert kinds(programs(Rounds(function, after=MIDDLE), quantize_early))[0] != "Q"
    assert kinds(programs(Rounds(function, before=MIDDLE), dequantize_late))[-1] != "DQ"


def test_nothing_moves_where_others_read_what_would_change():
    def forked(x):
        return nn.functional.max_pool2d(x, 2) + x[:, :, ::2, ::2]

    assert kinds(programs(Rounds(forked, after=MIDDLE), quantize_early))[0] != "Q"

    class Forked(Rounds):
        def forward(self, x):
            x = self.conv(x)
            return self.round(x.relu(), "after", self.after) + x.relu().mean() + x

    assert "relu" in kinds(programs(Forked(None, after=MIDDLE), quantize_early))


@pytest.mark.parametrize(
    ("function", "grid", "ends"),
    [
        (torch.relu, (0.02, 100), (100, 255)),
        (torch.relu, (0.02, 0), (0, 255)),
        (torch.relu, (0.02, 100, 90, 120), (100, 120)),
        (nn.functional.relu6, (0.05, 3), (3, 123)),
        (lambda x: x.clamp(-0.5, 0.26), (0.02, 100), (75, 113)),
        (lambda x: x.clamp(min=0.25), (0.5, 100), (100, 255)),
        (nn.functional.hardtanh, (0.02, 100), (50, 150)),
    ],
)
def test_limits_become_the_ends_of_the_range(function, grid, ends):
    after = programs(Rounds(function, after=grid), quantize_early)
    assert kinds(after) == ["Q", "DQ"]
    (node,) = (node for node in after.exported.graph.nodes if node.target is QUANTIZE)
    assert node.args[4:6] == ends


def test_a_relu_of_rounded_values_ends_in_the_range_of_the_first_rounding():
    after = programs(Rounds(torch.relu, before=MIDDLE), dequantize_late, quantize_early, join_twins)
    assert kinds(after) == ["Q", "DQ"]
    (node,) = (node for node in after.exported.graph.nodes if node.target is QUANTIZE)
    assert node.args[4:6] == (100, 255)


def test_a_limit_halfway_between_two_numbers_is_rounded_as_the_values_are():
    # A step of which 6 are so many and a half in single precision, and a little less or more in double precision.
    scale = next(
        float(scale)
        for scale in (6 / (torch.arange(40.0, 250.0) + 0.5))
        if quantize(torch.tensor(6.0), scale, torch.tensor(0), "uint8", 0, 255)
        != quantize(torch.tensor(6.0), scale, torch.tensor(0), "int32", 0, 255)
    )
    example = torch.linspace(-40, 40, 3 * 4 * 64).view(3, 4, 8, 8)
    after = programs(Rounds(nn.functional.relu6, after=(scale, 0)), quantize_early, example=example)
    assert kinds(after) == ["Q", "DQ"]


class OnGrid(nn.Module):
    """Values of a convolution, some rounded in one range and some in another of the same grid, then a function."""

    def __init__(self, function, *ranges, kind="uint8", zero_point=100):
        super().__init__()
        self.function, self.ranges, self.kind = function, ranges, kind
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(zero_point, dtype=torch.int8 if kind == "int1" else torch.uint8))

    def forward(self, x):
        x = self.conv(x)
        rounded = [
            dequantize(quantize(x, self.scale, self.zero, self.kind, low, high), self.scale, self.zero, self.kind)
            for low, high in self.ranges
        ]
        return self.function(*rounded) * 2.0


def test_joined_values_keep_the_widest_of_their_ranges():
    after = programs(OnGrid(lambda *values: torch.cat(values, 1), (98, 102), (0, 255)), dequantize_late)
    assert [node.args[4:6] for node in after.exported.graph.nodes if node.target is QUANTIZE][-1] == (0, 255)


def test_a_zero_outside_the_range_is_not_rounded():
    after = programs(OnGrid(lambda x: nn.functional.pad(x, (1, 1)), (110, 120)), dequantize_late)
    assert kinds(after).count("Q") == 1


def test_signs_have_no_zero_to_limit_or_to_keep():
    after = programs(OnGrid(torch.relu, (-1, 1), kind="int1", zero_point=0), dequantize_late)
    assert kinds(after).count("Q") == 1

    class Limited(OnGrid):
        def forward(self, x):
            return dequantize(
                quantize(self.conv(x).relu(), self.scale, self.zero, "int1", -1, 1), self.scale, self.zero, "int1"
            ).mul(2.0)

    assert "relu" in kinds(programs(Limited(None, kind="int1", zero_point=0), quantize_early))


def test_a_pool_is_left_alone_where_each_sample_has_a_scale():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor([0.01, 0.02, 0.03]))
            self.register_buffer("zero", torch.zeros(3, dtype=torch.int8))

        def forward(self, x):
            x = nn.functional.max_pool2d(x * 1.0, 2)
            return dequantize(
                quantize(x, self.scale, self.zero, "int8", -127, 127, 0), self.scale, self.zero, "int8", 0
            )

    example = torch.randn(3, 4, 8, 8)
    before = Program(export(Pooled(), example, dynamic_batch=False))
    graph = Graph(before)
    before_pools(graph)
    assert torch.equal(graph.close().exported.module()(example), before.exported.module()(example))


class Joined(nn.Module):
    """Two convolutions whose outputs are joined and rounded; one may have another reader, or a grid of its own."""

    def __init__(self, forked=False):
        super().__init__()
        self.first, self.second, self.forked = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), forked
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(100, dtype=torch.uint8))

    def forward(self, x):
        first, second = self.first(x), self.second(x)
        joined = torch.cat([first, second], 1)
        joined = dequantize(quantize(joined, self.scale, self.zero, "uint8", 0, 255), self.scale, self.zero, "uint8")
        return joined.relu() * 2 + (first.sum() if self.forked else 0)


def test_parts_are_rounded_before_they_are_joined_all_or_none():
    for forked, roundings in ((False, 3), (True, 1)):
        after = programs(Joined(forked), quantize_early)
        assert kinds(after).count("Q") == roundings


def test_parts_of_a_split_are_rounded_each_by_itself():
    def swap(x):
        first, second = x.chunk(2, 1)
        return torch.cat([second, first], 1)

    after = programs(Rounds(swap, before=MIDDLE), dequantize_late)
    assert kinds(after).count("Q") == 4


@pytest.mark.parametrize(
    ("function", "limits"),
    [
        (lambda x: x.relu().clamp(-1, 1), 1),
        (lambda x: nn.functional.relu6(x).clamp(1, 7), 1),
        (lambda x: nn.functional.hardtanh(x).clamp(-0.5, 0.5), 1),
        (lambda x: x.clamp(min=0.2), 1),
        (lambda x: x.clamp(max=0.2).clamp(-1, 1), 1),
        (lambda x: x.clamp(-3, -2).clamp(-1, 1), 2),
        (lambda x: x.clamp(2, 3).clamp(-1, 1), 2),
    ],
    ids=["relu", "relu6", "hardtanh", "one end", "the other end", "below", "above"],
)
def test_two_limits_are_one_where_they_overlap(function, limits):
    class Limited(nn.Module):
        def forward(self, x):
            return function(x * 1.0) * 2.0

    example = torch.linspace(-8, 8, 40).view(2, 20)
    before = Program(export(Limited(), example))
    graph = Graph(before)
    merge_limits(graph)
    after = graph.close()
    assert torch.equal(after.exported.module()(example), before.exported.module()(example))
    names = ("clamp", "relu", "relu6", "hardtanh")
    calls = [str(node.target).split(".")[1] for node in after.exported.graph.nodes if node.op == "call_function"]
    assert sum(call in names for call in calls) == limits
