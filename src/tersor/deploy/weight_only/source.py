"""What is to be stored: the weights of a Transformers model as integers, what stays floating, and the report."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.config.values import is_activation
from tersor.deploy.lowering import Fallback
from tersor.deploy.plain import plain_copy
from tersor.deploy.stored import Stored
from tersor.deploy.weight_only.packing import Integers
from tersor.deploy.weights import check_rounded
from tersor.errors import InvalidValueError, UnmatchedError, WrapError, nearest
from tersor.graph.inputs import named_tensors
from tersor.quantization.base import CalibrationConfig
from tersor.wrapping import is_wrapped

Unsupported = Literal["error", "float"]
Accept = Callable[[tuple[str, ...], nn.Module, Integers], None]
"""Raises InvalidValueError where a format cannot store a module's weight, given under all its names."""


@dataclass(frozen=True)
class WeightReport:
    """What was written.

    Attributes:
        path: the file or the folder.
        format: what it is.
        bytes: of all its files.
        float_bytes: of the model's parameters before, in their own type.
        quantized: the parameters that are stored as integers.
        deviation: the largest difference between a weight in the file and in the simulation, as a share of the largest
            weight of its tensor. It is 0 unless scales are rounded to another type.
        fallbacks: what was quantized and is not stored so, and why.
    """

    path: Path
    format: str
    bytes: int
    float_bytes: int
    quantized: tuple[str, ...]
    deviation: float
    fallbacks: tuple[Fallback, ...]


