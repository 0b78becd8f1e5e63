"""Normalizations, pooling and reductions: which dimensions pass and which must stay whole.

A statistic over a labelled dimension *bends* it: without some of its indices the computation goes through, but gives
other numbers, so that they leave only where inexact pruning is allowed.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from tersor.graph.rules import Call, Labels, freeze_rest, meet, rule

NORMALIZED = "is normalized with a channel that no parameter controls"


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(call: Call) -> list[Labels]:
    """Per channel: input, scale, shift and running statistics agree."""
    rank = call.arguments["input"].dim()
    uses_batch = call.arguments.get("training", False) or call.arguments.get("running_mean") is None
    averaged = [dim for dim in range(rank) if dim != 1] if uses_batch else []
    x = call.labels("input", whole=averaged)
    for dim in averaged:
        if dim in x:
            call.ledger.bend(x[dim], "is averaged over by a batch norm")
    names = ("weight", "bias", "running_mean", "running_var")
    given = [name for name in names if isinstance(call.arguments.get(name), Tensor)]
    channels = [x.get(1), *(call.labels(name).get(0) for name in given)]
    vector = meet(call, channels, call.arguments["input"].shape[1], NORMALIZED)
    passed = {**x, **({} if vector is None else {1: vector})}
    return [passed] + [{} for _ in call.result[1:]]


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Any:
    """Mean and variance, or mean square, over the last dimensions."""
    x: Tensor = call.arguments["input"]
    normalized = range(x.dim() - len(call.arguments["normalized_shape"]), x.dim())
    labels = call.labels("input", whole=normalized)
    for dim in normalized:
        names = [name for name in ("weight", "bias") if isinstance(call.arguments.get(name), Tensor)]
        own = [call.labels(name).get(dim - normalized.start) for name in names]
        vector = meet(call, [labels.get(dim), *own], x.shape[dim], NORMALIZED)
        if vector is not None:
            call.ledger.bend(vector, "is normalized as a whole")
            labels[dim] = vector
    return [labels] + [{} for _ in call.result[1:]] if isinstance(call.result, (list, tuple)) else labels


@rule("native_group_norm")
def group_norm(call: Call) -> list[Labels]:
    """Statistics over each group of channels and all space: groups live and die whole."""
    x: Tensor = call.arguments["input"]
    labels = call.labels("input", whole=range(2, x.dim()))
    for dim in [dim for dim in labels if dim > 1]:
        call.ledger.bend(labels[dim], "is averaged over by a group norm")
    names = [name for name in ("weight", "bias") if isinstance(call.arguments.get(name), Tensor)]
    vector = meet(call, [labels.get(1), *(call.labels(name).get(0) for name in names)], x.shape[1], NORMALIZED)
    if vector is not None:
        call.ledger.tie(vector.reshape(call.arguments["group"], -1), [1])
        labels[1] = vector
    return [labels] + [{} for _ in call.result[1:]]


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
      "mkldnn_max_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
      "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d",
      "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "_upsample_nearest_exact1d",
      "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
      "grid_sampler_2d", "grid_sampler_3d")  # fmt: skip
def spatial(call: Call) -> Any:
    """Batch and channels pass; the last dimensions, space, are mixed. The operator's name says how many they are."""
    x: Tensor = next(iter(call.arguments.values()))
    kept = range(x.dim() - int(re.findall(r"(\d)d", call.name.replace("sampler_", "sampler"))[0]))
    labels = call.labels_of(x, whole=range(len(kept), x.dim()))
    freeze_rest(call, labels, kept, f"'{call.name}' mixes it")
    passed = {dim: vector for dim, vector in labels.items() if dim in kept}
    return [passed, passed] if isinstance(call.result, (list, tuple)) else passed


@rule("mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "norm",
      "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin")  # fmt: skip
