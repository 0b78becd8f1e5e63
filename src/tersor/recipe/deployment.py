"""From a trained model to an int8 artefact that is measured: ``tersor deploy``, and the last part of a recipe."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from torch import nn

from tersor.analysis.metrics import Metric
from tersor.compressor import Compressor
from tersor.config.values import is_activation
from tersor.deploy import CompiledModel, QuantizationSpeedup, engine_config
from tersor.deploy.audit import AuditLine, audit, audit_table
from tersor.deploy.engines import engine_of
from tersor.deploy.post_training import post_training
from tersor.deploy.quantization_speedup import OnFailure
from tersor.deploy.side_by_side import SideBySide, side_by_side
from tersor.deploy.smaller import slower_layers
from tersor.deploy.stored import Stored
from tersor.deploy.unsupported import Unsupported
from tersor.errors import UnmatchedError, nearest
from tersor.graph import functions_as_modules
from tersor.graph.inputs import named_tensors
from tersor.quantization import CalibrationConfig
from tersor.quantization.base import Quantizer
from tersor.recipe.prepare import Built, Data
from tersor.recipe.spec import Recipe
from tersor.training.batches import to_device
from tersor.training.evaluation import LoaderEvaluation
from tersor.training.evaluator import modes_kept


@dataclass(frozen=True)
class Deployed:
    """What a deployment came to. Printing it with rich shows it.

    Attributes:
        compiled: the artefact; its report is complete.
        timings: eager, the engine in fp32 and in int8, in one run.
        accuracy: before and after, by the data's metric; None without test data.
        lines: which convolutions and products run in int8.
        notes: what a user should know: what was only warned of, what is not faster.
    """

    compiled: CompiledModel
    timings: SideBySide
    accuracy: tuple[float | None, float | None]
    lines: tuple[AuditLine, ...]
    notes: tuple[str, ...]

    def table(self) -> Table:
        """The figures of the artefact, and its accuracy."""
        table = self.compiled.report.table(self.compiled.signature)
        before, after = self.accuracy
        if before is not None and after is not None:
            metric = Metric("accuracy", "Accuracy", before, after, "score", 1.0)
            table.add_row("accuracy", f"{' -> '.join(metric.texts)} ({metric.change})")
        return table

    def audit_table(self) -> Table:
        """Which convolutions and products run in int8, and why others do not."""
        return audit_table(self.lines)

    def __rich__(self) -> Group:
        """Figures, timings, notes."""
        return Group(self.table(), self.timings, *(f"[bold yellow]note[/] {escape(note)}" for note in self.notes))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        before, after = self.accuracy
        return {
            "report": self.compiled.report.to_dict(),
            "accuracy": {"before": before, "after": after},
            "timings": self.timings.to_dict(),
            "audit": [asdict(line) for line in self.lines],
            "notes": [*self.notes, *self.timings.notes],
        }


def deploy(
    model: nn.Module,
    data: Data,
    *,
    engine: str = "auto",
    calibration: CalibrationConfig | None = None,
    compressor: Compressor | None = None,
    calibration_batches: int = 8,
    threads: int | None = None,
    on_failure: OnFailure = "error",
    unsupported: Unsupported = "error",
    batch_sizes: Iterable[int] | None = None,
    original: nn.Module | None = None,
) -> Deployed:
    """Quantize a model for an engine, build its artefact, and measure it beside the model.

    Args:
        model: trained, on the CPU; it is left as it was.
        data: batches to calibrate with, and to evaluate on if it has any.
        engine: see :func:`tersor.deploy.engines`.
        calibration: what a quantizer found; None calibrates by :func:`tersor.deploy.post_training`.
        compressor: what simulates the same model already, on the CPU; then it is neither calibrated nor given one.
        calibration_batches: how many batches of the training data that takes.
        threads: of the engine, and of torch beside it.
        on_failure: see :class:`tersor.deploy.QuantizationSpeedup`.
        unsupported: likewise.
        batch_sizes: at which to measure; None takes the example inputs as they are.
        original: the model before it was made smaller, to tell which layers are no faster for it.

    Raises:
        TersorError: whatever is wrong with the model, the calibration, the data or the engine; a
            :class:`tersor.errors.VerificationError` where the artefact computes something else.
    """
    name, example = engine_of(engine).name, data.example_inputs
    source: Any
    if compressor is not None:
        source = compressor
    elif calibration is None:
        source = post_training(model, example, list(islice(data.train, calibration_batches)), name)
    else:
        source = fitting_model(model, example, calibration)
    notes: list[str] = []
    with _heard(f"{engine_of(name).title}: ", notes):
        speedup = QuantizationSpeedup(
            source, example, calibration, name, float_model=model, on_failure=on_failure, unsupported=unsupported,
            threads=threads,
        )  # fmt: skip
        compiled = speedup.compile()
    assert speedup.program is not None
    timings = side_by_side(
        model, example, compressed={"": compiled}, engines=name, threads=threads, eager_only=True,
        batch_sizes=None if batch_sizes is None else tuple(batch_sizes),
    )  # fmt: skip
    ours = timings.ways[-1]
    assert ours.latency is not None
    compiled.with_report(milliseconds=1000 * ours.latency[timings.batch_sizes[0]].median)
    accuracy = _score(model, data), _score(_Callable(compiled), data)
    if original is not None:
        notes += slower_layers(original, model, example, name, threads=threads)
    return Deployed(compiled, timings, accuracy, audit(compiled, speedup.program), tuple(notes))


def deploy_built(recipe: Recipe, built: Built, model: nn.Module, compressor: Compressor | None = None) -> Deployed:
    """Deploy what became of a recipe's model, as the recipe says.

    Args:
        recipe: says so.
        built: what it names.
        model: the small model, without any simulation.
        compressor: what simulates it.
    """
    asked = recipe.deployment
    assert asked is not None
    # Engines compute on the CPU.
    example_inputs = to_device(built.example_inputs, torch.device("cpu"))
    quantizes = compressor is not None and any(isinstance(own, Quantizer) for own in compressor.chain)
    return deploy(
        copy.deepcopy(model).cpu(),
        replace(built.data, example_inputs=example_inputs),
        engine=asked.engine,
        compressor=_on_cpu(compressor) if compressor is not None and quantizes else None,
        calibration_batches=asked.calibration_batches,
        threads=asked.threads,
        on_failure=asked.on_failure,
        batch_sizes=recipe.output.batch_sizes,
        original=copy.deepcopy(built.original).cpu(),
    )


def _on_cpu(compressor: Compressor) -> Compressor:
    """A compressor and its model, copied where they are elsewhere."""
    if all(own.device.type == "cpu" for own in compressor.model.parameters()):
        return compressor
    compressor = copy.deepcopy(compressor)
    compressor.model.cpu()
    for wrapper in compressor.wrappers.by_module.values():
        for stack in wrapper.stacks.values():  # those of inputs and outputs are no part of the model
            stack.cpu()
    return compressor


def fitting_model(model: nn.Module, example_inputs: Any, calibration: CalibrationConfig) -> nn.Module:
    """The form of a model that a calibration was made on: as it is, with functions as modules, or with folded norms.

    Among those that have all modules it is the one whose weights the scales fit best.

    Raises:
        UnmatchedError: none of them has all modules.
    """
    # The third is what every engine's quantizer sees; which engine it is asked for makes no difference to the model.
    forms = [
        lambda: model,
        lambda: functions_as_modules(model, example_inputs).eval(),
        lambda: engine_config(model, example_inputs)[0],
    ]
    fitting: list[tuple[float, nn.Module]] = []
    modules: dict[str, nn.Module] = {}
    for make in forms:
        form = make()
        modules = dict(form.named_modules())
        if all(name in modules for name in calibration):
            fitting.append((_misfit(form, calibration), form))
    if not fitting:
        unknown = next((name for name in calibration if name not in modules), "")
        raise UnmatchedError(
            "the model has no such module", where=f"calibration[{unknown!r}]", remedy=nearest(unknown, modules)
        )
    return min(fitting, key=lambda pair: pair[0])[1]


def _misfit(model: nn.Module, calibration: CalibrationConfig) -> float:
    """What rounding takes from the quantized parameters, as a share of their power."""
    tensors = named_tensors(model)
    lost = power = 0.0
    for module, targets in calibration.items():
        for target, said in targets.items():
            name = f"{module}.{target}" if module else target
            if is_activation(target) or name not in tensors:
                continue
            values = tensors[name].detach().cpu().float()
            stored = Stored.of(said, name, values.shape)
            difference = stored.values(stored.numbers(values)) - values
            lost, power = lost + float(difference.square().sum()), power + float(values.square().sum())
    return lost / power if power else 0.0


class _Callable(nn.Module):
    """An artefact, as a module: what evaluates models can evaluate it."""

    def __init__(self, compiled: CompiledModel) -> None:
        super().__init__()
        self.forward = compiled


def _score(model: nn.Module, data: Data) -> float | None:
    if data.test is None:
        return None
    with modes_kept(model):
        return LoaderEvaluation(data.test, data.metric, None)(model)


@contextmanager
def _heard(prefix: str, notes: list[str]) -> Iterator[None]:
    """Take warnings that begin with a prefix as notes; others are given on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if str(warning.message).startswith(prefix):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
