"""How a program's own operators are said in ONNX. Imported where ONNX is wanted alone: its packages are optional."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from typing import Any, Optional

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21

from tersor.config.dtypes import FloatDtype, IntDtype, parse_dtype

op: Any = opset21
_NAMED = {
    **{
        f"{sign}int{bits}": getattr(ir.DataType, f"{sign}int{bits}".upper())
        for sign in ("", "u")
        for bits in (4, 8, 16)
    },
    "int32": ir.DataType.INT32,
    "fp8_e4m3": ir.DataType.FLOAT8E4M3FN,
    "fp8_e5m2": ir.DataType.FLOAT8E5M2,
}
PACKED = ("int4", "uint4")


def element_type(kind: str) -> ir.DataType:
    """The ONNX type that a type is stored as: its own, or the next wider one.

    >>> element_type("uint4").name, element_type("int3").name
    ('UINT4', 'INT8')
    """
    dtype = parse_dtype(kind)
    if kind in _NAMED or isinstance(dtype, FloatDtype):
        return _NAMED[kind]
    wider = next(bits for bits in (8, 16, 32) if bits >= dtype.bits)
    return _NAMED[IntDtype(wider, dtype.signed).as_config()]


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export``'s ``custom_translation_table``."""
    return {
        torch.ops.tersor.quantize.default: _quantize,
        torch.ops.tersor.dequantize.default: _dequantize,
        torch.ops.tersor.choose.default: _choose,
    }


# The exporter takes what is an attribute from the annotations, which therefore are no strings' union.
def _quantize(
    x: Any, scale: Any, zero_point: Any, kind: str, low: float, high: float,
    axis: Optional[int] = None, block: Optional[int] = None,  # noqa: UP045
) -> Any:  # fmt: skip
    """QuantizeLinear, and a limit on the stored numbers where their range is not all of the type's.

    On stored numbers a limit is the same for all channels and blocks, is exact, costs next to nothing (a byte a value,
    without arithmetic), and keeps no engine from fusing what stands in front of it.
    """
    q = op.QuantizeLinear(x, scale, _typed(zero_point, kind), **_place(axis, block))
    dtype = parse_dtype(kind)
    if isinstance(dtype, FloatDtype) or _is_whole(dtype, low, high):
        return q
    wide = element_type(kind)
    if wide.bitwidth == 8:
        return op.Clip(q, *(op.Constant(value=ir.tensor(np.array(end, wide.numpy()))) for end in (low, high)))
    ends = (op.Constant(value=ir.tensor(np.array(end, np.int32))) for end in (low, high))
    return op.Cast(op.Clip(op.Cast(q, to=int(ir.DataType.INT32)), *ends), to=int(wide))


def _dequantize(
    q: Any, scale: Any, zero_point: Any, kind: str,
    axis: Optional[int] = None, block: Optional[int] = None,  # noqa: UP045
) -> Any:  # fmt: skip
    """DequantizeLinear. What is stored in four bits without blocks is read as bytes, since engines compute with these.

    The engine widens such a constant once, when it opens the file. Floats of eight bits are cast and multiplied:
    ONNX Runtime would look for an integer product behind a DequantizeLinear, and reject the file.
    """
    q = _typed(q, kind)
    if isinstance(parse_dtype(kind), FloatDtype) and block is None:
        if axis is not None:
            rows = [-1 if dim == axis else 1 for dim in range(len(q.shape))]
            scale = op.Reshape(scale, op.Constant(value_ints=rows))
        return op.Mul(op.Cast(q, to=int(ir.DataType.FLOAT)), scale)
    if kind in PACKED and block is None:
        kind = IntDtype(8).as_config()
        q = op.Cast(q, to=int(element_type(kind)))
        zero_point = op.Cast(zero_point, to=int(element_type(kind)))
    return op.DequantizeLinear(q, scale, _typed(zero_point, kind), **_place(axis, block))


def _choose(
    x: Any, kind: str, scheme: str, low: float, high: float,
    axis: Optional[int] = None, block: Optional[int] = None,  # noqa: UP045
) -> Any:  # fmt: skip
    """Scale and zero point of a range, in double precision as the simulation has them.

    The one form that the standard has an operator for, and engines an integer product: uint8, affine, the whole tensor.
    """
    if (kind, scheme, low, high, axis) == ("uint8", "affine", 0, 255, None):
        _, scale, zero_point = op.DynamicQuantizeLinear(x)
        return scale, zero_point
    dims = [] if axis is None else [op.Constant(value_ints=[axis])]
    least, most = (
        op.Cast(reduce(x, *dims, keepdims=int(axis is not None)), to=int(ir.DataType.DOUBLE))
        for reduce in (op.ReduceMin, op.ReduceMax)
    )
    width, zero = _double(high - low), _double(0.0)
    if scheme == "symmetric":
        scale = op.Div(op.Max(op.Abs(least), op.Abs(most)), _double((high - low) / 2))
    else:
        least, most = op.Min(least, zero), op.Max(most, zero)
        scale = op.Div(op.Sub(most, least), width)
    tiny = _double(float(torch.finfo(torch.float32).tiny))
    scale = op.Cast(op.Where(op.Less(scale, tiny), _double(1.0), scale), to=int(ir.DataType.FLOAT))
    if scheme == "symmetric":
        middle = 0.0 if isinstance(parse_dtype(kind), FloatDtype) else (high - low + 1) // 2 + low
        zero_point = op.Add(op.Mul(op.Cast(scale, to=int(ir.DataType.DOUBLE)), zero), _double(middle))
    else:
        steps = op.Round(op.Div(least, op.Cast(scale, to=int(ir.DataType.DOUBLE))))
        zero_point = op.Clip(op.Sub(_double(low), steps), _double(low), _double(high))
    return scale, op.Cast(zero_point, to=int(element_type(kind)))


