"""The command line: ``tersor run``, ``plan``, ``deploy``, ``compare``, ``inspect`` and ``pruners``.

What is asked for goes to the standard output, as a table or, with ``--json``, as one JSON document; everything else
goes to the standard error stream. Exit codes: 0 well, 1 an error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from pydantic_core import to_json
from rich.console import Console, Group
from rich.markup import escape
from torch import nn

import tersor
from tersor import analysis
from tersor.checkpoint import read_architecture
from tersor.deploy import CompiledModel, read_deployment, side_by_side
from tersor.deploy.compiled import refuse_other_folder
from tersor.deploy.engines import engine_of
from tersor.deploy.record import is_deployment
from tersor.errors import ConfigError, InvalidValueError, TersorError
from tersor.graph import groups as coupling_groups
from tersor.recipe import (
    Data,
    PreparedFusion,
    build_data,
    build_model,
    catalogue,
    describe,
    prepare,
    prepare_fusion,
    read_recipe,
    run_recipe,
)
from tersor.recipe import deploy as deploy_model
from tersor.storage import CALIBRATION_FILE, load_calibration

CALIBRATION_BATCHES = 8

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

RecipeFile = Annotated[Path, typer.Argument(help="YAML or JSON file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")]
Build = Annotated[
    str | None, typer.Option(help="package.module:callable that builds the original model of a checkpoint.")
]
Shape = Annotated[
    list[str] | None, typer.Option("--example-shape", help="Shape of an input, such as 8,3,224,224; once for each.")
]
DataOption = Annotated[
    str | None, typer.Option("--data", help="package.module:callable that gives the data, as in a recipe.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the engine, and of PyTorch beside it.")]
BatchSizes = Annotated[list[int] | None, typer.Option(help="Measure the latency at this one; repeatable.")]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="Take model code and example inputs from a recipe.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tersor {tersor.__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
]


@app.callback()
def main(version: Version = False) -> None:
    """Compress PyTorch models: prune them, make them physically smaller, and measure what it brought."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # import paths are looked up in the current folder too, as with python -m


@app.command()
def run(recipe: RecipeFile, as_json: Json = False, traceback: Traceback = False) -> None:
    """Prune, quantize, distil, train, make small, verify, save, export, deploy, compare: all that RECIPE asks for."""
    with _reported(as_json, traceback):
        result = run_recipe(read_recipe(recipe))
    shown = [result.comparison] if result.deployed is None else [result.comparison, result.deployed]
    _show(Group(*shown), result.to_dict(), as_json)


