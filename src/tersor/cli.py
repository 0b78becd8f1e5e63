"""The command line: ``tersor run``, ``plan``, ``compare`` and ``inspect``.

What is asked for goes to the standard output, as a table or, with ``--json``, as one JSON document; everything else goes
to the standard error stream. Exit codes: 0 well, 1 an error, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from pydantic_core import to_json
from rich.console import Console, RenderableType
from rich.markup import escape
from torch import nn

import tersor
from tersor import analysis
from tersor.errors import ConfigError, InvalidValueError, TersorError
from tersor.graph import groups as coupling_groups
from tersor.recipe import ModelSource, Prepared, build_model, prepare, read_recipe, run_recipe

app = typer.Typer(
    help="Compress PyTorch models: prune them, make them physically smaller, and measure what it brought.",
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
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="Take model code and example inputs from a recipe.")]


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    """Import paths are looked up in the current folder first, as ``python -m`` does."""
    if version:
        typer.echo(f"tersor {tersor.__version__}")
        raise typer.Exit
    if "" not in sys.path:
        sys.path.insert(0, "")


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
        prepared = prepare(read_recipe(recipe), progress=False)
        found = tersor.plan(prepared.original, prepared.config_list, "pruning", prepared.example_inputs)
        explanation = None if explain is None else found.explain(explain)
    document = found.to_dict() if explanation is None else {"module": explain, "explanation": explanation}
    _show(found if explanation is None else escape(explanation), document, as_json)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(help="Import path or checkpoint folder.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Import path or checkpoint folder.", show_default=False)],
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
        prepared = _prepared(recipe)
        build = build or _builder(prepared, recipe) or (None if Path(before).is_dir() else before)
        models = [_model(name, build) for name in (before, after)]
        comparison = analysis.compare(*models, _inputs(example_shape, prepared), batch_sizes=batch_size)
        if report is not None:
            comparison.report(report)
    _show(comparison, comparison.to_dict(), as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Import path or checkpoint folder.", show_default=False)],
    groups: Annotated[bool, typer.Option("--groups", help="Show which channels live and die together.")] = False,
    build: Build = None,
    example_shape: Shape = None,
    recipe: RecipeOption = None,
    as_json: Json = False,
    traceback: Traceback = False,
) -> None:
    """List the layers of MODEL: shapes, parameters, MACs where example inputs are given; or its coupling groups."""
    with _reported(as_json, traceback):
        prepared = _prepared(recipe)
        network = _model(model, build or _builder(prepared, recipe))
        known = prepared is not None or example_shape
        inputs = _inputs(example_shape, prepared) if known or groups else None
        found: Any = coupling_groups(network, inputs) if groups else analysis.inspect(network, inputs)
    _show(escape(str(found)) if groups else found, found.to_dict(), as_json)
