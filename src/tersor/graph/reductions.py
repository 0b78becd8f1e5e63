"""Normalizations, pooling and reductions: which dimensions pass and which must stay whole."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from tersor.graph.rules import Call, Labels, freeze_rest, meet, rule


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update")  # fmt: skip
def batch_norm(call: Call) -> list[Labels]:
    """Per channel: input, scale, shift and running statistics agree."""
    x = call.labels("input")
    uses_batch = call.arguments.get("training", False) or call.arguments.get("running_mean") is None
    kept = (1,) if uses_batch else (0, 1)
    freeze_rest(call, x, kept, "is averaged over by a batch norm")
    names = ("weight", "bias", "running_mean", "running_var")
    given = [name for name in names if isinstance(call.arguments.get(name), Tensor)]
    channels = [x.get(1), *(call.labels(name).get(0) for name in given)]
    meet(call, channels, call.arguments["input"].shape[1], "is normalized with a channel that no parameter controls")
    return [{dim: v for dim, v in x.items() if dim in kept}] + [{} for _ in call.result[1:]]


@rule("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d",
      "mkldnn_max_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_max_pool2d",
      "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
      "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "reflection_pad1d", "reflection_pad2d",
      "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
      "_upsample_bilinear2d_aa", "_upsample_nearest_exact2d")  # fmt: skip
def spatial(call: Call) -> Any:
    """Batch and channels pass; the last dimensions, space, are mixed. The operator's name says how many they are."""
    x: Tensor = next(iter(call.arguments.values()))
    kept = range(x.dim() - int(re.findall(r"(\d)d", call.name)[0]))
    labels = call.labels_of(x)
    freeze_rest(call, labels, kept, f"'{call.name}' mixes it")
    passed = {dim: vector for dim, vector in labels.items() if dim in kept}
    return [passed, passed] if isinstance(call.result, (list, tuple)) else passed


@rule("mean", "sum", "amax", "amin", "prod", "var", "std", "var_mean", "norm", "linalg_vector_norm", "any", "all")
def reduction(call: Call) -> Any:
    """What is reduced over stays; the rest moves up."""
    x: Tensor = call.arguments["self"]
    given = call.arguments.get("dim")
    reduced = [d % x.dim() for d in ([given] if isinstance(given, int) else given or range(x.dim()))]
    labels: Labels = {}
    for dim, vector in call.labels("self").items():
        if dim in reduced:
            call.ledger.freeze(vector, f"'{call.name}' reduces over it")
        elif call.arguments.get("keepdim"):
            labels[dim] = vector
        else:
            labels[dim - sum(d < dim for d in reduced)] = vector
    return [labels] * len(call.result) if isinstance(call.result, (list, tuple)) else labels


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum")
def along_one_dimension(call: Call) -> Labels:
    """The dimension that is summed over stays; the others pass."""
    along = call.arguments["dim"] % call.result.dim()
    labels = dict(call.labels("self"))
    if along in labels:
        call.ledger.freeze(labels.pop(along), f"'{call.name}' runs over it")
    return labels
