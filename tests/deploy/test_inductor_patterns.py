"""What the patterns of Inductor take, made without changing a value."""

import pytest
import torch
from torch import nn

from tersor.deploy.graph import DEQUANTIZE, Graph
from tersor.deploy.inductor import Inductor
from tersor.deploy.inductor_patterns import merge_limits
from tersor.deploy.lowering import Program, export, lower
from tersor.quantization import PtqQuantizer


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


class PadsItself(nn.Conv2d):
    """A convolution whose own code pads what it was given."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


def test_a_convolution_that_pads_by_itself_reads_rounded_values():
    net, example = nn.Sequential(PadsItself(4, 4, 3)).eval(), torch.randn(2, 4, 6, 6)
    config_list = [{"op_types": [PadsItself], "target_names": ["weight", "_input_0"], "quant_dtype": "int8"}]
    quantizer = PtqQuantizer(net, config_list, calibration=[example])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    program = lower(net, example, calibration)
    prepared, _ = Inductor().prepare(program)
    (conv,) = [node for node in prepared.exported.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert conv.args[0].target is DEQUANTIZE
    assert torch.equal(prepared.exported.module()(example), program.exported.module()(example))