def reduction(call: Call) -> Any:
    """What is reduced over stays; the rest moves up. A sum of what is zero where it is masked loses nothing."""
    x: Tensor = call.arguments["self"]
    given = call.arguments.get("dim")
    given = [given] if isinstance(given, int) else given or list(range(x.dim()))
    reduced = [d % x.dim() for d in given]
    is_exact = call.name in ("sum", "linalg_vector_norm", "norm") and call.is_zero(x)
    labels: Labels = {}
    for dim, vector in call.labels("self", whole=reduced).items():
        if dim in reduced:
            if is_exact:
                call.ledger.mark_silenced(vector)
            else:
                call.ledger.bend(vector, f"'{call.name}' reduces over it")
        elif call.arguments.get("keepdim"):
            labels[dim] = vector
        else:
            labels[dim - sum(d < dim for d in reduced)] = vector
    return [labels] * len(call.result) if isinstance(call.result, (list, tuple)) else labels


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(call: Call) -> Labels:
    """The dimension that is summed over stays; the others pass."""
    along = call.arguments["dim"] % call.result.dim()
    labels = call.labels("self", whole=(along,))
    if along in labels:
        call.ledger.bend(labels[along], f"'{call.name}' runs over it")
    return labels


@rule("cumsum", "cumprod", "topk", "sort", "argsort", "kthvalue", "median", "mode", "logcumsumexp", "cummax", "cummin")
def along_one_dimension(call: Call) -> Any:
    """Positions along one dimension matter; the others pass."""
    x: Tensor = call.arguments["self"]
    along = call.arguments.get("dim", -1) % max(x.dim(), 1)
    labels = call.labels("self", whole=(along,))
    if along in labels:
        call.ledger.freeze(labels.pop(along), f"'{call.name}' runs over it")
    return [labels] * len(call.result) if isinstance(call.result, (list, tuple)) else labels


@rule("triu", "tril")
def triangle(call: Call) -> Labels:
    """The last two dimensions are positions."""
    rank = call.result.dim()
    labels = call.labels("self", whole=(rank - 2, rank - 1))
    freeze_rest(call, labels, range(rank - 2), f"'{call.name}' goes by its positions")
    return {dim: vector for dim, vector in labels.items() if dim < rank - 2}


@rule("glu")
def gated(call: Call) -> Labels:
    """``y = x[:half] * sigmoid(x[half:])``: the halves lose the same positions."""
    along = call.arguments.get("dim", -1) % call.result.dim()
    labels = call.labels("self")
    if along in labels:
        labels[along] = call.ledger.tie(labels[along].reshape(2, -1), [0]).reshape(-1)
    return labels


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(call: Call) -> Labels:
    """A transform along some dimensions; the others pass."""
    x: Tensor = call.arguments["self"]
    along = [dim % x.dim() for dim in call.arguments["dim"]]
    labels = call.labels("self", whole=along)
    for dim in along:
        if dim in labels:
            call.ledger.freeze(labels.pop(dim), "a Fourier transform runs over it")
    return labels


@rule("view_as_real", "view_as_complex", "real", "imag", "conj", "_conj", "resolve_conj", "complex", "polar")
def as_complex(call: Call) -> Labels:
    """Real and imaginary parts are the last dimension of two."""
    x: Tensor = next(iter(call.arguments.values()))
    labels = call.labels_of(x)
    if call.name == "view_as_complex" and x.dim() - 1 in labels:
        call.ledger.freeze(labels.pop(x.dim() - 1), "is a real or imaginary part")
    return labels


@rule("im2col")
def patches(call: Call) -> Labels:
    """``[N, C, H, W]`` to ``[N, C * kernel, positions]``."""
    labels = call.labels("self", whole=(2, 3))
    freeze_rest(call, labels, (0, 1), "'im2col' slides over it")
    passed = {dim: vector for dim, vector in labels.items() if dim < 2}
    if 1 in passed:
        passed[1] = passed[1].repeat_interleave(call.result.shape[-2] // len(passed[1]))
    return passed


@rule("col2im")
def folded(call: Call) -> Labels:
    """``[N, C * kernel, positions]`` to ``[N, C, H, W]``."""
    labels = call.labels("self", whole=(2,))
    freeze_rest(call, labels, (0, 1), "'col2im' slides over it")
    passed = {dim: vector for dim, vector in labels.items() if dim < 2}
    if 1 in passed:
        passed[1] = call.ledger.tie(passed[1].reshape(call.result.shape[1], -1), [1]).reshape(-1)
    return passed
