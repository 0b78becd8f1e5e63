"""Attention with separate projections: heads as blocks, shared keys, tables and gates for each head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, HEAD_DIM = 16, 4, 4


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out, for the cases whose difficulty lies elsewhere; (batch, heads, tokens, head size)."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


class Attention(nn.Module):
    """Separate projections; the numbers of heads and their size are integers of the module."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.num_key_value_heads = self.kv_heads
        self.head_dim = HEAD_DIM
        self.q_proj = nn.Linear(DIM, HEADS * HEAD_DIM)
        self.k_proj = nn.Linear(DIM, self.kv_heads * HEAD_DIM)
        self.v_proj = nn.Linear(DIM, self.kv_heads * HEAD_DIM)
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        y = self.mix(q, k, v).transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        return x + self.o_proj(y)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


class FusedAttentionKernel(Attention):
    """The same through PyTorch's fused operator, causal."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class RepeatedKeys(Attention):
    """Two query heads to a key head: keys and values are repeated by `repeat_interleave`."""

    kv_heads = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = self.num_heads // self.num_key_value_heads
        return attend(q, k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1))


class ExpandedKeys(Attention):
    """The same by an expanded view that is folded into the heads, in the manner of Llama."""

    kv_heads = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, tokens, size = k.shape
        k, v = (
            t[:, :, None].expand(batch, heads, 2, tokens, size).reshape(batch, heads * 2, tokens, size) for t in (k, v)
        )
        return F.scaled_dot_product_attention(q, k, v)


class GroupedQueries(Attention):
    """The same inside the fused operator."""

    kv_heads = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class MultiQuery(Attention):
    """One key head for all: keys and values broadcast over the queries' heads, and cannot lose a head."""

    kv_heads = 1

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


class NormalizedQueries(Attention):
    """Queries and keys are normalized within each head, by one weight for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(HEAD_DIM)
        self.k_norm = nn.RMSNorm(HEAD_DIM)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class CosineAttention(Attention):
    """Swin V2's: queries and keys of length one, and a temperature for each head that is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.randn(HEADS, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return (scores * self.logit_scale.clamp(max=4.6).exp()).softmax(-1) @ v


class RelativePositions(Attention):
    """A table with a column for each head is read at relative positions, as in Swin."""

    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, HEADS))
        steps = torch.arange(6)
        self.register_buffer("index", steps[:, None] - steps[None] + 5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[-2]
        bias = self.table[self.index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        return (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1) @ v


class EmbeddedPositions(Attention):
    """The table is an embedding, as in T5, and its rows go into the fused operator as a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        steps = torch.arange(q.shape[-2])
        bias = self.table(steps[:, None] - steps[None] + 5).permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0), scale=1.0)


class LinearBiases(Attention):
    """ALiBi: slopes that are computed from the number of heads."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slopes = 2.0 ** -torch.arange(1, self.num_heads + 1)
        steps = torch.arange(k.shape[-2])
        bias = slopes[:, None, None] * (steps[None] - steps[:, None])
        return (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v


class RotaryPositions(Attention):
    """Halves of each head are rotated against each other."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angles = torch.arange(q.shape[-2])[:, None] * 100.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)
        cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
        q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
        return attend(q, k, v)


class TalkingHeads(Attention):
    """Layers mix the scores of all heads before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(HEADS, HEADS)
        self.after = nn.Conv2d(HEADS, HEADS, 1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.after(scores.softmax(-1)) @ v


class LinearAttention(Attention):
    """Keys meet values first: a matrix that varies along the head size of both."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


class EinsumAttention(Attention):
    """Contractions in words, and heads that are never a block of a view but of an einsum."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
        return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


class HeadsInBatch(Attention):
    """Heads are folded into the batch for `bmm`, as in BART."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[0]
        q, k, v = (t.reshape(batch * self.num_heads, -1, self.head_dim) for t in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(scores, v).view(batch, self.num_heads, -1, self.head_dim)


class HeadGates(Attention):
    """Each head is scaled by a bare parameter and by a gate that the input opens."""

    def __init__(self) -> None:
        super().__init__()
        self.head_scale = nn.Parameter(torch.rand(HEADS) + 0.5)
        self.gate = nn.Linear(HEADS * HEAD_DIM, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = attend(q, k, v) * self.head_scale.view(1, -1, 1, 1)
        gate = torch.sigmoid(self.gate(v.transpose(1, 2).flatten(2)))
        return y * gate.transpose(1, 2).unsqueeze(-1)


CASES = dict.fromkeys(
    (
        Attention,
        FusedAttentionKernel,
        RepeatedKeys,
        ExpandedKeys,
        GroupedQueries,
        MultiQuery,
        NormalizedQueries,
        CosineAttention,
        RelativePositions,
        EmbeddedPositions,
        LinearBiases,
        RotaryPositions,
        TalkingHeads,
        LinearAttention,
        EinsumAttention,
        HeadsInBatch,
        HeadGates,
    ),
    (6, DIM),
)
