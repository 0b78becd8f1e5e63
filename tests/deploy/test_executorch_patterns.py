"""What XNNPACK's partitioner takes, made without changing a value; none of this needs ExecuTorch."""

import pytest
import torch
from torch import nn

from tersor.deploy.executorch import ExecuTorch
from tersor.deploy.executorch_patterns import dequantize_for_each, explicit_padding, far_sums, own_biases
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph
from tersor.deploy.movement import on_one_grid
from tests.deploy.lowered import largest_difference, program_of, program_outputs, ptq

BYTE = {"quant_dtype": "int8", "quant_scheme": "affine"}
ROWS = {"quant_dtype": "int8", "granularity": "per_channel"}
_ATEN = torch.ops.aten


def layers(*names, weight=ROWS, value=BYTE, output=BYTE):
    """Weights, inputs and outputs of some modules."""
    settings = {"weight": weight, "_input_0": value, "_output_0": output}
    settings = {target: own for target, own in settings.items() if own is not None}
    return {"op_names": list(names), "target_names": list(settings), "target_settings": settings}


def changed(program, *passes):
    graph = Graph(program)
    results = [each(graph) for each in passes]
    return graph.close(), results


def calls(program, *targets):
    return [node for node in program.exported.graph.nodes if node.target in targets]


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "pads", "left"),
    [(4, 1, "same", [1, 2, 1, 2], [0, 0]), (3, 2, "same", None, [2, 2]), (4, 1, "valid", None, [0, 0])],
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_that_is_named_is_said_in_numbers(kernel, dilation, padding, pads, left):
    net = nn.Sequential(nn.Conv2d(2, 3, kernel, dilation=dilation, padding=padding))
    x = torch.randn(2, 2, 9, 9)
    program = program_of(ptq(net, [layers("0")], x), x)
    after, _ = changed(program, explicit_padding)
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) < 1e-6
    (conv,) = calls(after, _ATEN.conv2d.default)
    assert not calls(after, _ATEN.conv2d.padding)
    assert list(conv.args[4]) == left
    assert [list(node.args[1]) for node in calls(after, _ATEN.constant_pad_nd.default)] == ([pads] if pads else [])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_of_one_dimension():
    net = nn.Sequential(nn.Conv1d(2, 3, 4, padding="same", bias=False))
    x = torch.randn(2, 2, 9)
    program = program_of(ptq(net, [layers("0")], x), x)
    after, _ = changed(program, explicit_padding)
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) < 1e-6
    assert [list(node.args[1]) for node in calls(after, _ATEN.constant_pad_nd.default)] == [[1, 2]]


