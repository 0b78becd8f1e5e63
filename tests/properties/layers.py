"""Layers for random graphs that are more than one call: attention in its many spellings, gates, windows, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Choices:
    """Decisions made by a short list of integers; where these are used up, each first option is taken.

    Zero is always the simplest option, so a list that shrinks describes a simpler layer.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = list(numbers)

    def pick(self, *options: Any) -> Any:
        return options[(self._numbers.pop(0) if self._numbers else 0) % len(options)]

    def flag(self) -> bool:
        return self.pick(False, True)

    def width(self) -> int:
        """A number of channels."""
        return self.pick(4, 8, 6, 12, 16)

    def divisor(self, number: int) -> int:
        """A number of groups or heads."""
        return self.pick(*(part for part in (2, 4, 3, 1) if number % part == 0))


class Apply(nn.Module):
    """A function of one or more values as a layer.

    Args:
        function: what is computed; it takes the values, then the layer's own parameter and buffer.
        own: shape of a parameter, if there is one.
        fixed: shape of a buffer, if there is one.
        constants: further arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        own: Sequence[int] | None = None,
        *,
        fixed: Sequence[int] | None = None,
        **constants: Any,
    ) -> None:
        super().__init__()
        self.function, self.constants = function, constants
        self.own = None if own is None else nn.Parameter(torch.zeros(tuple(own)))
        self.register_buffer("fixed", None if fixed is None else torch.zeros(tuple(fixed)))

    def forward(self, *values: Tensor) -> Any:
        own = (tensor for tensor in (self.own, self.fixed) if tensor is not None)
        return self.function(*values, *own, **self.constants)


class Around(nn.Module):
    """A layer between two functions: a change of shape and its way back."""

    def __init__(self, before: Callable[..., Tensor], layer: nn.Module, after: Callable[..., Tensor]) -> None:
        super().__init__()
        self.before, self.layer, self.after = before, layer, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


class First(nn.Module):
    """A layer that returns several values, of which the first goes on."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.times)[0]


