"""From a compressed model to a program: its graph in torch's operators, with stored numbers in place of weights."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.utils import parametrize

from tersor.analysis.batches import batch_size_of, with_batch_size
from tersor.config.values import is_activation
from tersor.deploy.operators import choose, dequantize, quantize, spread
from tersor.deploy.stored import Stored
from tersor.deploy.structure import arguments_of, plain_nesting
from tersor.deploy.weights import burnt_into_heads, compute_parametrized, store_parameters
from tersor.errors import CheckpointError, TersorError, TraceError, UnmatchedError, WrapError, nearest
from tersor.graph.inputs import as_call, evaluating, named_tensors
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
        CheckpointError: the calibration does not fit the model, or does not say which numbers its latent weights are.
        ConflictError: a norm is to be folded that cannot be, as simulated, because of hooks or a mask in between.
        TraceError: ``torch.export`` rejects the model.
    """
    if is_wrapped(model):
        raise WrapError("the model is still wrapped", remedy="Give the compressor itself, or call its unwrap_model().")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    calibration = dict(calibration or {})
    masks = fold_norms(model, calibration, masks or {})
    _check_parameters(model, calibration)
    stored, refused = store_parameters(model, calibration)
    _give_plain_outputs(model)
    stored |= round_activations(model, calibration, masks)
    modules = {
        module: type(model.get_submodule(module)).__name__
        for module, targets in calibration.items()
        if any(not is_activation(target) for target in targets)
    }
    return Program(
        export(model, example_inputs, dynamic_batch=dynamic_batch),
        stored,
        modules,
        tuple(Fallback(*own) for own in refused),
    )


def fold_norms(
    model: nn.Module, calibration: CalibrationConfig, masks: Mapping[str, Mapping[str, Mask]]
) -> dict[str, dict[str, Mask]]:
    """Fold the norms that were quantized as one module with the layer in front of them, in place and for good.

    Args:
        model: plain; it is changed.
        calibration: says which.
        masks: of inputs and outputs.

    Returns:
        the masks that are still wanted: those in front of a norm are burnt in.

    Raises:
        UnmatchedError: the calibration names a module that the model does not have.
        ConflictError: a norm cannot be folded as simulated.
    """
    groups = fused_names(calibration)
    _check_modules(model, calibration, groups)
    compute_parametrized(model, calibration)
    # Where the norms are folded for good already, an Identity stands in their place.
    to_fold = [names for names in groups.values() if not any(_is_identity(model, name) for name in names)]
    left = burnt_into_heads(model, masks, to_fold)
    fuse_modules(model, to_fold)
    return left


def _is_identity(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Identity)


def round_activations(
    model: nn.Module, calibration: CalibrationConfig, masks: Mapping[str, Mapping[str, Mask]] | None = None
) -> dict[str, Stored]:
    """Put what rounds, and what masks, on inputs and outputs, in place.

    Args:
        model: plain.
        calibration: of which the parameters are not looked at.
        masks: of inputs and outputs.

    Returns:
        how each input and output is stored, by its name.
    """
    stored: dict[str, Stored] = {}
    groups, wrappers = fused_names(calibration), ModelWrappers(model)
    for module, targets in calibration.items():
        for target, said in targets.items():
            if not is_activation(target):
                continue
            name = f"{module}.{target}" if module else target
            stored[name] = Stored.of(said, name)
            wrappers[place_of(module, target, groups)].stack(target).add(Rounded(name, stored[name]))
    for module, own in (masks or {}).items():
        for target, mask in own.items():
            wrappers[module].stack(target).add(mask)
    return stored


def place_of(module: str, target: str, groups: Mapping[str, tuple[str, ...]]) -> str:
    """The module at which an input or output lies: that of modules quantized as one is the last one's."""
    return groups[module][-1] if target.startswith("_output_") and module in groups else module


def export(model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = True) -> ExportedProgram:
    """``torch.export`` in eval mode, with a free batch size.

    Raises:
        TraceError: it rejects the model.
    """
    args, kwargs, shapes = (
        export_arguments(model, example_inputs) if dynamic_batch else (*as_call(example_inputs), None)
    )
    # In the order of forward, whatever that of the example: so the program's inputs are, and a signature's.
    kwargs = {name: kwargs[name] for name in arguments_of(model, args, kwargs) if name in kwargs}
    with evaluating(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.export's own, about itself
        # Recurrent layers keep their weights a second time; what is written there is what was there.
        warnings.filterwarnings("ignore", "The tensor attributes? .*_flat_weights", UserWarning)
        try:
            # The empty table takes nothing apart; what is written in place becomes a value of its own.
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes).run_decompositions({})
        except TersorError:
            raise  # by a hook of ours, and it says what is wrong
        except Exception as error:
            remedy = "Change what torch.export rejects, or deploy a part of the model."
            if dynamic_batch:
                remedy += " Where dimension 0 of its inputs is no batch, or is fixed, set dynamic_batch=False."
            raise TraceError(
                f"torch.export cannot follow it: {_first_lines(error)}", where=type(model).__name__, remedy=remedy
            ) from error


