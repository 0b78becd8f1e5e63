"""From a compressed model to a program: its graph in torch's operators, with stored numbers in place of weights."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tersor.analysis.batches import batch_size_of, with_batch_size
from tersor.config.values import is_activation
from tersor.deploy.operators import choose, dequantize, quantize
from tersor.deploy.stored import Stored
from tersor.errors import TraceError, UnmatchedError, WrapError, nearest
from tersor.graph.inputs import as_call, evaluating, map_tensors, named_tensors
from tersor.quantization.base import CalibrationConfig
from tersor.quantization.module_fusion import fuse_modules
from tersor.wrapping import Mask, ModelWrappers, Stage, Transform, is_wrapped


@dataclass(frozen=True)
class Fallback:
    """Something that was asked for and does not run as asked.

    Attributes:
        where: a target, a module or an operator.
        reason: why, and what happens instead.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Program:
    """A lowered model.

    Attributes:
        exported: its graph of ATen operators, ``tersor::quantize`` and ``tersor::dequantize``; dimension 0 of inputs
            is free where it is the batch.
        targets: how each quantized target is stored, by its name.
        modules: the modules that have a quantized weight, with the name of their type.
        fallbacks: what could not be lowered.
    """

    exported: ExportedProgram
    targets: Mapping[str, Stored] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    fallbacks: tuple[Fallback, ...] = ()


def lower(
    model: nn.Module,
    example_inputs: Any,
    calibration: CalibrationConfig | None = None,
    *,
    masks: Mapping[str, Mapping[str, Mask]] | None = None,
    dynamic_batch: bool = True,
) -> Program:
    """Lower a model with its calibration.

    Args:
        model: plain: not wrapped. It is left as it was; a copy is taken.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Tensors whose dimension 0 is
            that of the first one get a free batch size.
        calibration: as a quantizer gives it; None or empty for a model in floating point. The weights may be latent or
            rounded: both have the same stored numbers.
        masks: of inputs and outputs; those of parameters are burnt in by now.
        dynamic_batch: whether the size of the batch stays free.

    Raises:
        WrapError: a compressor has wrapped the model.
        UnmatchedError: the calibration names a module or a tensor that the model does not have.
        CheckpointError: the calibration does not fit the model.
        TraceError: ``torch.export`` rejects the model.
    """
    if is_wrapped(model):
        raise WrapError("the model is still wrapped", remedy="Give the compressor itself, or call its unwrap_model().")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    calibration = dict(calibration or {})
    groups = fused_names(calibration)
    _check_modules(model, calibration)
    # Where the norms are folded for good already, an Identity stands in their place.
    fuse_modules(model, [names for names in groups.values() if not _is_folded(model, names)])
    _check_parameters(model, calibration)
    stored, fallbacks = _store_parameters(model, calibration)
    wrappers = ModelWrappers(model)
    for module, targets in calibration.items():
        for target, said in targets.items():
            if not is_activation(target):
                continue
            name = f"{module}.{target}" if module else target
            behind = groups[module][-1] if target.startswith("_output_") and module in groups else module
            stored[name] = Stored.of(said, name)
            wrappers[behind].stack(target).add(Rounded(stored[name]))
    for module, own in (masks or {}).items():
        for target, mask in own.items():
            wrappers[module].stack(target).add(mask)
    modules = {
        module: type(model.get_submodule(module)).__name__
        for module, targets in calibration.items()
        if any(not is_activation(target) for target in targets)
    }
    return Program(export(model, example_inputs, dynamic_batch=dynamic_batch), stored, modules, tuple(fallbacks))


def export(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> ExportedProgram:
    """``torch.export`` in eval mode, with a free batch size.

    Raises:
        TraceError: it rejects the model.
    """
    args, kwargs = as_call(example_inputs)
    shapes = None
    if dynamic_batch:
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        batch = batch_size_of(example_inputs)
        shapes = map_tensors(dict(named), lambda tensor: _free_batch(tensor, batch))
        # torch.export would take a batch of 1 for a constant.
        args, kwargs = with_batch_size(example_inputs, max(batch, 2))
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export's own, about itself
        try:
            # The empty table takes nothing apart; what is written in place becomes a value of its own.
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes).run_decompositions({})
        except Exception as error:
            raise TraceError(
                f"torch.export cannot follow it: {str(error).strip().splitlines()[0] if str(error) else error!r}",
                where=type(model).__name__,
                remedy="Change what torch.export rejects, or deploy a part of the model.",
            ) from error


