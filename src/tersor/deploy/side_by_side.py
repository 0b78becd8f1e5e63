"""Models on everything that can run them here, timed in one run: eager, compiled, bfloat16, and each engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from tersor.analysis.batches import batch_size_of, with_batch_size
from tersor.analysis.compare import environment
from tersor.analysis.latency import Latency, Ratio, measure, paired_ratio
from tersor.analysis.memory import file_size
from tersor.analysis.metrics import si
from tersor.compressor import Compressor
from tersor.deploy.agreement import agreement
from tersor.deploy.compiled import CompiledModel
from tersor.deploy.engines import engine_of
from tersor.deploy.engines import engines as known_engines
from tersor.deploy.post_training import post_training
from tersor.deploy.quantization_speedup import QuantizationSpeedup
from tersor.errors import InvalidValueError, TersorError
from tersor.graph.inputs import evaluating, map_tensors, tensors_of

Compressed: TypeAlias = nn.Module | Compressor | CompiledModel
EAGER, COMPILED = "eager", "torch.compile"
BFLOAT16: Mapping[str, Mapping[str, Any]] = {"openvino": {"precision": "bf16"}}
"""Engines that compute in bfloat16 where an option asks them to."""


@dataclass(frozen=True)
class Way:
    """One way to run one of the models, and how it did.

    Attributes:
        model: the name of the model.
        runs_on: ``eager``, ``torch.compile``, or an engine.
        precision: ``fp32``, ``bf16`` or ``int8``.
        bytes: of the file; of the parameters and buffers where there is none.
        snr: of the outputs, against those of the first model in eager mode, in dB.
        latency: batch size -> measured latency of one call.
        skipped: why it was not run; empty where it was.
    """

    model: str
    runs_on: str
    precision: str
    bytes: int | None = None
    snr: float | None = None
    latency: Mapping[int, Latency] | None = None
    skipped: str = ""

    @property
    def name(self) -> str:
        """What it is called in the table."""
        own = f"{self.runs_on} {self.precision}"
        return own if self.model in ("", self.runs_on) else f"{self.model}, {own}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        latency = {str(batch): own.to_dict() for batch, own in (self.latency or {}).items()}
        return {**vars(self), "name": self.name, "latency": latency}


@dataclass(frozen=True)
class SideBySide:
    """What :func:`side_by_side` found. Printing it with rich shows the table.

    Attributes:
        ways: all, the skipped ones among them; the first is the first model in eager mode.
        batch_sizes: those measured.
        environment: what it was measured on.
    """

    ways: tuple[Way, ...]
    batch_sizes: tuple[int, ...]
    environment: Mapping[str, str]

    def way(self, name: str) -> Way:
        """One of them by its name.

        Raises:
            InvalidValueError: there is none of that name.
        """
        for way in self.ways:
            if way.name == name:
                return way
        raise InvalidValueError(f"there is no {name!r}", where="way", legal=[way.name for way in self.ways])

    def base_of(self, way: Way) -> Way | None:
        """The first model in fp32 on the same engine; None where that was not run."""
        return next((own for own in self.ways if own.runs_on == way.runs_on and own.precision == "fp32"), None)

    def gain(self, way: Way, batch_size: int, over: Way | None = None) -> Ratio | None:
        """How often faster one way is than another, paired by round, with its 95 % interval.

        Args:
            way: which.
            batch_size: at which.
            over: than what; eager where None.

        Returns:
            None where one of both was not run.
        """
        over = over or self.ways[0]
        if not way.latency or not over.latency:
            return None
        return paired_ratio(over.latency[batch_size], way.latency[batch_size])

    @property
    def notes(self) -> tuple[str, ...]:
        """What was not run and why, and what is not measurably faster than the first model in fp32 on its engine."""
        return tuple(self._notes())

    def _notes(self) -> Iterator[str]:
        for way in self.ways:
            if way.skipped:
                yield f"{way.name} was not run: {way.skipped}"
            base = self.base_of(way)
            if base is None or way is base or way.precision == "bf16":
                continue
            for batch in self.batch_sizes:
                gain = self.gain(way, batch, base)
                if gain is not None and gain.low <= 1:
                    yield (
                        f"At batch {batch} {way.name} is not measurably faster than {base.name} "
                        f"({gain.median:.2f} times as fast, 95 % interval {gain.low:.2f} to {gain.high:.2f})."
                    )

    def table(self) -> Table:
        """One row each: bytes, agreement with the first model in dB, and for each batch size the time and two gains.

        They are over eager, and over the first model in fp32 on the same engine.
        """
        # Narrow enough for two batch sizes on a terminal of 80 columns.
        table = Table(box=SIMPLE_HEAD, padding=(0, 0), caption="\n".join(self.notes) or None, caption_justify="left")
        table.add_column("", no_wrap=True)
        for heading in ("file", "dB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for batch in self.batch_sizes:
            for heading in (f"batch\n{batch}", "vs\neager", "vs\nfp32"):
                table.add_column(heading, justify="right", no_wrap=True)
        for way in self.ways:
            row = [way.name, "" if way.bytes is None else si(way.bytes, "B")]
            row.append("" if way.snr is None or way is self.ways[0] else f"{way.snr:.0f}")
            for batch in self.batch_sizes:
                row.append(si(way.latency[batch].median, "s") if way.latency else "")
                over = (self.ways[0], self.base_of(way))
                row += ["" if own is None or own is way else _times(self.gain(way, batch, own)) for own in over]
            table.add_row(*row)
        return table

    __rich__ = table

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; gains by way and batch size."""
        return {
            "ways": [{**way.to_dict(), "gains": self._gains(way)} for way in self.ways],
            "notes": list(self.notes),
            "environment": dict(self.environment),
        }

    def _gains(self, way: Way) -> dict[str, dict[str, float | None]]:
        over = {"eager": self.ways[0], "fp32": self.base_of(way)}
        return {
            str(batch): {name: _median(other and self.gain(way, batch, other)) for name, other in over.items()}
            for batch in self.batch_sizes
        }


