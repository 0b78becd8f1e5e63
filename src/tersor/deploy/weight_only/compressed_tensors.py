r"""Checkpoints in the format of the compressed-tensors package, which Transformers and vLLM load.

Of a linear layer with b bits and groups of g columns the file holds, in place of ``weight``:

===================== ====== ==============================================================================
``weight_packed``     int32  (rows, columns b / 32): numbers plus :math:`2^{b-1}`, the first in the lowest bits
``weight_scale``      float  (rows, columns / g), in the model's type; g is all columns where rows have one scale
``weight_zero_point`` int32  (rows b / 32, columns / g), packed along columns; left out where all are 0
``weight_shape``      int64  (2,)
===================== ====== ==============================================================================

``quantization_config`` in ``config.json`` says what b and g are, for all layers or for each.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.deploy.weight_only.packing import Integers, pack
from tersor.deploy.weight_only.source import (
    Source,
    Unsupported,
    WeightReport,
    collect,
    deviation,
    refuse_other_folder,
    size_of,
)
from tersor.errors import ConflictError, InvalidValueError
from tersor.extras import require
from tersor.graph.inputs import named_tensors
from tersor.quantization.base import CalibrationConfig
from tersor.storage import replacing_folder

FORMAT = "pack-quantized"
_TITLE = f"compressed-tensors ({FORMAT})"
Key = tuple[int, int | None]
"""Bits, and the size of a group; None where a row is one."""


def save_compressed_tensors(
    model_or_compressor: nn.Module | Compressor,
    directory: str | os.PathLike[str],
    calibration_config: CalibrationConfig | None = None,
    *,
    tokenizer: Any = None,
    unsupported: Unsupported = "error",
) -> WeightReport:
    """Write a checkpoint whose quantized weights are packed integers: ``AutoModel.from_pretrained`` loads it.

    A loaded model computes what the simulation computes, to the bit, if the model is float32. In bfloat16 and float16
    Transformers keeps scales in the model's type, so they are rounded to it; the report's ``deviation`` says what that
    costs. Whatever is not quantized is stored as it is.

    Args:
        model_or_compressor: a finished quantizer, or all that is fused with it, of a Transformers model; or the plain
            model, with its calibration.
        directory: the folder to write, whole or not at all. An older one of this format is replaced.
        calibration_config: as ``compress()`` or ``load_calibration()`` give it. Scales of inputs and outputs are left
            out, with a warning.
        tokenizer: a Transformers tokenizer, whose files are put beside.
        unsupported: what becomes of weights that the format cannot hold (types that are no integers of at most 8
            bits, groups that do not divide the columns, layers that are not linear, tied weights): an ``error``, or
            ``float`` (the rounded values are stored in floating point).

    Returns:
        What was written.

    Raises:
        InvalidValueError: no Transformers model, a weight that the format cannot hold, or a folder of something else.
        ConflictError: several schemes, one with zero points: Transformers would read them wrongly.
        MissingExtraError: Transformers is not installed.
    """
    require(_TITLE, "tersor[transformers]", "transformers")
    directory = refuse_other_folder(directory, _is_checkpoint, "checkpoint of compressed-tensors")
    source = collect(model_or_compressor, calibration_config, _TITLE, _accept, unsupported)
    schemes = _schemes(source.integers)
    state, furthest = _state(source, schemes)
    with replacing_folder(directory) as folder:
        shell = copy.copy(source.model)  # shares everything but what is set on it
        shell.config = copy.deepcopy(source.model.config)
        shell.config.quantization_config = _quantization_config(source, schemes)
        shell.save_pretrained(folder, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    files = [file for file in directory.rglob("*") if file.is_file()]
    return WeightReport(
        directory,
        FORMAT,
        size_of(files),
        source.float_bytes(),
        tuple(source.integers),
        furthest,
        source.fallbacks,
    )


def _accept(names: tuple[str, ...], module: nn.Module, integers: Integers) -> None:
    """Linear layers of at most 8 bits."""
    name, *others = names
    if others:
        raise InvalidValueError(
            f"it is {others[0]} as well, and tied weights are no linear layer's alone",
            remedy=f"Add exclude_op_names: [{name.rpartition('.')[0]!r}] to the config list, or set "
            "unsupported='float'.",
        )
    if not isinstance(module, nn.Linear) or name.rpartition(".")[2] != "weight":
        raise InvalidValueError(f"it is no weight of a linear layer, but of {type(module).__name__}")
    if integers.dtype.bits > 8:
        raise InvalidValueError(f"{integers.dtype.as_config()} has more than 8 bits", legal=("int2 to int8",))


def _schemes(integers: Mapping[str, Integers]) -> dict[Key, list[str]]:
    """The parameters of each scheme.

    Where all groups are of one size, a row of just that size is a group too.

    Raises:
        ConflictError: see :func:`save_compressed_tensors`.
    """
    if not integers:
        raise InvalidValueError("no weight is quantized", where="calibration_config")
    sizes = {own.group for own in integers.values() if own.scale.shape[1] > 1}
    schemes: dict[Key, list[str]] = {}
    for name, own in integers.items():
        key: Key = max(own.dtype.bits, 2), own.group if own.group in sizes else None
        schemes[key] = [*schemes.get(key, []), name]
    if len(schemes) > 1 and not _is_symmetric(integers.values()):
        shown = "; ".join(f"{_said(key)}: {names[0]}" for key, names in schemes.items())
        raise ConflictError(
            f"there are several schemes and zero points ({shown}); with zero points Transformers reads all weights by "
            "the first scheme",
            where=_TITLE,
            remedy="Set quant_scheme: symmetric, or one quant_dtype and one granularity for all weights.",
        )
    return schemes


def _is_symmetric(integers: Iterable[Integers]) -> bool:
    return all(own.is_symmetric for own in integers)


def _said(key: Key) -> str:
    bits, group = key
    return f"int{bits} by {'rows' if group is None else f'groups of {group}'}"


def _state(source: Source, schemes: Mapping[Key, list[str]]) -> tuple[dict[str, Tensor], float]:
    """The tensors of the checkpoint, and the largest deviation from the simulation."""
    state: dict[str, Tensor] = {**source.model.state_dict(), **source.floats}
    parameters = named_tensors(source.model)
    furthest = 0.0
    for (bits, _), names in schemes.items():
        symmetric = _is_symmetric(source.integers[name] for name in names)
        for name in names:
            own, dtype = source.integers[name], parameters[name].dtype
            del state[name]
            numbers, zero_point = own.signed()
            scale = own.scale.to(dtype)
            if not bool((scale.isfinite() & (scale > 0)).all()):
                raise InvalidValueError(
                    f"its scales, from {float(own.scale.min()):.2g} to {float(own.scale.max()):.2g}, do not fit the "
                    f"model's type, {dtype}, in which {_TITLE} keeps them",
                    where=name,
                    remedy="Store model.float().",
                )
            state[f"{name}_packed"] = pack(numbers, bits)
            state[f"{name}_scale"] = scale
            state[f"{name}_shape"] = torch.tensor(numbers.shape)
            if not symmetric:
                state[f"{name}_zero_point"] = pack(zero_point.T, bits).T.contiguous()
            kept = replace(own, scale=scale.float())
            furthest = max(furthest, deviation(kept.values().to(dtype), own.values().to(dtype)))
    return state, furthest


def _quantization_config(source: Source, schemes: Mapping[Key, list[str]]) -> dict[str, Any]:
    """What ``config.json`` says of it."""
    linear = [name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)]
    quantized = {name.removesuffix(".weight") for name in source.integers}
    groups = {
        f"group_{number}": {
            # One scheme is said by the type of the modules, as other writers do; several by the modules' names.
            "targets": ["Linear"] if len(schemes) == 1 else [name.removesuffix(".weight") for name in names],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": _is_symmetric(source.integers[name] for name in names),
                "strategy": "channel" if group is None else "group",
                "group_size": group,
                "dynamic": False,
            },
            "format": FORMAT,
        }
        for number, ((bits, group), names) in enumerate(schemes.items())
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name in linear if name not in quantized],
    }
    if importlib.util.find_spec("compressed_tensors"):
        config["version"] = importlib.metadata.version("compressed-tensors")
    if not _is_symmetric(source.integers.values()):
        # Transformers 5 expects zero points that are not packed, unless it decodes weights while it loads them.
        config["dequantize"] = True
    return config


def _is_checkpoint(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["quantization_config"]["quant_method"] == "compressed-tensors"
    except (OSError, ValueError, KeyError, TypeError):
        return False
