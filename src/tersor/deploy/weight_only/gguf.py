r"""GGUF files, which llama.cpp runs and Transformers loads.

Each row of a quantized weight is a sequence of blocks of 32 numbers with scales in fp16:

======== ========================================== ===================================
``Q4_0`` d, 16 bytes with two numbers each          :math:`(q - 8) d`, q from 0 to 15
``Q4_1`` d, m, 16 bytes with two numbers each       :math:`q d + m`, q from 0 to 15
``Q8_0`` d, 32 bytes                                :math:`q d`, q from -128 to 127
======== ========================================== ===================================

So the integers that a quantizer found are stored as they are, and its scales rounded to fp16: to 11 bits. That
is what the ``deviation`` of the report comes from; nothing is quantized a second time.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tersor.compressor import Compressor
from tersor.deploy.weight_only.gguf_metadata import architecture_of, rows_in_order, write_metadata
from tersor.deploy.weight_only.packing import Integers
from tersor.deploy.weight_only.source import Source, Unsupported, WeightReport, collect, deviation, size_of
from tersor.errors import InvalidValueError
from tersor.extras import require
from tersor.graph.inputs import named_tensors
from tersor.quantization.base import CalibrationConfig
from tersor.storage import replacing_file

FloatType = Literal["F32", "F16", "BF16"]
BLOCK = 32
_TITLE = "GGUF"
_FURTHEST = 2.0**-9
"""As a share of the largest weight, what rounding scales to fp16 may move one; numbers that fp16 holds stay below."""
_FLOAT_TYPES: dict[torch.dtype, FloatType] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
Array = np.ndarray[Any, Any]


def save_gguf(
    model_or_compressor: nn.Module | Compressor,
    path: str | os.PathLike[str],
    calibration_config: CalibrationConfig | None = None,
    *,
    tokenizer: Any = None,
    pre_tokenizer: str = "default",
    float_type: FloatType | None = None,
    unsupported: Unsupported = "error",
) -> WeightReport:
    """Write a GGUF file whose quantized weights are blocks of the integers that the quantizer found.

    Symmetric weights of at most 4 bits become ``Q4_0``, affine ones ``Q4_1``, and symmetric ones of 5 to 8 bits
    ``Q8_0``. Groups are of 32 columns, or of a multiple, whose scale is repeated. Tied embeddings stay tied.

    Args:
        model_or_compressor: a finished quantizer, or all that is fused with it, of a causal language model of
            Transformers (Llama, Mistral, Qwen2 or Qwen3); or the plain model, with its calibration.
        path: the file to write or replace, whole or not at all.
        calibration_config: as ``compress()`` or ``load_calibration()`` give it. Scales of inputs and outputs are left
            out, with a warning.
        tokenizer: a Transformers tokenizer of the byte-level BPE kind. Without one the file holds no vocabulary:
            llama.cpp takes token numbers then.
        pre_tokenizer: llama.cpp's name for how the tokenizer splits text before its merges (``llama-bpe``, ``qwen2``,
            ``smollm``).
        float_type: of the matrices that are not quantized; None for the model's own. Vectors are always float32.
        unsupported: what becomes of weights that no block holds (groups that are no multiple of 32, affine weights of
            more than 4 bits, types that are no integers): an ``error``, or ``float`` (the rounded values are stored in
            floating point).

    Returns:
        What was written.

    Raises:
        InvalidValueError: another architecture, or a weight that no block holds.
        MissingExtraError: ``gguf`` or Transformers is not installed.
    """
    require(_TITLE, "tersor[transformers,gguf]", "transformers", "gguf")
    if float_type not in (None, *_FLOAT_TYPES.values()):
        raise InvalidValueError(f"{float_type!r} is not accepted", where="float_type", legal=_FLOAT_TYPES.values())
    source = collect(model_or_compressor, calibration_config, _TITLE, _accept, unsupported)
    architecture = architecture_of(source.model)
    blocks, furthest = _tensors(source, float_type)

    import gguf  # here, because the package is optional

    kinds = Counter(kind for _, kind in blocks.values())
    path = Path(path)
    with replacing_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        write_metadata(writer, source.model.config, kinds, tokenizer, pre_tokenizer)
        for name, (data, kind) in blocks.items():
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return WeightReport(
        path,
        ", ".join(sorted(kind for kind in kinds if kind.startswith("Q"))),
        size_of([path]),
        source.float_bytes(),
        tuple(source.integers),
        furthest,
        source.fallbacks,
    )


def _accept(names: tuple[str, ...], module: nn.Module, integers: Integers) -> None:
    """Matrices of blocks."""
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise InvalidValueError(f"it is no weight of a linear layer or an embedding, but of {type(module).__name__}")
    if integers.group % BLOCK:
        raise InvalidValueError(
            f"its scales belong to groups of {integers.group} columns, and blocks have {BLOCK}",
            remedy=f"Set granularity: [1, {BLOCK}], or a multiple.",
        )
    kind_of(integers)
    if not blocks_of(integers)[1] <= _FURTHEST:
        scale = integers.scale
        raise InvalidValueError(
            f"its scales, from {float(scale.min()):.2g} to {float(scale.max()):.2g}, do not fit fp16",
            remedy="Rescale the weights, or leave them out of the config list.",
        )


def kind_of(integers: Integers) -> str:
    """The type of the blocks.

    Raises:
        InvalidValueError: there is none.
    """
    bits, symmetric = integers.dtype.bits, integers.is_symmetric
    if bits <= 4:
        return "Q4_0" if symmetric else "Q4_1"
    if bits <= 8 and symmetric:
        return "Q8_0"
    raise InvalidValueError(
        f"there are no blocks of {'' if symmetric else 'affine '}{integers.dtype.as_config()}",
        legal=("symmetric int2 to int8", "affine int2 to int4"),
        remedy="Set quant_scheme: symmetric." if bits <= 8 else "Set quant_dtype: int8.",
    )


def blocks_of(integers: Integers) -> tuple[Array, float]:
    """The bytes of a matrix, shape (rows, bytes of a row), and the largest deviation of a value."""
    kind = kind_of(integers)
    rows, columns = integers.numbers.shape
    numbers, zero_point = (own.int() for own in integers.signed())
    half = 2 ** (integers.dtype.bits - 1) if kind == "Q4_1" else 0
    scale, zero_point = (own.repeat_interleave(integers.group // BLOCK, 1) for own in (integers.scale, zero_point))
    scale = scale.half()
    least = (-(zero_point + half) * scale.float()).half()
    numbers = (numbers + half).view(rows, columns // BLOCK, BLOCK)
    values = numbers * scale.float()[:, :, None] + (least.float()[:, :, None] if kind == "Q4_1" else 0)
    if kind == "Q8_0":
        parts = [scale[:, :, None], numbers.to(torch.int8)]
    else:
        unsigned = numbers if kind == "Q4_1" else numbers + 8
        first, second = unsigned.chunk(2, -1)  # the first half of a block lies in the low bits
        mins = [least[:, :, None]] if kind == "Q4_1" else []
        parts = [scale[:, :, None], *mins, (first | second << 4).to(torch.uint8)]
    data = np.concatenate([np.ascontiguousarray(part.numpy()).view(np.uint8) for part in parts], axis=-1)
    return data.reshape(rows, -1), deviation(values.view(rows, columns), integers.values())


def _tensors(source: Source, float_type: FloatType | None) -> tuple[dict[str, tuple[Array, str]], float]:
    """All tensors of the file with their types, by name, and the largest deviation from the simulation."""
    import gguf  # here, because the package is optional

    config, kind = source.model.config, gguf.MODEL_ARCH
    number = next(own for own in kind if gguf.MODEL_ARCH_NAMES[own] == architecture_of(source.model))
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    parameters = named_tensors(source.model)
    quantized = {id(parameters[name]): own for name, own in source.integers.items()}
    tensors: dict[str, tuple[Array, str]] = {}
    furthest = 0.0
    for name, parameter in source.model.named_parameters():
        own_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own_name is None:
            raise InvalidValueError("GGUF has no name for it", where=name)
        order = rows_in_order(own_name, config, len(parameter))
        integers = quantized.get(id(parameter))
        if integers is not None:
            data, moved = blocks_of(integers if order is None else integers.with_rows(order))
            tensors[own_name] = data, kind_of(integers)
        else:
            values = source.floats.get(name, parameter).detach().cpu()
            wanted = float_type or _FLOAT_TYPES.get(values.dtype, "F32")
            data, wanted, moved = _floats(values if order is None else values[order], wanted, name)
            tensors[own_name] = data, wanted
        furthest = max(furthest, moved)
    return tensors, furthest


def _floats(values: Tensor, wanted: FloatType, name: str) -> tuple[Array, FloatType, float]:
    """A tensor in floating point; vectors are small, and llama.cpp wants them as float32."""
    values = values.float()
    if values.dim() < 2 or wanted == "F32":
        return values.contiguous().numpy(), "F32", 0.0
    dtype = torch.float16 if wanted == "F16" else torch.bfloat16
    kept = values.to(dtype).contiguous()
    if not bool(kept.isfinite().all()):
        raise InvalidValueError(f"has values that {wanted} does not hold", where=name, legal=("F32", "BF16"))
    data = kept.view(torch.uint8).numpy() if wanted == "BF16" else kept.numpy()
    return data, wanted, deviation(kept, values)
