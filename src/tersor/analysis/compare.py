"""A model before and after compression: every figure of both, what changed, and what to be wary of."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from tersor.analysis.batches import batch_size_of, with_batch_size
from tersor.analysis.latency import Latency, Ratio, measure, paired_ratio
from tersor.analysis.layers import Layer, LayerChange, changes_between, layers_of
from tersor.analysis.macs import Uncounted, count
from tersor.analysis.memory import file_size, peak_memory
from tersor.analysis.metrics import Metric
from tersor.analysis.notes import notes_on
from tersor.analysis.report import render
from tersor.errors import InvalidValueError, nearest
from tersor.graph.inputs import as_call, evaluating, tensors_of
from tersor.storage import write_text


@dataclass(frozen=True)
class Measurement:
    """The figures of one model.

    Attributes:
        batch_size: of the example inputs, with which ``peak_memory`` was found.
        parameters: number of parameters, tied ones once.
        macs: multiply-accumulates per sample, without what ``uncounted`` lists.
        file_size: bytes of the weights as a safetensors file.
        peak_memory: bytes of the weights and of what one forward pass of the example inputs needs beside them.
        latency: batch size -> measured latency of one call.
        accuracy: as given to `compare`.
        layers: one by one.
        uncounted: operators that ``macs`` lacks.
    """

    batch_size: int
    parameters: int
    macs: int
    file_size: int
    peak_memory: int
    latency: Mapping[int, Latency]
    accuracy: float | None
    layers: tuple[Layer, ...]
    uncounted: tuple[Uncounted, ...]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "batch_size": self.batch_size,
            "parameters": self.parameters,
            "macs": self.macs,
            "file_size": self.file_size,
            "peak_memory": self.peak_memory,
            "latency": {str(batch): latency.to_dict() for batch, latency in self.latency.items()},
            "accuracy": self.accuracy,
            "uncounted": [asdict(missing) for missing in self.uncounted],
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Printing it with rich shows the table.

    Attributes:
        before: figures of the first model.
        after: figures of the second.
        environment: what the latencies were measured on.
    """

    before: Measurement
    after: Measurement
    environment: Mapping[str, str]

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """Every figure before and after: MACs, parameters, file size, memory, latencies, and accuracy if given."""
        before, after = self.before, self.after
        labels = {
            "macs": ("MACs per sample", ""),
            "parameters": ("Parameters", ""),
            "file_size": ("File size", "B"),
            "peak_memory": (f"Peak memory, batch {before.batch_size}", "B"),
        }
        metrics: list[Metric] = []
        for key, (label, unit) in labels.items():
            left, right = getattr(before, key), getattr(after, key)
            metrics.append(Metric(key, label, left, right, unit, _quotient(right, left)))
        for batch, left in before.latency.items():
            right = after.latency[batch]
            spread = ((left.p10, left.p90), (right.p10, right.p90))
            label, ratio = f"Latency, batch {batch}", self.latency_ratio(batch).median
            metrics.append(Metric(f"latency@{batch}", label, left.median, right.median, "s", ratio, spread))
        if before.accuracy is not None and after.accuracy is not None:
            ratio = _quotient(after.accuracy, before.accuracy)
            metrics.append(Metric("accuracy", "Accuracy", before.accuracy, after.accuracy, "score", ratio))
        return tuple(metrics)

    def ratio(self, name: str) -> float:
        """After / before of one figure.

        Args:
            name: ``"macs"``, ``"parameters"``, ``"file_size"``, ``"peak_memory"``, ``"accuracy"``, ``"latency@64"``
                for the batch size 64, or ``"latency"`` for the first one measured.

        Raises:
            InvalidValueError: there is no such figure.
        """
        ratios = {metric.key: metric.ratio for metric in self.metrics}
        first = next(key for key in ratios if key.startswith("latency@"))
        ratios["latency"] = ratios[first]
        if name not in ratios:
            raise InvalidValueError(f"no figure {name!r}", where="ratio", legal=ratios, remedy=nearest(name, ratios))
        return ratios[name]

    def latency_ratio(self, batch_size: int) -> Ratio:
        """Latency after / before, paired by round, with its 95 % interval."""
        return paired_ratio(self.after.latency[batch_size], self.before.latency[batch_size])

    def layers(self) -> tuple[LayerChange, ...]:
        """Every layer before and after, matched by name."""
        return changes_between(self.before.layers, self.after.layers)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know: things not counted, not faster, not really smaller."""
        return tuple(
            notes_on(
                self.layers(),
                (*self.before.uncounted, *self.after.uncounted),
                macs_ratio=self.ratio("macs"),
                latency_ratios={batch: self.latency_ratio(batch) for batch in self.before.latency},
            )
        )

    def table(self) -> Table:
        """The figures side by side."""
        table = Table("", caption="\n".join(self.notes) or None, caption_justify="left")
        for heading in ("before", "after", "change"):
            table.add_column(heading, justify="right")
        for metric in self.metrics:
            table.add_row(metric.label, *metric.texts, metric.change)
        return table

    __rich__ = table

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "ratios": {metric.key: metric.ratio if metric.before else None for metric in self.metrics},
            "layers": [change.to_dict() for change in self.layers()],
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    def report(
        self,
        directory: str | PathLike[str],
        *,
        title: str = "Compression report",
        sparsity: Mapping[str, float] | None = None,
    ) -> Path:
        """Write ``report.html``, one page that needs nothing else, and give back its path.

        Args:
            directory: made if missing; an older report in it is replaced.
            title: heading of the page.
            sparsity: layer name -> share of its weights that the masks removed. None shows the exact zeros in the
                weights of the model after, which a speedup takes away.
        """
        page = render(
            title=title,
            metrics=self.metrics,
            layers=self.layers(),
            notes=self.notes,
            environment=self.environment,
            sparsity=sparsity,
        )
        return write_text(Path(directory) / "report.html", page)


def compare(
    before: nn.Module,
    after: nn.Module,
    example_inputs: Any,
    *,
    accuracy: Mapping[str, float] | tuple[float, float] | None = None,
    batch_sizes: Sequence[int] | None = None,
    repeats: int = 100,
    seconds: float = 5.0,
) -> Comparison:
    """Measure two models on the same inputs, in eval mode and without gradients; both are left as they were.

    Args:
        before: the model as it was.
        after: the compressed one. They may share modules or parameters.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, on the models' device.
        accuracy: what you measured yourself, as ``(before, after)`` or ``{"before": ..., "after": ...}``; shares of 1,
            or any other score.
        batch_sizes: measure the latency at these; tensors whose dimension 0 is the batch are repeated or cut. None
            takes the inputs as they are.
        repeats: rounds of latency at most, for each batch size.
        seconds: for all latencies together, at most (three rounds are always timed).

    Raises:
        TraceError: a model cannot run on the inputs.
        InvalidValueError: an accuracy or a batch size is not as described.

    >>> wide = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> narrow = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> comparison = compare(wide, narrow, torch.zeros(4, 8), repeats=3)
    >>> comparison.before.macs, comparison.after.macs, comparison.ratio("macs")
    (320, 80, 0.25)
    """
    models = {"before": before, "after": after}
    scores = _scores(accuracy)
    sizes = tuple(batch_sizes or (batch_size_of(example_inputs),))
    if min(sizes) < 1:
        raise InvalidValueError(f"{min(sizes)} is no batch size", where="batch_sizes", legal=("1", "2", "..."))
    counts = {name: count(model, example_inputs) for name, model in models.items()}
    memory = {name: peak_memory(model, example_inputs) for name, model in models.items()}

    fastpath = torch.backends.mha.get_fastpath_enabled()
    latency: dict[int, dict[str, Latency]] = {}
    with evaluating(before), evaluating(after):
        torch.backends.mha.set_fastpath_enabled(fastpath)  # timed as its user would run it
        for size in sizes:
            args, kwargs = as_call(example_inputs) if batch_sizes is None else with_batch_size(example_inputs, size)
            calls = {name: partial(model, *args, **kwargs) for name, model in models.items()}
            latency[size] = measure(calls, (), repeats=repeats, seconds=seconds / len(sizes))

    measurements = {
        name: Measurement(
            batch_size=counts[name].batch_size,
            parameters=counts[name].parameters,
            macs=counts[name].macs,
            file_size=file_size(model),
            peak_memory=memory[name],
            latency={size: measured[name] for size, measured in latency.items()},
            accuracy=scores[name],
            layers=layers_of(model, counts[name]),
            uncounted=counts[name].uncounted,
        )
        for name, model in models.items()
    }
    return Comparison(**measurements, environment=environment(example_inputs))


def environment(example_inputs: Any) -> dict[str, str]:
    """What the figures were measured on, in general words: versions, kind of device, threads."""
    device = next((tensor.device for tensor in tensors_of(as_call(example_inputs))), torch.device("cpu"))
    is_cuda = device.type == "cuda"
    return {
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "System": platform.system(),
        "Device": torch.cuda.get_device_name(device) if is_cuda else f"{device.type} {platform.machine()}",
        "Threads": str(torch.get_num_threads()),
    }


def _scores(accuracy: Mapping[str, float] | tuple[float, float] | None) -> dict[str, float | None]:
    if accuracy is None:
        return {"before": None, "after": None}
    sides = ("before", "after")
    scores: dict[str, float | None] = dict(
        accuracy if isinstance(accuracy, Mapping) else zip(sides, accuracy, strict=False)
    )
    if len(accuracy) != 2 or not all(isinstance(scores.get(side), (int, float)) for side in sides):
        raise InvalidValueError(
            f"{accuracy!r} are not two numbers",
            where="accuracy",
            legal=("(0.99, 0.98)", "{'before': 0.99, 'after': 0.98}"),
        )
    return scores


def _quotient(after: float, before: float) -> float:
    if before:
        return after / before
    return math.inf if after else 1.0
