"""Modules that are quantized as if they were one: which types, in which order, and whether they fit together.

A deployed kernel computes a convolution, its batch norm and its activation in one go, and what is between them never
becomes int8. So a config entry names such modules together (``fuse_names``): the norm's scale is folded into the
weight before that is quantized, and the output is quantized once, behind the last of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from tersor.config.entry import Entry
from tersor.errors import ConflictError, InvalidValueError, UnmatchedError, nearest
from tersor.graph.inputs import evaluating
from tersor.targets.channels import channel_dims
from tersor.targets.resolve import TargetConfig
from tersor.targets.selection import Modules

_POINTWISE: list[type[nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.RReLU, nn.Threshold, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Softplus, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Softsign,
    nn.Softshrink, nn.Hardshrink,
]  # fmt: skip
_ORDERS = (
    "a convolution or a linear layer, a batch norm, an activation",
    "a convolution or a linear layer, a batch norm",
    "a convolution or a linear layer, an activation",
    "a batch norm, an activation",
)
_NORM_DIMS: Mapping[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (0, 1),
    nn.BatchNorm2d: (2,),
    nn.BatchNorm3d: (3,),
}
"""How many dimensions the layer in front slides over; a linear layer over none. Other batch norms take any."""


def register_pointwise(kind: type[nn.Module]) -> None:
    """Let modules of a type stand last in a group: they work on each element alone, and have no parameters.

    >>> class Swish(nn.Module): ...
    >>> register_pointwise(Swish)
    >>> is_pointwise(Swish())
    True
    """
    _POINTWISE.append(kind)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module can be the last of a group."""
    return isinstance(module, tuple(_POINTWISE))


def is_head(module: nn.Module) -> bool:
    """Whether a module has a weight into which a batch norm can be folded."""
    return isinstance(module, (nn.Linear, _ConvNd))


@dataclass(frozen=True)
class FusedGroup:
    """Modules that are quantized as one, by their first names.

    Attributes:
        head: a convolution or a linear layer, or a batch norm in front of an activation.
        norm: the batch norm behind it, folded into the head's weight and bias.
        activation: the last, where there is one.

    >>> FusedGroup("conv1", "bn1", "relu1").last
    'relu1'
    """

    head: str
    norm: str | None = None
    activation: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All members, in the order in which they are called."""
        return tuple(name for name in (self.head, self.norm, self.activation) if name is not None)

    @property
    def last(self) -> str:
        """The member whose output is the group's."""
        return self.names[-1]


def fused_groups(model: nn.Module, entries: Iterable[Entry], targets: Iterable[TargetConfig]) -> dict[str, FusedGroup]:
    """The groups of a config list, by their head.

    Args:
        model: the model; it is not touched.
        entries: a parsed config list for quantization. Several may name the same group.
        targets: what it resolves to. A group whose head has none any more, since a later entry excludes it, is none.

    Raises:
        UnmatchedError: a name that is no module's.
        ConflictError: modules that cannot be fused, or that two groups want; a weight that is not quantized, or a bias
            that cannot be.

    >>> from tersor.config import parse_config_list
    >>> from tersor.targets.resolve import resolve_targets
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> entries = parse_config_list([{"op_names": ["0"], "fuse_names": [("0", "1", "2")]}], "quantization")
    >>> fused_groups(model, entries, resolve_targets(model, entries, "quantization").targets)
    {'0': FusedGroup(head='0', norm='1', activation='2')}
    """
    held: dict[str, set[str]] = {}
    for target in targets:
        held.setdefault(target.module_name, set()).add(target.target_name)
    named = [(f"{entry.where}['fuse_names']", names) for entry in entries for names in entry.fuse_names or ()]
    groups = [group for group in read_groups(Modules(model), named) if group.head in held]
    for group in groups:
        if group.norm is not None and "weight" not in held[group.head]:
            raise ConflictError(
                f"{group.norm!r} is to be folded into the weight of {group.head!r}, which is not quantized.",
                where=f"fuse_names {group.names}",
                remedy="Add 'weight' to the target_names of its head, or leave the group out.",
            )
        if group.norm is not None and "bias" in held[group.head] and model.get_submodule(group.norm).bias is None:
            raise ConflictError(
                f"the folded bias is simulated on the bias of {group.norm!r}, which has none (affine=False).",
                where=f"fuse_names {group.names}",
                remedy="Leave 'bias' out of the target_names of its head, or leave the group out.",
            )
    return {group.head: group for group in groups}


def read_groups(modules: Modules, named: Iterable[tuple[str, Sequence[str]]]) -> list[FusedGroup]:
    """Groups from the names of their members, each checked; a group that is named twice counts once.

    Args:
        modules: of the model.
        named: for each group what errors call it, and two or three names.

    Raises:
        InvalidValueError: not two or three names.
        UnmatchedError: a name that is no module's.
        ConflictError: modules that cannot be fused, or that two groups want.
    """
    groups: list[FusedGroup] = []
    taken: dict[str, FusedGroup] = {}
    for where, names in named:
        group = _read_group(modules, names, where)
        for name in group.names:
            other = taken.setdefault(name, group)
            if other != group:
                raise ConflictError(
                    f"{name!r} belongs to {other.names} and to {group.names}.",
                    where=where,
                    remedy="Name each module in one group.",
                )
        if group not in groups:
            groups.append(group)
    return groups


