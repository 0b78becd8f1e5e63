"""Multi-head attention with fewer heads than its width has room for.

``nn.MultiheadAttention`` computes the size of a head from its width, ``embed_dim // num_heads``, and wants queries,
keys and values as wide as its input. So no head can leave it, and its input can only become narrower as its heads do.
Here the heads have a size of their own:

    head_i = softmax(Q W_i^Q (K W_i^K)^T / sqrt(head_dim)) V W_i^V,    output = concat(head_1 .. head_h) W^O

with ``W^Q, W^K, W^V`` of shape ``(heads * head_dim, width)`` and ``W^O`` of shape ``(width, heads * head_dim)``
(Vaswani et al., Attention Is All You Need, 2017; heads that may leave: Michel et al., Are Sixteen Heads Really Better
than One?, 2019).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tersor.errors import InvalidValueError, SpeedupError
from tersor.speedup.replace import Cut, replace
from tersor.speedup.resize import update_sizes

HEADS = {
    "in_proj_weight": (0, 3),
    "in_proj_bias": (0, 3),
    "q_proj_weight": (0, 1),
    "k_proj_weight": (0, 1),
    "v_proj_weight": (0, 1),
    "bias_k": (2, 1),
    "bias_v": (2, 1),
    "out_proj.weight": (1, 1),
}
"""Where heads stand: target to dimension and how many times all heads stand there."""


class NarrowMultiheadAttention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` whose heads have a size of their own, whatever the width of its input.

    The speedup makes one of an existing ``nn.MultiheadAttention`` (:func:`narrow_attention`): the same object, with its
    parameters, names, hooks and flags, gets this class. What it returns is what the full module returns with the
    removed heads masked, but for ``average_attn_weights``, the average over the heads that are left. torch's fused
    kernels for inference, which know equal widths only, are never taken; ``need_weights=False`` uses
    ``scaled_dot_product_attention``.

    Attributes:
        num_heads: the heads that are left.
        head_dim: the size of each, and of the scale ``1 / sqrt(head_dim)``: what it was before.
        embed_dim: the width of the query that is left; ``kdim`` and ``vdim`` those of key and value.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does.

        Args:
            query: ``(L, N, embed_dim)``, ``(N, L, embed_dim)`` with ``batch_first``, or unbatched ``(L, embed_dim)``.
            key: the same with ``S`` positions of width ``kdim``.
            value: the same with ``S`` positions of width ``vdim``.
            key_padding_mask: ``(N, S)`` or ``(S,)``; True ignores a position, floats are added to the scores.
            need_weights: also return the attention weights.
            attn_mask: ``(L, S)``, or ``(N * num_heads, L, S)`` for the heads that are left; True forbids, floats are
                added to the scores.
            average_attn_weights: average the returned weights over the heads that are left.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            The output, shaped like the query; and the weights, ``(N, L, S)`` or ``(N, num_heads, L, S)``, or None.

        Raises:
            InvalidValueError: ``is_causal`` without the mask, or a mask for another number of heads.
        """
        if is_causal and attn_mask is None:
            raise InvalidValueError("is only a hint", where="is_causal", remedy="Give attn_mask as well.")
        batched = query.dim() == 3
        q, k, v = (self._batch_first(states, batched) for states in self._project(query, key, value))
        mask = self._scores_mask(attn_mask, key_padding_mask, q)
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        q, k, v = (states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for states in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            # The hint stands for the mask on torch's own condition.
            causal = is_causal and key_padding_mask is None
            heads = F.scaled_dot_product_attention(q, k, v, None if causal else mask, dropout, is_causal=causal)
        heads = heads.transpose(1, 2) if self.batch_first or not batched else heads.permute(2, 0, 1, 3)
        output = F.linear(heads.flatten(2), self.out_proj.weight, self.out_proj.bias)
        return (output, weights) if batched else (output.squeeze(0), None if weights is None else weights.squeeze(0))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads; in one product where all three come from the same tensor."""
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:
            return F.linear(query, packed, bias).chunk(3, dim=-1)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        projections = separate if packed is None else packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(map(F.linear, (query, key, value), projections, biases))

    def _batch_first(self, states: Tensor, batched: bool) -> Tensor:
        if not batched:
            return states.unsqueeze(0)
        return states if self.batch_first else states.transpose(0, 1)

    def _extended(self, states: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with the positions that ``add_bias_kv`` and ``add_zero_attn`` append."""
        if bias is not None:
            states = torch.cat([states, bias.expand(states.shape[0], 1, -1)], dim=1)
        return F.pad(states, (0, 0, 0, 1)) if self.add_zero_attn else states

    def _scores_mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to scores of shape ``(N, heads, L, S)``; appended positions are free."""
        batch, mask = q.shape[0], None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            if mask.dim() == 3 and mask.shape[0] != batch * self.num_heads:
                raise InvalidValueError(
                    f"its first size is {mask.shape[0]}, which is not {batch} samples times {self.num_heads} heads",
                    where="attn_mask",
                    remedy="Give a mask of the heads that are left.",
                )
            mask = mask.unflatten(0, (batch, self.num_heads)) if mask.dim() == 3 else mask[None, None]
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype).reshape(batch, 1, 1, -1)
            mask = padding if mask is None else mask + padding
        appended = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(mask, (0, appended)) if mask is not None and appended else mask

    def extra_repr(self) -> str:
        """The sizes, which differ from those that the class was built with."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores: -inf where a bool mask is True."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def narrow_attention(model: nn.Module) -> None:
    """Give the narrow class to every ``nn.MultiheadAttention`` that torch's code cannot run at its present sizes.

    Tensors alone decide, so this also completes a model whose small tensors were loaded.

    Args:
        model: changed in place; an attention itself, or a model that holds some.

    Raises:
        SpeedupError: one is of a subclass with a ``forward`` of its own.
    """
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and not _fits(module):
            module.__class__ = _narrow_class(module)
            module._qkv_same_embed_dim = False  # what torch's fused kernels ask
            update_sizes(module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _has_narrow(module):
            module.use_nested_tensor = False  # only the fused kernels take nested tensors


def _fits(module: nn.MultiheadAttention) -> bool:
    """Whether heads and input are as wide as each other."""
    packed: Tensor | None = module.in_proj_weight
    rows, width = (packed.shape[0] // 3, packed.shape[1]) if packed is not None else module.q_proj_weight.shape
    return rows == width == module.out_proj.weight.shape[0]


def _has_narrow(module: nn.Module) -> bool:
    return any(isinstance(inner, NarrowMultiheadAttention) for inner in module.modules())


def _narrow_class(module: nn.MultiheadAttention) -> type:
    """The narrow class for an attention; a parametrized one, whose class torch made for it alone, stays one."""
    kind = parametrize.type_before_parametrizations(module)
    if issubclass(kind, NarrowMultiheadAttention):
        narrow = kind
    elif kind.forward is not nn.MultiheadAttention.forward:
        raise SpeedupError(
            "a subclass of nn.MultiheadAttention with a forward of its own cannot lose heads",
            where=kind.__name__,
            remedy="Register a replacer for it with @tersor.speedup.replace, or exclude it from the config list.",
        )
    elif kind is nn.MultiheadAttention:
        narrow = NarrowMultiheadAttention
    else:
        narrow = type(kind.__name__, (NarrowMultiheadAttention, kind), {})
    if not parametrize.is_parametrized(module):
        return narrow
    content = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(type(module).__name__, (narrow,), content)


@replace(nn.MultiheadAttention)
def _remove_heads(module: nn.MultiheadAttention, cut: Cut) -> None:
    """Heads leave whole, in queries, keys, values and the output projection alike."""
    stays: Tensor | None = None
    for target, (dim, times) in HEADS.items():
        if target not in cut.shapes:
            continue
        blocks = cut.along(target, dim).reshape(times, -1, module.head_dim)
        stays = blocks[0, :, 0] if stays is None else stays
        if not torch.equal(blocks, stays[None, :, None].expand_as(blocks)):
            raise SpeedupError(
                f"not the same whole heads leave {target} and the module's other tensors",
                where=type(module).__name__,
                remedy=f"Prune heads of {module.head_dim} rows: the same in queries, keys, values and the output.",
            )
    narrow_attention(module)


@replace(nn.TransformerEncoder)
def _without_nested_tensors(module: Any, cut: Cut) -> None:
    """An encoder decides on its own whether its layers get nested tensors."""
    narrow_attention(module)
