"""Passes that make a program fit for an engine; its values stay what they were."""

import pytest
import torch
from torch import nn

from tersor.deploy.graph import DEQUANTIZE, QUANTIZE, Graph
from tersor.deploy.lowering import Program, export, lower
from tersor.deploy.operators import dequantize, quantize
from tersor.deploy.placement import (
    gather_numbers,
    integer_biases,
    join_twins,
    products,
    unsigned_activations,
    whole_ranges,
)
from tersor.deploy.sums import round_in_float
from tersor.quantization import PtqQuantizer


def lowered(net, example, **forms):
    kinds = sorted({type(module).__name__ for module in net.modules() if hasattr(module, "weight")})
    config = [{"op_types": kinds, "target_names": list(forms), "target_settings": forms}]
    quantizer = PtqQuantizer(net.eval(), config, calibration=[example])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    return lower(net, example, calibration)


def changed(program, example, *passes, equal=True):
    graph = Graph(program)
    for each in passes:
        each(graph)
    after = graph.close()
    if equal:
        assert torch.equal(after.exported.module()(example), program.exported.module()(example))
    return after


def calls(program, target):
    return [node for node in program.exported.graph.nodes if node.target is target]


@pytest.mark.parametrize(
    ("kind", "ends"), [("int8", (1, 255)), ("int6", (97, 159)), ("uint3", (0, 7)), ("uint8", (0, 255))]
)
def test_activations_become_bytes_with_the_range_that_they_had(kind, ends):
    torch.manual_seed(0)
    example = torch.randn(3, 4)
    program = lowered(nn.Sequential(nn.Linear(4, 2)), example, weight={}, _input_0={"quant_dtype": kind})
    (node,) = calls(changed(program, example, unsigned_activations), QUANTIZE)
    assert node.args[3:6] == ("uint8", *ends)


def test_sixteen_bits_are_no_bytes():
    example = torch.randn(3, 4)
    program = lowered(nn.Sequential(nn.Linear(4, 2)), example, weight={}, _input_0={"quant_dtype": "int16"})
    (node,) = calls(changed(program, example, unsigned_activations), QUANTIZE)
    assert node.args[3] == "int16"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.first(x) + self.second(x)


def test_twins_are_rounded_once():
    example = torch.randn(3, 4)
    program = lowered(Twice(), example, weight={}, _input_0={})
    assert len(calls(program, QUANTIZE)) == 2
    after = changed(program, example, join_twins)
    assert (len(calls(after, QUANTIZE)), len(calls(after, DEQUANTIZE))) == (1, 3)


@pytest.mark.parametrize("form", [{"granularity": [-1, 1]}, {"granularity": [1, -1]}, {"granularity": [1, 2]}, {}])
def test_a_table_is_looked_up_before_it_is_dequantized(form):
    torch.manual_seed(0)
    example = torch.tensor([[3, 1, 0], [6, 6, 2]])
    program = lowered(nn.Sequential(nn.Embedding(7, 4)), example, weight={"quant_dtype": "int8", **form})
    after = changed(program, example, gather_numbers)
    (node,) = calls(after, DEQUANTIZE)
    assert tuple(node.meta["val"].shape[1:]) == (3, 4)


@pytest.mark.parametrize("form", [{}, {"granularity": [1, -1]}, {"granularity": [1, 2], "quant_dtype": "int4"}])
def test_linear_layers_are_products_of_weights_that_are_stored_the_other_way_round(form):
    torch.manual_seed(0)
    example = torch.randn(2, 3, 4)
    program = lowered(nn.Sequential(nn.Linear(4, 6)), example, weight={"quant_dtype": "int8", **form})
    after = changed(program, example, products, equal=False)
    values = [each.exported.module()(example) for each in (program, after)]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)
    (node,) = calls(after, DEQUANTIZE)
    assert tuple(node.meta["val"].shape) == (4, 6)
    assert not calls(after, torch.ops.aten.linear.default)


