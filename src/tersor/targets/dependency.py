"""Dependency groups set by the graph: targets whose output channels leave together are decided together."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import nn

from tersor.config import PruningSpec, parse_config_list
from tersor.config.files import read_config_file
from tersor.config.parse import ConfigList
from tersor.graph.coupling import Coupling, coupling_of
from tersor.targets.channels import channel_dims
from tersor.targets.choices import connected
from tersor.targets.planned import qualified
from tersor.targets.resolve import TargetConfig, resolve_targets

BY_CHANNEL = ("default", "out_channel")


def auto_set_dependency_group_ids(model: nn.Module, config_list: ConfigList, dummy_input: Any) -> list[Any]:
    """Find which selected targets must be decided together, and say so in a new config list.

    Targets get one ``dependency_group_id`` where some of their output channels leave together: they are added,
    multiplied or normalized together, joined along the channels with what is, or belong to one attention head. Where
    channels can only leave in runs (heads, the groups of a convolution), they get that run as their ``granularity``.

    Give the pruner example inputs too: what such targets have in common may come in another order or more often in one
    than in the other (grouped-query attention), and only the graph knows which channels are meant.

    Args:
        model: any module; it is left as it was.
        config_list: a pruning config list; the caller's own stays as it is.
        dummy_input: a tensor, a tuple of arguments or a mapping of keyword arguments; or what
            :func:`tersor.graph.groups` found on this very model, which saves a run.

    Returns:
        a config list that says the same and, behind it, entries for the targets that have a partner or a run.

    Raises:
        ConfigError: the config list is wrong.
        TraceError: the model does not run on ``dummy_input``.
    """
    entries = parse_config_list(config_list, "pruning")
    coupling = coupling_of(model, dummy_input)
    targets = [
        (target, classes)
        for target in resolve_targets(model, entries, "pruning").targets
        if (classes := _output_classes(target, coupling)) is not None
    ]
    grouped: list[dict[str, Any]] = []
    groups = 0
    for numbers in connected([_linking(classes, coupling) for _, classes in targets]):
        members = [targets[number] for number in numbers]
        if len(members) > 1:
            grouped += _entries(members, f"dependency_{groups}")
            groups += 1
        elif _run_length(members[0][1]) > 1:
            grouped += _entries(members, None)
    given = read_config_file(config_list) if isinstance(config_list, (str, os.PathLike)) else config_list
    return [*given, *grouped]


def _output_classes(target: TargetConfig, coupling: Coupling) -> np.ndarray | None:
    """The class of each output channel of a parameter that is pruned by output channels; None for all others."""
    spec = target.spec
    if not isinstance(spec, PruningSpec) or spec.align is not None or target.target_name.startswith("_"):
        return None
    if spec.granularity is not None and spec.granularity.name not in BY_CHANNEL:
        return None
    out_dim, _ = channel_dims(target.module, target.target_name, getattr(target.module, target.target_name).dim())
    return None if out_dim is None else coupling.classes_along(qualified(target), out_dim)


def _linking(classes: np.ndarray, coupling: Coupling) -> np.ndarray:
    """The classes that can leave; where none can, all: another coupling of the model may let them (layer norm)."""
    free = classes[~coupling.frozen[classes]]
    return free if len(free) else classes


def _run_length(classes: np.ndarray) -> int:
    """How many consecutive channels share a class, where all runs are equally long; else 1."""
    lengths = np.diff(np.flatnonzero(np.diff(classes, prepend=-1, append=-1)))
    return int(lengths[0]) if len(lengths) > 1 and (lengths == lengths[0]).all() else 1


def _entries(targets: list[tuple[TargetConfig, np.ndarray]], group: str | None) -> list[dict[str, Any]]:
    """The targets' own settings with the group, one entry for those that have the same."""
    entries: list[dict[str, Any]] = []
    for target, classes in targets:
        setting = {"target_names": [target.target_name], **target.spec.as_config()}
        if group is not None:
            setting["dependency_group_id"] = group
        if (run := _run_length(classes)) > 1:
            setting["granularity"] = [[run], "back", -1]
        same = next((entry for entry in entries if {**entry, "op_names": []} == {"op_names": [], **setting}), None)
        if same is None:
            same = {"op_names": [], **setting}
            entries.append(same)
        same["op_names"].append(target.module_name)
    return entries
