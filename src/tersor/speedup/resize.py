"""The sizes that a module keeps beside its tensors: channel counts, feature counts, groups, heads.

Slicing a parameter changes its shape; the module's own record of that shape must follow, or ``repr``, ``extra_repr``
and every later reader of ``in_channels`` is wrong. One table says which attributes a module type has and how they
follow from its tensors. A norm without parameters has nothing to read them off; it takes them from its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

Sizes = dict[str, int | tuple[int, ...]]
CORRECTED = "_tersor_corrected_sizes"
"""Under this name a module remembers which of its other numbers a speedup made right; they are saved with its sizes."""
SizeRule = Callable[[Any], Sizes]


def _conv(module: Any) -> Sizes:
    """Sizes of a convolution. How many groups it has its tensors do not say: :func:`groups_left` does."""
    outer, inner = module.weight.shape[:2]
    names = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    return {names[0]: outer, names[1]: inner * module.groups, "groups": module.groups}


def groups_left(groups: int, kept: Tensor) -> int:
    """How many groups a convolution has left: fewer where whole groups leave, all where each loses some positions.

    >>> import torch
    >>> groups_left(2, torch.tensor([True, True, False, False])), groups_left(2, torch.tensor([True, False] * 2))
    (1, 2)
    """
    rows = kept.reshape(groups, -1)
    alive = rows.any(1)
    return int(alive.sum()) if bool((alive == rows.all(1)).all()) else groups


def _linear(module: Any) -> Sizes:
    return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}


def _bilinear(module: Any) -> Sizes:
    out, first, second = module.weight.shape
    return {"in1_features": first, "in2_features": second, "out_features": out}


def _conv1d(module: Any) -> Sizes:
    """Sizes of the transposed linear layer of GPT-2."""
    return {"nx": module.weight.shape[0], "nf": module.weight.shape[1]}


def _norm(module: Any) -> Sizes:
    tensors = (module.weight, module.bias, module.running_mean)
    return {"num_features": next((t.shape[0] for t in tensors if t is not None), module.num_features)}


def _group_norm(module: Any) -> Sizes:
    """Sizes of a group norm. Its groups leave whole, like those of a convolution."""
    return _grouped(module, module.num_channels if module.weight is None else module.weight.shape[0])


def _grouped(module: Any, channels: int) -> Sizes:
    groups, part = divmod(module.num_groups * channels, module.num_channels)
    return {"num_channels": channels, "num_groups": module.num_groups if part else groups}


def _shape_norm(module: Any) -> Sizes:
    return {"normalized_shape": module.normalized_shape if module.weight is None else tuple(module.weight.shape)}


def _embedding(module: Any) -> Sizes:
    return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}


def _prelu(module: Any) -> Sizes:
    return {"num_parameters": module.weight.shape[0]}


def _recurrent(module: Any) -> Sizes:
    """Sizes of a recurrent network; all its layers and both its directions have the same."""
    hidden, projected = module.weight_hh_l0.shape[1], 0
    if module.proj_size:
        projected, hidden = module.weight_hr_l0.shape
    return {"input_size": module.weight_ih_l0.shape[1], "hidden_size": hidden, "proj_size": projected}


def _cell(module: Any) -> Sizes:
    return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}


def _attention(module: Any) -> Sizes:
    """Sizes of a multi-head attention. Heads leave whole, so ``head_dim`` is constant."""
    if module.in_proj_weight is not None:
        rows, width = module.in_proj_weight.shape
        return {"embed_dim": width, "kdim": width, "vdim": width, "num_heads": rows // 3 // module.head_dim}
    rows, width = module.q_proj_weight.shape
    widths = {"embed_dim": width, "kdim": module.k_proj_weight.shape[1], "vdim": module.v_proj_weight.shape[1]}
    return {**widths, "num_heads": rows // module.head_dim}


SIZE_RULES: dict[type[nn.Module], SizeRule] = {
    _ConvNd: _conv,
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    _NormBase: _norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _shape_norm,
    nn.RMSNorm: _shape_norm,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    nn.PReLU: _prelu,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _cell,
    nn.MultiheadAttention: _attention,
}

FOREIGN_RULES: dict[str, SizeRule] = {
    "transformers.pytorch_utils.Conv1D": _conv1d,
    **{
        f"timm.layers.norm.{name}": _shape_norm
        for kind in ("RmsNorm", "SimpleNorm")
        for name in (kind, f"{kind}Fp32", f"{kind}2d", f"{kind}2dFp32")
    },
}
"""Types of libraries that are not imported, by their full names."""


def size_attributes(module: nn.Module) -> Sizes:
    """What the module's size attributes must be, given the shapes that its tensors have now.

    Args:
        module: any module; subclasses follow the rule of their nearest base class.

    Returns:
        Attribute name to integer, or to a tuple of them (``normalized_shape``); empty for a module type without such
        attributes. Where no tensor tells, the attribute as it is.

    >>> size_attributes(nn.Linear(3, 4))
    {'in_features': 3, 'out_features': 4}
    >>> size_attributes(nn.GroupNorm(2, 8))
    {'num_channels': 8, 'num_groups': 2}
    """
    own: Sizes = {name: getattr(module, name) for name in getattr(module, CORRECTED, ())}
    for base in type(module).__mro__:
        rule = SIZE_RULES.get(base) or FOREIGN_RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule:
            return {**own, **rule(module)}
    return own


def update_sizes(module: nn.Module) -> None:
    """Set the module's size attributes to what its tensors say."""
    for name, value in size_attributes(module).items():
        setattr(module, name, value)


def _normalized(module: Any, values: Tensor) -> Sizes:
    return {"normalized_shape": tuple(values.shape[-len(module.normalized_shape) :])}


def _counted(module: Any, values: Tensor) -> Sizes:
    dim = -module._get_no_batch_dim() if isinstance(module, _InstanceNorm) else 1
    return {"num_features": values.shape[dim]}


INPUT_RULES: dict[type[nn.Module], Callable[[Any, Tensor], Sizes]] = {
    nn.GroupNorm: lambda module, values: _grouped(module, values.shape[1]),
    nn.LayerNorm: _normalized,
    nn.RMSNorm: _normalized,
    _NormBase: _counted,
}


@contextmanager
def sizes_from_inputs(model: nn.Module) -> Iterator[None]:
    """Let norms without parameters take their sizes from what they are given, in the calls made under it.

    Nothing of such a norm is sliced, so nothing of it says what has left. One run of the small model does; the
    sizes that it sets stay.

    >>> import torch
    >>> norm = nn.GroupNorm(4, 16, affine=False)
    >>> with sizes_from_inputs(norm):
    ...     _ = norm(torch.zeros(1, 8))
    >>> norm.num_groups, norm.num_channels
    (2, 8)
    """
    decided: set[nn.Module] = set()

    def follow(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in decided:
            return  # called again, perhaps on another width: its first call tells whether it became narrower
        decided.add(module)
        rule = next(INPUT_RULES[base] for base in type(module).__mro__ if base in INPUT_RULES)
        for name, value in rule(module, args[0]).items():
            setattr(module, name, value)

    silent = [
        module
        for module in model.modules()
        if isinstance(module, tuple(INPUT_RULES))
        and all(tensor is None for tensor in (*module._parameters.values(), *module._buffers.values()))
    ]
    handles = [module.register_forward_pre_hook(follow) for module in silent]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