class Gate(nn.Module):
    """Squeeze and excitation, whose sigmoid is a half where its input is removed."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Feed(nn.Module):
    """Two linear layers over the last dimension with an activation, or a gate of two halves, between them."""

    def __init__(self, channels: int, hidden: int, kind: str) -> None:
        super().__init__()
        self.kind, self.hidden = kind, hidden
        self.enter = nn.Linear(channels, hidden * (1 if kind in ("plain", "swiglu") else 2))
        self.gate = nn.Linear(channels, hidden, bias=False) if kind == "swiglu" else None
        self.leave = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(x)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        elif self.kind == "plain":
            y = torch.sigmoid(y)
        elif self.kind == "split":
            y, gate = y.split(self.hidden, dim=-1)
            y = y * torch.sigmoid(gate)
        else:
            y, gate = y.chunk(2, dim=-1)
            y = y * F.gelu(gate)
        return self.leave(y)


class Experts(nn.Module):
    """A soft mixture of experts, whose weights stand in one tensor each."""

    def __init__(self, channels: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(channels, experts)
        self.up = nn.Parameter(torch.zeros(experts, channels, hidden))
        self.down = nn.Parameter(torch.zeros(experts, hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x).softmax(-1)
        y = torch.sigmoid(torch.einsum("ntc,ecd->entd", x, self.up))
        return torch.einsum("entd,edc,nte->ntc", y, self.down, share)


class Tied(nn.Module):
    """An embedding whose table is also the output projection."""

    def __init__(self, rows: int, channels: int) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, channels)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        ids = (source.flatten(1)[:, : x.shape[1]] > 0).long() + 1
        return F.linear(x + self.table(ids), self.table.weight)


class Rotary(nn.Module):
    """Rotary embedding: half of each head, times a buffer, exchanged with the other half."""

    def __init__(self, tokens: int, size: int) -> None:
        super().__init__()
        angle = torch.arange(float(tokens))[:, None] / 3.0 ** torch.arange(float(size))[None, :]
        self.register_buffer("cosine", angle.cos())
        self.register_buffer("sine", angle.sin())

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self.cosine + torch.cat([-b, a], dim=-1) * self.sine


class Attention(nn.Module):
    """Attention over tokens, as it is written in many models.

    Args:
        channels: of the tokens.
        tokens: their number, for the tables.
        cross: keys and values come from a second value.
        choices: heads, head size, how q, k and v are projected and cut into heads, how few heads k and v have, how
            these are repeated, what is added to the scores, and whether PyTorch's own attention is called.
    """

    def __init__(self, channels: int, tokens: int, choices: Choices, *, cross: bool = False) -> None:
        super().__init__()
        self.style = "apart" if cross else choices.pick("apart", "3hd", "h3d", "chunk", "split", "einsum")
        self.heads, self.size = choices.pick(2, 4, 3), choices.pick(2, 4, 3)
        self.bias_kind = choices.pick("none", "heads", "table", "indexed", "causal", "scale")
        self.literal = choices.pick("size", "heads", "both")
        self.kernel = choices.pick("written", "sdpa", "einsum")
        extra = choices.pick("", "gqa", "expand", "rotary", "norm")
        shared = extra in ("gqa", "expand") and self.style == "apart" and self.heads % 2 == 0
        self.repeat, self.kv_heads, width = extra, self.heads // 2 if shared else self.heads, self.heads * self.size
        if self.style == "apart":
            self.q = nn.Linear(channels, width)
            self.k = nn.Linear(channels, self.kv_heads * self.size, bias=False)
            self.v = nn.Linear(channels, self.kv_heads * self.size)
        elif self.style == "einsum":
            self.own = nn.Parameter(torch.zeros(3, channels, self.heads, self.size))
        else:
            self.qkv = nn.Linear(channels, 3 * width)
        self.rotary = Rotary(tokens, self.size) if extra == "rotary" and self.size % 2 == 0 else None
        self.norm = nn.LayerNorm(self.size) if extra == "norm" else None
        shapes = {
            "heads": (self.heads, tokens, tokens),
            "table": (2 * tokens - 1, self.heads),
            "scale": (self.heads, 1, 1),
        }
        shape = shapes.get("table" if self.bias_kind == "indexed" else self.bias_kind)
        self.bias = None if shape is None else nn.Parameter(torch.zeros(shape))
        place = torch.arange(tokens)
        self.register_buffer("index", place[:, None] - place[None, :] + tokens - 1)
        self.project = nn.Linear(width, channels)

    def cut(self, x: Tensor, heads: int) -> Tensor:
        """``(batch, tokens, heads * size)`` to ``(batch, heads, tokens, size)``."""
        sizes = {"size": (-1, self.size), "heads": (heads, -1), "both": (heads, self.size)}[self.literal]
        return x.view(x.shape[0], x.shape[1], *sizes).transpose(1, 2)

    def projected(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        batch, tokens, _ = x.shape
        if self.style == "apart":
            return (
                self.cut(self.q(x), self.heads),
                self.cut(self.k(context), self.kv_heads),
                self.cut(self.v(context), self.kv_heads),
            )
        if self.style == "einsum":
            return tuple(torch.einsum("ntc,pchd->pnhtd", x, self.own).unbind(0))
        if self.style == "chunk":
            return tuple(self.cut(part.contiguous(), self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.style == "split":
            parts = self.qkv(x).split(self.heads * self.size, dim=-1)
            return tuple(self.cut(part.contiguous(), self.heads) for part in parts)
        if self.style == "3hd":
            size = self.size if self.literal == "both" else -1
            return tuple(self.qkv(x).reshape(batch, tokens, 3, self.heads, size).permute(2, 0, 3, 1, 4).unbind(0))
        heads = self.heads if self.literal == "both" else -1
        return tuple(self.qkv(x).view(batch, tokens, heads, 3, self.size).permute(3, 0, 2, 1, 4).unbind(0))

    def repeated(self, x: Tensor) -> Tensor:
        """Each of the few heads of keys and values once for every query that it serves."""
        if self.kv_heads == self.heads:
            return x
        if self.repeat == "gqa":
            return x.repeat_interleave(self.heads // self.kv_heads, dim=1)
        batch, heads, tokens, size = x.shape
        return x[:, :, None].expand(batch, heads, 2, tokens, size).reshape(batch, heads * 2, tokens, size)

    def added(self, queries: int, keys: int) -> Tensor | None:
        """What is added to the scores."""
        if self.bias_kind == "heads":
            return self.bias[:, :queries, :keys]
        if self.bias_kind == "table":
            return self.bias[self.index].permute(2, 0, 1)[:, :queries, :keys]
        if self.bias_kind == "indexed":
            table = self.bias[self.index.view(-1)].view(*self.index.shape, -1)
            return table.permute(2, 0, 1).contiguous().unsqueeze(0)[:, :, :queries, :keys]
        if self.bias_kind == "causal":
            return torch.zeros_like(self.index, dtype=torch.float64).masked_fill(self.index.tril() == 0, -9.0)[
                :queries, :keys
            ]
        return None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = self.projected(x, x if context is None else context)
        if self.rotary is not None and context is None:
            q, k = self.rotary(q), self.rotary(k)
        if self.norm is not None:
            q, k = self.norm(q), self.norm(k)
        if self.bias_kind == "scale":
            q = q * torch.sigmoid(self.bias)
        k, v = self.repeated(k), self.repeated(v)
        added = self.added(q.shape[2], k.shape[2])
        if self.kernel == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2)
        else:
            scores = torch.einsum("nhqd,nhkd->nhqk", q, k) if self.kernel == "einsum" else q @ k.transpose(2, 3)
            scores = scores * self.size**-0.5 if added is None else scores * self.size**-0.5 + added
            share = scores.softmax(-1)
            y = torch.einsum("nhqk,nhkd->nqhd", share, v) if self.kernel == "einsum" else (share @ v).transpose(1, 2)
        flat = y.flatten(2) if self.literal == "size" else y.reshape(x.shape[0], x.shape[1], -1)
        if self.literal == "both":
            flat = y.reshape(x.shape[0], x.shape[1], self.heads * self.size)
        return self.project(flat)


class Windows(nn.Module):
    """Attention within windows of 2 x 2 pixels, shifted by one."""

    def __init__(self, channels: int, choices: Choices) -> None:
        super().__init__()
        self.shift, self.channels = choices.pick(0, 1), channels if choices.flag() else -1
        self.attention = Attention(channels, 4, choices)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.permute(0, 2, 3, 1).roll((-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.attention(y).view(n, h // 2, w // 2, 2, 2, self.channels).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(n, h, w, self.channels).roll((self.shift, self.shift), (1, 2))
        return y.permute(0, 3, 1, 2)