def export_arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """What ``torch.export`` is given for a free batch size: positional and keyword arguments, and dynamic shapes."""
    args, kwargs = as_call(example_inputs)
    named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    batch = batch_size_of(example_inputs)
    shapes = {name: _free_batch(value, batch) for name, value in named.items()}
    # torch.export would take a batch of 1 for a constant.
    return *with_batch_size(example_inputs, max(batch, 2)), shapes


def _free_batch(value: Any, batch: int) -> Any:
    """Which dimensions of an argument are free, nested as it is."""
    if isinstance(value, Tensor):
        return {0: torch.export.Dim.DYNAMIC} if value.dim() and value.shape[0] == batch else {}
    if isinstance(value, Mapping):
        return {key: _free_batch(own, batch) for key, own in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_free_batch(own, batch) for own in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return None


def _first_lines(error: Exception) -> str:
    """What an error says first, and the first reason that it lists."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    reason = next((line.lstrip("- ") for line in lines[1:] if line.startswith("- ")), "")
    return f"{lines[0]} {reason}".strip()


def _give_plain_outputs(model: nn.Module) -> None:
    """Let a model of ours give its outputs in tuples, lists and dicts, of which alone torch.export knows."""
    forward = model.forward

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return plain_nesting(forward(*args, **kwargs))

    model.forward = plain


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
    """An input or output on its grid, in the operators of a program.

    Args:
        name: of the target.
        stored: what it is stored as.
    """

    stage: ClassVar[Stage] = Stage.QUANTIZE

    scale: Tensor
    zero_point: Tensor

    def __init__(self, name: str, stored: Stored) -> None:
        super().__init__()
        self.name, self.stored = name, stored
        self.watching = stored.scale is None
        self._found: tuple[Tensor, Tensor] | None = None
        self.register_buffer("scale", stored.scale)
        self.register_buffer("zero_point", stored.zero_point)

    def watch(self, value: Tensor) -> None:
        """Find scale and zero point of what passes, where they are dynamic; masked elements count as zeros."""
        if not value.is_floating_point() or not value.numel():
            return
        stored, (axis, block) = self.stored, self._place(value)
        self._found = choose(value, stored.kind, stored.scheme, stored.low, stored.high, axis, block)

    def forward(self, value: Tensor) -> Tensor:
        """Quantized and back, in the value's type."""
        if not value.is_floating_point() or (self.watching and self._found is None):
            return value
        stored, (axis, block) = self.stored, self._place(value)
        scale, zero_point = self._found or self._each(value.shape[axis] if axis is not None else 1)
        self._found = None
        q = quantize(value, scale, zero_point, stored.kind, stored.low, stored.high, axis, block)
        if value.dtype is torch.float64 and not torch.compiler.is_compiling():
            # As the quantizers simulate: to be off by float32's last digit makes what lies deeper round the other way.
            shift, factor = (spread(own.double(), q, axis, block) for own in (zero_point, scale))
            return (q.double() - shift) * factor
        values = dequantize(q, scale, zero_point, stored.kind, axis, block)
        return values if value.dtype is torch.float32 else values.to(value.dtype)

    def _place(self, value: Tensor) -> tuple[int | None, int | None]:
        """Along which dimension scales differ, and how many indices of it share one; a token is a whole row."""
        if self.stored.scale is None and self.stored.axis is not None:
            return value.dim() - 1, value.shape[-1]
        return self.stored.axis, self.stored.block

    def _each(self, size: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points for each index of the dimension along which they differ: blocks have one each."""
        count = self.scale.numel()
        if self.stored.axis is None or count == size:
            return self.scale, self.zero_point
        if size % count:
            raise CheckpointError(
                f"there are {count} scales, and {size} channels pass",
                where=self.name,
                remedy="Give the calibration of this model, and of its present shape.",
            )
        repeats = size // count
        return self.scale.repeat_interleave(repeats), self.zero_point.repeat_interleave(repeats)


def _check_modules(model: nn.Module, calibration: CalibrationConfig, groups: Mapping[str, tuple[str, ...]]) -> None:
    modules = dict(model.named_modules())
    for module in [*calibration, *(name for names in groups.values() for name in names)]:
        if module not in modules:
            raise UnmatchedError(
                "the model has no such module", where=f"calibration[{module!r}]", remedy=nearest(module, modules)
            )


def _check_parameters(model: nn.Module, calibration: CalibrationConfig) -> None:
    tensors = named_tensors(model)
    for module, targets in calibration.items():
        for target in targets:
            name = f"{module}.{target}" if module else target
            held = name in tensors or parametrize.is_parametrized(model.get_submodule(module), target)
            if not is_activation(target) and not held:
                raise UnmatchedError(
                    "the model has no such parameter", where=f"calibration[{module!r}]", remedy=nearest(name, tensors)
                )
