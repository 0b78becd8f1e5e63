import pytest
import torch
from torch import nn

from tersor.errors import InvalidValueError, TraceError
from tersor.graph.inputs import as_call, evaluating, fresh_inputs, run, tensors_of


def test_calls():
    x = torch.zeros(1)
    assert as_call(x)[0][0] is x
    assert as_call((x, 2))[0] == (x, 2)
    assert as_call({"x": x})[1]["x"] is x
    with pytest.raises(InvalidValueError, match="NoneType"):
        as_call(None)


def test_fresh_inputs_keep_kind_at_another_batch_size():
    example = {"image": torch.randn(2, 3, 4) * 5 + 100, "ids": torch.tensor([[1, 7], [2, 9]]), "scale": torch.ones(5)}
    state = torch.get_rng_state()
    fresh = fresh_inputs(example, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert fresh["image"].shape == (1, 3, 4)
    assert 90 < fresh["image"].mean() < 110
    assert fresh["ids"].shape == (1, 2)
    assert {tuple(row) for row in fresh["ids"].tolist()} <= {(1, 7), (2, 9)}
    assert fresh["scale"].shape == (5,)


def test_evaluating_restores_every_flag():
    net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    net[1].eval()
    seen = []

    def fail() -> None:
        seen.append((net.training, torch.is_grad_enabled()))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), evaluating(net):
        fail()
    assert seen == [(False, False)]
    assert net.training
    assert net[0].training
    assert not net[1].training


def test_a_model_that_does_not_run_is_named():
    with pytest.raises(TraceError, match=r"Linear cannot run on the example inputs of shape \(1, 3\)"):
        run(nn.Linear(2, 2), torch.zeros(1, 3))


def test_tensors_in_nested_outputs():
    x = torch.zeros(1)
    assert len(tensors_of({"a": (x, [x, None]), "b": 3})) == 2