def _double(value: float) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, np.float64)))


def _typed(value: Any, kind: str) -> Any:
    """A value in the ONNX type of a kind; torch has fewer types and holds some in wider ones."""
    wanted = element_type(kind)
    return value if value.dtype == wanted else op.Cast(value, to=int(wanted))


def _place(axis: int | None, block: int | None) -> dict[str, int]:
    return {key: value for key, value in (("axis", axis), ("block_size", block)) if value is not None}


def _is_whole(dtype: IntDtype, low: float, high: float) -> bool:
    """Whether a range is all of what the type holds in ONNX."""
    bits = int(element_type(dtype.as_config()).bitwidth)
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.signed else (0, 2**bits - 1)
    return low <= least and high >= most


def join_dynamic(model: ir.Model) -> None:
    """Let DynamicQuantizeLinear give the stored numbers too, where a quantizer makes them of what it chose."""
    chosen = {node.outputs[1]: node for node in model.graph if node.op_type == "DynamicQuantizeLinear"}
    for node in list(model.graph):
        made = chosen.get(node.inputs[1]) if node.op_type == "QuantizeLinear" else None  # pyright: ignore
        if made is not None and made.inputs[0] is node.inputs[0]:
            ir.convenience.replace_all_uses_with(node.outputs[0], made.outputs[0])
            model.graph.remove(node, safe=True)


def pads_into_convolutions(model: ir.Model) -> None:
    """Let convolutions add the zeros around their inputs: theirs may differ from side to side, which torch's may not.

    Done by an operator of its own it takes as long as some convolutions do.
    """
    for node in list(model.graph):
        pad = node.inputs[0].producer() if node.op_type == "Conv" and node.inputs[0] is not None else None
        added = _added_zeros(pad) if pad is not None else None
        if pad is None or added is None or "auto_pad" in node.attributes:
            continue
        own = node.attributes.get_ints("pads", [0] * len(added))
        node.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(own, added, strict=True)])
        node.replace_input_with(0, pad.inputs[0])
        if not pad.outputs[0].uses() and not pad.outputs[0].is_graph_output():
            model.graph.remove(pad, safe=True)


def _added_zeros(pad: ir.Node) -> list[int] | None:
    """How many zeros a node adds before and behind each dimension but the first two; None where it does more."""
    if pad.op_type != "Pad" or pad.attributes.get_string("mode", "constant") != "constant":
        return None
    sizes, value, *axes = (ir.convenience.get_const_tensor(own) if own is not None else None for own in pad.inputs[1:])
    if sizes is None or any(own is not None for own in pad.inputs[3:]) or any(axes):
        return None
    if value is None and len(pad.inputs) > 2 and pad.inputs[2] is not None:
        return None  # computed while the model runs
    counts, rank = sizes.numpy().tolist(), len(sizes.numpy()) // 2
    if (value is not None and value.numpy().any()) or min(counts) < 0 or any(counts[:2] + counts[rank : rank + 2]):
        return None
    return counts[2:rank] + counts[rank + 2 :]


def pack_small_types(model: ir.Model) -> None:
    """Store constants of four bits as such: two numbers a byte, and no cast while the model runs."""
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if node.op_type != "Cast" or source is None or source.const_value is None:
            continue
        to = ir.DataType(node.attributes["to"].as_int())
        if to not in (ir.DataType.INT4, ir.DataType.UINT4):
            continue
        values = source.const_value.numpy().astype(to.numpy())
        name = f"{source.name}_{to.name.lower()}"
        if name not in model.graph.initializers:
            packed = ir.Value(
                name=name,
                shape=ir.Shape(values.shape),
                type=ir.TensorType(to),
                const_value=ir.Tensor(np.asarray(values), dtype=to),
            )
            model.graph.register_initializer(packed)
        ir.convenience.replace_all_uses_with(node.outputs[0], model.graph.initializers[name])
        model.graph.remove(node, safe=True)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        model.graph.initializers.pop(name)


COMPUTING = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention", "LSTM", "GRU", "RNN"})
"""Operators of ONNX that hold convolutions or products."""


def name_by_module(model: ir.Model) -> None:
    """Call each node after the module that it comes from, and leave out of the file where that module's code lies.

    The first convolution or product of a module ``block.attn`` becomes ``block.attn/Gemm``, the second
    ``block.attn/MatMul.2``; so engines' profiles name modules, and :func:`tersor.deploy.audit` can read them. What the
    exporter writes beside would tell the paths of source files.
    """
    calls: dict[str, list[str]] = {}
    taken: Counter[str] = Counter()
    for node in model.graph:
        said = node.metadata_props
        scopes = ast.literal_eval(said.get("pkg.torch.onnx.name_scopes", "[]"))
        module = str(scopes[-2]) if len(scopes) > 1 else ""
        name = f"{module}/{node.op_type}"
        if node.op_type in COMPUTING:
            own = calls.setdefault(module, [])
            call = said.get("pkg.torch.onnx.fx_node", name).partition(" ")[0]
            if call not in own:
                own.append(call)
            name += f".{own.index(call) + 1}" if own.index(call) else ""
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        node.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
