"""Coupling: which indices of which parameters live and die together, and what follows when some of them leave."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import EmptyLayerError, InvalidValueError, TraceError
from tersor.graph import export
from tersor.graph.follow import follow
from tersor.graph.inputs import named_tensors
from tersor.graph.labels import Axis
from tersor.graph.members import CouplingGroup, Member
from tersor.graph.movement import support
from tersor.graph.rules import Fields, Labels, Rule, customized_rules

Masks = Mapping[str, Mapping[str, Tensor]]
"""``{module name: {target name: bool tensor}}``, 1 keeps."""


class Coupling:
    """What one run of a model says about its parameters.

    Attributes:
        example_inputs: what the model was run on.
        axes: every dimension of every parameter and buffer with more than one index.
        allow_inexact: whether classes may leave over which a statistic runs (layer norm).
        classes: the class of each label, shape ``(labels,)``.
        reasons: why a class is frozen.
        silenced: classes that leave without harm only because they are zero where they are masked.
        coded: classes whose size the code may hold as a number, so that only a run shows whether they can leave.
        inexact: why removing a class changes the numbers of what stays.
        written: labels that a contraction computes.
        read: labels that a contraction sums over.
        run_inputs: the part of the example inputs that the model was run on.
        unknown: operators without a rule that touched labels.
        unused: tensors that no operator touched: parts of the model that this run did not reach keep their sizes.
        nodes: labels of each node's result, where the model is a GraphModule and they were asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        allow_inexact: bool = False,
        customized: Mapping[Any, Rule] | None = None,
        record_nodes: bool = False,
    ) -> None:
        with customized_rules(customized or {}):
            propagation = follow(model, example_inputs, record_nodes=record_nodes)
        self.example_inputs = example_inputs
        self.allow_inexact = allow_inexact
        self.axes: tuple[Axis, ...] = tuple(propagation.ledger.axes)
        found = propagation.ledger.solve(propagation.live)
        self.classes, self.written, self.read = found.of, found.written, found.read
        self.coded, self.silenced = found.coded, found.silenced
        self.inexact: Mapping[int, str] = found.bent
        self.reasons: Mapping[int, str] = found.reasons if allow_inexact else {**found.bent, **found.reasons}
        self.nodes: Mapping[str, Labels] = {name: self.settled(labels) for name, labels in propagation.outputs}
        self.unknown: Mapping[str, int] = propagation.unknown
        self._steps, self.run_inputs = propagation.steps, propagation.inputs
        self.unused: tuple[str, ...] = propagation.unused
        self._by_name: dict[str, list[Axis]] = {}
        for axis in self.axes:
            for name in axis.names:
                self._by_name.setdefault(name, []).append(axis)

    def settled(self, fields: Fields) -> Labels:
        """One vector of labels a dimension: by now fields over several are constant along all but one."""
        labels: Labels = {}
        for dims, array in fields.items():
            if isinstance(dims, int):
                labels[dims] = array
                continue
            found = support(torch.from_numpy(self.classes[array.numpy()]))
            if found is not None and isinstance(found[0], int):
                labels[dims[found[0]]] = found[1]
        return labels

    def shapes_without(self, removed: np.ndarray) -> list[tuple[str, list[tuple[int, ...]]]] | None:
        """What shapes the operators of a run give when some classes have left; None where that is not known."""
        if self._steps is None:
            return None
        stays = ~removed[self.classes]
        shapes: list[tuple[str, list[tuple[int, ...]]]] = []
        for name, results in self._steps:
            shapes.append((name, []))
            for shape, fields in results:
                left = {dim: int(stays[vector.numpy()].sum()) for dim, vector in self.settled(fields).items()}
                shapes[-1][1].append(tuple(left.get(dim, size) for dim, size in enumerate(shape)))
        return shapes

    @cached_property
    def frozen(self) -> np.ndarray:
        """Which classes may not leave, boolean, indexed by class."""
        flags = np.zeros(len(self.classes), dtype=bool)
        flags[list(self.reasons)] = True
        return flags

    @cached_property
    def axis_numbers(self) -> np.ndarray:
        """Of each label, the number of its axis among :attr:`axes`; -1 for labels of no parameter or buffer."""
        numbers = np.full(len(self.classes), -1)
        for number, axis in enumerate(self.axes):
            numbers[axis.span] = number
        return numbers

    def signatures(self, labels: np.ndarray | None = None) -> np.ndarray:
        """A number for each class: equal for those with equally many labels of each axis, so interchangeable.

        It is the sum of a random mark for each label, one mark an axis. Sums wrap around at 64 bits, and tell classes
        apart as well as if they did not.

        Args:
            labels: those that are counted; None counts all.

        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> coupling = Coupling(net, torch.zeros(1, 4))
        >>> rows, columns = (coupling.signatures()[coupling.classes_along("0.weight", dim)] for dim in (0, 1))
        >>> len(set(rows)), len({*rows, *columns})
        (1, 2)
        """
        marks = np.random.default_rng(0).integers(1, 2**62, size=len(self.axes), dtype=np.int64)
        mark_of = np.append(marks, 0)[self.axis_numbers]
        counted = slice(None) if labels is None else labels
        signatures = np.zeros(len(self.classes), dtype=np.int64)
        np.add.at(signatures, self.classes[counted], mark_of[counted])
        return signatures

    def axis(self, name: str, dim: int) -> Axis | None:
        """One dimension of a named tensor; None for a size of 1 or an unknown name."""
        return next((axis for axis in self._by_name.get(name, ()) if axis.dim == dim), None)

    def classes_along(self, name: str, dim: int) -> np.ndarray | None:
        """The class of each index along one dimension; None for a size of 1 or an unknown name."""
        axis = self.axis(name, dim)
        return None if axis is None else self.classes[axis.span]

    def frozen_reason(self, name: str, dim: int) -> str | None:
        """Why no index along this dimension may leave; None where at least one may."""
        classes = self.classes_along(name, dim)
        if classes is None:
            return "has a single index"
        return self.reasons.get(int(classes[0])) if self.frozen[classes].all() else None

    def partners(self, name: str, dim: int) -> list[tuple[Axis, int]]:
        """Other dimensions that share a class with this one, with the number of indices they share."""
        classes = self.classes_along(name, dim)
        if classes is None:
            return []
        inside = np.zeros(len(self.classes), dtype=bool)
        inside[classes] = True
        shared = ((axis, int(inside[self.classes[axis.span]].sum())) for axis in self.axes)
        return [(axis, count) for axis, count in shared if count and axis is not self.axis(name, dim)]

    @cached_property
    def groups(self) -> tuple[CouplingGroup, ...]:
        """Classes with the same members, as groups, in the order in which the model holds their parameters.

        Dimensions that no contraction writes or reads (kernel positions) are left out.
        """
        return tuple(self._group(roots, reason) for roots, reason in self._group_classes())

    def _group_classes(self) -> list[tuple[list[int], str | None]]:
        """The classes of each group, and why they are frozen."""
        # Members are named once, however many of their indices a class has.
        _, once = np.unique(self.classes * (len(self.axes) + 1) + self.axis_numbers, return_index=True)
        signatures = self.signatures(once)
        used = np.zeros(len(self.classes), dtype=bool)
        used[self.classes[self.written | self.read]] = True
        used[0] = False
        found: dict[tuple[int, str | None], list[int]] = {}
        for root in np.unique(self.classes[used[self.classes]]).tolist():
            found.setdefault((int(signatures[root]), self.reasons.get(root)), []).append(root)
        return [(roots, reason) for (_, reason), roots in found.items()]

    def _group(self, roots: list[int], reason: str | None) -> CouplingGroup:
        inside = np.zeros(len(self.classes), dtype=bool)
        inside[roots] = True
        return CouplingGroup(len(roots), tuple(self._members(inside)), reason)

    def _members(self, inside: np.ndarray) -> Iterator[Member]:
        for axis in self.axes:
            places = np.flatnonzero(inside[self.classes[axis.span]])
            if len(places):
                written, read = self.written[axis.span][places].any(), self.read[axis.span][places].any()
                role = "written" if written else "read" if read else "carried"
                yield Member(axis.name, axis.dim, int(places[0]), len(places), role)

    def removed(self, masks: Masks) -> np.ndarray:
        """Which classes the masks ask to remove, boolean, indexed by class.

        A class leaves when its masks cut it: everything that writes it is masked, or everything that reads it is; and
        only where it is not frozen. Then, and only then, is removing it from every other member the same computation.

        Raises:
            EmptyLayerError: nothing would be left along some dimension.
        """
        masked = self.masked(masks)
        leaves = self._cut_by(self.written, masked) | self._cut_by(self.read, masked)
        leaves &= ~self.frozen
        emptied = [axis for axis, lost in self._losing(leaves) if lost == axis.size]
        if emptied:
            # An axis that the user masked is named rather than one that only follows it.
            axis = next((axis for axis in emptied if (masked & self.written)[axis.span].any()), emptied[0])
            raise EmptyLayerError(
                f"the masks remove all {axis.size} indices of dimension {axis.dim}",
                where=axis.name,
                remedy="Lower sparse_ratio, or set max_sparse_ratio below 1 for this layer.",
            )
        return leaves

    def random_masks(self, ratio: float, seed: int = 0) -> dict[str, dict[str, Tensor]]:
        """Masks that remove a share of the choices of every free group, drawn at random; never all of them.

        Args:
            ratio: the share, from 0 to 1; rounded down to whole choices.
            seed: of the draw.

        Returns:
            ``{module: {target: mask}}`` for the parameters that the groups are written by, or, where there are none,
            for those that read them; masks broadcast along the other dimensions.

        Raises:
            InvalidValueError: the ratio is not between 0 and 1.
        """
        if not 0 <= ratio <= 1:
            raise InvalidValueError(
                f"ratio is {ratio}", where="random_masks", legal=("0 to 1",), remedy="Give the share that is removed."
            )
        generator = np.random.default_rng(seed)
        leaves = np.zeros(len(self.classes), dtype=bool)
        for roots, reason in self._group_classes():
            if reason is None:
                leaves[generator.permutation(roots)[: min(int(ratio * len(roots)), len(roots) - 1)]] = True
        return self.masks_of(leaves)

    def masks_of(self, leaves: np.ndarray) -> dict[str, dict[str, Tensor]]:
        """Masks that remove these classes and nothing else.

        Args:
            leaves: boolean, indexed by class.

        Returns:
            masks of the parameters that write the classes, or, where none does, of those that read them.
        """
        role = self.written.copy()
        is_written = np.bincount(self.classes[role], minlength=len(self.classes)) > 0
        role |= self.read & ~is_written[self.classes]
        masks: dict[str, dict[str, Tensor]] = {}
        for axis in self.axes:
            vector = leaves[self.classes[axis.span]] & role[axis.span]
            if vector.any():
                mask = axis.mask(~vector)
                for name in axis.names:
                    module, _, target = name.rpartition(".")
                    own = masks.setdefault(module, {})
                    own[target] = own.get(target, mask) & mask
        return masks

    def near(self, module: str, removed: np.ndarray) -> np.ndarray:
        """Of the classes that leave, those with a tensor in or below a module."""
        near = np.zeros(len(self.classes), dtype=bool)
        for axis in self.axes:
            if any(name.startswith(f"{module}.") for name in axis.names):
                near[self.classes[axis.span]] = True
        return near & removed

    def _losing(self, removed: np.ndarray) -> list[tuple[Axis, int]]:
        """Axes that lose something, with the number of their indices that leave."""
        if not self.axes:
            return []
        # Axes stand one after the other from label 1 on.
        end = self.axes[-1].span.stop
        lost = np.add.reduceat(removed[self.classes[:end]].astype(np.int64), [axis.start for axis in self.axes])
        return [(self.axes[number], int(lost[number])) for number in np.flatnonzero(lost)]

    def masked(self, masks: Masks) -> np.ndarray:
        """Which labels' slices of their tensors are masked in whole, boolean, indexed by label."""
        masked = np.zeros(len(self.classes), dtype=bool)
        for module, targets in masks.items():
            for target, mask in targets.items():
                for axis in self._by_name.get(f"{module}.{target}" if module else target, ()):
                    if mask.shape[axis.dim] in (1, axis.size):
                        others = [dim for dim in range(mask.dim()) if dim != axis.dim]
                        alive = mask.bool().any(dim=others) if others else mask.bool()
                        masked[axis.span] |= ~alive.cpu().numpy()
        return masked

    def _cut_by(self, role: np.ndarray, masked: np.ndarray) -> np.ndarray:
        """Classes with at least one label in a role, all of which are masked."""
        total = np.bincount(self.classes[role], minlength=len(self.classes))
        cut = np.bincount(self.classes[role & masked], minlength=len(self.classes))
        return (total > 0) & (total == cut)

    def kept(self, removed: np.ndarray) -> dict[str, dict[int, Tensor]]:
        """For each tensor that loses something: dimension to bool vector, True keeps. Each tied name has an entry."""
        kept: dict[str, dict[int, Tensor]] = {}
        for axis, _ in self._losing(removed):
            vector = torch.from_numpy(~removed[self.classes[axis.span]])
            for name in axis.names:
                kept.setdefault(name, {})[axis.dim] = vector
        return kept

    def complete(self, masks: Masks, removed: np.ndarray | None = None) -> dict[str, dict[str, tuple[Tensor, ...]]]:
        """Masks carried over to everything that leaves with what they remove: biases, norms, consumers.

        With completed masks the masked model computes exactly what the small model will: whatever value a removed
        channel still carries (a shift, ``sigmoid(0)``), its consumers' weights for it are masked.

        Args:
            masks: bool masks of parameters, of the parameter's shape or broadcastable to it.
            removed: what :meth:`removed` said of them, where it was asked already.

        Returns:
            for each target its mask as factors: bool tensors that broadcast against the target and whose product is
            the mask. What is carried over is one vector a dimension and takes next to no memory.
        """
        complete: dict[str, dict[str, tuple[Tensor, ...]]] = {
            module: {target: (mask,) for target, mask in targets.items()} for module, targets in masks.items()
        }
        removed = self.removed(masks) if removed is None else removed
        for axis, _ in self._losing(removed):
            if not axis.is_parameter:
                continue
            factor = axis.mask(~removed[self.classes[axis.span]])
            for name in axis.names:
                module, _, target = name.rpartition(".")
                factors = complete.setdefault(module, {})
                known = factors.get(target, ())
                if not any(own.shape == factor.shape and torch.equal(own.cpu(), factor) for own in known):
                    factors[target] = (*known, factor)
        return complete

    def __str__(self) -> str:
        return "\n".join(f"group {number}: {group}" for number, group in enumerate(self.groups))

    def to_dict(self) -> list[dict[str, Any]]:
        """The groups as lists, mappings, strings and numbers."""
        return export.to_dict(self.groups)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The groups as JSON; written to ``path`` as well where one is given."""
        return export.to_json(self.groups, path)

    def to_dot(self, path: str | os.PathLike[str] | None = None) -> str:
        """The groups as a graph for Graphviz (``dot -Tsvg``); written to ``path`` as well where one is given."""
        return export.to_dot(self.groups, path)


def coupling_of(
    model: nn.Module,
    example_inputs: Any,
    *,
    allow_inexact: bool = False,
    customized: Mapping[Any, Rule] | None = None,
) -> Coupling:
    """The coupling of a model: found now, or the one that is given in place of example inputs.

    Raises:
        TraceError: the model does not run on these inputs, or a given coupling is another model's.
    """
    if not isinstance(example_inputs, Coupling):
        return Coupling(model, example_inputs, allow_inexact=allow_inexact, customized=customized)
    tensors = named_tensors(model)
    for axis in example_inputs.axes:
        if axis.name not in tensors or tensors[axis.name].shape[axis.dim] != axis.size:
            raise TraceError(
                "the coupling groups were found on another model, or before this one was made small",
                where=axis.name,
                remedy="Give example inputs, or call tersor.graph.groups(model, example_inputs) again.",
            )
    return example_inputs


def groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    allow_inexact: bool = False,
    customized_mask_updaters: Mapping[Any, Rule] | None = None,
) -> Coupling:
    """Run the model once and find its coupling groups; ``print`` the result to read them.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
        allow_inexact: let classes leave over which a statistic runs (the width of a model with layer norm).
        customized_mask_updaters: rules by operator or module type for this run alone; :func:`propagate` registers one
            for good.

    Raises:
        TraceError: the model does not run on these inputs.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(groups(net, torch.zeros(1, 4)).groups[0])
    8 choices, free
      0.weight dim 0 [0:8] written
      0.bias dim 0 [0:8] carried
      2.weight dim 1 [0:8] read
    """
    return Coupling(model, example_inputs, allow_inexact=allow_inexact, customized=customized_mask_updaters)
