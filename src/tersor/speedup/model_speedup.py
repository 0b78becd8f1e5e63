"""Masks in, smaller model out: complete, bake, slice, verify."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import MaskError, SpeedupError, TraceError, VerificationError, WrapError, nearest
from tersor.graph.coupling import Coupling, Masks, coupling_of
from tersor.graph.inputs import batch_size, fresh_inputs, named_tensors
from tersor.graph.trace import concrete_trace
from tersor.speedup.literals import rewrite_sizes
from tersor.speedup.slicing import Snapshot, bake, cut
from tersor.speedup.verify import divergence_error, first_divergence, module_outputs, outputs_of, relative_error
from tersor.storage import load_masks
from tersor.wrapping import is_wrapped
from tersor.wrapping.stack import as_bool, check_shape, compact

GRAPH_RETURNED = (
    "Sizes stand in the code of forward as numbers, so a torch.fx.GraphModule with rewritten sizes is returned. It is "
    "the graph of the model in eval mode: training branches outside torch.nn's modules are not in it. Take the sizes "
    "from tensors (x.flatten(1)) to keep the model's own class."
)

Factors = Mapping[str, Mapping[str, tuple[Tensor, ...]]]
Check = tuple[Any, list[Tensor]]
"""Inputs, and what the masked model returns for them."""


@dataclass(frozen=True)
class LeftAlone:
    """Something that the masks removed and the speedup did not.

    Attributes:
        target: the tensor and its dimension.
        count: how many of its indices are fully masked and yet still there.
        reason: why.
    """

    target: str
    count: int
    reason: str


@dataclass(frozen=True)
class SpeedupReport:
    """What a speedup did.

    Attributes:
        shapes: for each tensor that was cut, its shape before and after.
        left_alone: what the masks removed and the speedup could not; masked values are zero there.
        unused: tensors that the run on the example inputs did not reach; they keep their sizes.
        error: largest difference of the small model's outputs from the masked model's, relative to the largest output;
            None where verification was turned off.
    """

    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    left_alone: tuple[LeftAlone, ...]
    unused: tuple[str, ...]
    error: float | None


class ModelSpeedup:
    """Makes a masked model physically smaller, in place where its code allows.

    The masks are completed over the coupling groups, burnt into the parameters, and what they remove is sliced away.
    The original module classes, parameter objects (``is`` holds), hooks, dtypes, devices and train/eval flags stay.
    Then the small model is run against the masked one on fresh inputs at another batch size. Where it differs because
    sizes stand in the code of ``forward`` as numbers (``x.view(-1, 400)``), a ``torch.fx.GraphModule`` with rewritten
    sizes is returned instead, made of the same modules.

    Args:
        model: the model, unwrapped (``pruner.unwrap_model()``).
        dummy_input: a tensor, a tuple of arguments or a mapping of keyword arguments; or what
            :func:`tersor.graph.groups` found on this very model, which saves a run.
        masks_or_file: ``{module: {target: mask}}`` as ``compress()`` returns them, or the path of a masks file.
        verify: compare the outputs before the small model is handed out.
        tolerance: the largest relative difference that is accepted.
        batch_dim: the dimension of the inputs that holds the batch.

    Raises:
        MaskError: the masks belong to another model, or would empty a layer.
        WrapError: the model is still wrapped.
        SpeedupError: called in inference mode.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> mask = torch.ones(8, 1, dtype=torch.bool)
    >>> mask[3:] = False
    >>> ModelSpeedup(net, torch.randn(2, 4), {"0": {"weight": mask}}).speedup_model()
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_or_file: Masks | str | os.PathLike[str],
        *,
        verify: bool = True,
        tolerance: float = 1e-4,
        batch_dim: int = 0,
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise SpeedupError(
                "parameters that are made in inference mode can never be trained",
                remedy="Call it outside torch.inference_mode().",
            )
        if is_wrapped(model):
            raise WrapError("the model is still wrapped", remedy="Call unwrap_model() of its compressor first.")
        given = load_masks(masks_or_file) if isinstance(masks_or_file, (str, os.PathLike)) else masks_or_file
        self.model = model
        self.dummy_input = dummy_input
        self.masks = _checked(model, given)
        self._simulated_only = tuple(_simulated_only(given))
        self.verify = verify
        self.tolerance = tolerance
        self.batch_dim = batch_dim
        self.report: SpeedupReport | None = None

    def speedup_model(self) -> nn.Module:
        """Make the model small and return it; what happened is then in ``report``.

        Raises:
            VerificationError: the small model computes something else; the model is unchanged.
            EmptyLayerError: a layer would be left without anything; the model is unchanged.
        """
        coupling = coupling_of(self.model, self.dummy_input)
        removed = coupling.removed(self.masks)
        masks, kept = coupling.complete(self.masks, removed), coupling.kept(removed)
        tensors = named_tensors(self.model)
        small, error = self.model, None
        with Snapshot(self.model) as snapshot:
            if not self.verify:
                shapes = cut(self.model, tensors, kept, self.masks)
            else:
                bake(tensors, masks)
                checks = [self._expected(coupling.example_inputs)]
                snapshot.restore()
                shapes = cut(self.model, tensors, kept, self.masks)
                error = _error(small, checks)
                if error > self.tolerance:
                    snapshot.restore()
                    small, error = self._as_graph(coupling, masks, kept, checks, snapshot)
                if error > self.tolerance:
                    raise self._divergence(coupling, removed, masks, snapshot, checks[0][0])
        if small is not self.model:
            warnings.warn(GRAPH_RETURNED, stacklevel=2)
        left_alone = (*_left_alone(coupling, self.masks, removed), *self._simulated_only)
        self.report = SpeedupReport(shapes, left_alone, coupling.unused, error)
        return small

    def _expected(self, example_inputs: Any) -> Check:
        """Fresh inputs at another batch size, a small one where the model takes it, and the masked model's outputs."""
        given = batch_size(example_inputs, self.batch_dim)
        try:
            inputs = fresh_inputs(example_inputs, 1 if given > 1 else 2, batch_dim=self.batch_dim)
            return inputs, outputs_of(self.model, inputs)
        except TraceError:  # a batch norm without running statistics refuses a single sample
            inputs = fresh_inputs(example_inputs, given + 1, batch_dim=self.batch_dim)
            return inputs, outputs_of(self.model, inputs)

    def _as_graph(
        self,
        coupling: Coupling,
        masks: Factors,
        kept: Mapping[str, Mapping[int, Tensor]],
        checks: list[Check],
        snapshot: Snapshot,
    ) -> tuple[nn.Module, float]:
        """The model as a graph with the sizes in its code rewritten, cut, and its error at two batch sizes.

        A graph holds what the code decided on for the example, so a model that decides stays in its own class.
        """
        example = coupling.example_inputs
        graph = concrete_trace(self.model, example)
        if graph.meta["decisions"]:
            cut(self.model, named_tensors(self.model), kept, self.masks)
            return self.model, float("inf")
        nodes = Coupling(graph, example, record_nodes=True)
        rewrite_sizes(graph, nodes, nodes.removed(self.masks))
        larger = fresh_inputs(example, batch_size(example, self.batch_dim) + 1, batch_dim=self.batch_dim)
        tensors = named_tensors(self.model)
        bake(tensors, masks)
        checks = [*checks, (larger, outputs_of(self.model, larger))]
        snapshot.restore()
        cut(self.model, tensors, kept, self.masks)
        return graph, _error(graph, checks)

    def _divergence(
        self, coupling: Coupling, removed: np.ndarray, masks: Factors, snapshot: Snapshot, inputs: Any
    ) -> VerificationError:
        small, cause = module_outputs(self.model, inputs)
        snapshot.restore()
        bake(named_tensors(self.model), masks)
        masked, _ = module_outputs(self.model, inputs)
        return divergence_error(first_divergence(self.model, coupling, removed, masked, small, self.tolerance), cause)