class Shared(nn.Module):
    """Two layers with one bias, which their kernels add in steps of their own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.bias = self.one.bias

    def forward(self, x):
        return self.one(x), self.two(20 * x)


def test_a_bias_that_two_layers_share_is_stored_for_each():
    x = torch.randn(6, 4)
    program = program_of(ptq(Shared(), [layers("one", "two")], x), x)
    biases = [node.args[2] for node in calls(program, _ATEN.linear.default)]
    assert biases[0] is biases[1]
    after, _ = changed(program, own_biases)
    biases = [node.args[2] for node in calls(after, _ATEN.linear.default)]
    assert biases[0] is not biases[1]
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) == 0


def test_a_bias_of_stored_numbers_becomes_one_of_values():
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(6, 4)
    bias = {"op_names": ["0"], "target_names": ["bias"], "quant_dtype": "int8"}
    program = program_of(ptq(net, [layers("0"), bias], x), x)
    after, fallbacks = ExecuTorch().prepare(program)
    assert fallbacks == ()
    (linear,) = calls(after, _ATEN.linear.default)
    assert [own.op for own in linear.args] == ["call_function", "call_function", "placeholder"]
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) == 0


@pytest.mark.parametrize("dead", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)])
def test_a_bias_without_room_among_the_steps_of_its_weight_gets_coarser_ones(dead):
    torch.manual_seed(0)
    x = torch.randn(3, 4) if isinstance(dead, nn.Linear) else torch.randn(3, 4, 6, 6)
    rows = dead.weight.data.transpose(0, 1) if isinstance(dead, nn.ConvTranspose2d) else dead.weight.data
    rows[1] *= 1e-12
    dead.bias.data[1] = 3.0
    program = program_of(ptq(nn.Sequential(dead), [layers("0")], x), x)
    after, fallbacks = ExecuTorch().prepare(program)
    assert fallbacks == ()
    (weight,) = [node for node in calls(after, DEQUANTIZE) if node.args[0].op == "placeholder"]
    value = next(node for node in calls(after, DEQUANTIZE) if node.args[0].op != "placeholder")
    graph = Graph(after)
    held = {node.name: graph.constant(node) for node in graph.graph.nodes}
    steps = held[weight.args[1].name].double() * float(held[value.args[1].name])
    assert float((dead.bias.detach().double() / steps).abs().max()) <= 2**30 * (1 + 1e-6)
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) < 1e-6


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


class Added(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.one, self.sum, self.factor = nn.Linear(4, 4), Sum(), factor

    def forward(self, x):
        y = self.one(x)
        return self.sum(y, self.factor - y)


@pytest.mark.parametrize(("factor", "far"), [(1.0, False), (1e-5, True)])
def test_sums_of_what_is_far_larger_than_the_sum_are_rounded_in_floating_point(factor, far):
    torch.manual_seed(0)
    x, config = torch.randn(16, 4), {"op_names": ["sum"], "target_names": ["_input_0", "_input_1", "_output_0"], **BYTE}
    program = program_of(ptq(Added(factor), [config], x), x)
    after, (fallbacks,) = changed(program, far_sums)
    assert [own.where for own in fallbacks] == (["sum"] if far else [])
    assert len(calls(after, QUANTIZE)) == (2 if far else 3)
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) == 0


class Moved(nn.Module):
    """A value that lies on one grid, is moved, and goes to another."""

    def __init__(self, move):
        super().__init__()
        self.fc, self.move, self.other = nn.Linear(6, 6), move, nn.Identity()

    def forward(self, x):
        return self.other(self.move(self.fc(x)))


def two_grids(program):
    """What stands between values on one grid and the rounding to another, where nothing else reads it."""
    graph = Graph(program)
    found = []
    for node in graph.calls(QUANTIZE):
        source, scale = node.args[0], graph.constant(node.args[1])
        values = source.all_input_nodes
        if source.target is _ATEN.linear.default or any(value.target is not DEQUANTIZE for value in values):
            continue
        found += [source.target for value in values if not torch.equal(graph.constant(value.args[1]), scale)]
    return found


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.view(-1, 2, 3),
        lambda x: torch.cat([x, x], 1),
        lambda x: x.relu(),
    ],
    ids=["view", "cat", "relu"],
)
def test_what_moves_to_another_grid_is_rounded_before(move):
    symmetric = {"quant_dtype": "int8", "quant_scheme": "symmetric", "quant_range": "full"}
    config = [layers("fc"), layers("other", weight=None, value=None, output=symmetric)]
    x = torch.randn(8, 6)
    program = program_of(ptq(Moved(move), config, x), x)
    assert two_grids(program)
    after, _ = changed(program, on_one_grid)
    assert two_grids(after) == []
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) == 0


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({**BYTE, "dynamic": True}, "its scale is dynamic"),
        ({**BYTE, "granularity": "per_channel"}, "more than one scale"),
    ],
)
def test_what_xnnpack_cannot_hold_is_rounded_in_floating_point(value, why):
    net, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(8, 6)
    program = program_of(ptq(net, [layers("0", value=value)], x), x)
    after, fallbacks = ExecuTorch().prepare(program)
    assert [own.where for own in fallbacks] == ["0"]
    assert fallbacks[0].reason.startswith("a value is rounded in floating point: ")
    assert why in fallbacks[0].reason
    assert len(calls(after, QUANTIZE)) == 1  # the output
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) == 0


class Fork(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        return y.exp(), y.sin(), y.cos()


def test_each_reader_of_stored_numbers_has_its_own_values():
    x = torch.randn(3, 4)
    program = program_of(ptq(Fork(), [layers("fc", value=None)], x), x)
    after, _ = changed(program, dequantize_for_each)
    (number,) = calls(after, QUANTIZE)
    assert len(number.users) == 3
    assert all(len(node.users) == 1 for node in calls(after, DEQUANTIZE))
    assert largest_difference(program_outputs(after, x), program_outputs(program, x)) == 0
