"""What the patterns of Inductor take, made without changing a value."""

import pytest
import torch
from torch import nn

from tersor.deploy.graph import Graph
from tersor.deploy.inductor_patterns import merge_limits
from tersor.deploy.lowering import Program, export


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
