"""Attention with fused projections, over another sequence, and in PyTorch's own layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.hard.attention import DIM, HEAD_DIM, HEADS, attend


class FusedReshape(nn.Module):
    """ViT's fused projection: the view puts the three roles before the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.head_dim = HEAD_DIM
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class FusedChunk(nn.Module):
    """The three roles are chunks of the projection's outputs; a literal head size and inferred heads."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(DIM, 3 * DIM)
        self.out_proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.in_proj(x).chunk(3, dim=-1))
        return x + self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class FusedHeadsFirst(nn.Module):
    """GPT-NeoX's fused projection: the roles lie within each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads = HEADS
        self.head_size = HEAD_DIM
        self.query_key_value = nn.Linear(DIM, 3 * DIM)
        self.dense = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.query_key_value(x).view(*x.shape[:2], self.num_attention_heads, 3 * self.head_size)
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)
        y = attend(q, k, v).transpose(1, 2).contiguous()
        return x + self.dense(y.view(*x.shape[:2], self.num_attention_heads * self.head_size))


class FusedSplit(nn.Module):
    """Queries of four heads and keys and values of two in one projection, split by literal sizes, as in Phi-3."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.num_key_value_heads = 2
        self.head_dim = HEAD_DIM
        self.qkv_proj = nn.Linear(DIM, 32)
        self.o_proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self.qkv_proj(x).split([16, 8, 8], -1))
        repeats = self.num_heads // self.num_key_value_heads
        y = attend(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
        return x + self.o_proj(y.transpose(1, 2).flatten(2))


class ConvolutionalAttention(nn.Module):
    """Queries, keys and values of a map by 1x1 convolutions, with tokens last (the non-local block, by heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, 3, padding=1)
        self.qkv = nn.Conv2d(DIM, 3 * DIM, 1)
        self.proj = nn.Conv2d(DIM, DIM, 1)
        self.head = nn.Conv2d(DIM, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(x).view(batch, HEADS, -1, height * width).chunk(3, dim=2)
        y = v @ (k.transpose(-2, -1) @ q * 0.5).softmax(-2)
        return self.head(x + self.proj(y.reshape(batch, channels, height, width)))


class CrossAttention(nn.Module):
    """Keys and values come from another sequence of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.encode = nn.Linear(6, 12)
        self.to_q = nn.Linear(DIM, DIM)
        self.to_kv = nn.Linear(12, 2 * DIM)
        self.to_out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = torch.relu(self.encode(context))
        k, v = self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (self.to_q(x), k, v))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MultiheadAttention(nn.Module):
    """PyTorch's own layer: one fused parameter, heads inside; first over itself, then over another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(DIM, HEADS, kdim=12, vdim=12, batch_first=True)
        self.encode = nn.Linear(6, 12)
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        context = torch.relu(self.encode(x))
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y, weights = self.cross(x, context, value=context)
        return self.head(torch.relu(x + y)), weights


class EncoderLayers(nn.Module):
    """PyTorch's encoder layer twice, once with its norms first, under a padding mask and tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, DIM)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(DIM, HEADS, 24, dropout=0.0, norm_first=first) for first in (False, True)
        )
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        x = self.embed(x).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.head(x.transpose(0, 1))


class DecoderLayer(nn.Module):
    """PyTorch's decoder layer: attention over itself under a causal mask, and over the encoder's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, DIM)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(DIM, HEADS, 24, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoderLayer(DIM, HEADS, 24, dropout=0.0, activation=F.gelu, batch_first=True)
        self.head = nn.Linear(DIM, 5)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(self.embed(source))
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.decoder(self.embed(target), memory, tgt_mask=mask))


CASES: dict[type[nn.Module], tuple[Any, ...]] = {
    **dict.fromkeys((FusedReshape, FusedChunk, FusedHeadsFirst, FusedSplit), (6, DIM)),
    ConvolutionalAttention: (3, 4, 4),
    CrossAttention: ((6, DIM), (9, 6)),
    MultiheadAttention: (7, 6),
    EncoderLayers: (7, 6),
    DecoderLayer: ((7, 6), (5, 6)),
}
