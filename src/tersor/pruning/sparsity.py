"""What was asked of each pruned target, what came of it, and why where that is less."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from tersor.config import PruningSpec
from tersor.graph.coupling import Masks
from tersor.targets.choices import Choices, choices
from tersor.targets.plan import Plan
from tersor.targets.planned import PlannedTarget
from tersor.targets.rows import PlanRow, removed_count


@dataclass(frozen=True)
class Sparsity:
    """What was asked of one target, and what came of it.

    Attributes:
        target: ``module.target``.
        asked: the sparse ratio; None where there is none.
        blocks: how many blocks the target has.
        removed: how many of them its mask removes in whole.
        elements: the share of its elements that are masked, by its own mask or because what they read is gone.
        reason: why less is removed than was asked; empty where it is not.
    """

    target: str
    asked: float | None
    blocks: int
    removed: int
    elements: float
    reason: str


def measure_sparsity(plan: Plan, own: Masks, applied: Masks) -> list[Sparsity]:
    """Compare a plan with masks.

    Args:
        plan: of the pruner.
        own: the masks that it made, broadcasting to their targets.
        applied: those that are simulated, completed by the graph.
    """
    found: list[Sparsity] = []
    short = _short_groups(plan, own)
    for target, row in zip(plan.targets, plan.rows, strict=True):
        spec = target.config.spec
        if target.blocks is None or not isinstance(spec, PruningSpec):
            continue
        mask, simulated = _find(own, target), _find(applied, target)
        removed = _removed(target, mask)
        share = 0.0 if simulated is None else float((~simulated).double().mean())
        reason = target.frozen or ("" if mask is None else _why_less(target, spec, row, removed, short))
        found.append(Sparsity(target.name, spec.ratio, target.blocks.count, removed, share, reason))
    return found


def _find(masks: Masks, target: PlannedTarget) -> Tensor | None:
    return masks.get(target.config.module_name, {}).get(target.config.target_name)


def _removed(target: PlannedTarget, mask: Tensor | None) -> int:
    """How many blocks of a target are masked in whole."""
    if mask is None or target.blocks is None:
        return 0
    return int((~target.blocks.split(mask.expand(target.blocks.shape)).any(-1)).sum())


def _why_less(target: PlannedTarget, spec: PruningSpec, row: PlanRow, removed: int, short: dict[str, str]) -> str:
    if spec.global_group_id is not None:
        return short.get(spec.global_group_id, "")
    if spec.ratio is None or row.blocks is None:
        return ""
    if removed >= max(removed_count(spec.ratio, row.blocks), 1 if spec.ratio else 0):
        return ""
    limits = ("max_sparse_ratio", "internal_metric_block", "balance_granularity", "dependency_group_id")
    asked = spec.as_config()
    given = [f"{name} {asked[name]}" for name in limits if name in asked]
    if row.reason or given:
        return row.reason or f"limited by {' and '.join(given)}"
    return f"each of {target.parts} equal parts loses whole blocks" if target.parts > 1 else ""


def _short_groups(plan: Plan, own: Masks) -> dict[str, str]:
    """The global groups that fall short of their ratio by a choice of each kind or more, with the reason."""
    groups: dict[str, list[Choices]] = defaultdict(list)
    for parts in choices(plan.targets):
        spec = parts[0].target.config.spec
        if isinstance(spec, PruningSpec) and spec.global_group_id is not None:
            groups[spec.global_group_id].append(parts)
    short: dict[str, str] = {}
    for group, sets in groups.items():
        members = {part.target: part for parts in sets for part in parts if _find(own, part.target) is not None}
        if not members:
            continue
        weights = [(parts[0].count, sum(part.weight for part in parts)) for parts in sets]
        ratio = getattr(sets[0][0].target.config.spec, "ratio", None) or 0.0
        asked = removed_count(ratio, sum(count * weight for count, weight in weights))
        removed = sum(_removed(t, _find(own, t)) * t.blocks.block_numel for t in members if t.blocks)
        if asked - removed >= sum(weight for _, weight in weights):
            short[group] = (
                f"global group {group} gives up {removed} of {asked} elements: max_sparse_ratio forbids more, "
                "or its targets are down to their last choices"
            )
    return short
