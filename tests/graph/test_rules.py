"""What must stay: operators after which a removed index would go on counting, or come out at another place."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tersor.graph import groups


class Net(nn.Module):
    """Two linear layers with something in between; ``w`` and ``table`` are bare."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)
        self.w = nn.Parameter(torch.randn(6, 6))
        self.register_buffer("table", torch.randn(6, 6))
        self.between = between

    def forward(self, x):
        return self.between(self, x)


def roll(net, x):
    return net.c(torch.roll(net.a(x), 1, -1))


def permuted(net, x):
    return net.c(torch.index_select(net.a(x), 1, torch.tensor([3, 1, 2, 0, 5, 4])))


def gram(net, x):
    return torch.sigmoid(net.a(x)) @ torch.sigmoid(net.b(x)).T


def transformed_weight(net, x):
    return torch.sigmoid(net.a(x)) @ net.w.exp()


def buffer_weight(net, x):
    return torch.sigmoid(net.a(x)) @ net.table


def square_beside_reader(net, x):
    h = torch.sigmoid(net.a(x))
    return net.c(h) + (h.unsqueeze(1) @ h.unsqueeze(2)).flatten(1)


def statistics_over_channels(net, x):
    h = net.a(x).T
    return net.c(F.batch_norm(h.reshape(6, 1, -1).expand(6, 2, -1), None, None, training=True)[:, 0].T)


def constant_statistics(net, x):
    return net.c(F.batch_norm(net.a(x), torch.arange(6.0), torch.ones(6)))


def in_place_view(net, x):
    h = net.a(x)
    h.unsqueeze_(1)
    return net.c(h).flatten(1)


def softmax_over_channels(net, x):
    return net.c(net.a(x).softmax(-1))


def mean_over_channels(net, x):
    return net.a(x).mean(1, keepdim=True)


def channel_by_number(net, x):
    h = net.a(x)
    return net.c(h) * h[:, :1]


def no_rule(net, x):
    return net.c(torch.renorm(net.a(x), 2, 0, 1.0))


def every_other_copy(net, x):
    return net.a(x).repeat(1, 2)[:, ::2] @ net.c.weight.T


def gathered_channels(net, x):
    return net.c(net.a(x).gather(1, torch.tensor([[3, 1, 2, 0, 5, 4]] * 4)))


def gathered_rows(net, x):
    return net.c(net.a(x).gather(0, torch.tensor([[0, 1, 2, 3, 1, 2]] * 4)))


def scattered_channels(net, x):
    return net.c(torch.zeros(4, 6).scatter(1, torch.tensor([[3, 1, 2, 0, 5, 4]] * 4), net.a(x)))


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (roll, "reorders"),
        (permuted, "looked up by position"),
        (gathered_channels, "looked up by position"),
        (gathered_rows, "meets rows that no parameter controls"),
        (scattered_channels, "looked up by position"),
        (gram, "not zero where it is masked"),
        (transformed_weight, "not zero where it is masked"),
        (buffer_weight, "not zero where it is masked"),
        (square_beside_reader, "not zero where it is masked"),
        (statistics_over_channels, "averaged over"),
        (constant_statistics, "no parameter controls"),
        (in_place_view, "no rule"),
        (softmax_over_channels, "runs over it"),
        (mean_over_channels, "reduces over it"),
        (channel_by_number, "takes it apart"),
        (no_rule, "no rule"),
        (every_other_copy, "every second index"),
    ],
)
def test_frozen_with_a_reason(between, reason):
    found = groups(Net(between), torch.randn(4, 3)).frozen_reason("a.weight", 0)
    assert found is not None
    assert reason in found


def counting_bias(net, x):
    return net.c(F.conv1d(x.unsqueeze(2), net.a.weight.unsqueeze(2), torch.arange(6.0)).flatten(1))


def test_a_constant_bias_freezes_what_it_is_added_to():
    found = groups(Net(counting_bias), torch.randn(4, 3)).frozen_reason("a.weight", 0)
    assert found == "is added to a tensor that no parameter controls"


def test_a_sparse_operand_does_not_stop_the_run():
    def spread(net, x):
        return net.c(torch.sparse.mm(torch.eye(4).to_sparse(), net.a(x)))

    assert groups(Net(spread), torch.randn(4, 3)).classes_along("a.weight", 0) is not None


@pytest.mark.parametrize(
    "between",
    [
        lambda net, x: net.c(net.a(x).flip(1)),
        lambda net, x: net.c(net.a(x).T.contiguous().T),
        lambda net, x: net.c(torch.cat([net.a(x), net.b(x)], 0)),
        lambda net, x: net.c(net.a(x) * torch.sigmoid(net.b(x))),
        lambda net, x: torch.relu(net.a(x)) @ net.w @ net.table,
        lambda net, x: net.c(F.linear(x, net.a.weight.clone(), net.a.bias)),
        lambda net, x: net.c(net.a(x)) + (net.a(x) * net.a(x).tanh()).sum(1, keepdim=True),
        lambda net, x: torch.relu(net.a(x)) @ F.gelu(net.b(x)).T,
        lambda net, x: net.c(net.a(x) + torch.ones(6)),
        lambda net, x: net.c(net.a(x).unsqueeze(2).repeat(1, 1, 3).amax(2)),
        lambda net, x: net.c(net.a(x) + F.embedding(torch.arange(4), net.w)),
        lambda net, x: net.c(net.a(x) + F.embedding_bag(torch.tensor([[0, 5]] * 4), net.w)),
        lambda net, x: net.c(net.a(x).gather(0, torch.ones(4, 6, dtype=torch.int64))),
        lambda net, x: net.c(torch.zeros(4, 6).index_add(0, torch.tensor([1, 3, 0, 2]), net.a(x))),
    ],
)
def test_what_may_leave_is_not_frozen(between):
    assert groups(Net(between), torch.randn(4, 3)).frozen_reason("a.weight", 0) is None
