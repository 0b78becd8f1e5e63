"""From simulated to real: a model and its calibration become a file that an engine runs in integers, and the proof."""

from __future__ import annotations

import os
import shutil
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from tersor.compressor import Compressor
from tersor.deploy.agreement import agreement
from tersor.deploy.compiled import CompiledModel, size_of
from tersor.deploy.engine import Engine
from tersor.deploy.engines import engine_of
from tersor.deploy.graph import DEQUANTIZE
from tersor.deploy.layerwise import layerwise
from tersor.deploy.lowering import Fallback, Program, lower
from tersor.deploy.operator_changes import compare_operators
from tersor.deploy.plain import Plain, plain_copy, plain_of
from tersor.deploy.record import DeployReport
from tersor.deploy.simulation import Simulation, called, floor_of
from tersor.deploy.small import make_small
from tersor.deploy.structure import Signature
from tersor.deploy.unsupported import Unsupported, fit_types
from tersor.errors import InvalidValueError, TersorError, VerificationError
from tersor.graph import Masks
from tersor.graph.inputs import evaluating, named_tensors, tensors_of
from tersor.quantization.base import CalibrationConfig
from tersor.wrapping import TargetStack

OnFailure = Literal["error", "warn"]
FLOOR_MARGIN = 6.0
"""So many dB below what the simulation has against itself an artefact may lie."""


