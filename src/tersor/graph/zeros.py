"""Where is a tensor zero at what is masked? There a sum over it loses nothing when the index leaves.

Masked parameters are zero. What follows says through which operators that holds, operator by operator; where nothing is
said, it does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tersor.graph.inputs import tensors_of
from tersor.graph.movement import EXPANDING
from tersor.graph.rules import Call, Fields, as_tuple, preserves_values

ODD = frozenset(
    {"relu", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "abs", "neg", "sqrt", "sign", "sin", "mish",
     "erf", "expm1", "log1p", "trunc", "floor", "ceil", "round", "square", "softshrink", "hardshrink", "tan", "asin",
     "atan", "sinh", "dropout", "native_dropout", "feature_dropout", "alpha_dropout", "celu", "selu"}
)  # fmt: skip
"""Functions of one tensor that are zero at zero."""
FIRST = frozenset(
    {"div", "glu", "_prelu_kernel", "index", "_unsafe_index", "index_select", "gather", "embedding", "im2col", "col2im",
     "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "mean", "sum", "amax", "amin",
     "linalg_vector_norm", "norm", "_fft_r2c", "_fft_c2c", "view_as_real", "view_as_complex", "_weight_norm_interface"}
)  # fmt: skip
"""Operators whose result is zero where their first tensor is."""


def stays_zero(call: Call, labels: Fields) -> bool:
    """Whether the result of a call is zero at every index that leaves with one of its labels."""
    name = call.name
    operands = tensors_of(list(call.arguments.values()))
    if name == "mul":
        zero = [dim for operand in operands if call.is_zero(operand) for dim in _aligned(call, operand)]
        return _covers(zero, labels)
    if name in ("add", "sub", "rsub"):
        scalar = any(
            isinstance(value, (int, float)) and value for key, value in call.arguments.items() if key == "other"
        )
        return not scalar and all(call.is_zero(o) and _covers(_aligned(call, o), labels) for o in operands)
    if name in ("mm", "bmm", "addmm", "baddbmm", "mv"):
        return _product_is_zero(call, operands, labels)
    if name in ("convolution", "_convolution"):
        bias = call.arguments.get("bias")
        own = call.is_weight(call.arguments["weight"]) and (bias is None or call.is_zero(bias))
        return own and (0 not in labels or call.is_zero(call.arguments["input"]))
    if "batch_norm" in name or name in ("native_layer_norm", "_fused_rms_norm", "native_group_norm"):
        weight, bias = call.arguments.get("weight"), call.arguments.get("bias")
        scaled = isinstance(weight, Tensor) and call.is_zero(weight) and (bias is None or call.is_zero(bias))
        return scaled and set(labels) <= set(_normalized(call, name))
    if name == "zeros" or name in ("new_zeros", "zeros_like"):
        return True
    if name in EXPANDING or name == "constant_pad_nd":
        return False
    if not operands or not call.is_zero(operands[0]):
        return False
    if name in ("hardtanh", "clamp"):
        low, high = (
            call.arguments.get(key) for key in (("min_val", "max_val") if name == "hardtanh" else ("min", "max"))
        )
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return False
        return (low is None or low <= 0) and (high is None or high >= 0)
    if name == "pow":
        exponent = call.arguments.get("exponent")
        return isinstance(exponent, (int, float)) and exponent > 0
    known = name in ODD or name in FIRST or "pool" in name or "upsample" in name or "_pad" in name
    return known or (preserves_values(call.operator) and all(call.is_zero(operand) for operand in operands))


def _aligned(call: Call, operand: Tensor) -> list[int]:
    """The labelled dimensions of an operand, counted in the broadcast result."""
    shift = call.result.dim() - operand.dim() if isinstance(call.result, Tensor) else 0
    return [dim + shift for dims in call.fields_of(operand) for dim in as_tuple(dims)]


def _covers(dims: Iterable[int], labels: Fields) -> bool:
    return {dim for key in labels for dim in as_tuple(key)} <= set(dims)


def _normalized(call: Call, name: str) -> Any:
    if name in ("native_layer_norm", "_fused_rms_norm"):
        rank = call.arguments["input"].dim()
        return range(rank - len(call.arguments["normalized_shape"]), rank)
    return (1,)


def _product_is_zero(call: Call, operands: list[Tensor], labels: Fields) -> bool:
    """Rows are zero with the left factor, columns with the right one, what both share with either."""
    *addend, left, right = operands
    last = call.result.dim() - 1
    by = {last: [right], last - 1: [left]} if call.name != "mv" else {last: [left]}
    factors = [by.get(dim, [left, right]) for key in labels for dim in as_tuple(key)]
    zero = all(any(call.is_zero(factor) for factor in either) for either in factors)
    return zero and all(call.is_zero(o) and _covers(_aligned(call, o), labels) for o in addend)
