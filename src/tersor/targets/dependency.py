"""Dependency groups set by the graph: targets whose output channels must be the same share one mask."""

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
from tersor.targets.planned import qualified
from tersor.targets.resolve import TargetConfig, resolve_targets

BY_CHANNEL = ("default", "out_channel")


def auto_set_dependency_group_ids(model: nn.Module, config_list: ConfigList, dummy_input: Any) -> list[Any]:
    """Find which selected targets must share a mask, and say so in a new config list.

    Targets whose output channels are added, multiplied or normalized together get one ``dependency_group_id``; where
    channels can only leave in runs (the groups of a convolution), they get that run as their ``granularity``.

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
    sequences: dict[bytes, list[TargetConfig]] = {}
    for target in resolve_targets(model, entries, "pruning").targets:
        classes = _output_classes(target, coupling)
        if classes is not None:
            sequences.setdefault(classes.tobytes(), []).append(target)
    grouped: list[dict[str, Any]] = []
    groups = 0
    for classes, targets in sequences.items():
        run = _run_length(classes)
        if len(targets) > 1:
            grouped += _entries(targets, f"dependency_{groups}", run)
            groups += 1
        elif run > 1:
            grouped += _entries(targets, None, run)
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


def _run_length(classes: bytes) -> int:
    """How many consecutive channels share a class, where all runs are equally long; else 1."""
    values = np.frombuffer(classes, dtype=np.int64)
    lengths = np.diff(np.flatnonzero(np.diff(values, prepend=-1, append=-1)))
    return int(lengths[0]) if len(lengths) > 1 and (lengths == lengths[0]).all() else 1


def _entries(targets: list[TargetConfig], group: str | None, run: int) -> list[dict[str, Any]]:
    """The targets' own settings with the group, one entry for those that have the same."""
    entries: list[dict[str, Any]] = []
    for target in targets:
        setting = {"target_names": [target.target_name], **target.spec.as_config()}
        if group is not None:
            setting["dependency_group_id"] = group
        if run > 1:
            setting["granularity"] = [[run], "back", -1]
        same = next((entry for entry in entries if {**entry, "op_names": []} == {"op_names": [], **setting}), None)
        if same is None:
            same = {"op_names": [], **setting}
            entries.append(same)
        same["op_names"].append(target.module_name)
    return entries