class QuantizationSpeedup:
    """Makes a quantized model run in integers on an inference engine, and proves that it computes the same.

    Args:
        model: a finished compressor (a quantizer, or all that is fused with it, pruners among them); or a plain model,
            with its calibration.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments: real data, since outputs are
            compared on them.
        calibration_config: as ``get_calibration_config()`` or ``load_calibration()`` give it. Without any the model
            runs in floating point.
        engine: see :func:`tersor.deploy.engines`; ``auto`` is the first that is installed.
        float_model: the model before compression, to compare with.
        masks: of a plain model that was pruned, ``{module: {target: mask}}`` or the path of a masks file; a compressor
            brings its own.
        small: whether what masks remove is cut out first, see :func:`tersor.deploy.make_small`; else it is zero.
        round_to: leave this many channels, or heads, or a multiple: engines compute in blocks, see the table of sizes
            in ``docs/deploy_zoo.md``.
        unpruned: the report of the same model compiled before it was pruned; a warning names the operators that did
            not get faster. Both have to be compiled with the ``options`` in which the engine's profile has times
            (``Engine.timed``).
        min_snr: outputs are to agree with the simulation's by so many dB. Deep networks amplify what differs in the
            last digit where a value is rounded the other way. So what the simulation has against itself, its values
            changed by what float32 is off by, is enough (less six dB) where each layer agrees by so many dB from the
            same inputs, see :func:`tersor.deploy.layerwise.layerwise`.
        min_coverage: of the convolutions and products that the calibration quantizes, this share has to run in int8.
        on_failure: ``error`` or ``warn`` where one of these fails.
        unsupported: what becomes of types that the engine lacks: an ``error``, ``float`` (the values stay rounded), or
            ``widen`` (stored as the next wider type, same values).
        threads: of the engine; None leaves it to the engine.
        dynamic_batch: whether the batch may have any size.
        options: of the engine, by name.

    Raises:
        InvalidValueError: an unknown engine, or a calibration beside a compressor that has its own.
        MissingExtraError: the engine is not installed.

    Attributes:
        report: None until :meth:`compile` has run.
        program: what was compiled, before the engine's wishes; likewise.
    """

    def __init__(
        self,
        model: nn.Module | Compressor,
        example_inputs: Any,
        calibration_config: CalibrationConfig | None = None,
        engine: str = "auto",
        *,
        float_model: nn.Module | None = None,
        masks: Masks | str | os.PathLike[str] | None = None,
        small: bool = True,
        round_to: int = 1,
        unpruned: DeployReport | None = None,
        min_snr: float = 40.0,
        min_coverage: float = 1.0,
        on_failure: OnFailure = "error",
        unsupported: Unsupported = "error",
        threads: int | None = None,
        dynamic_batch: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, legal in (
            ("on_failure", on_failure, ("error", "warn")),
            ("unsupported", unsupported, ("error", "float", "widen")),
        ):
            if value not in legal:
                raise InvalidValueError(f"{value!r} is not accepted", where=name, legal=legal)
        if isinstance(model, Compressor) and calibration_config is not None:
            raise InvalidValueError(
                "the compressor has a calibration of its own",
                where="calibration_config",
                remedy="Leave it out, or call update_calibration_config() first.",
            )
        if isinstance(model, Compressor) and masks is not None:
            raise InvalidValueError("the compressor has masks of its own", where="masks", remedy="Leave them out.")
        self.model = model
        self.masks, self.small, self.round_to, self.unpruned = masks, small, round_to, unpruned
        self.example_inputs = example_inputs
        self.calibration_config = calibration_config
        self.engine: Engine = engine_of(engine)
        self.float_model = float_model
        self.min_snr, self.min_coverage = min_snr, min_coverage
        self.on_failure: OnFailure = on_failure
        self.unsupported: Unsupported = unsupported
        self.threads, self.dynamic_batch = threads, dynamic_batch
        self.options = dict(options or {})
        self.report: DeployReport | None = None
        self.program: Program | None = None

    def lower(self) -> Program:
        """The program, before the engine's wishes; its outputs are the simulation's."""
        plain = self._plain()
        program = lower(
            plain.model,
            self.example_inputs,
            plain.calibration,
            masks=plain.activation_masks,
            dynamic_batch=self.dynamic_batch,
        )
        return replace(program, fallbacks=(*plain.fallbacks, *program.fallbacks))

    def _plain(self) -> Plain:
        """The model with its calibration, as small as its masks allow."""
        if isinstance(self.model, Compressor):
            plain = plain_copy(self.model)
        elif self.masks is None:
            return Plain(self.model, self.calibration_config or {}, {})
        else:
            plain = plain_of(self.model, self.calibration_config, self.masks)
        if not self.small:
            return plain
        try:
            return make_small(plain, self.example_inputs, round_to=self.round_to)
        except TersorError as error:
            if self.on_failure == "error":
                raise
            warnings.warn(f"The model keeps its size, masked: {error}", stacklevel=4)
            return replace(plain, fallbacks=(Fallback("the model", f"keeps its size, masked: {error}"),))

    def compile(self) -> CompiledModel:
        """Build, open, compare.

        Returns:
            What is called like the model.

        Raises:
            TraceError: the model cannot be exported.
            InvalidValueError: a type that the engine lacks.
            VerificationError: the outputs depart from the simulation's, or too little runs in int8.
        """
        program = self.program = self.lower()
        fitted, lacking = fit_types(program, self.engine, self.unsupported)
        prepared, refused = self.engine.prepare(fitted)
        folder = Path(mkdtemp(prefix="tersor-"))
        try:
            compiled = self._compiled(program, prepared, (*program.fallbacks, *lacking, *refused), folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(compiled, shutil.rmtree, folder, True)
        self.report = compiled.report
        return compiled

    def _compiled(
        self, program: Program, prepared: Program, fallbacks: tuple[Fallback, ...], folder: Path
    ) -> CompiledModel:
        self.engine.build(prepared, folder, self.options)
        simulation = Simulation(self._simulated(program), self.example_inputs, self.dynamic_batch)
        source = self.model.model if isinstance(self.model, Compressor) else self.model
        signature = Signature.of(source, self.example_inputs, simulation.output, dynamic_batch=self.dynamic_batch)
        report = DeployReport(
            self.engine.name,
            self.engine.version(),
            size_of(folder),
            bytes_of(source),
            asked=len(quantized_contractions(program)),
            fallbacks=fallbacks,
        )
        compiled = CompiledModel(
            self.engine.name, folder, signature, report, threads=self.threads, options=self.options
        )
        self._verify(compiled, program, prepared, simulation)
        self._warn_of_slower(compiled.report)
        return compiled

    def _simulated(self, program: Program) -> nn.Module:
        """What the artefact is compared with: the compressor's own simulation, where there is one."""
        if isinstance(self.model, Compressor):
            return self.model.model
        return program.exported.module() if self.calibration_config or self.masks else self.model

    def _verify(self, compiled: CompiledModel, program: Program, prepared: Program, simulation: Simulation) -> None:
        results = tensors_of(called(compiled, simulation.inputs))
        own = agreement(results, simulation.outputs)
        flat = compiled.signature.flatten(*simulation.inputs)
        operators = tuple(compiled.session.profile(flat))
        int8 = sum(operator.computes and operator.precision == "int8" for operator in operators)
        before = None
        if self.float_model is not None:
            with evaluating(self.float_model), torch.no_grad():
                before = agreement(results, tensors_of(called(self.float_model, simulation.inputs))).snr
        compiled.with_report(operators=operators, int8=int8, simulation_snr=own.snr, float_snr=before, top1=own.top1)
        if not own.snr >= self.min_snr:
            self._verify_layers(compiled, program, prepared, simulation, flat, results)
        if compiled.report.coverage < self.min_coverage:
            floating = [operator.name for operator in operators if operator.computes and operator.precision == "float"]
            self._fail(
                f"{int8} of {compiled.report.asked} quantized operators run in int8; "
                f"in floating point: {', '.join(floating[:5])}",
                "See engine_config() for what this engine wants quantized, or lower min_coverage.",
            )

    def _verify_layers(
        self,
        compiled: CompiledModel,
        program: Program,
        prepared: Program,
        simulation: Simulation,
        flat: list[Tensor],
        results: list[Tensor],
    ) -> None:
        """Outputs that are far from the simulation's: as far as rounding brings them, and each layer right?"""
        own, floor = compiled.report.simulation_snr, floor_of(program, prepared, simulation)
        layers = layerwise(
            self.engine, prepared, simulation.inputs, flat, results, threads=self.threads, options=self.options
        )
        compiled.with_report(floor=floor, layers=layers)
        remedy = "Try another engine, or turn its optimizations off; do not ship this file."
        least = min(self.min_snr, floor - FLOOR_MARGIN)
        if not own >= least:
            self._fail(
                f"the outputs depart from the simulation's: {own:.1f} dB, less than {least:.1f} "
                f"(the simulation has {floor:.1f} dB against itself)",
                remedy,
            )
        elif not layers.snr >= self.min_snr:
            self._fail(
                f"{layers.where or 'the last layer'} departs from the simulation's, from the same inputs: "
                f"{layers.snr:.1f} dB, less than {self.min_snr:.1f}",
                remedy,
            )

    def _warn_of_slower(self, report: DeployReport) -> None:
        if self.unpruned is None:
            return
        if all(operator.milliseconds is None for operator in report.operators):
            warnings.warn(
                f"{self.engine.title}'s profile has no times, so what pruning was of use for is not known; "
                f"it has them with options={dict(self.engine.timed)}, before and after.",
                stacklevel=3,
            )
        changes = compare_operators(self.unpruned, report)
        slower = [change for change in changes if not change.is_faster]
        if slower:
            shown = ", ".join(f"{own.name} ({own.before:.3g} -> {own.after:.3g} ms)" for own in slower[:5])
            warnings.warn(
                f"{self.engine.title}: {len(slower)} of {len(changes)} convolutions and products are not faster than "
                f"before pruning: {shown}. Engines compute in blocks of channels: try round_to=16.",
                stacklevel=3,
            )

    def _fail(self, what: str, remedy: str) -> None:
        if self.on_failure == "warn":
            warnings.warn(f"{self.engine.title}: {what}. {remedy}", stacklevel=4)
            return
        raise VerificationError(what, where=self.engine.title, remedy=remedy)


def bytes_of(model: nn.Module) -> int:
    """What a model's parameters and buffers take, each counted once, without those of a compressor's simulation."""
    simulation = {id(own) for module in model.modules() if isinstance(module, TargetStack) for own in module.buffers()}
    held = {id(own): own for own in named_tensors(model).values() if id(own) not in simulation}
    return sum(own.numel() * own.element_size() for own in held.values())


_ATEN = torch.ops.aten
CONTRACTIONS = frozenset(
    {
        _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default, _ATEN.convolution.default,
        _ATEN.conv_transpose1d.default, _ATEN.linear.default, _ATEN.addmm.default, _ATEN.mm.default,
        _ATEN.bmm.default, _ATEN.matmul.default, _ATEN.baddbmm.default,
    }
)  # fmt: skip


def quantized_contractions(program: Program) -> list[fx.Node]:
    """The convolutions and products of a program of which both operands are quantized."""
    return [
        node
        for node in program.exported.graph.nodes
        if node.target in CONTRACTIONS
        and sum(source_of(operand).target is DEQUANTIZE for operand in node.args if isinstance(operand, fx.Node)) >= 2
    ]


def source_of(node: fx.Node) -> fx.Node:
    """Where a value comes from, before what only moves it."""
    while node.op == "call_function" and node.target in _MOVEMENT:
        node = node.args[0]  # pyright: ignore
    return node


_MOVEMENT = frozenset(
    {
        _ATEN.permute.default, _ATEN.transpose.int, _ATEN.t.default, _ATEN.view.default, _ATEN.reshape.default,
        _ATEN.unsqueeze.default, _ATEN.expand.default, _ATEN.pad.default, _ATEN.constant_pad_nd.default,
    }
)  # fmt: skip