def side_by_side(
    model: nn.Module,
    example_inputs: Any,
    *,
    compressed: Compressed | Mapping[str, Compressed] | None = None,
    calibration: Iterable[Any] | None = None,
    engines: str | Sequence[str] = "installed",
    batch_sizes: Sequence[int] | None = None,
    threads: int | None = None,
    eager_only: bool = False,
    repeats: int = 100,
    seconds: float = 10.0,
) -> SideBySide:
    """Time a model, and what was made of it, on everything that can run it, interleaved in one run.

    That is: eager in fp32 and bfloat16, ``torch.compile``, and each engine in fp32, in bfloat16 where it has that, and
    in int8. A gain is stated against eager and against the first model in fp32 on the same engine: an engine alone is
    often twice as fast as eager, which no compression may claim. What cannot be run is listed with the reason.

    Args:
        model: the model as it was; it is left as it is.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, on the CPU: real data.
        compressed: a smaller model, a finished compressor, or an artefact; or several by name (artefacts by the name of
            their engine, if you like).
        calibration: some batches, by which the models (not the compressors) are quantized for each engine: see
            :func:`tersor.deploy.post_training`.
        engines: names of engines; ``installed`` are all that are there, ``()`` none.
        batch_sizes: measure at these; None takes the inputs as they are.
        threads: of torch and of the engines; None leaves both.
        eager_only: leave ``torch.compile`` and bfloat16 out.
        repeats: rounds at most, for each batch size.
        seconds: for all rounds together, at most (three rounds are always timed).

    Raises:
        InvalidValueError: an unknown engine, or a batch size below 1.
        MissingExtraError: an engine that was named is not installed.

    >>> net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> found = side_by_side(net, torch.randn(4, 8), engines=(), eager_only=True, repeats=3)
    >>> [way.name for way in found.ways], found.batch_sizes
    (['eager fp32'], (4,))
    """
    sizes = tuple(batch_sizes or (batch_size_of(example_inputs),))
    if min(sizes) < 1:
        raise InvalidValueError(f"{min(sizes)} is no batch size", where="batch_sizes", legal=("1", "2", "..."))
    if not isinstance(compressed, Mapping):
        compressed = {} if compressed is None else {"compressed": compressed}
    batches = None if calibration is None else list(calibration)
    run = _Run(example_inputs, sizes, threads, batches)
    plain: dict[str, nn.Module] = {"": model}
    plain |= {name: own for name, own in compressed.items() if isinstance(own, nn.Module)}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as modes:
        for own in plain.values():
            modes.enter_context(evaluating(own))
        torch.backends.mha.set_fastpath_enabled(fastpath)  # timed as its user would run it
        for name, own in plain.items():
            run.add(Way(name, EAGER, "fp32", file_size(own)), partial(_itself, own))
        if not eager_only:
            for name, own in plain.items():
                run.add(Way(name, COMPILED, "fp32", file_size(own)), partial(_compiled, own))
                run.add(Way(name, EAGER, "bf16", file_size(own) // 2), partial(_in_bfloat16, own))
        for engine in _named(engines):
            for name, own in plain.items():
                run.add_plain(engine, name, own, bfloat16=not eager_only)
            for name, own in compressed.items():
                if isinstance(own, Compressor):
                    run.add(Way(name, engine, "int8"), partial(run.deployed, own, engine))
        for name, own in compressed.items():
            if isinstance(own, CompiledModel):
                precision = "int8" if own.report.int8 else "fp32"
                run.add(Way(name, own.engine, precision, own.report.bytes), partial(_itself, own))
        return SideBySide(run.measured(repeats, seconds), sizes, environment(example_inputs))


class _Run:
    """Collects what can be run, and times it."""

    def __init__(
        self, example_inputs: Any, sizes: Sequence[int], threads: int | None, calibration: list[Any] | None
    ) -> None:
        self.example_inputs, self.sizes, self.threads, self.calibration = example_inputs, sizes, threads, calibration
        self.inputs = {size: with_batch_size(example_inputs, size) for size in sizes}
        self.ways: list[Way] = []
        self.calls: dict[int, Callable[..., Any]] = {}
        self.reference: list[Tensor] = []

    def add(self, way: Way, make: Callable[[], Callable[..., Any]]) -> None:
        """Make a way ready, and run it once at each batch size; what fails is listed with its reason."""
        try:
            call = make()
            with torch.no_grad():
                results = [tensors_of(call(*args, **kwargs)) for args, kwargs in self.inputs.values()]
            if not self.ways:
                self.reference = results[0]
            way = replace(way, snr=agreement(results[0], self.reference).snr)
            if isinstance(call, CompiledModel):
                way = replace(way, bytes=call.report.bytes)
            self.calls[len(self.ways)] = call
        except Exception as error:
            if not self.ways:
                raise  # the first of all has to run
            text = str(error) if isinstance(error, TersorError) else f"{type(error).__name__}: {error}"
            way = replace(way, skipped=text.strip().splitlines()[0])
        self.ways.append(way)

    def add_plain(self, engine: str, name: str, model: nn.Module, *, bfloat16: bool) -> None:
        """A model that is not quantized, on an engine: as it is, in bfloat16, and calibrated."""
        self.add(Way(name, engine, "fp32"), partial(self.deployed, model, engine))
        if bfloat16 and engine in BFLOAT16:
            make = partial(self.deployed, model, engine, min_snr=0.0, options=BFLOAT16[engine])
            self.add(Way(name, engine, "bf16"), make)
        if self.calibration is not None:
            self.add(Way(name, engine, "int8"), partial(self._calibrated, model, engine))

    def deployed(self, model: nn.Module | Compressor, engine: str, **arguments: Any) -> CompiledModel:
        """An artefact."""
        arguments = {"min_coverage": 0.0, **arguments}  # what runs in floating point is slow, which shows
        return QuantizationSpeedup(
            model, self.example_inputs, engine=engine, threads=self.threads, **arguments
        ).compile()

    def _calibrated(self, model: nn.Module, engine: str) -> CompiledModel:
        assert self.calibration is not None
        return self.deployed(post_training(model, self.example_inputs, self.calibration, engine), engine)

    def measured(self, repeats: int, seconds: float) -> tuple[Way, ...]:
        """All ways, with their latencies."""
        latency: dict[int, dict[int, Latency]] = {index: {} for index in self.calls}
        for size, (args, kwargs) in self.inputs.items():
            calls = {str(index): partial(call, *args, **kwargs) for index, call in self.calls.items()}
            found = measure(calls, (), repeats=repeats, seconds=seconds / len(self.sizes), threads=self.threads)
            for index in self.calls:
                latency[index][size] = found[str(index)]
        return tuple(replace(way, latency=latency.get(index)) for index, way in enumerate(self.ways))


def _named(names: str | Sequence[str]) -> list[str]:
    """Engines that are there and were asked for."""
    if names == "installed":
        return [name for name, engine in known_engines().items() if not engine.why_not()]
    return [engine_of(name).name for name in ([names] if isinstance(names, str) else names)]


def _itself(call: Callable[..., Any]) -> Callable[..., Any]:
    return call


def _compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model)


def _in_bfloat16(model: nn.Module) -> Callable[..., Any]:
    small = copy.deepcopy(model).to(torch.bfloat16)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor

    return lambda *args, **kwargs: small(*map_tensors(args, cast), **map_tensors(kwargs, cast))


def _times(gain: Ratio | None) -> str:
    return "" if gain is None else f"{gain.median:.{2 if gain.median < 10 else 1}f}x"


def _median(gain: Ratio | None) -> float | None:
    return None if gain is None else gain.median
