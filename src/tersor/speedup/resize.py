"""The integers that a module keeps beside its tensors: channel counts, feature counts, groups.

Slicing a parameter changes its shape; the module's own record of that shape must follow, or ``repr``, ``extra_repr``
and every later reader of ``in_channels`` is wrong. One table says which attributes a module type has and how they
follow from its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

SizeRule = Callable[[Any], dict[str, int]]


def _conv(module: Any) -> dict[str, int]:
    """Sizes of a convolution. Groups leave whole, so ``channels / groups`` is constant."""
    outer, inner = module.weight.shape[:2]
    before = module.in_channels if module.transposed else module.out_channels
    groups = module.groups * outer // before if module.groups > 1 else 1
    names = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    return {names[0]: outer, names[1]: inner * groups, "groups": groups}


def _linear(module: Any) -> dict[str, int]:
    return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}


def _norm(module: Any) -> dict[str, int]:
    tensors = (module.weight, module.bias, module.running_mean)
    return {"num_features": next((t.shape[0] for t in tensors if t is not None), module.num_features)}


def _embedding(module: Any) -> dict[str, int]:
    return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}


def _prelu(module: Any) -> dict[str, int]:
    return {"num_parameters": module.weight.shape[0]}


def _recurrent(module: Any) -> dict[str, int]:
    return {"input_size": module.weight_ih_l0.shape[1]}


SIZE_RULES: dict[type[nn.Module], SizeRule] = {
    _ConvNd: _conv,
    nn.Linear: _linear,
    _NormBase: _norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.RNNBase: _recurrent,
}


def size_attributes(module: nn.Module) -> dict[str, int]:
    """What the module's size attributes must be, given the shapes that its tensors have now.

    Args:
        module: any module; subclasses follow the rule of their nearest base class.

    Returns:
        Attribute name to integer; empty for a module type without such attributes.

    >>> size_attributes(nn.Linear(3, 4))
    {'in_features': 3, 'out_features': 4}
    """
    rule = next((SIZE_RULES[base] for base in type(module).__mro__ if base in SIZE_RULES), None)
    return rule(module) if rule else {}


def update_sizes(module: nn.Module) -> None:
    """Set the module's size attributes to what its tensors say."""
    for name, value in size_attributes(module).items():
        setattr(module, name, value)
