"""The words of the small language: for each, the layer that it stands for on a value of a given shape.

A maker takes the choices of its step and the value that the layer will read. Makers of pairs take two values. What
cannot be built on such a value (five channels in two groups) returns None, or raises what the kernel raises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.properties.layers import (
    Apply,
    Around,
    Attention,
    Choices,
    Experts,
    Feed,
    First,
    Gate,
    Tied,
    Windows,
)

Maker = Callable[..., nn.Module | None]


def conv(c: Choices, x: Tensor) -> nn.Module:
    width, kernel, mode = c.width(), c.pick(1, 3), c.pick("zeros", "reflect", "circular", "replicate")
    dilation = c.pick(1, 2)
    padding = kernel // 2 * dilation if mode != "zeros" else c.pick(kernel // 2 * dilation, 0, 1)
    return nn.Conv2d(x.shape[1], width, kernel, c.pick(1, 2), padding, dilation, bias=not c.flag(), padding_mode=mode)


def grouped(c: Choices, x: Tensor) -> nn.Module:
    groups = c.divisor(x.shape[1])
    return nn.Conv2d(x.shape[1], groups * c.pick(2, 1, 3), 3, padding=1, groups=groups, bias=not c.flag())


def depthwise(c: Choices, x: Tensor) -> nn.Module:
    channels = x.shape[1]
    return nn.Conv2d(channels, channels * c.pick(1, 2), 3, c.pick(1, 2), 1, groups=channels, bias=not c.flag())


def transposed(c: Choices, x: Tensor) -> nn.Module:
    width, groups = c.width(), c.pick(1, 2, x.shape[1])
    return nn.ConvTranspose2d(
        x.shape[1], groups * max(1, width // groups), 2, c.pick(1, 2), groups=groups, bias=not c.flag()
    )


def shuffle(c: Choices, x: Tensor) -> nn.Module:
    groups, channels = c.divisor(x.shape[1]), x.shape[1]
    rows = c.pick(-1, channels // groups)

    def shuffled(x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return x.view(n, groups, rows, h, w).transpose(1, 2).reshape(n, -1, h, w)

    return Apply(shuffled) if c.flag() else nn.ChannelShuffle(groups)


def pixels(c: Choices, x: Tensor) -> nn.Module | None:
    if c.pick("up", "down") == "down":
        return nn.PixelUnshuffle(2)
    return nn.PixelShuffle(2) if x.shape[1] % 4 == 0 else None


def channels_last_norm(c: Choices, x: Tensor) -> nn.Module:
    norm = c.pick(nn.LayerNorm, nn.RMSNorm)(x.shape[1])
    return Around(lambda x: x.permute(0, 2, 3, 1), norm, lambda x: x.permute(0, 3, 1, 2))


def flattened(c: Choices, x: Tensor) -> nn.Module:
    size = x[0].numel()
    flat = c.pick(
        lambda x: x.flatten(1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.reshape(-1, size),
        lambda x: torch.flatten(x, 1),
    )
    return nn.Sequential(Apply(flat), nn.Linear(size, c.width()))


def computed_weight(c: Choices, x: Tensor) -> nn.Module:
    make = c.pick(lambda w: 2 * w, torch.exp, lambda w: w - w.mean((1, 2, 3), keepdim=True), torch.sigmoid)
    return Apply(lambda x, own: F.conv2d(x, make(own)), (c.width(), x.shape[1], 1, 1))


def two_parts(c: Choices, channels: int) -> list[int]:
    first = c.pick(2, 1, 3)
    return [first, channels - first]


def overwritten(c: Choices, x: Tensor) -> nn.Module:
    start, value = c.pick(0, 1, 2), c.pick(0.5, 0.0)

    def written(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, start : start + 2] = value
        return x

    return Apply(written)


IMAGE: dict[str, Maker] = {
    "conv": conv,
    "grouped": grouped,
    "depthwise": depthwise,
    "transposed": transposed,
    "batch_norm": lambda c, x: nn.BatchNorm2d(
        x.shape[1], affine=not c.flag(), track_running_stats=c.pick(True, True, False)
    ),
    "group_norm": lambda c, x: nn.GroupNorm(c.pick(c.divisor(x.shape[1]), x.shape[1]), x.shape[1], affine=not c.flag()),
    "instance_norm": lambda c, x: nn.InstanceNorm2d(x.shape[1], affine=not c.flag(), track_running_stats=c.flag()),
    "channels_last_norm": channels_last_norm,
    "prelu": lambda c, x: nn.PReLU(c.pick(x.shape[1], 1)),
    "max_pool": lambda c, x: nn.MaxPool2d(2, c.pick(2, 1), ceil_mode=c.flag()),
    "avg_pool": lambda c, x: nn.AvgPool2d(3, c.pick(1, 2), 1, count_include_pad=c.flag()),
    "adaptive_pool": lambda c, x: c.pick(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)(c.pick(1, 2, 3)),
    "upsample": lambda c, x: nn.Upsample(scale_factor=2, mode=c.pick("nearest", "bilinear", "bicubic")),
    "resized": lambda c, x: Apply(lambda x: F.interpolate(x, size=(4, 4), mode="nearest")),
    "shuffle": shuffle,
    "pixels": pixels,
    "gate": lambda c, x: Gate(x.shape[1], c.width()),
    "layer_scale": lambda c, x: Apply(torch.mul, c.pick((x.shape[1], 1, 1), (1, x.shape[1], 1, 1))),
    "scale_of_vector": lambda c, x: Apply(lambda x, own: x * own[:, None, None], (x.shape[1],)),
    "gated_by_own": lambda c, x: Apply(lambda x, own: x * torch.sigmoid(own), (x.shape[1], 1, 1)),
    "buffer": lambda c, x: Apply(c.pick(torch.mul, torch.add), fixed=(x.shape[1], 1, 1)),
    "position": lambda c, x: Apply(torch.add, c.pick((1, *x.shape[1:]), (1, *x.shape[2:]))),
    "glu": lambda c, x: nn.GLU(1),
    "chunk": lambda c, x: Apply(lambda x: x.chunk(2, 1)),
    "split": lambda c, x: Apply(
        lambda x, first: x.split([first, x.shape[1] - first], 1), first=c.pick(x.shape[1] // 2, 1, 2)
    ),
    "split_literal": lambda c, x: Apply(lambda x, sizes: x.split(sizes, 1), sizes=two_parts(c, x.shape[1])),
    "split_equal": lambda c, x: Apply(lambda x, size: x.split(size, 1), size=x.shape[1] // c.divisor(x.shape[1])),
    "halves": lambda c, x: Apply(lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])),
    "slice": lambda c, x: Apply(
        c.pick(
            lambda x: x[:, :-1],
            lambda x: x[:, 2:],
            lambda x: x[:, ::2],
            lambda x: x[:, :3],
            lambda x: x.narrow(1, 1, 2),
        )
    ),
    "index": lambda c, x: Apply(
        c.pick(lambda x: x[:, [1, 0, 2]], lambda x: x[:, 1:2], lambda x: x.index_select(1, torch.tensor([2, 0])))
    ),
    "pad_channels": lambda c, x: Apply(F.pad, pad=(0, 0, 0, 0, 1, 2), value=c.pick(0.0, 0.7)),
    "pad_space": lambda c, x: Apply(F.pad, pad=(1, 1, 1, 1), mode=c.pick("constant", "reflect")),
    "with_constant": lambda c, x: Apply(lambda x: torch.cat([x, torch.ones_like(x[:, :2])], 1)),
    "twice": lambda c, x: Apply(c.pick(lambda x: torch.cat([x, x.cos()], 1), lambda x: x.repeat(1, 2, 1, 1))),
    "interleaved": lambda c, x: Apply(lambda x: x.repeat_interleave(2, 1)),
    "reordered": lambda c, x: Apply(
        c.pick(lambda x: x.flip(1), lambda x: x.roll(1, 1), lambda x: torch.cat(x.chunk(2, 1)[::-1], 1))
    ),
    "rolled": lambda c, x: Apply(lambda x: x.roll((1, 1), (2, 3))),
    "softmax": lambda c, x: Apply(c.pick(lambda x: x.softmax(1), lambda x: x.flatten(2).softmax(-1).view(x.shape))),
    "normalized": lambda c, x: Apply(c.pick(lambda x: F.normalize(x, dim=1), lambda x: F.normalize(x, dim=(2, 3)))),
    "over_channels": lambda c, x: Apply(
        c.pick(
            lambda x: x - x.mean(1, keepdim=True),
            lambda x: x * x.amax(1, keepdim=True),
            lambda x: x.sum(1, keepdim=True),
            lambda x: x.cumsum(1),
        )
    ),
    "einsum": lambda c, x: Apply(lambda x, own: torch.einsum("nchw,cd->ndhw", x, own), (x.shape[1], c.width())),
    "computed_weight": computed_weight,
    "overwritten": overwritten,
    "unfold": lambda c, x: nn.Sequential(
        nn.Unfold(2), Apply(lambda x: x.transpose(1, 2)), nn.Linear(4 * x.shape[1], 6)
    ),
    "windows": lambda c, x: Windows(x.shape[1], c),
    "flattened": flattened,
    "pooled": lambda c, x: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(x.shape[1], c.width())),
    "averaged": lambda c, x: Apply(
        c.pick(lambda x: x.mean((2, 3)), lambda x: x.amax((2, 3)), lambda x: x.std((2, 3), correction=0))
    ),
    "tokens": lambda c, x: Apply(
        c.pick(
            lambda x, size: x.flatten(2).transpose(1, 2),
            lambda x, size: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
            lambda x, size: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, size),
            lambda x, size: x.view(x.shape[0], size, -1).permute(0, 2, 1),
            lambda x, size: x.flatten(2),
        ),
        size=x.shape[1],
    ),
}
"""Layers that read an image ``(batch, channels, height, width)``."""


def along_tokens(layer: nn.Module) -> nn.Module:
    return Around(lambda x: x.transpose(1, 2), layer, lambda x: x.transpose(1, 2))


def rms(x: Tensor, own: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * own


TOKENS: dict[str, Maker] = {
    "linear": lambda c, x: nn.Linear(x.shape[2], c.width(), bias=not c.flag()),
    "layer_norm": lambda c, x: nn.LayerNorm(x.shape[2], elementwise_affine=not c.flag()),
    "rms_norm": lambda c, x: c.pick(nn.RMSNorm(x.shape[2]), Apply(rms, (x.shape[2],))),
    "feed": lambda c, x: Feed(x.shape[2], c.width(), c.pick("plain", "geglu", "swiglu", "split")),
    "experts": lambda c, x: Experts(x.shape[2], c.width(), c.pick(2, 3)),
    "attention": lambda c, x: Attention(x.shape[2], x.shape[1], c),
    "multihead": lambda c, x: First(
        nn.MultiheadAttention(x.shape[2], c.divisor(x.shape[2]), bias=not c.flag(), batch_first=True), 3
    ),
    "encoder": lambda c, x: nn.TransformerEncoderLayer(
        x.shape[2], c.divisor(x.shape[2]), c.width(), norm_first=c.flag(), batch_first=True
    ),
    "self_similarity": lambda c, x: Apply(
        c.pick(
            lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
            lambda x: F.scaled_dot_product_attention(x, x, x),
            lambda x: x.softmax(-1) @ (x.transpose(1, 2) @ x),
        )
    ),
    "position": lambda c, x: Apply(torch.add, c.pick((1, *x.shape[1:]), x.shape[1:], (x.shape[1], 1))),
    "layer_scale": lambda c, x: Apply(torch.mul, (x.shape[2],)),
    "gated_by_own": lambda c, x: Apply(lambda x, own: x * torch.sigmoid(own), (x.shape[2],)),
    "buffer": lambda c, x: Apply(c.pick(torch.mul, torch.add), fixed=(x.shape[2],)),
    "class_token": lambda c, x: Apply(
        lambda x, own: torch.cat([own.expand(x.shape[0], -1, -1), x], 1), (1, 1, x.shape[2])
    ),
    "tied": lambda c, x: Apply(
        lambda x, own: F.linear(torch.sigmoid(F.linear(x, own)), own.t()), (c.width(), x.shape[2])
    ),
    "recurrent": lambda c, x: First(
        c.pick(nn.GRU, nn.LSTM, nn.RNN)(
            x.shape[2], c.pick(4, 3, 6), c.pick(1, 2), bias=not c.flag(), batch_first=True, bidirectional=c.flag()
        )
    ),
    "einsum": lambda c, x: Apply(
        lambda x, own: torch.einsum("ntc,chd->nhtd", x, own).transpose(1, 2).flatten(2), (x.shape[2], 2, c.pick(2, 3))
    ),
    "matmul": lambda c, x: Apply(torch.matmul, (x.shape[2], c.width())),
    "matmul_computed": lambda c, x: Apply(
        lambda x, own, make: x @ make(own), (x.shape[2], c.width()), make=c.pick(torch.exp, torch.sigmoid, torch.neg)
    ),
    "mixer": lambda c, x: along_tokens(Feed(x.shape[1], c.width(), c.pick("plain", "geglu"))),
    "conv1d": lambda c, x: along_tokens(nn.Conv1d(x.shape[2], c.width(), 3, padding=1, bias=not c.flag())),
    "depthwise1d": lambda c, x: along_tokens(nn.Conv1d(x.shape[2], x.shape[2], 3, padding=1, groups=x.shape[2])),
    "batch_norm": lambda c, x: along_tokens(nn.BatchNorm1d(x.shape[2])),
    "heads_norm": lambda c, x: Apply(
        lambda x, heads: F.normalize(x.unflatten(-1, (heads, -1)), dim=-1).flatten(2), heads=c.divisor(x.shape[2])
    ),
    "heads_scale": lambda c, x: Apply(
        lambda x, own: (x.view(x.shape[0], x.shape[1], own.shape[0], -1) * own).reshape(x.shape),
        (c.divisor(x.shape[2]), 1),
    ),
    "chunk": lambda c, x: Apply(lambda x: x.chunk(2, -1)),
    "glu": lambda c, x: nn.GLU(-1),
    "split_literal": lambda c, x: Apply(lambda x, sizes: x.split(sizes, -1), sizes=two_parts(c, x.shape[2])),
    "slice": lambda c, x: Apply(c.pick(lambda x: x[..., :-1], lambda x: x[..., ::2], lambda x: x[..., 2:])),
    "merged": lambda c, x: Apply(lambda x: torch.cat([x[:, 0:-1], x[:, 1:]], -1)),
    "folded": lambda c, x: Apply(lambda x: x.reshape(x.shape[0], 2, -1)),
    "softmax": lambda c, x: Apply(torch.softmax, dim=c.pick(1, -1)),
    "cumsum": lambda c, x: Apply(torch.cumsum, dim=c.pick(1, -1)),
    "transposed": lambda c, x: Apply(lambda x: x.transpose(1, 2)),
    "rolled": lambda c, x: Apply(lambda x, dim: x.roll(1, dim), dim=c.pick(1, 2)),
    "averaged": lambda c, x: Apply(
        c.pick(lambda x: x.mean(1), lambda x: x[:, 0], lambda x: x.amax(1), lambda x: x[:, -1])
    ),
    "flattened": flattened,
    "image": lambda c, x: Apply(
        c.pick(
            lambda x, shape: x.transpose(1, 2).reshape(x.shape[0], -1, *shape[1:]),
            lambda x, shape: x.permute(0, 2, 1).reshape(-1, *shape),
            lambda x, shape: x.unsqueeze(1),
        ),
        shape=(x.shape[2], 1, x.shape[1]),
    ),
}
"""Layers that read tokens ``(batch, tokens, channels)``."""

VECTOR: dict[str, Maker] = {
    "linear": lambda c, x: nn.Linear(x.shape[1], c.width(), bias=not c.flag()),
    "batch_norm": lambda c, x: nn.BatchNorm1d(x.shape[1]),
    "layer_norm": lambda c, x: nn.LayerNorm(x.shape[1]),
    "prelu": lambda c, x: nn.PReLU(x.shape[1]),
    "lerp": lambda c, x: Apply(lambda x, own: torch.lerp(x, own, 0.3), (1, x.shape[1])),
    "outer": lambda c, x: Apply(lambda x: x[:, :, None] * x[:, None, :]),
    "expanded": lambda c, x: Apply(
        c.pick(
            lambda x: x[:, None].expand(-1, 3, -1),
            lambda x: x[:, :, None, None].expand(-1, -1, 3, 3),
            lambda x: x.unflatten(1, (2, -1)),
            lambda x: x.view(x.shape[0], -1, 2, 2),
        )
    ),
    "positions": lambda c, x: Apply(lambda x, own: x[:, None] + own[None], (3, x.shape[1])),
    "bilinear": lambda c, x: Apply(lambda x, own: torch.einsum("na,abc,nb->nc", x, own, x), (*[x.shape[1]] * 2, 4)),
}
"""Layers that read one vector a sample ``(batch, channels)``."""

NOT_ZERO_AT_ZERO: dict[str, Maker] = {
    "sigmoid": lambda c, x: Apply(torch.sigmoid),
    "cos": lambda c, x: Apply(torch.cos),
    "plus_one": lambda c, x: Apply(c.pick(lambda x: x + 1, lambda x: 1 - x, lambda x: x.clamp(0.1, 1.0))),
    "bell": lambda c, x: Apply(c.pick(lambda x: (-x * x).exp(), F.softplus, lambda x: (x * x + 1).rsqrt())),
    "where": lambda c, x: Apply(
        c.pick(lambda x: torch.where(x > 0, x, 0.3), lambda x: x.masked_fill(x < 0, -0.7), lambda x: (x > 0) + 0.0 * x)
    ),
}
"""Functions of one value that leave something where a channel was removed: there silent errors show."""

ANYWHERE: dict[str, Maker] = {
    "relu": lambda c, x: c.pick(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2)),
    "gelu": lambda c, x: c.pick(nn.GELU(), nn.SiLU(), nn.ELU(), nn.Mish()),
    "hardswish": lambda c, x: c.pick(nn.Hardswish(), nn.Hardsigmoid(), nn.Tanh(), nn.Dropout(0.5)),
    "scaled": lambda c, x: Apply(c.pick(lambda x: 0.5 * x, lambda x: x.mul_(0.5), lambda x: -x)),
    "gated_by_all": lambda c, x: Apply(lambda x: x * torch.sigmoid(x.flatten(1).sum(1)).view(-1, *[1] * (x.dim() - 1))),
    "doubled_batch": lambda c, x: Apply(lambda x: torch.cat([x, x.neg()])[::2]),
}

PAIRS: dict[str, Maker] = {
    "add": lambda c, x, y: Apply(c.pick(torch.add, torch.sub, torch.maximum, lambda x, y: x.add_(y))),
    "mul": lambda c, x, y: Apply(c.pick(torch.mul, lambda x, y: x * torch.sigmoid(y), lambda x, y: torch.cos(x) * y)),
    "chosen": lambda c, x, y: Apply(lambda x, y: torch.where(y > 0, x, 0.5 * y)),
    "stacked": lambda c, x, y: Apply(
        c.pick(lambda x, y: torch.stack([x, y]).sum(0), lambda x, y: torch.stack([x, y], 1).mean(1))
    ),
    "cat": lambda c, x, y: Apply(lambda x, y, dim: torch.cat([x, y], dim), dim=-1 if x.dim() == 3 else 1),
}
"""Functions of two values of one shape (for ``cat``, but for the joined dimension)."""

OTHERS: dict[str, Maker] = {
    "cross_attention": lambda c, x, y: (
        Attention(x.shape[2], x.shape[1], c, cross=True) if x.shape[2] == y.shape[2] else None
    ),
    "embedded": lambda c, x, y: Tied(5, x.shape[2]),
    "scores": lambda c, x, y: Apply(lambda x, y: x @ y.transpose(1, 2)) if x.shape[2] == y.shape[2] else None,
    "read": lambda c, x, y: Apply(lambda x, y: x.transpose(1, 2) @ y) if x.shape[1] == y.shape[1] else None,
}
"""Layers that read two values of tokens."""
