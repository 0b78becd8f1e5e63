"""Recurrent layers, embeddings that are tied, gated and mixed experts, scans over time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BidirectionalLstm(nn.Module):
    """Two layers in both directions: four gates in one parameter, and outputs of both directions joined."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.lstm = nn.LSTM(8, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, (hidden, _) = self.lstm(torch.relu(self.enter(x)))
        return self.head(torch.tanh(y)) + self.head(torch.cat([hidden[-2], hidden[-1]], -1)).unsqueeze(1)


class ProjectedLstm(nn.Module):
    """A cell that is wider than its output, in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 10, proj_size=4, batch_first=True, dtype=torch.float64)
        self.head = nn.Linear(4, 5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class StackedGru(nn.Module):
    """Two layers, time first, from an initial state that a layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 16)
        self.gru = nn.GRU(6, 8, num_layers=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.tanh(self.start(x.mean(1))).view(len(x), 2, 8).transpose(0, 1).contiguous()
        y, state = self.gru(x.transpose(0, 1), state)
        return self.head(y[-1] + state[0])


class PlainRnn(nn.Module):
    """A recurrent layer between convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.rnn = nn.RNN(8, 10, nonlinearity="relu", batch_first=True, bidirectional=True)
        self.head = nn.Conv1d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.rnn(x)[0].transpose(1, 2))


class CellLoop(nn.Module):
    """Cells that are stepped through time by a loop, with states that start as constants."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 8
        self.lstm = nn.LSTMCell(6, 8)
        self.gru = nn.GRUCell(8, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hidden_size)
        state, outputs = None, []
        for step in x.unbind(1):
            h, c = self.lstm(step, (h, c))
            state = self.gru(h, state)
            outputs.append(self.head(state))
        return torch.stack(outputs, 1)


class SelectiveScan(nn.Module):
    """A state space for each channel, written out over time: products of three parameters' dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(6, 16)
        self.conv1d = nn.Conv1d(8, 8, 3, padding=2, groups=8)
        self.x_proj = nn.Linear(8, 6)
        self.dt_proj = nn.Linear(2, 8)
        self.A_log = nn.Parameter(torch.rand(8, 2))
        self.D = nn.Parameter(torch.ones(8))
        self.out_proj = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        step, b, c = self.x_proj(x).split([2, 2, 2], dim=-1)
        step = F.softplus(self.dt_proj(step))
        decay = torch.exp(-step.unsqueeze(-1) * self.A_log.exp())
        state, outputs = torch.zeros_like(decay[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + (step[:, t] * x[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(1)
            outputs.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1))
        return self.out_proj((torch.stack(outputs, 1) + self.D * x) * F.silu(gate))


class TiedEmbeddings(nn.Module):
    """One parameter reads the words and writes the logits, through a projection between two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.enter = nn.Linear(8, 12)
        self.leave = nn.Linear(12, 8)
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.leave(torch.relu(self.enter(self.embed(ids)))))


class TiedTransposed(nn.Module):
    """An autoencoder whose decoder is its encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 10)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.encode(x)), self.encode.weight.t(), self.bias)


class SummedEmbeddings(nn.Module):
    """Words, positions and kinds on one stream, and a bag of words beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.positions = nn.Embedding(16, 8)
        self.kinds = nn.Parameter(torch.randn(2, 8))
        self.bag = nn.EmbeddingBag(20, 8, mode="mean")
        self.fc = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        x = self.words(ids) + self.positions(positions) + self.kinds[(ids > 9).long()]
        return self.head(torch.relu(self.fc(x * torch.sigmoid(self.bag(ids)).unsqueeze(1))))


class GatedFeedForward(nn.Module):
    """SwiGLU twice: with two layers, and with one that holds gate and value."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(6, 10)
        self.up_proj = nn.Linear(6, 10)
        self.down_proj = nn.Linear(10, 6)
        self.gate_up_proj = nn.Linear(6, 16)
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return x + self.last(up * F.gelu(gate))


class BatchedExperts(nn.Module):
    """Experts in parameters of three dimensions; every one computes, a softmax weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.w1 = nn.Parameter(torch.randn(4, 6, 10))
        self.b1 = nn.Parameter(torch.randn(4, 10))
        self.w2 = nn.Parameter(torch.randn(4, 10, 6))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        hidden = F.silu(torch.einsum("btd,edh->bteh", x, self.w1) + self.b1)
        return x + torch.einsum("bteh,ehd,bte->btd", hidden, self.w2, weights)


class RoutedExperts(nn.Module):
    """Each token visits its best two experts; which, the data decide, and some experts may stay unvisited."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6)) for _ in range(self.gate.out_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == index)
            result.index_add_(0, row, expert(tokens[row]) * weights[row, slot, None])
        return x + result.view_as(x)


class TimeDistributed(nn.Module):
    """Time is folded into the batch for a convolutional encoder, and unfolded for a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc = nn.Linear(24, 8)
        self.gru = nn.GRU(8, 7, batch_first=True)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(torch.relu(self.conv(x.flatten(0, 1))), 2).flatten(1)
        y = torch.relu(self.fc(y)).view(x.shape[0], x.shape[1], -1)
        return self.head(self.gru(y)[0][:, -1])


def ids() -> Tensor:
    return torch.randint(1, 20, (2, 9), generator=torch.Generator().manual_seed(0))


SEQUENCE = (5, 6)
CASES: dict[type[nn.Module], tuple[int, ...] | Callable[[], Tensor]] = {
    **dict.fromkeys((BidirectionalLstm, StackedGru, PlainRnn, CellLoop, SelectiveScan), SEQUENCE),
    **dict.fromkeys((TiedTransposed, GatedFeedForward, BatchedExperts, RoutedExperts), SEQUENCE),
    ProjectedLstm: lambda: torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    TiedEmbeddings: ids,
    SummedEmbeddings: ids,
    TimeDistributed: (3, 1, 6, 6),
}
