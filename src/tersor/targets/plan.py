"""The plan: what a config list comes to on one model, before anything is touched."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import nn

from tersor.config import Granularity, Mode, PruningSpec, parse_config_list
from tersor.config.parse import ConfigList
from tersor.errors import ConfigError, ConflictError, UnmatchedError, nearest
from tersor.graph.coupling import Coupling, coupling_of
from tersor.targets.channels import channel_dims
from tersor.targets.granularity import Blocks, block_of
from tersor.targets.resolve import Resolution, TargetConfig, resolve_targets

OUT_CHANNEL = Granularity(name="out_channel")


@dataclass(frozen=True)
class PlannedTarget:
    """One target, its setting, and what the graph says about it.

    Attributes:
        config: module, target name and spec.
        blocks: how a pruned parameter is cut into blocks; None for inputs, outputs and other modes.
        frozen: why its blocks cannot leave; None where they can.
    """

    config: TargetConfig
    blocks: Blocks | None = None
    frozen: str | None = None

    @property
    def name(self) -> str:
        """``module.target``."""
        return (
            f"{self.config.module_name}.{self.config.target_name}"
            if self.config.module_name
            else (self.config.target_name)
        )

    @property
    def cut_dim(self) -> int | None:
        """The one dimension along which whole slices live or die; None for finer granularities."""
        if self.blocks is None:
            return None
        cut = [dim for dim, count in enumerate(self.blocks.grid) if count > 1]
        return cut[0] if len(cut) == 1 and self.blocks.count == self.blocks.grid[cut[0]] else None


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
        self.rows = tuple(_row(mode, target) for target in targets)

    def table(self) -> Table:
        """The plan as a rich table; modules that are skipped stand below, with the reason."""
        table = Table(title=f"Plan: {self.mode}", title_justify="left")
        for heading in ("module", "type", "target", "action", "blocks", "removes", "group", "setting", "reason"):
            table.add_column(heading, justify="right" if heading in ("blocks", "removes") else "left", overflow="fold")
        for row in self.rows:
            setting = ", ".join(f"{key}={value}" for key, value in row.setting.items())
            counts = ["" if count is None else str(count) for count in (row.blocks, row.removes)]
            table.add_row(row.module, row.type, row.target, row.action, *counts, row.group, setting, row.reason)
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.skipped.items():
            by_reason[reason].append(name or "(the model itself)")
        for reason, names in by_reason.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            table.add_row(shown, "", "", "nothing", "", "", "", "", reason)
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
        where = f"config_list[{target.entry_index}]['granularity'] on {target.module_name}.{target.target_name}"
        raise type(error)(error.what, where=where, legal=error.legal, remedy=error.remedy) from None
    planned = PlannedTarget(target, blocks)
    if coupling is not None and planned.cut_dim is not None:
        frozen = coupling.frozen_reason(planned.name, planned.cut_dim)
        return PlannedTarget(target, blocks, frozen)
    return planned


def _row(mode: Mode, target: PlannedTarget) -> PlanRow:
    config, spec = target.config, target.config.spec
    action, removes, reason = {"quantization": "quantize", "distillation": "distil"}.get(mode, "prune"), None, ""
    group = ""
    if isinstance(spec, PruningSpec):
        action, removes, reason = _pruning_action(target, spec)
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


def _pruning_action(target: PlannedTarget, spec: PruningSpec) -> tuple[str, int | None, str]:
    if spec.align is not None:
        source = ".".join(filter(None, (spec.align.module_name, spec.align.target_name)))
        return "align", None, f"follows {source}"
    if target.frozen:
        return "nothing", 0, target.frozen
    if spec.sparse_ratio is None and spec.sparse_threshold is None and spec.min_sparse_ratio is None:
        return "nothing", 0, "no sparse_ratio or sparse_threshold is set"
    if spec.sparse_ratio is None or spec.global_group_id is not None or target.blocks is None:
        return "prune", None, ""
    low, high = spec.min_sparse_ratio or 0.0, 1.0 if spec.max_sparse_ratio is None else spec.max_sparse_ratio
    return "prune", removed_count(min(max(spec.sparse_ratio, low), high), target.blocks.count), ""


def removed_count(ratio: float, blocks: int) -> int:
    """How many of a number of blocks a ratio removes: rounded down, but 0.29 of 100 is 29.

    >>> removed_count(0.29, 100)
    29
    """
    return int(ratio * blocks + 1e-6)