def fused_names(calibration: CalibrationConfig) -> dict[str, tuple[str, ...]]:
    """The groups that were quantized as one module, by their head."""
    groups: dict[str, tuple[str, ...]] = {}
    for module, targets in calibration.items():
        for said in targets.values():
            if said.get("fuse_names"):
                groups[module] = tuple(said["fuse_names"])
    return groups


@final
class Rounded(Transform):
    """An input or output on its grid, in the operators of a program."""

    stage: ClassVar[Stage] = Stage.QUANTIZE

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero_point", stored.zero_point)

    def forward(self, value: Tensor) -> Tensor:
        """Quantized and back, in the value's type."""
        if not value.is_floating_point() or not value.numel():
            return value
        stored, axis, block = self.stored, self.stored.axis, self.stored.block
        if stored.scale is None:
            if axis is not None:
                axis, block = value.dim() - 1, value.shape[-1]
            scale, zero_point = choose(value, stored.kind, stored.scheme, stored.low, stored.high, axis, block)
        else:
            scale, zero_point = self.scale, self.zero_point
        q = quantize(value, scale, zero_point, stored.kind, stored.low, stored.high, axis, block)
        values = dequantize(q, scale, zero_point, stored.kind, axis, block)
        return values if value.dtype is torch.float32 else values.to(value.dtype)


@final
class StoredNumbers(nn.Module):
    """A parameter that is stored as numbers.

    Args:
        numbers: in the type that holds them.
        stored: what they mean.
        dtype: of the parameter.
    """

    def __init__(self, numbers: Tensor, stored: Stored, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = stored, dtype
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero_point", stored.zero_point)

    def forward(self) -> Tensor:
        """The real values."""
        stored = self.stored
        values = dequantize(self.numbers, self.scale, self.zero_point, stored.kind, stored.axis, stored.block)
        return values if self.dtype is torch.float32 else values.to(self.dtype)


def _store_parameters(model: nn.Module, calibration: CalibrationConfig) -> tuple[dict[str, Stored], list[Fallback]]:
    """Put stored numbers in the place of all quantized parameters, under all names of those that are tied."""
    stored: dict[str, Stored] = {}
    fallbacks: list[Fallback] = []
    places: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model).items():
        places.setdefault(id(tensor), []).append(name)
    tensors = named_tensors(model)
    for module, targets in calibration.items():
        for target, said in targets.items():
            if is_activation(target):
                continue
            name = f"{module}.{target}" if module else target
            values = tensors[name]
            if isinstance(model.get_submodule(module), nn.RNNBase):
                fallbacks.append(Fallback(name, "recurrent layers run in floating point, on the rounded values"))
                continue
            stored[name] = Stored.of(said, name, values.shape)
            numbers = stored[name].numbers(values.detach())
            for place in places[id(values)]:
                owner, _, own = place.rpartition(".")
                _put(model.get_submodule(owner), own, StoredNumbers(numbers, stored[name], values.dtype))
    return stored, fallbacks


def _put(module: nn.Module, name: str, numbers: StoredNumbers) -> None:
    """Let a module compute a parameter from stored numbers wherever it reads it.

    torch's parametrizations do the same by a property, and refuse an original of another type.
    """
    delattr(module, name)
    held = f"{name}_numbers"
    module.add_module(held, numbers)
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: property(lambda self: getattr(self, held)())})


def _is_folded(model: nn.Module, names: tuple[str, ...]) -> bool:
    return any(isinstance(model.get_submodule(name), nn.Identity) for name in names)


def _check_modules(model: nn.Module, calibration: CalibrationConfig) -> None:
    modules = dict(model.named_modules())
    for module in calibration:
        if module not in modules:
            raise UnmatchedError(
                "the model has no such module", where=f"calibration[{module!r}]", remedy=nearest(module, modules)
            )


def _check_parameters(model: nn.Module, calibration: CalibrationConfig) -> None:
    tensors = named_tensors(model)
    for module, targets in calibration.items():
        for target in targets:
            name = f"{module}.{target}" if module else target
            if not is_activation(target) and name not in tensors:
                raise UnmatchedError(
                    "the model has no such parameter", where=f"calibration[{module!r}]", remedy=nearest(name, tensors)
                )


def _free_batch(tensor: Tensor, batch: int) -> dict[int, Any]:
    free = tensor.dim() > 0 and tensor.shape[0] == batch
    return {0: torch.export.Dim.DYNAMIC} if free else {}