@app.command()
def plan(
    recipe: RecipeFile,
    explain: Annotated[str | None, typer.Option(help="Say why this module is in, out or coupled.")] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Show what RECIPE would do to which layer and why, without doing it."""
    with _reported(as_json, traceback):
        asked = read_recipe(recipe)
        alone = asked.alone is not None
        prepared = prepare(asked, progress=False) if alone else prepare_fusion(asked, progress=False)
        chain = prepared.compressor.chain if isinstance(prepared, PreparedFusion) else (prepared.pruner,)
        words = describe(asked, prepared)
        explanation = None if explain is None else "\n".join(own.plan.explain(explain) for own in chain)
    if explanation is not None:
        _show(escape(explanation), {"module": explain, "explanation": explanation}, as_json)
        return
    lines = "\n".join(f"[bold]{escape(part):<13}[/]{escape(text)}" for part, text in words.items())
    if alone:
        _show(Group(chain[0].plan, "", lines), {**chain[0].plan.to_dict(), "words": words}, as_json)
        return
    timeline = chain[-1].timeline()
    plans = [{"compressor": own.title, **own.plan.to_dict()} for own in chain]
    shown = [part for own in chain for part in (f"[bold]{escape(own.title)}[/]", own.plan, "")]
    _show(Group(*shown, timeline, "", lines), {"plans": plans, "timeline": timeline.to_dict(), "words": words}, as_json)


@app.command()
def deploy(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or import path.", show_default=False)],
    *,
    engine: Annotated[str, typer.Option(help="Which inference engine; auto is the first installed.")] = "auto",
    data: DataOption = None,
    calibration: Annotated[
        Path | None, typer.Option(help=f"What save_calibration wrote; {CALIBRATION_FILE} in MODEL where not given.")
    ] = None,
    calibration_batches: Annotated[
        int, typer.Option(min=1, help="How many batches to calibrate on, where there is no calibration.")
    ] = CALIBRATION_BATCHES,
    build: Build = None,
    recipe: RecipeOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; MODEL-ENGINE where not given.")] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Show which products run in int8, which do not and why.")
    ] = False,
    batch_size: BatchSizes = None,
    threads: Threads = None,
    on_failure: Annotated[
        Literal["error", "warn"], typer.Option(help="Where the artefact departs from the simulation.")
    ] = "error",
    unsupported: Annotated[
        Literal["error", "float", "widen"], typer.Option(help="What becomes of types that the engine lacks.")
    ] = "error",
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Quantize MODEL for an inference engine and write the int8 artefact; measure it, and prove that it is right."""
    with _reported(as_json, traceback):
        name = engine_of(engine).name
        out = out or Path(f"{model.rpartition(':')[2].rstrip('/')}-{name}")
        refuse_other_folder(out)
        builder, found = _from_recipe(recipe, build, data, needs_data=True)
        if found is None:
            raise ConfigError("no data to calibrate and to measure with.", remedy="Give --data, or --recipe.")
        network = _model(model, builder)
        beside = Path(model) / CALIBRATION_FILE
        calibration = calibration or (beside if beside.is_file() else None)
        deployed = deploy_model(
            network,
            found,
            engine=name,
            calibration=None if calibration is None else load_calibration(calibration),
            calibration_batches=calibration_batches,
            threads=threads,
            on_failure=on_failure,
            unsupported=unsupported,
            batch_sizes=batch_size,
            original=build_model(builder) if builder is not None and Path(model).is_dir() else None,
        )
        deployed.compiled.save(out)
    shown = [deployed, *([deployed.audit_table()] if audit else []), escape(f"Written to {out}.")]
    _show(Group(*shown), {**deployed.to_dict(), "directory": str(out)}, as_json)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="Import path or checkpoint folder.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Import path, checkpoint or deployment folder.", show_default=False)],
    *,
    build: Build = None,
    example_shape: Shape = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    batch_size: BatchSizes = None,
    engines: Annotated[
        str | None,
        typer.Option(
            help="Time on these as well, such as openvino,onnxruntime; 'installed' are all. With data in int8, too."
        ),
    ] = None,
    threads: Threads = None,
    report: Annotated[Path | None, typer.Option(help="Write report.html into this folder.")] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Measure two models: parameters, MACs, file size, memory, latency; and on inference engines, side by side.

    A checkpoint is built by --build, by the recipe's model, or by BEFORE where that is an import path.
    """
    with _reported(as_json, traceback):
        builder, found = _from_recipe(recipe, build, data, needs_data=engines is not None or not example_shape)
        inputs = _example_inputs(example_shape, found, needed=True)
        builder = builder or (None if Path(before).is_dir() else before)
        original, shown, document = _model(before, builder), [], {}
        artefact = CompiledModel.load(after, threads=threads) if is_deployment(after) else None
        compressed = artefact or _model(after, builder)
        if isinstance(compressed, nn.Module):
            comparison = analysis.compare(original, compressed, inputs, batch_sizes=batch_size)
            if report is not None:
                comparison.report(report)
            shown, document = [comparison], comparison.to_dict()
        if engines is not None or artefact is not None:
            chosen = engines or (artefact.engine if artefact is not None else "")
            side = side_by_side(
                original,
                inputs,
                compressed={"after": compressed},
                calibration=None if found is None else islice(found.train, CALIBRATION_BATCHES),
                engines=chosen if chosen == "installed" else chosen.split(","),
                batch_sizes=batch_size,
                threads=threads,
            )
            shown, document = [*shown, side], {**document, "side_by_side": side.to_dict()}
    _show(Group(*shown), document, as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Import path, checkpoint or deployment folder.", show_default=False)],
    *,
    groups: Annotated[bool, typer.Option("--groups", help="Show which channels live and die together.")] = False,
    build: Build = None,
    example_shape: Shape = None,
    recipe: RecipeOption = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """List the layers of MODEL: shapes, parameters, MACs where example inputs are given; or its coupling groups.

    Of a deployment folder it shows the record: engine, figures, and what runs in int8.
    """
    with _reported(as_json, traceback):
        if is_deployment(model):
            if groups:
                raise ConfigError("is a deployment, which has no groups", where=model, remedy="Leave --groups out.")
            found: Any = read_deployment(model)
            found.check_files()
        else:
            builder, data = _from_recipe(recipe, build, None, needs_data=not example_shape)
            inputs = _example_inputs(example_shape, data, needed=groups)
            network = _model(model, builder)
            found = coupling_groups(network, inputs) if groups else analysis.inspect(network, inputs)
    _show(escape(str(found)) if groups else found, found.to_dict(), as_json)


@app.command()
def pruners(as_json: Json = False, traceback: Traceback = False) -> None:
    """List the pruners that a recipe can name: what each does, needs, and takes as arguments."""
    with _reported(as_json, traceback):
        found = catalogue()
    _show(found, found.to_dict(), as_json)


@contextmanager
def _reported(as_json: bool, traceback: bool) -> Iterator[None]:
    """Turn errors into exit codes, and keep the standard output for the JSON document where one is asked for."""
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            yield
    except TersorError as error:
        if traceback:
            raise
        Console(stderr=True).print(f"[bold red]error[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _show(result: Any, document: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(to_json(document, indent=2, inf_nan_mode="null").decode())
    else:
        # Into a file or a pipe a table is as wide as it needs to be.
        Console(width=None if sys.stdout.isatty() else 200).print(result)


def _from_recipe(
    path: Path | None, build: str | None, data: str | None, *, needs_data: bool
) -> tuple[str | None, Data | None]:
    """The function that builds a checkpoint's model, and the data: each from its option or else the recipe."""
    recipe = None if path is None else read_recipe(path)
    build = build or (recipe.model.build if recipe else None)
    where, named = ("--data", data) if data or recipe is None else ("recipe['data']", recipe.data)
    return build, build_data(named, where) if needs_data and named else None


def _example_inputs(shapes: list[str] | None, data: Data | None, *, needed: bool) -> Any:
    """Example inputs, from the option or else the data."""
    if shapes:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(_shape(shape), generator=generator) for shape in shapes)
    if data is None and needed:
        raise ConfigError("no example inputs.", remedy="Give --example-shape 8,3,224,224, or --recipe.")
    return None if data is None else data.example_inputs


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.replace("x", ",").split(",")
    if not all(size.strip().isdigit() and int(size) for size in sizes):
        raise InvalidValueError(f"{text!r} is no shape.", where="--example-shape", legal=["sizes such as 8,3,224,224"])
    return tuple(int(size) for size in sizes)


def _model(name: str, build: str | None) -> nn.Module:
    """A model by its import path, or the one in a checkpoint folder."""
    if ":" in name and not Path(name).is_dir():
        return build_model(name)
    architecture = read_architecture(name)
    if build is None:
        raise ConfigError(
            f"is a checkpoint of {architecture.model}, whose code is not known",
            where=name,
            remedy="Say what builds the original model: --build package.module:callable, or --recipe.",
        )
    return build_model(build, name)