def _read_group(modules: Modules, names: Sequence[str], where: str) -> FusedGroup:
    if isinstance(names, str) or len(names) not in (2, 3):
        legal = ["two or three names of modules, such as ('conv', 'bn', 'relu')"]
        raise InvalidValueError(f"{names!r} is nothing to fuse.", where=where, legal=legal)
    for name in names:
        if name not in modules.by_name:
            remedy = nearest(name, modules.by_name)
            raise UnmatchedError(f"{name!r} of {tuple(names)} is no module of the model.", where=where, remedy=remedy)
    first, *rest = [modules.by_name[name] for name in names]
    norm = rest.pop(0) if is_head(first) and isinstance(rest[0], _BatchNorm) else None
    activation = rest.pop(0) if rest and is_pointwise(rest[0]) else None
    if rest or not (is_head(first) or isinstance(first, _BatchNorm)) or (norm is None and activation is None):
        kinds = ", ".join(type(modules.by_name[name]).__name__ for name in names)
        raise ConflictError(f"{tuple(names)} cannot be fused: they are {kinds}.", where=where, legal=_ORDERS)
    if norm is not None and (reason := why_not_folded(first, norm)):
        raise ConflictError(
            f"{names[1]!r} cannot be folded into {names[0]!r}: {reason}.",
            where=where,
            remedy="Leave the group out: its modules are quantized one by one then.",
        )
    head, *others = [modules.first_name[name] for name in names]
    return FusedGroup(head, others[0] if norm is not None else None, others[-1] if activation is not None else None)


def why_not_folded(head: nn.Module, norm: nn.Module) -> str:
    """Why a batch norm cannot be folded into the weight of the layer in front of it; empty where it can.

    >>> why_not_folded(nn.Linear(2, 8), nn.BatchNorm1d(4))
    'the one has 8 channels, the other 4'
    """
    weight: Any = getattr(head, "weight", None)
    variance: Any = getattr(norm, "running_var", None)
    if variance is None or getattr(norm, "running_mean", None) is None:
        return "it keeps no running statistics (track_running_stats=False), so its scale is another one in every batch"
    slid_over = weight.dim() - 2
    for kind, legal in _NORM_DIMS.items():
        if isinstance(norm, kind) and slid_over not in legal:
            return f"a {kind.__name__} does not follow a {type(head).__name__}"
    if channels_of(head) != len(variance):
        return f"the one has {channels_of(head)} channels, the other {len(variance)}"
    if not _is_torchs_own(norm):
        return f"{type(norm).__name__} has a forward of its own, which may do more than a batch norm"
    if not _is_torchs_own(head) and not _is_linear_in_weight(head):
        return f"{type(head).__name__} has a forward of its own, which is not proportional to the weight"
    return ""


def channels_of(head: nn.Module) -> int:
    """The number of output channels.

    >>> channels_of(nn.ConvTranspose2d(4, 6, 3, groups=2))
    6
    """
    weight: Any = head.weight
    out_dim, _ = channel_dims(head, "weight", weight.dim())
    return weight.shape[0] if out_dim == 0 else weight.shape[1] * int(getattr(head, "groups", 1))


def over_outputs(scale: Tensor, shape: Sequence[int], out_dim: int) -> Tensor:
    """One number for each output channel, in a shape that broadcasts against the weight.

    The weight of a grouped transposed convolution has shape (in, out / groups, ...), its rows in the order of groups.

    Args:
        scale: shape ``(out,)``.
        shape: of the weight.
        out_dim: its dimension of output channels, 0 or 1.

    >>> over_outputs(torch.tensor([1.0, 2.0, 3.0, 4.0]), (2, 2, 1), 1)[..., 0]  # two groups
    tensor([[1., 2.],
            [3., 4.]])
    """
    positions = (1,) * (len(shape) - 2)
    if out_dim == 0:
        return scale.view(-1, 1, *positions)
    in_one_group = scale.view(-1, shape[1])
    if len(in_one_group) > 1:
        in_one_group = in_one_group.repeat_interleave(shape[0] // len(in_one_group), 0)
    return in_one_group.view(*in_one_group.shape, *positions)


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether what a module computes is what torch wrote for its type."""
    codes = [getattr(module, name, None) for name in ("forward", "_conv_forward")]
    return all(code is None or code.__module__.startswith("torch.nn.modules.") for code in codes)


class _Forward(nn.Module):
    """The forward of a module without its hooks."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes."""
        return self.head.forward(x)


def _is_linear_in_weight(head: Any) -> bool:
    """Whether a layer computes ``s f(W) + b`` where its weight is ``s W`` and its bias ``b``: tried on random numbers.

    A convolution that pads by itself does, one that standardises its weight does not.
    """
    draws = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, dtype=torch.float64, device="cpu")

    out_dim, _ = channel_dims(head, "weight", head.weight.dim())
    sizes = [2 * extent * dilation for extent, dilation in _kernel(head)]
    x = draw(2, head.in_channels if isinstance(head, _ConvNd) else head.in_features, *sizes)
    weight, scale, bias = draw(*head.weight.shape), draw(channels_of(head)), draw(channels_of(head))
    held = {
        f"head.{name}": tensor.detach().cpu().double() if tensor.is_floating_point() else tensor.detach().cpu()
        for name, tensor in (*head.named_parameters(), *head.named_buffers())
    }

    def computed(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(_Forward(head), held | {"head.weight": weight, "head.bias": bias}, (x,))

    try:
        with evaluating(head):
            plain = computed(weight, torch.zeros_like(bias))
            scaled = computed(weight * over_outputs(scale, weight.shape, out_dim or 0), bias)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    channels = (-1, *(1,) * len(sizes))
    return torch.allclose(scaled, plain * scale.view(channels) + bias.view(channels), rtol=1e-9, atol=1e-9)


def _kernel(head: Any) -> Iterator[tuple[int, int]]:
    return zip(head.kernel_size, head.dilation, strict=True) if isinstance(head, _ConvNd) else iter(())
