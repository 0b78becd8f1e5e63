import pytest
import torch
from torch import nn

from tersor.errors import TraceError
from tersor.graph.nodes import Nodes


@pytest.fixture
def nodes():
    return Nodes(nn.Linear(2, 2))


def test_tensors_that_nothing_made_are_constants_and_parameters_are_the_models(nodes):
    model = nn.Linear(2, 2)
    nodes, table = Nodes(model), torch.ones(3)
    assert nodes.argument(model.weight).target == "weight"
    assert nodes.argument([table, table])[1].target == "_constant_0"
    assert nodes.constants == {"_constant_0": table}


def test_a_constant_takes_no_name_of_the_models():
    model = nn.Module()
    model.register_buffer("_constant_0", torch.ones(1))
    assert Nodes(model).argument(torch.ones(2)).target == "__constant_0"


def test_an_alias_made_by_other_means_is_the_tensor(nodes):
    x = torch.ones(3)
    nodes.remember(x, nodes.add("placeholder", "x"))
    alias = nodes.argument(nn.Parameter(x))
    assert (alias.target, alias.args[0].target) == ("detach", "x")


def test_what_has_no_place_in_a_graph_is_named(nodes):
    nodes.scopes = ["encoder.layer"]
    with pytest.raises(TraceError, match=r"module 'encoder.layer': a value of type generator.*leaf_types"):
        nodes.argument(x for x in "ab")

    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself, cycle.x = cycle, torch.ones(1)
    with pytest.raises(TraceError, match="Cycle holds itself"):
        nodes.argument(cycle)


def test_a_tensor_is_forgotten_with_its_last_reference(nodes):
    for _ in range(50):
        nodes.remember(torch.ones(1), nodes.add("call_function", torch.ones, (1,)))
    unknown = [nodes.argument(torch.ones(1)).op for _ in range(50)]
    assert set(unknown) == {"get_attr"}
