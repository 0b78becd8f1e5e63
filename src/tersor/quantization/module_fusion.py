"""Module fusion: find what a deployed kernel computes in one go, and fold batch norms into weights for good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from tersor.errors import ConflictError, WrapError
from tersor.graph import concrete_trace
from tersor.graph.inputs import named_tensors, refuse_lazy
from tersor.targets.channels import channel_dims
from tersor.targets.fused import (
    FusedGroup,
    is_head,
    is_pointwise,
    over_outputs,
    read_groups,
    why_not_folded,
)
from tersor.targets.selection import Modules
from tersor.wrapping.wrappers import is_wrapped


def auto_fuse(model: nn.Module, example_inputs: Any) -> list[tuple[str, ...]]:
    """Find the modules that can be fused, ready for a config entry's ``fuse_names``.

    The model is run once. A chain is a convolution or linear layer with a batch norm, an activation or both behind it,
    or a batch norm with an activation; each is called once, and what one gives to the next is used by nobody else.
    Functions (``torch.relu(x)``) are no modules and cannot be named; a module that is called in several places (one
    ``nn.ReLU`` for a whole block) cannot be a member.

    Args:
        model: any module that is not wrapped; it is left as it was.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Returns:
        tuples of two or three names, in the order in which the modules are called.

    Raises:
        TraceError: the model cannot be traced on these inputs.
        WrapError: a compressor has wrapped the model.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(16, 2))
    >>> auto_fuse(model, torch.zeros(1, 1, 4, 4))
    [('0', '1', '2')]
    """
    _refuse_wrapped(model)
    modules, found, taken = dict(model.named_modules()), [], set[str]()
    refusals = _Refusals(model)
    links = _links(model, example_inputs)
    for head in links:
        if head in taken or not (is_head(modules[head]) or isinstance(modules[head], _BatchNorm)):
            continue
        names = [head]
        follower = modules[links[head]]
        if is_head(modules[head]) and isinstance(follower, _BatchNorm):
            if why_not_folded(modules[head], follower) or refusals.of(modules[head], follower):
                continue
            names.append(links[head])
        last = links.get(names[-1])
        if last is not None and is_pointwise(modules[last]):
            names.append(last)
        if len(names) > 1:
            found.append(tuple(names))
            taken.update(names)
    return found


def fuse_modules(model: nn.Module, fuse_names: Iterable[Sequence[str]], example_inputs: Any = None) -> nn.Module:
    r"""Fold batch norms into the layers in front of them, in place and for good.

    For each output channel, with :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` of the running statistics,

    .. math:: W' = s W, \qquad b' = (b - \mu) s + \beta

    and an ``nn.Identity`` takes the norm's place. In eval mode the model computes what it did. A layer without a bias
    gets one; an optimizer made before does not know it. Activations stay modules: to fold them is the deployed
    kernel's business, so a group without a norm behind its head changes nothing.

    Parameters stay the same objects with new values, of the same type, on the same device; their gradients, which were
    those of other values, are dropped.

    Paper: Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
    (CVPR 2018), section 3.2.

    Args:
        model: any module that is not wrapped.
        fuse_names: tuples of two or three names of modules, as :func:`auto_fuse` finds them.
        example_inputs: with them the model is traced, and what is not called in that order, or is used elsewhere too,
            is refused. Without them that is up to you.

    Returns:
        the model.

    Raises:
        ConfigError: one of its subclasses: a name that is no module's; modules that cannot be fused, that two groups
            want or that are used elsewhere. Nothing was changed then.
        WrapError: a compressor has wrapped the model.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    >>> x = torch.randn(2, 1, 5, 5)
    >>> before = model(x)
    >>> torch.allclose(fuse_modules(model, [("0", "1", "2")])(x), before, atol=1e-5)
    True
    >>> model[1], model[0].bias.shape
    (Identity(), torch.Size([4]))
    """
    _refuse_wrapped(model)
    modules = Modules(model)
    groups = read_groups(modules, ((f"fuse_names[{index}]", names) for index, names in enumerate(fuse_names)))
    if example_inputs is not None:
        check_calls(model, groups, example_inputs)
    refusals = _Refusals(model)
    folded: list[tuple[Any, str, Tensor, Tensor]] = []
    for group in groups:
        if group.norm is not None:
            head, norm = modules.by_name[group.head], modules.by_name[group.norm]
            if reason := refusals.of(head, norm):
                raise ConflictError(
                    f"{group.norm!r} cannot be folded into {group.head!r}: {reason}.",
                    where=f"fuse_names {group.names}",
                    remedy="Leave the group out.",
                )
            folded.append((head, group.norm, *_folded(head, norm)))
    for head, norm_name, weight, bias in folded:
        _replace(head, weight, bias)
        parent, _, name = norm_name.rpartition(".")
        identity = nn.Identity().train(modules.by_name[norm_name].training)
        setattr(model.get_submodule(parent), name, identity)
    return model


def check_calls(model: nn.Module, groups: Iterable[FusedGroup], example_inputs: Any) -> None:
    """Refuse groups whose members are not called one after another, once each, with nobody else between.

    Raises:
        ConflictError: naming the group and the first two members of which that is so.
        TraceError: the model cannot be traced on these inputs.
    """
    links = _links(model, example_inputs)
    for group in groups:
        for first, second in zip(group.names, group.names[1:], strict=False):
            if links.get(first) != second:
                raise ConflictError(
                    f"{second!r} is not all that uses {first!r}, or one of them is called more than once.",
                    where=f"fuse_names {group.names}",
                    remedy=f"Behind {first!r} comes {links[first]!r}." if first in links else "Leave the group out.",
                )


def fold_norm(
    weight: Tensor, bias: Tensor | None, scale: Tensor, mean: Tensor, shift: Tensor | None, out_dim: int = 0
) -> tuple[Tensor, Tensor]:
    r"""Weight and bias of a layer that computes its batch norm too: :math:`s W` and :math:`(b - \mu) s + \beta`.

    Args:
        weight: of any layer whose output is linear in it.
        bias: shape ``(out,)``, or None.
        scale: the norm's :math:`s`, shape ``(out,)``; see :func:`norm_scale`.
        mean: its running mean.
        shift: its :math:`\beta`, or None.
        out_dim: the weight's dimension of output channels.

    >>> one = torch.ones(1)
    >>> fold_norm(torch.tensor([[2.0]]), None, 3 * one, one, 10 * one)
    (tensor([[6.]]), tensor([7.]))
    """
    moved = (-mean if bias is None else bias - mean) * scale
    return weight * over_outputs(scale, weight.shape, out_dim), moved if shift is None else moved + shift


def norm_scale(gamma: Tensor | None, variance: Tensor, epsilon: float) -> Tensor:
    r"""What a batch norm multiplies each channel by in eval mode: :math:`\gamma / \sqrt{\sigma^2 + \epsilon}`.

    >>> norm_scale(torch.tensor([1.0, -2.0]), torch.tensor([4.0, 4.0]), 0.0)
    tensor([ 0.5000, -1.0000])
    """
    inverse = torch.rsqrt(variance + epsilon)
    return inverse if gamma is None else gamma * inverse


def _folded(head: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """The new weight and bias, computed in float32 at least, in the weight's own type."""
    weight, bias = head.weight.detach(), head.bias
    dtype = torch.promote_types(weight.dtype, torch.promote_types(norm.running_var.dtype, torch.float32))
    held = norm.running_mean, norm.running_var, norm.weight, norm.bias, bias
    mean, variance, gamma, shift, own = [None if t is None else t.detach().to(weight.device, dtype) for t in held]
    assert mean is not None
    assert variance is not None
    out_dim, _ = channel_dims(head, "weight", weight.dim())
    scale = norm_scale(gamma, variance, norm.eps)
    new_weight, new_bias = fold_norm(weight.to(dtype), own, scale, mean, shift, out_dim or 0)
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype if bias is None else bias.dtype)


def _replace(head: Any, weight: Tensor, bias: Tensor) -> None:
    head.weight.grad = None
    head.weight.data = weight
    if head.bias is None:
        head.register_parameter("bias", nn.Parameter(bias, requires_grad=head.weight.requires_grad))
    else:
        head.bias.grad = None
        head.bias.data = bias


class _Refusals:
    """Why a layer may not be given another weight, or a norm taken out, though the two would fit."""

    def __init__(self, model: nn.Module) -> None:
        self._places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._uses = Counter(id(tensor) for tensor in named_tensors(model).values())

    def of(self, head: nn.Module, norm: nn.Module) -> str:
        """The reason; empty where there is none."""
        tensors = [tensor for tensor in head._parameters.values() if tensor is not None]
        if self._places[head] > 1 or self._places[norm] > 1:
            return "one of them stands in several places of the model"
        if parametrize.is_parametrized(head) or parametrize.is_parametrized(norm) or "weight" not in head._parameters:
            return "a parametrization computes its weight"
        if any(self._uses[id(tensor)] > 1 for tensor in tensors):
            return "its weight or bias is tied to another layer's"
        if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
            return "hooks hang on the norm, which is taken out"
        return ""


def _links(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """For each module that is called once, and whose output one other such module takes and nobody else: the other.

    In the order of the calls. What feeds a batch norm has its channels in the second dimension, where that has them.
    """
    modules = dict(model.named_modules())
    graph = concrete_trace(model, example_inputs).graph
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(str(node.target) for node in calls)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    links: dict[str, str] = {}
    for node in calls:
        users = list(node.users)
        if not users or users[0].op != "call_module" or users[0].all_input_nodes != [node]:
            continue
        first, second = str(node.target), str(users[0].target)
        if times[first] > 1 or times[second] > 1 or first in read or second in read:
            continue
        if len(users) > 1 and not getattr(modules[second], "inplace", False):
            continue  # whoever uses a tensor after a module that wrote into it uses what that wrote
        weight: Any = getattr(modules[first], "weight", None)
        is_folded = is_head(modules[first]) and isinstance(modules[second], _BatchNorm)
        if is_folded and len(node.meta.get("shape", ())) != weight.dim():
            continue  # tokens, of which a norm of one dimension takes the second for channels
        links[first] = second
    return links


def _refuse_wrapped(model: nn.Module) -> None:
    refuse_lazy(model)
    if is_wrapped(model):
        raise WrapError(
            "a compressor has wrapped the model", where="model", remedy="Call its unwrap_model() first, then fuse."
        )
