"""From the scores of blocks to what lives, where blocks leave together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tersor.config import PruningSpec
from tersor.pruning.allocation import Request, allocate
from tersor.targets.choices import Choices, Part
from tersor.targets.planned import PlannedTarget


def decide(sets: Sequence[Choices], scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which blocks of each target live.

    A choice is worth the mean score of its blocks, those of all its targets alike. Ratios, thresholds and budgets count
    choices, in each set of interchangeable ones by itself.

    Args:
        sets: what is decided on.
        scores: one for each block, by the name of the target.

    Returns:
        one bool for each block, flat, by the name of the target; what belongs to no choice lives.

    Raises:
        ConfigError: see :func:`tersor.pruning.allocation.allocate`.
        EmptyLayerError: all choices of a set would be removed.
    """
    requests: list[Request] = []
    named: set[str] = set()
    for parts in sets:
        group = _group(parts, named)
        blocks = sum(part.width for part in parts)
        # Allocation takes the mean over targets: the factor makes it one over blocks.
        requests += [_request(part, scores[str(part)], len(parts) / blocks, group) for part in parts]
    kept = allocate(requests)
    keep = {name: torch.ones(own.numel(), dtype=torch.bool, device=own.device) for name, own in scores.items()}
    for parts in sets:
        for part in parts:
            if part.blocks is None:
                keep[str(part)] = kept[part].flatten()
            else:
                keep[str(part)][torch.from_numpy(part.blocks).to(kept[part].device)] = kept[part][:, None]
    return keep


def masks_of_readers(targets: Sequence[PlannedTarget], keep: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Masks of what reads the classes that leave and that no weight writes as it is.

    A standardized weight is not zero where its parameter is masked. What it computes leaves only when nothing reads it.

    Args:
        targets: what was decided on.
        keep: what :func:`decide` said of them.
    """
    coupling = next((target.coupling for target in targets if target.coupling is not None), None)
    if coupling is None:
        return {}
    unwritten = np.ones(len(coupling.classes), dtype=bool)
    unwritten[coupling.classes[coupling.written]] = False
    lives, leaves = np.zeros_like(unwritten), np.zeros_like(unwritten)
    for target in targets:
        if target.classes is not None and unwritten[target.classes].any():
            kept = keep[target.name].cpu().numpy()
            lives[target.classes[kept]] = True
            leaves[target.classes[~kept]] = True
    leaves &= unwritten & ~lives
    return coupling.masks_of(leaves) if leaves.any() else {}


def _group(parts: Choices, named: set[str]) -> str | None:
    """A name of its own for each set that several targets share, close to what the user calls it."""
    if len(parts) == 1:
        return None
    config = parts[0].target.config
    given = name = getattr(config.spec, "dependency_group_id", None) or config.module_name
    number = 1
    while name in named:
        number += 1
        name = f"{given} ({number})"
    named.add(name)
    return name


def _request(part: Part, scores: Tensor, factor: float, group: str | None) -> Request:
    spec = part.target.config.spec
    assert isinstance(spec, PruningSpec)
    if part.blocks is not None:
        blocks = torch.from_numpy(part.blocks).to(scores.device)
        wide = scores.flatten().to(torch.promote_types(scores.dtype, torch.float32))
        scores = wide[blocks].sum(1) * factor
    return Request(
        key=part,
        scores=scores,
        block_numel=part.weight,
        ratio=spec.sparse_ratio,
        threshold=spec.sparse_threshold,
        min_ratio=spec.min_sparse_ratio,
        max_ratio=spec.max_sparse_ratio,
        global_group=spec.global_group_id,
        dependency_group=group,
        internal_block=spec.internal_metric_block,
    )
