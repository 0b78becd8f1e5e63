"""The command line: ``tersor run``, ``plan``, ``compare``, ``inspect`` and ``pruners``.

What is asked for goes to the standard output, as a table or, with ``--json``, as one JSON document; everything else
goes to the standard error stream. Exit codes: 0 well, 1 an error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic_core import to_json
from rich.console import Console, Group
from rich.markup import escape
from torch import nn

import tersor
from tersor import analysis
from tersor.checkpoint import read_architecture
from tersor.errors import ConfigError, InvalidValueError, TersorError
from tersor.graph import groups as coupling_groups
from tersor.recipe import build_data, build_model, catalogue, describe, prepare, read_recipe, run_recipe

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
    """Prune, fine-tune, make small, verify, save, export, compare, report: all that RECIPE asks for."""
    with _reported(as_json, traceback):
        result = run_recipe(read_recipe(recipe))
    _show(result.comparison, result.to_dict(), as_json)


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
        prepared = prepare(asked, progress=False)
        found, words = prepared.pruner.plan, describe(asked, prepared)
        explanation = None if explain is None else found.explain(explain)
    if explanation is not None:
        _show(escape(explanation), {"module": explain, "explanation": explanation}, as_json)
        return
    lines = "\n".join(f"[bold]{escape(part):<13}[/]{escape(text)}" for part, text in words.items())
    _show(Group(found, "", lines), {**found.to_dict(), "words": words}, as_json)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="Import path or checkpoint folder.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Import path or checkpoint folder.", show_default=False)],
    *,
    build: Build = None,
    example_shape: Shape = None,
    recipe: RecipeOption = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Measure the latency at this one; repeatable.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write report.html into this folder.")] = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """Measure two models: parameters, MACs, file size, memory, latency.

    A checkpoint is built by --build, by the recipe's model, or by BEFORE where that is an import path.
    """
    with _reported(as_json, traceback):
        builder, inputs = _from_recipe(recipe, build, example_shape, needed=True)
        builder = builder or (None if Path(before).is_dir() else before)
        comparison = analysis.compare(_model(before, builder), _model(after, builder), inputs, batch_sizes=batch_size)
        if report is not None:
            comparison.report(report)
    _show(comparison, comparison.to_dict(), as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Import path or checkpoint folder.", show_default=False)],
    *,
    groups: Annotated[bool, typer.Option("--groups", help="Show which channels live and die together.")] = False,
    build: Build = None,
    example_shape: Shape = None,
    recipe: RecipeOption = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """List the layers of MODEL: shapes, parameters, MACs where example inputs are given; or its coupling groups."""
    with _reported(as_json, traceback):
        builder, inputs = _from_recipe(recipe, build, example_shape, needed=groups)
        network = _model(model, builder)
        found: Any = coupling_groups(network, inputs) if groups else analysis.inspect(network, inputs)
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
    path: Path | None, build: str | None, shapes: list[str] | None, *, needed: bool
) -> tuple[str | None, Any]:
    """The function that builds a checkpoint's model, and example inputs: each from its option or else the recipe."""
    recipe = None if path is None else read_recipe(path)
    inputs: Any = None
    if shapes:
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(torch.randn(_shape(shape), generator=generator) for shape in shapes)
    elif recipe is not None:
        inputs = build_data(recipe.data, "recipe['data']").example_inputs
    elif needed:
        raise ConfigError("no example inputs.", remedy="Give --example-shape 8,3,224,224, or --recipe.")
    return build or (recipe.model.build if recipe else None), inputs


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
