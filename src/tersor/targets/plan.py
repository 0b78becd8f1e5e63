"""The plan: what a config list comes to on one model, before anything is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn

from tersor.config import Entry, Granularity, Mode, parse_config_list
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.errors import ConflictError, UnmatchedError, nearest
from tersor.graph.coupling import Coupling, coupling_of
from tersor.graph.inputs import refuse_lazy
from tersor.targets.activations import Place, values_at
from tersor.targets.fused import FusedGroup, fused_groups
from tersor.targets.planned import OUT_CHANNEL, PlannedTarget, place, plan_target, qualified
from tersor.targets.resolve import TargetConfig, resolve_targets
from tersor.targets.rows import PlanRow, plan_rows, rows_table, settings_of


class Plan:
    """What will happen to a model.

    Attributes:
        mode: the kind of compression.
        targets: every target that the config list selects.
        skipped: modules with parameters that have none, with the reason.
        coupling: what depends on what; None without example inputs.
        entries: the parsed config list.
        fused: what is quantized as if it were one module, by the name of the first.
    """

    def __init__(
        self,
        mode: Mode,
        targets: tuple[PlannedTarget, ...],
        skipped: Mapping[str, str],
        coupling: Coupling | None,
        entries: tuple[Entry, ...] = (),
        fused: Mapping[str, FusedGroup] = MappingProxyType({}),
    ) -> None:
        self.mode: Mode = mode
        self.targets = targets
        self.skipped = skipped
        self.coupling = coupling
        self.entries = entries
        self.fused = fused

    @cached_property
    def rows(self) -> tuple[PlanRow, ...]:
        """The plan, a line for each target."""
        return plan_rows(self.mode, self.targets, self.fused)

    def table(self) -> Table:
        """The plan as a rich table; modules that are skipped stand below, with the reason.

        What a reader knows already is left out: settings that are everyone's default, types of modules, and lines of
        their own for what follows another target of its module, such as a bias.
        """
        return rows_table(self.mode, self.rows, self.skipped)

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
            + ("" if self.mode == "pruning" else "".join(f", {own}" for own in settings_of(row, self.mode)))
            + (f", group {row.group}" if row.group else "")
            for row in self.rows
            if row.module == module
        ]  # fmt: skip
        known = {row.module for row in self.rows} | set(self.skipped)
        if module not in known:
            raise UnmatchedError("the plan has no such module", where=module, remedy=nearest(module, known))
        if module in self.skipped:
            lines.append(f"not selected: {self.skipped[module]}")
        if self.mode == "pruning":
            lines += self._coupled(module)
        return "\n".join([f"{module or '(the model itself)'}:", *(f"  {line}" for line in lines)])

    def _coupled(self, module: str) -> list[str]:
        if self.coupling is None:
            return ["coupling unknown: give example_inputs to see what depends on it"]
        coupling, lines, told = self.coupling, [], set()
        used = np.zeros(len(coupling.classes), dtype=bool)
        used[coupling.classes[coupling.written | coupling.read]] = True  # the others are kernel positions
        for axis in coupling.axes:
            classes = coupling.classes[axis.span]
            owners = [name.rpartition(".")[0] for name in axis.names]
            if module not in owners or not used[classes].any() or classes.tobytes() in told:
                continue
            told.add(classes.tobytes())
            place = f"{axis.name.rpartition('.')[2]} dim {axis.dim}"
            reason = coupling.frozen_reason(axis.name, axis.dim)
            if reason:
                lines.append(f"{place} stays: it {reason}")
                continue
            names = [f"{partner.name} dim {partner.dim}" for partner, _ in coupling.partners(axis.name, axis.dim)]
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
    default_balance: Granularity | None = None,
) -> Plan:
    """As :func:`plan`, with a coupling that is known already and a compressor's own defaults."""
    refuse_lazy(model)
    entries = tuple(parse_config_list(config_list, mode))
    resolution = resolve_targets(model, entries, mode)
    shapes = _activation_shapes(model, resolution.targets, coupling) if mode == "pruning" else {}
    fused = fused_groups(model, entries, resolution.targets)
    members = {name: f"fused into {group.head!r}" for group in fused.values() for name in group.names[1:]}
    targets = tuple(
        plan_target(target, coupling, default_granularity, balance=default_balance, shape=shapes.get(place(target)))
        for target in resolution.targets
        if target.module_name not in members
    )
    return Plan(mode, targets, {**resolution.skipped, **members}, coupling, entries, fused)


def _activation_shapes(
    model: nn.Module, targets: Iterable[TargetConfig], coupling: Coupling | None
) -> dict[Place, torch.Size]:
    """The shapes of the inputs and outputs that a pruner decides on; the model is run for them where there are any."""
    deciding = {
        place(target): target
        for target in targets
        if is_activation(target.target_name) and getattr(target.spec, "align", None) is None
    }
    if not deciding or coupling is None:
        return {}
    found = values_at(model, coupling.example_inputs, deciding)
    for where, value in found.items():
        if not value.is_floating_point():
            raise ConflictError(
                f"its values are {value.dtype}, whose size says nothing of what they are worth",
                where=f"{deciding[where].where} on {qualified(deciding[where])}",
                remedy="Leave it out, or take the mask from another target: set align in target_settings.",
            )
    return {where: value.shape for where, value in found.items()}
