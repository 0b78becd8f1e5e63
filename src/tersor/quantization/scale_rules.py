"""The rules by which factors pass the functions of torch; what has none lets none pass."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.graph.inputs import map_tensors, tensors_of
from tersor.quantization.scale_flow import ZERO, ScaleFlow, Sides, name_of, rule, writes

SAME = (
    "relu leaky_relu prelu rrelu abs neg positive dropout dropout1d dropout2d dropout3d alpha_dropout clone detach "
    "contiguous to float double half bfloat16 type type_as cpu cuda data requires_grad_"
)
MOVES = (
    "view reshape reshape_as flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze expand expand_as broadcast_to repeat tile repeat_interleave split chunk tensor_split unbind select "
    "narrow index_select __getitem__ flip roll cat concat concatenate stack pixel_shuffle pixel_unshuffle "
    "channel_shuffle unfold T mT"
)


@rule(SAME)
def _same(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    return flow.of(args[0] if args else kwargs["input"])


@rule("clamp clamp_min")
def _clamp(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    bounds = [*args[1:], *kwargs.values()]
    at_zero = bounds[:1] == [0] and all(bound is None for bound in bounds[1:])
    return flow.of(args[0]) if at_zero and "max" not in kwargs else None


@rule(MOVES)
def _move(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    """The same function on the ids; index tensors stay what they are."""

    def ids(tensor: Tensor) -> Tensor:
        return flow.of(tensor) if tensor.is_floating_point() else tensor.cpu()

    moved = tensors_of(result)
    if not all(tensor.is_floating_point() for tensor in moved):  # indices and masks
        return flow.constant if isinstance(result, Tensor) else [flow.constant] * len(moved)
    if func is Tensor.view:
        if any(isinstance(arg, torch.dtype) for arg in (*args, *kwargs.values())):
            return None
        func = Tensor.reshape  # ids may lie in memory in another way
    return func(*map_tensors(args, ids), **map_tensors(dict(kwargs), ids))


@rule("pad")
def _pad(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    call = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **kwargs}
    ids, pad = flow.of(call["input"]), call["pad"]
    if call.get("mode", "constant") != "constant":
        return flow.alike(ids, range(-(len(pad) // 2), 0))
    return F.pad(ids, pad, value=ZERO) if not call.get("value") else None


@rule("add sub subtract rsub __radd__ __rsub__ __iadd__ __isub__")
def _add(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    operands = [value for value in args[:2] if isinstance(value, Tensor)]
    if len(operands) < 2:
        number = next((value for value in args[:2] if not isinstance(value, Tensor)), kwargs.get("other"))
        return flow.of(operands[0]) if number == 0 else None
    a, b = map(flow.of, operands)
    if writes(name_of(func)) and bool(((a == ZERO) & (b != ZERO)).any()):
        return None  # another view of it would still be taken for zero
    return flow.join(a, b)


@rule("mul multiply __rmul__ __imul__")
def _mul(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    operands = [*args, *kwargs.values()][:2]
    ids = [flow.of(value) for value in operands if isinstance(value, Tensor)]
    if len(ids) < 2:
        return ids[0]
    # A parameter takes the factor in place of what it multiplies: the scale of a norm that is written out.
    return flow.product(*(reversed(ids) if isinstance(operands[0], nn.Parameter) else ids))


@rule("div divide true_divide __itruediv__")
def _div(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    divisor = args[1] if len(args) > 1 else kwargs.get("other")
    if not isinstance(args[0], Tensor) or "rounding_mode" in kwargs:
        return None
    if isinstance(divisor, Tensor):
        flow.fix(flow.of(divisor), "divides another tensor")
    return flow.of(args[0])


@rule("sum mean amax amin")
def _reduce(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    every = range(args[0].dim())
    dims = [dims] if isinstance(dims, int) else list(dims or every)
    ids = flow.alike(flow.of(args[0]), dims)
    shape = [1 if dim in [d % args[0].dim() for d in dims] else args[0].shape[dim] for dim in every]
    return ids.expand(shape).reshape(result.shape)


@rule(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)
def _pool(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    if not isinstance(result, Tensor):
        return None
    found = re.search(r"(\d)d", name_of(func))
    assert found is not None
    return flow.alike(flow.of(args[0] if args else kwargs["input"]), range(-int(found[1]), 0))


@rule("interpolate upsample")
def _interpolate(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    return flow.alike(flow.of(args[0] if args else kwargs["input"]), range(2, result.dim()))


@rule("linear")
def _linear(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    call = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **kwargs}
    return _read_last(flow, call["input"], flow.matrix(call["weight"]), call.get("bias"))


@rule("addmm")
def _addmm(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    if len(args) < 3 or kwargs:
        return None
    return _read_last(flow, args[1], flow.matrix(args[2], transposed=True), args[0])


def _read_last(flow: ScaleFlow, x: Tensor, sides: Sides | None, bias: Tensor | None) -> Tensor:
    """A weight reads the last dimension, and writes it."""
    ids = flow.alike(flow.of(x), range(x.dim() - 1))
    if sides is None:
        flow.fix(ids, "is read by a weight that is computed, or used in two ways")
    else:
        flow.join(ids.reshape(-1), sides.inputs)
    return flow.written(sides, bias)


@rule("matmul bmm mm __matmul__")
def _matmul(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    a, b = args[:2]
    if flow.owns(b) and b.dim() == 2:
        return _read_last(flow, a, flow.matrix(b, transposed=True), None)
    if min(a.dim(), b.dim()) < 2:
        return None
    return flow.product(flow.alike(flow.of(a), [-1]), flow.alike(flow.of(b), [-2]))


@rule("scaled_dot_product_attention")
def _attention(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    call = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
    flow.fix_all((call["query"], call["key"]), "is a query or a key: the softmax of their product reads it")
    ids = flow.alike(flow.of(call["value"]), [-2])
    if call.get("enable_gqa"):
        ids = ids.expand(*call["value"].shape[:-2], 1, -1).repeat_interleave(result.shape[-3] // ids.shape[-3], -3)
    return ids


@rule("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def _conv(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    transposed = "transpose" in name_of(func)
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    if transposed:
        names[5:] = ["output_padding", "groups", "dilation"]
    call = {"bias": None, "groups": 1, **dict(zip(names, args, strict=False)), **kwargs}
    x, spatial = call["input"], call["weight"].dim() - 2
    channel = x.dim() - 1 - spatial
    ids = flow.alike(flow.of(x), [dim for dim in range(x.dim()) if dim != channel]).reshape(-1)
    sides = flow.matrix(call["weight"], groups=call["groups"], transposed=transposed)
    if sides is None:
        flow.fix(ids, "is read by a weight that is computed, or used in two ways")
    else:
        flow.join(ids, sides.inputs)
    return flow.written(sides, call["bias"]).reshape(-1, *[1] * spatial)


@rule("layer_norm rms_norm")
def _layer_norm(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    call = {**dict(zip(("input", "normalized_shape", "weight", "bias"), args, strict=False)), **kwargs}
    flow.fix(flow.of(call["input"]), "is read by a norm, which divides by a statistic over all channels")
    weight = call.get("weight")
    if weight is None:
        return None
    ids = flow.written(flow.vector(weight), call.get("bias"))
    return ids.view(weight.shape) if ids.dim() else ids


@rule("batch_norm group_norm instance_norm")
def _batch_norm(flow: ScaleFlow, func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> Any:
    name = name_of(func)
    if name == "group_norm":
        names = ["input", "num_groups", "weight", "bias"]
    else:
        names = ["input", "running_mean", "running_var", "weight", "bias"]
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    flow.fix(flow.of(call["input"]), f"is read by a {name.replace('_', ' ')}, whose own weight takes factors instead")
    if call.get("weight") is None:
        return None
    ids = flow.written(flow.vector(call["weight"]), call.get("bias"))
    return ids.view(-1, *[1] * (result.dim() - 2)) if ids.dim() else ids
