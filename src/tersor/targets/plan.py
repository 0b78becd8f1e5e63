"""The plan: what a config list comes to on one model, before anything is touched."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from tersor.config import Granularity, Mode, PruningSpec, parse_config_list
from tersor.config.parse import ConfigList
from tersor.errors import ConfigError, ConflictError, UnmatchedError, nearest
from tersor.graph.coupling import Coupling, coupling_of
from tersor.targets.channels import channel_dims
from tersor.targets.granularity import Blocks, block_of
from tersor.targets.resolve import Resolution, TargetConfig, resolve_targets
from tersor.targets.settings import SETTINGS

OUT_CHANNEL = Granularity(name="out_channel")
ELEMENTS = Granularity(block=(1,))
COLUMNS = ("target", "action", "setting", "group", "reason")


@dataclass(frozen=True, eq=False)
class PlannedTarget:
    """One target, its setting, and what the graph says about it.

    Attributes:
        config: module, target name and spec.
        blocks: how a pruned parameter is cut into blocks; None for inputs, outputs and other modes.
        stays: which blocks cannot leave, bool, one a block; None where all can, or none can.
        why: why those cannot, or why none can; None where all can.
    """

    config: TargetConfig
    blocks: Blocks | None = None
    stays: Tensor | None = None
    why: str | None = None

    @property
    def name(self) -> str:
        """``module.target``."""
        return qualified(self.config)

    @property
    def greatest_ratio(self) -> float:
        """The share of its blocks that may go: ``max_sparse_ratio``, and no more than can leave."""
        asked = getattr(self.config.spec, "max_sparse_ratio", None)
        free = 1.0 if self.stays is None else 1 - float(self.stays.double().mean())
        return free if asked is None else min(asked, free)

    @property
    def frozen(self) -> str | None:
        """Why none of its blocks can leave; None where at least one can."""
        return self.why if self.stays is None else None


@dataclass(frozen=True)
class PlanRow:
    """One line of the plan.

    Attributes:
        module: name.
        type: class name.
        target: name.
        setting: the keys that apply, as a user would write them.
        group: dependency and global group.
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


