"""Global groups set by the graph: what is built alike is ranked together, and nothing else."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import count
from typing import Any

import numpy as np
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from tersor.config.files import read_config_file
from tersor.config.parse import ConfigList
from tersor.graph.coupling import Coupling, coupling_of
from tersor.graph.labels import Axis
from tersor.targets.choices import Choices, choices, connected
from tersor.targets.plan import make_plan
from tersor.targets.planned import PlannedTarget


def auto_set_isomorphic_group_ids(model: nn.Module, config_list: ConfigList, dummy_input: Any) -> list[Any]:
    """Find which selected targets are parts of isomorphic structures, and let each kind share one ratio.

    A global group ranks scores across layers. That is fair only between likes: the heads of attention, the hidden
    channels of its MLP and a residual stream have other numbers of parameters and other scales, so that one ranking of
    all would empty one kind first. Here targets get one ``global_group_id`` where what leaves with one of their
    channels is the same structure, whatever its width, and their ``sparse_ratio`` is the same. That ratio then holds
    for the kind as a whole, spread over its layers as the scores demand.

    The paper compares graphs: the slices that leave together are nodes, dependencies are edges. Compared here are the
    multisets of nodes: type of module, name of the parameter, dimension, in how many runs a choice lies along it and
    whether these are longer than one index, whether it writes, reads or is carried, kernel size, and whether the
    module works in groups. Graphs that are isomorphic with these labels always agree; those that hold the same layers
    in another order agree too, and are taken for isomorphic.

    Call :func:`auto_set_dependency_group_ids` first, so that what is added is one structure; its groups are kept. So
    are global groups that were set before. Targets with a threshold, and those that nothing else is built like, stay
    as they are. Scores should not depend on the width: :class:`tersor.pruning.GroupNormPruner` divides by their mean,
    and ``global_normalize: mean`` does so for any pruner.

    Paper: Fang, Ma, Bi, Wang: Isomorphic Pruning for Vision Models (ECCV 2024).

    Args:
        model: any module; it is left as it was.
        config_list: a pruning config list; the caller's own stays as it is.
        dummy_input: a tensor, a tuple of arguments or a mapping of keyword arguments; or what
            :func:`tersor.graph.groups` found on this very model, which saves a run.

    Returns:
        a config list that says the same and, behind it, entries for the targets that have their like.

    Raises:
        ConfigError: the config list is wrong.
        TraceError: the model does not run on ``dummy_input``.

    Example:
        Two hidden layers of different width: each is written by one linear layer and read by the next.

        >>> import torch
        >>> net = nn.Sequential(*(nn.Linear(*sizes) for sizes in [(4, 8), (8, 6), (6, 2)]))
        >>> config_list = [{"op_names": ["0", "1"], "sparse_ratio": 0.5}]
        >>> entry = auto_set_isomorphic_group_ids(net, config_list, torch.zeros(1, 4))[-1]
        >>> entry["op_names"], entry["global_group_id"]
        (['0', '1'], 'isomorphic_0')
    """
    coupling = coupling_of(model, dummy_input)
    targets = make_plan(model, config_list, "pruning", coupling).targets
    kinds: dict[Hashable, list[list[PlannedTarget]]] = {}
    for unit, sets in _units(choices(targets)):
        ratio = _shared_ratio(unit)
        if ratio is not None:
            structure = Counter(_structure(parts, coupling, model) for parts in sets)
            kinds.setdefault((frozenset(structure.items()), ratio), []).append(unit)
    taken = {_given(target) for target in targets}
    names = (name for number in count() if (name := f"isomorphic_{number}") not in taken)
    grouped: dict[str, dict[str, Any]] = {}
    for units in kinds.values():
        if len(units) > 1:
            name = next(names)
            for target in sorted((target for unit in units for target in unit), key=targets.index):
                _add(grouped, target, name)
    given = read_config_file(config_list) if isinstance(config_list, (str, os.PathLike)) else config_list
    return [*given, *grouped.values()]


def _units(sets: Sequence[Choices]) -> list[tuple[list[PlannedTarget], list[Choices]]]:
    """Targets that must be in one global group, because they have a set of choices in common, with all their sets."""
    sets_of: dict[PlannedTarget, list[int]] = {}
    for number, parts in enumerate(sets):
        for part in parts:
            sets_of.setdefault(part.target, []).append(number)
    targets = list(sets_of)
    units = [[targets[index] for index in unit] for unit in connected([np.array(own) for own in sets_of.values()])]
    return [(unit, [sets[number] for number in sorted({n for t in unit for n in sets_of[t]})]) for unit in units]


def _shared_ratio(unit: Sequence[PlannedTarget]) -> float | None:
    """The ratio of a unit that may get a group; None where it has one, has no ratio, or is not cut by channels."""
    settings = {(getattr(target.config.spec, "ratio", None), _given(target)) for target in unit}
    ratio, given = settings.pop()
    eligible = not settings and given is None and all(target.classes is not None for target in unit)
    return ratio if eligible else None


def _given(target: PlannedTarget) -> str | None:
    """The global group that a target has already."""
    return getattr(target.config.spec, "global_group_id", None)


def _structure(parts: Choices, coupling: Coupling, model: nn.Module) -> Hashable:
    """What leaves with one of a set of interchangeable choices, widths left out."""
    inside = np.zeros(len(coupling.classes), dtype=bool)
    for part in parts:
        assert part.target.classes is not None
        inside[part.target.classes[0 if part.blocks is None else part.blocks[0]]] = True
    nodes = Counter(
        _node(axis, places, coupling, model)
        for axis in coupling.axes
        if len(places := np.flatnonzero(inside[coupling.classes[axis.span]]))
    )
    return frozenset(nodes.items())


def _node(axis: Axis, places: np.ndarray, coupling: Coupling, model: nn.Module) -> Hashable:
    """What one dimension of one tensor is in a structure."""
    owner, _, name = axis.name.rpartition(".")
    module: Any = model.get_submodule(owner)
    written, read = coupling.written[axis.span][places].any(), coupling.read[axis.span][places].any()
    role = "written" if written else "read" if read else "carried"
    runs = 1 + int((np.diff(places) > 1).sum())  # three in a fused projection, where the rows of each head are runs
    works = str(getattr(module, "kernel_size", "")), getattr(module, "groups", 1) != 1
    return type_before_parametrizations(module), name, axis.dim, role, runs, len(places) > runs, *works


def _add(entries: dict[str, dict[str, Any]], target: PlannedTarget, group: str) -> None:
    """Give a target its own settings with the group, in one entry for all that have the same."""
    settings = {
        "target_names": [target.config.target_name],
        **target.config.spec.as_config(),
        "global_group_id": group,
    }
    entry = entries.setdefault(repr(settings), {"op_names": [], **settings})
    entry["op_names"].append(target.config.module_name)