def test_biases_of_convolutions_change_by_half_a_step_at_most():
    torch.manual_seed(0)
    example, net = torch.randn(2, 3, 6, 6), nn.Sequential(nn.Conv2d(3, 4, 3))
    program = lowered(net, example, weight={"granularity": [1, -1, -1, -1]}, _input_0={})
    after = changed(program, example, integer_biases, equal=False)
    before, now = (each.exported.module()(example) for each in (program, after))
    targets = program.targets
    step = targets["0.weight"].scale * targets["0._input_0"].scale
    assert bool(((before - now).abs() <= step.view(-1, 1, 1) / 2 + 1e-6).all())
    assert [node.args[3] for node in calls(after, DEQUANTIZE)].count("int32") == 1


def test_biases_of_dead_channels_get_numbers_too():
    """They are as large as billions of steps of weights that are next to nothing."""
    torch.manual_seed(0)
    example, net = torch.randn(2, 3, 6, 6), nn.Sequential(nn.Conv2d(3, 4, 3))
    net[0].weight.data[1] *= 1e-12
    net[0].bias.data[1] = 3.0
    program = lowered(net, example, weight={"granularity": [1, -1, -1, -1]}, _input_0={})
    after = changed(program, example, integer_biases, equal=False)
    before, now = (each.exported.module()(example) for each in (program, after))
    assert float((before - now)[:, 1].abs().max()) < 1e-6
    assert float((before - now).abs().max()) < float(program.targets["0.weight"].scale.max())
    assert [node.args[3] for node in calls(after, DEQUANTIZE)].count("int32") == 1


def test_biases_of_layers_in_floating_point_stay():
    example, net = torch.randn(2, 3, 6, 6), nn.Sequential(nn.Conv2d(3, 4, 3))
    program = lowered(net, example, weight={})
    after = changed(program, example, integer_biases)
    assert all(node.args[3] != "int32" for node in calls(after, DEQUANTIZE))


def test_an_output_that_a_pass_replaces_and_a_name_that_python_has():
    class Named(nn.Module):
        def forward(self, input):  # noqa: A002
            return input.relu()

    program = Program(export(Named(), torch.randn(2, 3)))
    graph = Graph(program)
    (relu,) = graph.calls()
    with graph.graph.inserting_before(relu):
        first = graph.new_constant(torch.ones(3), "one")
        second = graph.new_constant(torch.ones(3), "one")
        value = graph.call(torch.ops.aten.add.Tensor, (relu.args[0], first), relu)
        value = graph.call(torch.ops.aten.add.Tensor, (value, second), relu)
    relu.replace_all_uses_with(value)
    assert torch.equal(graph.close().exported.module()(torch.zeros(4, 3)), torch.full((4, 3), 2.0))


@pytest.mark.parametrize("granularity", [[4, 2], [2, 1]])
def test_a_row_of_scales_may_serve_several_rows_of_a_table(granularity):
    torch.manual_seed(0)
    example = torch.randint(0, 8, (3, 5))
    net = nn.Sequential(nn.Embedding(8, 4))
    program = lowered(net, example, weight={"granularity": granularity})
    changed(program, example, gather_numbers)


@pytest.mark.parametrize("change", [unsigned_activations, whole_ranges, lambda graph: round_in_float(graph, bool)])
def test_signs_stay_signs(change):
    class Signs(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.5))
            self.register_buffer("zero", torch.tensor(0, dtype=torch.int8))

        def forward(self, x):
            numbers = quantize(x * 0.1, self.scale, self.zero, "int1", -1, 1)
            return dequantize(numbers, self.scale, self.zero, "int1")

    example = torch.tensor([[-3.0, -0.2, 0.0, 0.2]])
    program = Program(export(Signs(), example))
    assert program.exported.module()(example).tolist() == [[-0.5, -0.5, 0.5, 0.5]]
    changed(program, example, change)


def test_half_precision_is_rounded_as_single():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.0013))
            self.register_buffer("zero", torch.tensor(0, dtype=torch.int16))

        def forward(self, x):
            numbers = quantize(x * 1.0, self.scale, self.zero, "int16", -32767, 32767)
            return dequantize(numbers, self.scale, self.zero, "int16")

    example = torch.linspace(-40, 40, 64).view(2, 32).half()
    changed(Program(export(Half(), example)), example, lambda graph: round_in_float(graph, bool))
