"""Every hard case is a model that works."""

import pytest
import torch
from torch import nn

from tersor.graph.inputs import as_call, fresh_inputs, tensors_of
from tests.networks import randomize
from tests.zoo.hard_cases import rows
from tests.zoo.rows import Row

ROWS = rows()
Case = tuple[Row, nn.Module]


@pytest.fixture(scope="module", params=ROWS, ids=[row.name for row in ROWS])
def case(request: pytest.FixtureRequest) -> Case:
    """A row and its model, made before a test begins: hooks and parametrizations of its own are no leaks."""
    torch.manual_seed(0)
    return request.param, randomize(request.param.build())


def test_names_are_unique():
    assert len({row.name for row in ROWS}) == len(ROWS) >= 30


def test_runs_at_two_batch_sizes(case: Case):
    row, model = case
    assert model.__doc__ != nn.Module.__doc__
    shapes = []
    for samples in (2, 3):
        args, kwargs = as_call(fresh_inputs(row.inputs(), samples))
        with torch.no_grad():
            outputs = tensors_of(model(*args, **kwargs))
        assert outputs
        assert all(bool(tensor.isfinite().all()) for tensor in outputs)
        assert all(float(tensor.std()) > 1e-3 for tensor in outputs)
        assert {len(tensor) for tensor in outputs} == {samples}
        shapes.append([tensor.shape[1:] for tensor in outputs])
    assert shapes[0] == shapes[1]


def test_what_is_used_is_trained(case: Case):
    row, model = case
    args, kwargs = as_call(row.inputs())
    sum(tensor.square().mean() for tensor in tensors_of(model(*args, **kwargs))).backward()
    without = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is None}
    expected = {"NeverUsed": {"unused", "dropped", "auxiliary"}, "IntermediateFeatures": {"body"}}
    assert without == expected.get(type(model).__name__, set())
