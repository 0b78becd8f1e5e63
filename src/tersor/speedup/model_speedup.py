"""Masks in, smaller model out: complete, cut, make sizes right, verify."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from tersor.errors import InvalidValueError, MaskError, SpeedupError, WrapError, nearest
from tersor.graph.coupling import Coupling, Masks, coupling_of
from tersor.graph.inputs import named_tensors
from tersor.graph.rules import Rule
from tersor.speedup.folding import Constants, find_constants
from tersor.speedup.replace import Customized
from tersor.speedup.rounding import round_up_kept
from tersor.speedup.trial import Options, Small, Trial
from tersor.speedup.verify import divergence_error
from tersor.storage import load_masks
from tersor.wrapping import is_wrapped, refuse_sharded
from tersor.wrapping.stack import as_bool, check_shape, compact

GRAPH_RETURNED = (
    "Sizes stand in the code of forward as numbers, so a torch.fx.GraphModule with rewritten sizes is returned. It is "
    "the graph of the model in eval mode: training branches outside torch.nn's modules are not in it. Take the sizes "
    "from tensors (x.flatten(1)) to keep the model's own class."
)
ROUNDED = "is kept so that a multiple of round_to is left"
UNVERIFIED = "has a size that may stand in the code as a number, which only verify=True finds out"
RETRIES = 4
"""How often classes are given back, where no form of the small model computes what the masked one does."""


@dataclass(frozen=True)
class LeftAlone:
    """Indices of a tensor's dimension of which a reader of the report should know.

    Attributes:
        target: the tensor and its dimension.
        count: how many of its indices are concerned: fully masked and yet still there, or gone although not exact.
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
        inexact: what was removed although a statistic runs over it (``allow_inexact``), with the reason; there the
            small model's numbers differ from the masked one's.
        attributes: numbers that modules keep beside their tensors and that were made right, before and after.
        not_folded: channels whose constants could not be folded (``constants="fold"``) and were masked, and why.
        kept: for each tensor that was cut, dimension to bool vector, True where the index stayed: what belongs to the
            tensor and lives elsewhere (scales, importances) is cut along with it.
        repairs: sizes in the code that were made right in the returned graph; empty where the model kept its class.
        error: largest difference of the small model's outputs from the masked model's, relative to the largest output;
            None where verification was turned off.
    """

    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    left_alone: tuple[LeftAlone, ...]
    unused: tuple[str, ...]
    error: float | None
    inexact: tuple[LeftAlone, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()
    not_folded: tuple[LeftAlone, ...] = ()
    kept: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)


class ModelSpeedup:
    """Makes a masked model physically smaller, in place where its code allows.

    The masks are completed over the coupling groups, burnt into the parameters, and what they remove is sliced away.
    The original module classes, parameter objects (``is`` holds), hooks, dtypes, devices and train/eval flags stay.
    Then the small model is run against the masked one on fresh inputs at another batch size. Where sizes stand in the
    code as numbers, those that are attributes of modules (``num_heads``) are set; where numbers in ``forward`` itself
    are wrong (``x.view(-1, 400)``), a ``torch.fx.GraphModule`` with rewritten sizes is returned, made of the same
    modules. Where that does not do either, the groups concerned are left alone and reported.

    Args:
        model: the model, unwrapped (``pruner.unwrap_model()``).
        dummy_input: a tensor, a tuple of arguments or a mapping of keyword arguments; or what
            :func:`tersor.graph.groups` found on this very model, which saves a run.
        masks_or_file: ``{module: {target: mask}}`` as ``compress()`` returns them, or the path of a masks file.
        verify: compare the outputs before the small model is handed out.
        tolerance: the largest relative difference that is accepted.
        batch_dim: the dimension of the inputs that holds the batch.
        allow_inexact: also remove what a statistic runs over (the width of a model with layer norm). The small model
            then computes other numbers than the masked one and has to be fine-tuned: it is only checked to run at its
            new sizes, ``report.error`` says how far it is off, and ``report.inexact`` why.
        round_to: leave this many channels, or heads, or a multiple: what is asked for beyond it stays, silent.
        constants: what becomes of the constant that a masked channel still carries where only weights are masked
            (its bias, the shift of its norm): ``mask`` silences it, as the simulation of a pruner does; ``fold`` moves
            it into the bias of the layers that read it, where that is exact, so that the small model computes what the
            model with nothing but the given masks does.
        customized_mask_updaters: rules by operator or module type, as :func:`tersor.graph.propagate` takes them, for
            this speedup alone.
        customized_replacers: replacers by module type, as :func:`tersor.speedup.replace` takes them, for this speedup
            alone.
        graph_module: a graph of the model to rewrite where sizes stand in the code, in place of one that is traced.

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
        allow_inexact: bool = False,
        round_to: int = 1,
        constants: Literal["mask", "fold"] = "mask",
        customized_mask_updaters: Mapping[Any, Rule] | None = None,
        customized_replacers: Customized = (),
        graph_module: fx.GraphModule | None = None,
    ) -> None:
        if torch.is_inference_mode_enabled():
            raise SpeedupError(
                "parameters that are made in inference mode can never be trained",
                remedy="Call it outside torch.inference_mode().",
            )
        refuse_sharded(model)
        if is_wrapped(model):
            raise WrapError("the model is still wrapped", remedy="Call unwrap_model() of its compressor first.")
        given = load_masks(masks_or_file) if isinstance(masks_or_file, (str, os.PathLike)) else masks_or_file
        self.model = model
        self.dummy_input = dummy_input
        self.masks = _checked(model, given)
        self._simulated_only = tuple(_simulated_only(given))
        if constants not in ("mask", "fold"):
            raise InvalidValueError(f"constants is {constants!r}", where="ModelSpeedup", legal=("mask", "fold"))
        self.allow_inexact = allow_inexact
        self.round_to = round_to
        self.constants = constants
        self.customized_mask_updaters = dict(customized_mask_updaters or {})
        rules = self.customized_mask_updaters
        self.options = Options(verify, tolerance, batch_dim, customized_replacers, graph_module, rules)
        self.report: SpeedupReport | None = None

    def speedup_model(self) -> nn.Module:
        """Make the model small and return it; what happened is then in ``report``.

        Raises:
            VerificationError: the small model computes something else; the model is unchanged.
            EmptyLayerError: a layer would be left without anything; the model is unchanged.
        """
        coupling = coupling_of(
            self.model, self.dummy_input, allow_inexact=self.allow_inexact, customized=self.customized_mask_updaters
        )
        asked = coupling.removed(self.masks)
        constants = self._constants(coupling, asked)
        # What is given back keeps what was asked for: it stays, silent.
        masks = coupling.complete(self.masks, asked if constants is None else constants.masked)
        shifts = () if constants is None else constants.shifts
        removed = round_up_kept(coupling, asked, self.round_to)
        rounded = np.flatnonzero(asked & ~removed).tolist()
        refused: dict[int, str] = dict.fromkeys(rounded, ROUNDED)
        if not self.options.verify:
            unsure = removed & coupling.coded
            refused.update(dict.fromkeys(np.flatnonzero(unsure).tolist(), UNVERIFIED))
            removed &= ~unsure
        retries = 0
        while True:
            options = self.options
            if any(removed[c] for c in coupling.inexact):  # other numbers are asked for; still, it has to run
                options = replace(options, tolerance=sys.float_info.max)
            trial = Trial(self.model, coupling, removed, masks, shifts, options)
            small = trial.run()
            if small is not None:
                return self._report(coupling, removed, small, refused, constants)
            where = trial.refused_by or trial.divergence()
            given_back = self._concerned(coupling, removed, trial.concerned or {where.partition(" ")[0]})
            if retries == RETRIES or not (removed & ~given_back).any():
                raise divergence_error(where, str(trial.cause or ""))  # to do nothing at all is an error
            reason = f"is a size in the code of {where} that could not be made right"
            refused.update(dict.fromkeys(np.flatnonzero(given_back).tolist(), reason))
            removed = removed & ~given_back
            retries += 1

    def _concerned(self, coupling: Coupling, removed: np.ndarray, names: set[str]) -> np.ndarray:
        """The classes that leave from the named modules or from others of their types, torch's own excepted."""
        modules = dict(self.model.named_modules())
        kinds = {type(modules[name]) for name in names if name in modules}
        kinds = {kind for kind in kinds if not kind.__module__.startswith("torch.nn")}
        names = names | {name for name, module in modules.items() if type(module) in kinds}
        near = [coupling.near(name, removed) for name in names if name]
        found = np.logical_or.reduce(near) if near else np.zeros_like(removed)
        return found if found.any() else removed.copy()

    def _constants(self, coupling: Coupling, removed: np.ndarray) -> Constants | None:
        if self.constants == "mask":
            return None
        never, batch_dim = coupling.silenced, self.options.batch_dim
        return find_constants(self.model, coupling, self.masks, removed, never=never, batch_dim=batch_dim)

    def _report(
        self,
        coupling: Coupling,
        removed: np.ndarray,
        small: Small,
        refused: Mapping[int, str],
        constants: Constants | None,
    ) -> nn.Module:
        if small.model is not self.model:
            warnings.warn(GRAPH_RETURNED, stacklevel=3)
        reasons = sorted(set(refused.values()) - {UNVERIFIED, ROUNDED})
        if reasons:
            warnings.warn(f"Left alone, for each {'; '.join(reasons)} (see report.left_alone).", stacklevel=3)
        left_alone = (*_left_alone(coupling, self.masks, removed, refused), *self._simulated_only)
        self.report = SpeedupReport(
            small.shapes,
            left_alone,
            coupling.unused,
            small.error,
            tuple(_inexact(coupling, removed)),
            small.attributes,
            small.repairs,
            () if constants is None else tuple(LeftAlone(n.target, n.count, n.reason) for n in constants.not_folded),
            coupling.kept(removed),
        )
        return small.model


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


def _left_alone(
    coupling: Coupling, masks: Masks, removed: np.ndarray, refused: Mapping[int, str]
) -> Iterator[LeftAlone]:
    """Rows that a contraction writes, that the masks silence, and that are still there."""
    silent = coupling.masked(masks) & coupling.written & ~removed[coupling.classes]
    for axis in coupling.axes:
        stays = silent[axis.span]
        if stays.any():
            refusal = next((refused[c] for c in coupling.classes[axis.span][stays].tolist() if c in refused), None)
            reason = refusal or coupling.frozen_reason(axis.name, axis.dim)
            where = f"{axis.name} dim {axis.dim}"
            yield LeftAlone(where, int(stays.sum()), reason or "other layers that write the same channels keep them")


def _inexact(coupling: Coupling, removed: np.ndarray) -> Iterator[LeftAlone]:
    """Rows that left although a statistic runs over them."""
    for axis in coupling.axes:
        left = [c for c in coupling.classes[axis.span].tolist() if removed[c] and c in coupling.inexact]
        if left and coupling.written[axis.span].any():
            yield LeftAlone(f"{axis.name} dim {axis.dim}", len(left), coupling.inexact[left[0]])
