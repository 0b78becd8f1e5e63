"""The lines of a plan, and the table that they are shown in."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch.nn.utils.parametrize import type_before_parametrizations

from tersor.config import Mode, PruningSpec
from tersor.targets.choices import Choices, choices
from tersor.targets.fused import FusedGroup
from tersor.targets.planned import PlannedTarget
from tersor.targets.settings import SETTINGS

COLUMNS = ("target", "action", "setting", "group", "reason")


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan.

    Attributes:
        module: name.
        type: class name.
        target: name.
        setting: the keys that apply, as a user would write them.
        group: dependency and global group, or the modules that it is fused with.
        blocks: how many blocks there are.
        removes: how many of them will go, where that is decided by this target alone.
        action: ``prune``, ``align``, ``quantize``, ``distil`` or ``nothing``.
        reason: why, where the action is not what the setting asks for, or who asked.
    """

    module: str
    type: str
    target: str
    setting: Mapping[str, Any]
    group: str
    blocks: int | None
    removes: int | None
    action: str
    reason: str


def plan_rows(mode: Mode, targets: Sequence[PlannedTarget], fused: Mapping[str, FusedGroup]) -> tuple[PlanRow, ...]:
    """A line for each target."""
    sets: dict[PlannedTarget, list[Choices]] = defaultdict(list)
    for parts in choices(targets) if mode == "pruning" else ():
        for part in parts:
            sets[part.target].append(parts)
    return tuple(_row(mode, target, sets.get(target, []), fused.get(target.config.module_name)) for target in targets)


def _row(mode: Mode, target: PlannedTarget, sets: Sequence[Choices], fused: FusedGroup | None) -> PlanRow:
    config, spec = target.config, target.config.spec
    action, removes, reason = {"quantization": "quantize", "distillation": "distil"}.get(mode, "prune"), None, ""
    group = " + ".join(fused.names) if fused else ""
    if isinstance(spec, PruningSpec):
        action, removes, reason = _pruning_action(target, spec, sets)
        group = " ".join(name for name in (spec.dependency_group_id, spec.global_group_id) if name)
    return PlanRow(
        config.module_name,
        type_before_parametrizations(config.module).__name__,
        config.target_name,
        spec.as_config(),
        group,
        target.blocks.count if target.blocks else None,
        removes,
        action,
        reason,
    )


def _pruning_action(target: PlannedTarget, spec: PruningSpec, sets: Sequence[Choices]) -> tuple[str, int | None, str]:
    if spec.align is not None:
        source = ".".join(filter(None, (spec.align.module_name, spec.align.target_name)))
        return "align", None, f"follows {source}"
    if target.frozen:
        return "nothing", 0, target.frozen
    if not target.decides or target.blocks is None:
        return "nothing", 0, "no sparse_ratio, sparse_threshold or sparse_pattern is set"
    own = [(parts, part) for parts in sets for part in parts if part.target is target]
    free = sum(part.count * part.width for _, part in own)
    partly = ""
    if free < target.blocks.count:
        partly = f"{target.blocks.count - free} blocks stay: one {target.why or 'leaves with a block that stays'}"
    if spec.sparse_threshold is not None or spec.global_group_id is not None:
        return "prune", None, partly
    if not own:
        return "nothing", 0, partly
    removes, asked = 0, 0.0
    for parts, part in own:
        ratio, shares = _ratio(parts)
        removes += part.width * shares * removed_count(ratio, part.count // shares)
        asked += ratio * part.width * part.count
    ratio, shares = _ratio(own[0][0])
    if not removes and len(own) == 1:
        what = "blocks" if own[0][1].width == 1 else f"choices of {own[0][1].width} blocks"
        less = f"{ratio:g} of {own[0][1].count // shares} {what} is less than one"
    elif (len(own) > 1 or own[0][1].width > 1) and removes < max(removed_count(1, asked), 1):
        kinds = [f"{part.count} choices of {part.width} blocks" for _, part in own]
        more = f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
        less = f"only whole choices leave, of each kind its share: {', '.join(kinds[:3])}{more}"
    else:
        less = ""
    return "prune" if removes else "nothing", removes, "; ".join(filter(None, (partly, less)))


def _ratio(parts: Choices) -> tuple[float, int]:
    """The ratio of a set of choices within its bounds, and the number of equal parts of which each loses that."""
    specs = [part.target.config.spec for part in parts]
    shares = math.lcm(*(part.target.parts for part in parts))
    asked = [max(s.ratio or 0.0, s.min_sparse_ratio or 0.0) for s in specs if isinstance(s, PruningSpec)]
    most = [1.0 if s.max_sparse_ratio is None else s.max_sparse_ratio for s in specs if isinstance(s, PruningSpec)]
    return min(max(asked), *most), shares


def removed_count(ratio: float, blocks: float) -> int:
    """How many of a number of blocks a ratio removes: rounded down, but 0.29 of 100 is 29.

    >>> removed_count(0.29, 100)
    29
    """
    return int(ratio * blocks + 1e-6)


def rows_table(mode: Mode, rows: Sequence[PlanRow], skipped: Mapping[str, str]) -> Table:
    """Lines as a table that fits a terminal.

    Args:
        mode: the kind of compression.
        rows: the lines.
        skipped: modules without a target, with the reason.
    """
    lines: list[dict[str, str]] = []
    before: PlanRow | None = None
    for row in rows:
        if before and row.module == before.module and row.reason == f"follows {before.target}":
            lines[-1]["target"] += f", {row.target}"
        else:
            lines.append(_cells(row, mode))
            before = row
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        by_reason[reason].append(name or "(the model itself)")
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append({"target": shown, "action": "nothing", "reason": reason})
    used = [heading for heading in COLUMNS if any(row.get(heading) for row in lines)]
    table = Table(title=f"Plan: {mode}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in used:
        table.add_column(heading, overflow="fold", no_wrap=heading == "action")
    for row in lines:
        table.add_row(*(escape(row.get(heading, "")) for heading in used))
    return table


def settings_of(row: PlanRow, mode: Mode) -> list[str]:
    """What holds for a target, as ``key=value``, without what every target has by default or another column says."""
    known = {**SETTINGS[mode].generic.as_config(), "quant_dtype": None, "lambda": None}
    return [
        f"{key}={value}"
        for key, value in row.setting.items()
        if known.get(key) != value and key not in ("align", "dependency_group_id", "global_group_id")
    ]


def _cells(row: PlanRow, mode: Mode) -> dict[str, str]:
    """A row for the table."""
    count = "" if row.removes is None or row.action == "nothing" else f" {row.removes} of {row.blocks}"
    return {
        "target": f"{row.module}.{row.target}" if row.module else row.target,
        "action": row.action + count,
        "setting": "\n".join(settings_of(row, mode)),
        "group": row.group,
        "reason": row.reason,
    }