def _error(model: nn.Module, checks: Sequence[Check]) -> float:
    """How far a model's outputs are from the expected ones; infinitely far where it does not run."""
    try:
        return max(relative_error(outputs_of(model, inputs), expected) for inputs, expected in checks)
    except TraceError:
        return float("inf")


def _checked(model: nn.Module, masks: Masks) -> dict[str, dict[str, Tensor]]:
    """Bool masks of parameters, each checked against the model; masks of inputs and outputs cut nothing themselves."""
    tensors = named_tensors(model)
    checked: dict[str, dict[str, Tensor]] = {}
    for module, targets in masks.items():
        for target, mask in targets.items():
            name = f"{module}.{target}" if module else target
            if target.startswith(("_input_", "_output_")):
                continue
            if name not in tensors:
                raise MaskError("the model has no such parameter or buffer", where=name, remedy=nearest(name, tensors))
            tensor = torch.as_tensor(mask)
            check_shape(tensor, tensors[name].shape, name)
            checked.setdefault(module, {})[target] = compact(as_bool(tensor, name))
    return checked


def _simulated_only(masks: Masks) -> Iterator[LeftAlone]:
    """Masks of inputs and outputs, which are not burnt in: what they silence is back where it did not leave."""
    for module, targets in masks.items():
        for target, mask in targets.items():
            if target.startswith(("_input_", "_output_")):
                count = int((~mask.bool()).sum())
                yield LeftAlone(f"{module}.{target}", count, "an input or output has no values to burn a mask into")


def _left_alone(coupling: Coupling, masks: Masks, removed: np.ndarray) -> Iterator[LeftAlone]:
    """Rows that a contraction writes, that the masks silence, and that are still there."""
    silent = coupling.masked(masks) & coupling.written & ~removed[coupling.classes]
    for axis in coupling.axes:
        stays = silent[axis.span]
        if stays.any():
            reason = coupling.frozen_reason(axis.name, axis.dim)
            where = f"{axis.name} dim {axis.dim}"
            yield LeftAlone(where, int(stays.sum()), reason or "other layers that write the same channels keep them")