@dataclass(frozen=True)
class Source:
    """A model that is ready to be stored.

    Attributes:
        model: of Transformers, plain.
        integers: by the name of the parameter.
        floats: values of parameters that were quantized and are stored in floating point, under all their names.
        fallbacks: what is not stored as it was quantized.
    """

    model: Any
    integers: Mapping[str, Integers]
    floats: Mapping[str, Tensor]
    fallbacks: tuple[Fallback, ...]

    def float_bytes(self) -> int:
        """Of the parameters, tied ones once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.model.parameters())


def collect(
    model_or_compressor: nn.Module | Compressor,
    calibration_config: CalibrationConfig | None,
    format_name: str,
    accept: Accept,
    unsupported: Unsupported,
) -> Source:
    """Find what is stored as integers.

    Raises:
        InvalidValueError: no model of Transformers, no calibration, or a weight that the format cannot store.
        UnmatchedError: the calibration names what the model does not have.
        WrapError: a wrapped model in place of its compressor.
    """
    if unsupported not in ("error", "float"):
        raise InvalidValueError(f"{unsupported!r} is not accepted", where="unsupported", legal=("error", "float"))
    model, calibration = _plain(model_or_compressor, calibration_config)
    _check_model(model, format_name)
    tensors, modules = named_tensors(model), dict(model.named_modules(remove_duplicate=False))
    integers: dict[str, Integers] = {}
    floats: dict[str, Tensor] = {}
    fallbacks: list[Fallback] = []
    dropped: list[str] = []
    for module, targets in calibration.items():
        for target, said in targets.items():
            name = f"{module}.{target}" if module else target
            if is_activation(target):
                dropped.append(name)
                continue
            if name not in tensors:
                raise UnmatchedError(
                    "the model has no such parameter", where=f"calibration[{module!r}]", remedy=nearest(name, tensors)
                )
            stored = Stored.of(said, name, tensors[name].shape)
            if stored.kind == "int1" or "magnitude" in said:
                values = tensors[name].detach().cpu()
                check_rounded(values, stored.values(stored.numbers(values)), name)
            names = (name, *(other for other in tensors if other != name and tensors[other] is tensors[name]))
            try:
                _refuse_norms(modules, said)
                own = Integers.of(stored, tensors[name], name)
                accept(names, modules[module], own)
            except InvalidValueError as error:
                if unsupported == "error":
                    raise InvalidValueError(
                        f"{format_name} cannot store it: {error.what}",
                        where=error.where or name,
                        legal=error.legal,
                        remedy=error.remedy or "Leave it out of the config list, or set unsupported='float'.",
                    ) from None
                fallbacks.append(Fallback(name, f"{error.what}; its rounded values are stored in floating point"))
                floats |= dict.fromkeys(names, _rounded(stored, tensors[name]))
                continue
            integers[name] = own
    fallbacks += _report_dropped(dropped, format_name)
    return Source(model, integers, floats, tuple(fallbacks))


def size_of(files: Iterable[Path]) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in files)


def deviation(own: Tensor, simulated: Tensor) -> float:
    """The largest difference as a share of the largest value.

    >>> deviation(torch.tensor([1.0, 3.9]), torch.tensor([1.1, -4.0]).abs())
    0.025000...
    """
    largest = float(simulated.abs().max())
    difference = float((own.double() - simulated.double()).abs().max())
    return difference / largest if largest else difference


def _plain(
    model_or_compressor: nn.Module | Compressor, calibration_config: CalibrationConfig | None
) -> tuple[nn.Module, CalibrationConfig]:
    if isinstance(model_or_compressor, Compressor):
        if calibration_config is not None:
            raise InvalidValueError(
                "the compressor has a calibration of its own",
                where="calibration_config",
                remedy="Leave it out, or call update_calibration_config() first.",
            )
        plain = plain_copy(model_or_compressor)
        return plain.model, plain.calibration
    if is_wrapped(model_or_compressor):
        raise WrapError("the model is still wrapped", remedy="Give the compressor itself, or call its unwrap_model().")
    if not calibration_config:
        raise InvalidValueError(
            "a plain model needs one, which says what its weights are rounded to",
            where="calibration_config",
            remedy="Give what compress() returned, or the compressor in place of the model.",
        )
    return model_or_compressor, calibration_config


def _check_model(model: Any, format_name: str) -> None:
    from transformers import PreTrainedModel  # here, because the package is optional

    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InvalidValueError(
            f"{kind} is no model of Transformers, and {format_name} needs its config",
            where="model_or_compressor",
            remedy="Deploy other models with QuantizationSpeedup.",
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise InvalidValueError(
            f"{kind} was loaded from a checkpoint that is quantized already",
            where="model_or_compressor",
            remedy="Load the original.",
        )
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in type(model)(config).named_parameters()}
    for name, tensor in model.named_parameters():
        if shapes.get(name) != tensor.shape:
            raise InvalidValueError(
                f"has shape {tuple(tensor.shape)}, and by the model's config "
                f"{tuple(shapes[name]) if name in shapes else 'it is not there'}: nothing could load it",
                where=name,
                remedy="Store models that were made smaller with tersor.save.",
            )


def _refuse_norms(modules: Mapping[str, nn.Module], said: Mapping[str, Any]) -> None:
    for name in said.get("fuse_names", ()):
        if "Norm" in type(modules[name]).__name__:
            raise InvalidValueError(f"the norm {name!r} is folded into it")


def _rounded(stored: Stored, values: Tensor) -> Tensor:
    """The values on their grid, in their own type."""
    if stored.scale is None or stored.zero_point is None:
        return values.detach()
    return stored.values(stored.numbers(values.detach().cpu())).to(values.dtype)


def _report_dropped(dropped: list[str], format_name: str) -> list[Fallback]:
    if dropped:
        shown = ", ".join(dropped[:3]) + (f" and {len(dropped) - 3} more" if len(dropped) > 3 else "")
        warnings.warn(
            f"{format_name} stores weights alone: the scales of {shown} are left out, and these values are not rounded "
            "where the file is loaded",
            stacklevel=4,
        )
    return [Fallback(name, "an input or output: the format stores weights alone") for name in dropped]


def refuse_other_folder(directory: str | os.PathLike[str], is_ours: Callable[[Path], bool], what: str) -> Path:
    """Refuse to replace a folder that holds something else.

    Raises:
        InvalidValueError: naming it.
    """
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and (not any(directory.iterdir()) or is_ours(directory))):
        raise InvalidValueError(f"is there and is no {what}", where=os.fspath(directory), remedy="Name a new folder.")
    return directory