class Plan:
    """What will happen to a model.

    Attributes:
        mode: the kind of compression.
        targets: every target that the config list selects.
        skipped: modules with parameters that have none, with the reason.
        coupling: what depends on what; None without example inputs.
        rows: the plan, a line for each target.
    """

    def __init__(
        self, mode: Mode, targets: tuple[PlannedTarget, ...], skipped: Mapping[str, str], coupling: Coupling | None
    ) -> None:
        self.mode: Mode = mode
        self.targets = targets
        self.skipped = skipped
        self.coupling = coupling
        # Rows are made now: once the model is wrapped, its modules' class names are parametrizations'.
        mates: dict[object, list[PlannedTarget]] = defaultdict(list)
        for target in targets:
            mates[_dependency(target)].append(target)
        self.rows = tuple(_row(mode, target, mates[_dependency(target)]) for target in targets)

    def table(self) -> Table:
        """The plan as a rich table; modules that are skipped stand below, with the reason.

        What a reader knows already is left out: settings that are everyone's default, types of modules, and lines of
        their own for what follows another target of its module, such as a bias.
        """
        rows: list[dict[str, str]] = []
        before: PlanRow | None = None
        for row in self.rows:
            if before and row.module == before.module and row.reason == f"follows {before.target}":
                rows[-1]["target"] += f", {row.target}"
            else:
                rows.append(_cells(row, self.mode))
                before = row
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.skipped.items():
            by_reason[reason].append(name or "(the model itself)")
        for reason, names in by_reason.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            rows.append({"target": shown, "action": "nothing", "reason": reason})
        used = [heading for heading in COLUMNS if any(row.get(heading) for row in rows)]
        table = Table(title=f"Plan: {self.mode}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for heading in used:
            table.add_column(heading, overflow="fold", no_wrap=heading == "action")
        for row in rows:
            table.add_row(*(escape(row.get(heading, "")) for heading in used))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def explain(self, module: str) -> str:
        """Why a module is in, out or coupled, in words.

        Raises:
            UnmatchedError: the plan does not know the module.
        """
        lines = [
            f"{row.target}: {row.action}" + (f" ({row.reason})" if row.reason else "")
            + (f", {row.removes} of {row.blocks} blocks leave" if row.removes is not None else "")
            + (f", group {row.group}" if row.group else "")
            for row in self.rows
            if row.module == module
        ]  # fmt: skip
        known = {row.module for row in self.rows} | set(self.skipped)
        if module not in known:
            raise UnmatchedError("the plan has no such module", where=module, remedy=nearest(module, known))
        if module in self.skipped:
            lines.append(f"not selected: {self.skipped[module]}")
        lines += self._coupled(module)
        return "\n".join([f"{module or '(the model itself)'}:", *(f"  {line}" for line in lines)])

    def _coupled(self, module: str) -> list[str]:
        if self.coupling is None:
            return ["coupling unknown: give example_inputs to see what depends on it"]
        lines = []
        for axis in self.coupling.axes:
            owners = [name.rpartition(".")[0] for name in axis.names]
            if module not in owners or not (self.coupling.written | self.coupling.read)[axis.span].any():
                continue
            place = f"{axis.name.rpartition('.')[2]} dim {axis.dim}"
            reason = self.coupling.frozen_reason(axis.name, axis.dim)
            if reason:
                lines.append(f"{place} stays: it {reason}")
                continue
            partners = self.coupling.partners(axis.name, axis.dim)
            names = [f"{partner.name} dim {partner.dim}" for partner, _ in partners]
            lines.append(f"{place} lives and dies with {', '.join(names) or 'nothing else'}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {"mode": self.mode, "targets": [asdict(row) for row in self.rows], "skipped": dict(self.skipped)}

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def plan(model: nn.Module, config_list: ConfigList, mode: Mode = "pruning", example_inputs: Any = None) -> Plan:
    """Resolve a config list on a model without touching it.

    Args:
        model: any module.
        config_list: as for a compressor: dicts, or the path of a YAML or JSON file.
        mode: ``pruning``, ``quantization`` or ``distillation``.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments. With them the plan knows what
            depends on what, and what cannot leave.

    Raises:
        ConfigError: one of its subclasses, which names the entry, the value and the remedy.
        TraceError: the model does not run on the example inputs.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(row.module, row.target, row.removes) for row in plan(net, [{"op_names": ["0"], "sparse_ratio": 0.5}]).rows]
    [('0', 'weight', 4), ('0', 'bias', None)]
    """
    coupling = None if example_inputs is None else coupling_of(model, example_inputs)
    return make_plan(model, config_list, mode, coupling)


def make_plan(
    model: nn.Module,
    config_list: ConfigList,
    mode: Mode,
    coupling: Coupling | None,
    default_granularity: Granularity = OUT_CHANNEL,
) -> Plan:
    """As :func:`plan`, with a coupling that is known already and a compressor's own default granularity."""
    resolution: Resolution = resolve_targets(model, parse_config_list(config_list, mode), mode)
    targets = tuple(_planned(target, coupling, default_granularity) for target in resolution.targets)
    return Plan(mode, targets, resolution.skipped, coupling)


def _planned(target: TargetConfig, coupling: Coupling | None, default: Granularity) -> PlannedTarget:
    spec = target.spec
    if not isinstance(spec, PruningSpec) or spec.align is not None:
        return PlannedTarget(target)
    if target.target_name.startswith("_"):
        raise ConflictError(
            "an input or output takes its mask from another target",
            where=f"config_list[{target.entry_index}] on {target.module_name}.{target.target_name}",
            remedy="Set align: {'target_name': 'weight', 'dims': [0]} for it in target_settings.",
        )
    tensor = getattr(target.module, target.target_name)
    granularity = spec.granularity or default
    if granularity.name == "default":
        granularity = default
    out_dim, in_dim = channel_dims(target.module, target.target_name, tensor.dim())
    try:
        blocks = Blocks(tuple(tensor.shape), block_of(granularity, tensor.shape, out_dim=out_dim, in_dim=in_dim))
    except ConfigError as error:
        where = f"config_list[{target.entry_index}]['granularity'] on {qualified(target)}"
        raise type(error)(error.what, where=where, legal=error.legal, remedy=error.remedy) from None
    if blocks.count == 1:
        return PlannedTarget(target, blocks, why="is a single block, and one has to stay")
    if coupling is None or _single_elements(granularity):
        return PlannedTarget(target, blocks)
    return PlannedTarget(target, blocks, *_what_stays(qualified(target), blocks, coupling))


def _single_elements(granularity: Granularity) -> bool:
    return granularity.fill == 1 and set(granularity.block) == {1}


def _what_stays(name: str, blocks: Blocks, coupling: Coupling) -> tuple[Tensor | None, str | None]:
    """Which blocks hold an index that cannot leave, and why; where blocks are whole slices along one dimension."""
    cut = [dim for dim, count in enumerate(blocks.grid) if count > 1]
    classes = coupling.classes_along(name, cut[0]) if len(cut) == 1 else None
    if classes is None:
        return None, None
    frozen = coupling.frozen[classes]
    stays = torch.from_numpy(frozen.reshape(blocks.count, -1).any(1))
    if not stays.any():
        return None, None
    return None if stays.all() else stays, coupling.reasons[int(classes[frozen][0])]


def _dependency(target: PlannedTarget) -> object:
    """What targets that share a mask have in common."""
    return getattr(target.config.spec, "dependency_group_id", None) or target


def _row(mode: Mode, target: PlannedTarget, mates: list[PlannedTarget]) -> PlanRow:
    config, spec = target.config, target.config.spec
    action, removes, reason = {"quantization": "quantize", "distillation": "distil"}.get(mode, "prune"), None, ""
    group = ""
    if isinstance(spec, PruningSpec):
        action, removes, reason = _pruning_action(target, spec, mates)
        group = " ".join(name for name in (spec.dependency_group_id, spec.global_group_id) if name)
    return PlanRow(
        config.module_name,
        type(config.module).__name__,
        config.target_name,
        spec.as_config(),
        group,
        target.blocks.count if target.blocks else None,
        removes,
        action,
        reason,
    )


def _pruning_action(
    target: PlannedTarget, spec: PruningSpec, mates: list[PlannedTarget]
) -> tuple[str, int | None, str]:
    if spec.align is not None:
        source = ".".join(filter(None, (spec.align.module_name, spec.align.target_name)))
        return "align", None, f"follows {source}"
    if target.frozen:
        return "nothing", 0, target.frozen
    keys = (spec.sparse_ratio, spec.sparse_threshold, spec.min_sparse_ratio)
    if keys == (None, None, None) or target.blocks is None:
        return "nothing", 0, "no sparse_ratio or sparse_threshold is set"
    partly = "" if target.stays is None else f"{int(target.stays.sum())} blocks stay: one {target.why}"
    if spec.sparse_threshold is not None or spec.global_group_id is not None:
        return "prune", None, partly
    specs = [mate.config.spec for mate in mates]
    parts = math.lcm(*(s.internal_metric_block or 1 for s in specs if isinstance(s, PruningSpec)))
    lowest = max(s.min_sparse_ratio or 0.0 for s in specs if isinstance(s, PruningSpec))
    ratio = min(max(spec.sparse_ratio or 0.0, lowest), *(mate.greatest_ratio for mate in mates))
    removes = parts * removed_count(ratio, target.blocks.count // parts)
    if not removes:
        return "nothing", 0, partly or f"{ratio:g} of {target.blocks.count // parts} blocks is less than one"
    return "prune", removes, partly


def _cells(row: PlanRow, mode: Mode) -> dict[str, str]:
    """A row for the table."""
    known = {**SETTINGS[mode].generic.as_config(), "quant_dtype": None, "lambda": None}
    setting = [
        f"{key}={value}"
        for key, value in row.setting.items()
        if known.get(key) != value and key not in ("align", "dependency_group_id", "global_group_id")
    ]
    count = "" if row.removes is None or row.action == "nothing" else f" {row.removes} of {row.blocks}"
    return {
        "target": f"{row.module}.{row.target}" if row.module else row.target,
        "action": row.action + count,
        "setting": "\n".join(setting),
        "group": row.group,
        "reason": row.reason,
    }


def qualified(target: TargetConfig) -> str:
    """``module.target``."""
    return f"{target.module_name}.{target.target_name}" if target.module_name else target.target_name


def removed_count(ratio: float, blocks: int) -> int:
    """How many of a number of blocks a ratio removes: rounded down, but 0.29 of 100 is 29.

    >>> removed_count(0.29, 100)
    29
    """
    return int(ratio * blocks + 1e-6)
