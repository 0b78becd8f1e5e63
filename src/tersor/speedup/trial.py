"""One attempt to make a model small: cut what leaves, in the original classes or as a graph, and compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from tersor.errors import SpeedupError, TersorError, TraceError
from tersor.graph.coupling import Coupling
from tersor.graph.follow import shapes_in
from tersor.graph.inputs import batch_size, caches_of, fresh_inputs, named_tensors
from tersor.graph.rules import CUSTOM_MODULES, Rule
from tersor.graph.trace import concrete_trace
from tersor.speedup.attributes import repair_attributes
from tersor.speedup.folding import Shift, fold
from tersor.speedup.guards import guard_decisions
from tersor.speedup.replace import Customized, Replacements, replace_modules
from tersor.speedup.resize import sizes_from_inputs
from tersor.speedup.rewrite import record_sizes, repair_graph
from tersor.speedup.slicing import Factors, Shapes, Snapshot, bake, cut
from tersor.speedup.small_graph import Repair
from tersor.speedup.verify import first_divergence, module_outputs, outputs_of, relative_error

Check = tuple[Any, list[Tensor]]
"""Inputs, and what the masked model returns for them."""


MANY = 9
"""A batch of more samples than examples have, at which code that decides on the batch size is found out."""


@dataclass(frozen=True)
class Options:
    """What the user asked of a speedup, beside the masks.

    Attributes:
        verify: compare the outputs.
        tolerance: the largest relative difference that is accepted.
        batch_dim: the dimension of the inputs that holds the batch.
        replacers: by module type, before the registered ones.
        graph_module: the user's own graph of the model.
        rules: for labels, by operator or module type, before the registered ones.
    """

    verify: bool
    tolerance: float
    batch_dim: int
    replacers: Customized
    graph_module: fx.GraphModule | None
    rules: Mapping[Any, Rule]


@dataclass
class Small:
    """A model that was made small.

    Attributes:
        model: the model itself, or a graph of it.
        shapes: for each tensor that was cut, its shape before and after.
        error: largest relative difference from the masked model; None where it was not measured.
        attributes: numbers of modules that were made right, before and after.
        repairs: sizes in the graph that were made right, in words.
    """

    model: nn.Module
    shapes: Shapes
    error: float | None
    attributes: Mapping[str, Any]
    repairs: tuple[str, ...]


class Trial:
    """Makes a model small by removing some classes, in the first form that computes what the masked model does.

    The model is cut in place. Where its code holds sizes as numbers, the numbers that are attributes of its modules are
    set; where that is not enough, its graph with rewritten sizes is returned. A trial that fails leaves the model as it
    was and says why in ``cause``.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        removed: np.ndarray,
        masks: Factors,
        shifts: Sequence[Shift],
        options: Options,
    ) -> None:
        """A trial.

        Args:
            model: changed in place by :meth:`run`, where that succeeds.
            coupling: of the model.
            removed: the classes that leave.
            masks: with them the model computes what the small one must.
            shifts: what the removed classes add to biases.
            options: of the user.
        """
        self.model = model
        self.coupling = coupling
        self.removed = removed
        self.masks = masks
        self.shifts = shifts
        self.options = options
        self.tensors = named_tensors(model)
        self.kept = coupling.kept(removed)
        self.cause: Exception | None = None
        self.refused_by = ""
        self.concerned: set[str] = set()  # modules in whose code sizes would have to be other
        self._replaced = Replacements()

    def run(self) -> Small | None:
        """The small model, or None where no form of it is right; the model is whole again then."""
        with Snapshot(self.model) as snapshot:
            if not self.options.verify:
                return Small(self.model, self._cut(), None, {}, ())
            checks = [self._expected(self._other_inputs(), snapshot)]
            given = self.options.graph_module
            own = None if given is None else copy.deepcopy(given.graph)
            try:
                small = self._in_place(checks)
                if small is None:
                    self._restore(snapshot)
                    small = self._repaired(checks, snapshot)
            except SpeedupError as error:  # a replacer cannot take what would be left of its module
                small, self.cause, self.refused_by = None, error, error.where or ""
            if small is None:
                self._restore(snapshot)
                if given is not None and own is not None:
                    given.graph = own
            else:
                for cache in caches_of(self.model):
                    cache.clear()  # what it holds has the old sizes
            return small

    def _cut(self) -> Shapes:
        shapes = cut(self.model, self.tensors, self.kept, self.masks)
        fold(self.model, self.shifts, self.kept)
        self._replaced = replace_modules(self.model, self.kept, self.options.replacers)
        return shapes

    def _restore(self, snapshot: Snapshot) -> None:
        self._replaced.undo()
        snapshot.restore()

    def _other_inputs(self, more: bool = False) -> Any:
        """Fresh inputs at another batch size: a small one where the model takes it."""
        given = batch_size(self.coupling.example_inputs, self.options.batch_dim)
        samples = given + 1 if more or given == 1 else 1
        return fresh_inputs(self.coupling.example_inputs, samples, batch_dim=self.options.batch_dim)

    def _expected(self, inputs: Any, snapshot: Snapshot) -> Check:
        """What the masked model returns."""
        bake(self.tensors, self.masks)
        try:
            return inputs, outputs_of(self.model, inputs)
        except TraceError:  # a batch norm without running statistics refuses a single sample
            inputs = self._other_inputs(more=True)
            return inputs, outputs_of(self.model, inputs)
        finally:
            snapshot.restore()

    def _in_place(self, checks: Sequence[Check]) -> Small | None:
        shapes = self._cut()
        with sizes_from_inputs(self.model):
            error = self._error(self.model, checks)
        return Small(self.model, shapes, error, {}, ()) if self._is_right(error) else None

    def _is_right(self, error: float) -> bool:
        """Whether the model in its own class is right: outputs agree, and so do the sizes inside.

        A view with a number of heads in the code also runs on half the heads, each of two halves; what comes of it may
        differ little on the inputs at hand.
        """
        if error > self.options.tolerance:
            return False
        if self._replaced.names or not (self.removed & self.coupling.coded).any():
            return True
        expected = self.coupling.shapes_without(self.removed)
        found = shapes_in(self.model, self.coupling.run_inputs)
        for wanted, step in zip(expected or (), found, strict=False):
            if wanted != step:
                return wanted[0] != step[0]  # another operator: from here on the two runs cannot be told side by side
        return True

    def _repaired(self, checks: list[Check], snapshot: Snapshot) -> Small | None:
        """With numbers made right, in the modules or else in the graph.

        A graph holds what the code decided on for the example, so a model that decides on values keeps its own class.
        """
        example, options = self.coupling.example_inputs, self.options
        whole = tuple(kind for kind in (*options.rules, *CUSTOM_MODULES) if isinstance(kind, type))
        try:
            graph = options.graph_module or concrete_trace(self.model, example, leaf_types=whole)
            inexact = self.coupling.allow_inexact
            nodes = Coupling(graph, example, allow_inexact=inexact, customized=options.rules, record_nodes=True)
            leaving = nodes.removed(self.coupling.masks_of(self.removed))
            sizes = record_sizes(graph, nodes)
            larger = self._expected(self._other_inputs(more=True), snapshot)
            shapes = self._cut()
            for name in self._replaced.names:
                _put(graph, name, self.model.get_submodule(name))
            with sizes_from_inputs(graph):
                repairs = repair_graph(graph, nodes, leaving, sizes)
            self.concerned = {repair.module for repair in repairs}
        except (TersorError, AttributeError) as error:
            self.cause = error
            return None
        both = [*checks, larger]
        words = tuple(str(repair) for repair in repairs)
        errors: list[float] = []
        attributes = self._by_attributes(repairs, both, errors)
        if attributes is not None:
            return Small(self.model, shapes, errors[-1], attributes, ())
        many = fresh_inputs(example, MANY, batch_dim=self.options.batch_dim)
        if not self._guarded(graph, [sizes.inputs, larger[0], many]):
            return None
        with sizes_from_inputs(graph):
            error = self._error(graph, both)
        return Small(graph, shapes, error, {}, words) if error <= self.options.tolerance else None

    def _guarded(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> bool:
        """Put checks where the graph holds what the code decided; False where it decided on what none can check."""
        try:
            with sizes_from_inputs(graph):
                unchecked = guard_decisions(graph, inputs)
        except TraceError as error:
            self.cause = error
            return False
        if unchecked:
            self.cause = SpeedupError(
                f"sizes stand in the code as numbers, and a graph cannot follow what it decides on: {unchecked}"
            )
        return unchecked is None

    def _by_attributes(
        self, repairs: Sequence[Repair], checks: Sequence[Check], errors: list[float]
    ) -> dict[str, Any] | None:
        """Numbers of modules made right, as ``repair_attributes`` has them; the error of each choice goes to a list."""

        def is_right(model: nn.Module) -> bool:
            with sizes_from_inputs(model):
                errors.append(self._error(model, checks))
                return self._is_right(errors[-1])

        cause = self.cause
        try:
            return repair_attributes(self.model, repairs, is_right)
        finally:
            self.cause = cause

    def _error(self, model: nn.Module, checks: Sequence[Check]) -> float:
        """How far a model's outputs are from the expected ones; infinitely far where it does not run."""
        try:
            return max(relative_error(outputs_of(model, inputs), expected) for inputs, expected in checks)
        except TraceError as error:
            self.cause = error
            return float("inf")

    def divergence(self) -> str:
        """The first module whose output differs when the model is cut in place, in words; the model stays whole."""
        inputs = self._other_inputs()
        with Snapshot(self.model) as snapshot:
            bake(self.tensors, self.masks)
            masked, _ = module_outputs(self.model, inputs)
            snapshot.restore()
            self._cut()
            with sizes_from_inputs(self.model):
                small, _ = module_outputs(self.model, inputs)
            self._restore(snapshot)
        return first_divergence(self.model, self.coupling, self.removed, masked, small, self.options.tolerance)


def _put(graph: nn.Module, name: str, module: nn.Module) -> None:
    """The module that took another's place in the model, in its graph as well."""
    parent, _, child = name.rpartition(".")
    try:
        graph.get_submodule(parent)._modules[child] = module
    except AttributeError:  # the graph does not call it
        return
