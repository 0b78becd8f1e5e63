"""Which convolutions and products of a model an engine runs in int8, which it does not, and why."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import fx

from tersor.deploy.compiled import CompiledModel
from tersor.deploy.engine import Operator, Precision
from tersor.deploy.graph import DEQUANTIZE, module_of
from tersor.deploy.lowering import Fallback, Program
from tersor.deploy.quantization_speedup import CONTRACTIONS, source_of

_ATEN = torch.ops.aten
RECURRENT = frozenset({_ATEN.lstm.input, _ATEN.gru.input, _ATEN.rnn_tanh.input, _ATEN.rnn_relu.input})
ATTENTION = frozenset({_ATEN.scaled_dot_product_attention.default})
UNNAMED = "the engine's profile does not name it"


@dataclass(frozen=True)
class AuditLine:
    """One convolution, linear layer or product of a model.

    Attributes:
        module: the module that computes it; empty for the model itself.
        kind: what it is, as torch calls it: ``conv2d``, ``linear``, ``matmul``.
        operator: the engine's names of what it runs in its place; empty where its profile does not tell.
        precision: of these; None where the profile does not tell.
        milliseconds: of one call; None where the profile does not tell.
        reason: why it does not run in int8; empty where it does.
    """

    module: str
    kind: str
    operator: str
    precision: Precision | None
    milliseconds: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def audit(compiled: CompiledModel, program: Program) -> tuple[AuditLine, ...]:
    """Find each convolution and product of a program among the operators that an engine ran.

    Engines rename, merge and split operators. One is found by its name, where that begins with the module's
    (``layer1.conv/...``, as files of ONNX have it); what is left over is matched in order, where as many are left on
    both sides, and else only told as far as all that are left have one precision.

    Args:
        compiled: what runs; its report holds the profile.
        program: what it was built from: :attr:`tersor.deploy.QuantizationSpeedup.program`.

    Returns:
        One line for each, in the order in which the model computes them.
    """
    calls = [node for node in program.exported.graph.nodes if node.target in CONTRACTIONS | RECURRENT | ATTENTION]
    found, left = _by_name(calls, [operator for operator in compiled.report.operators if operator.computes])
    open_calls = [call for call in calls if call not in found]
    found |= _in_order(open_calls, left)
    shared = _precision(left) if len({operator.precision for operator in left}) == 1 else None
    inputs = program.exported.graph_signature.user_inputs
    lines: list[AuditLine] = []
    for call in calls:
        operators = found.get(call, [])
        # What has operands in floating point cannot have been run in integers, whatever it was merged into.
        precision = _precision(operators) or (shared if _is_quantized(call) else "float")
        times = [operator.milliseconds for operator in operators if operator.milliseconds is not None]
        lines.append(
            AuditLine(
                module_of(call),
                getattr(call.target, "__name__", str(call.target)).partition(".")[0],
                ", ".join(operator.name for operator in operators),
                precision,
                sum(times) if times else None,
                "" if precision == "int8" else _reason(call, precision, compiled.report.fallbacks, inputs),
            )
        )
    return tuple(lines)


def audit_table(lines: Iterable[AuditLine]) -> Table:
    """An audit for people."""
    table = Table(
        "module", "computes", "engine's operator", "precision", title="What runs in int8", title_justify="left"
    )
    table.add_column("ms", justify="right")
    table.add_column("why not in int8")
    for line in lines:
        spent = "" if line.milliseconds is None else f"{line.milliseconds:.3f}"
        table.add_row(line.module, line.kind, line.operator, line.precision or "unknown", spent, line.reason)
    return table


def _by_name(
    calls: Sequence[fx.Node], operators: Sequence[Operator]
) -> tuple[dict[fx.Node, list[Operator]], list[Operator]]:
    """Calls with the operators whose names tell their module and their number in it, and the operators left over."""
    numbered: dict[tuple[str, int], fx.Node] = {}
    count: dict[str, int] = {}
    for call in calls:
        module = module_of(call)
        count[module] = count.get(module, 0) + 1
        numbered[module, count[module]] = call
    found: dict[fx.Node, list[Operator]] = {}
    left: list[Operator] = []
    for operator in operators:
        call = numbered.get(_place(operator.name))
        if call is None:
            left.append(operator)
        else:
            found.setdefault(call, []).append(operator)
    return found, left


def _in_order(calls: Sequence[fx.Node], operators: Sequence[Operator]) -> dict[fx.Node, list[Operator]]:
    """Calls with operators that no name tells: in order, quantized ones with those in int8, if there are as many."""
    whole = {call: [operator] for call, operator in zip(calls, operators, strict=False)}
    found: dict[fx.Node, list[Operator]] = {}
    for quantized, precision in ((True, "int8"), (False, "float")):
        own = [call for call in calls if _is_quantized(call) is quantized]
        ran = [operator for operator in operators if operator.precision == precision]
        if len(own) == len(ran):
            found |= {call: [operator] for call, operator in zip(own, ran, strict=True)}
    return whole if not found and len(calls) == len(operators) else found


def _is_quantized(call: fx.Node) -> bool:
    """Whether both operands of a product are."""
    return sum(source_of(operand).target is DEQUANTIZE for operand in call.args if isinstance(operand, fx.Node)) >= 2


def _place(name: str) -> tuple[str, int]:
    """The module that an operator's name begins with, and which of its convolutions and products it is.

    >>> _place("block.attn/MatMul.2_token_7"), _place("Convolution_12")
    (('block.attn', 2), ('Convolution_12', 0))
    """
    module, slash, own = name.partition("/")
    number = re.match(r"[A-Za-z]+(?:\.(\d+))?", own)
    return module, (int(number[1] or 1) if slash and number else 0)


def _precision(operators: Sequence[Operator]) -> Precision | None:
    """int8 where all are."""
    if not operators:
        return None
    return "int8" if all(operator.precision == "int8" for operator in operators) else "float"


def _reason(
    call: fx.Node, precision: Precision | None, fallbacks: Iterable[Fallback], inputs: Collection[object]
) -> str:
    """Why a call does not run in int8, as far as it is known; ``inputs`` are the names of the model's own."""
    module = module_of(call)
    told = [own.reason for own in fallbacks if own.where == module or (own.where.startswith(f"{module}.") and module)]
    if told:
        return "; ".join(dict.fromkeys(told))
    if call.target in RECURRENT:
        return "recurrent layers run in floating point"
    if call.target in ATTENTION:
        return "attention is one operator; engine_config() takes it apart into products"
    operands = [operand for operand in call.args if isinstance(operand, fx.Node)]
    if call.target in (_ATEN.addmm.default, _ATEN.baddbmm.default):
        operands = operands[1:]
    sources = [source_of(operand) for operand in operands[:2]]
    first, second = (source.target is DEQUANTIZE for source in sources)
    stored = sources[1].args[0] if second else sources[1]
    is_weight = isinstance(stored, fx.Node) and stored.op == "placeholder" and stored.name not in inputs
    if first and second:
        return UNNAMED if precision is None else "the engine fell back to floating point"
    if not is_weight:
        return "a product of two values, as in attention" + (
            ", of which one is quantized" if first or second else ", that the calibration leaves in floating point"
        )
    if second:
        return "weights only: its input is not quantized"
    return "its weight is not quantized" if first else "not in the calibration"
