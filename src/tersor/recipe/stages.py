"""The narration of a run: one line a stage, with its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.markup import escape


class Stages:
    """Prints each stage of a run when it is over, on the standard error stream unless told otherwise.

    Attributes:
        seconds: how long each stage took.

    >>> import sys
    >>> stages = Stages(Console(file=sys.stdout))
    >>> with stages("build") as note:
    ...     note("a model")
    build            0.0 s  a model
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[Callable[[str], None]]:
        """One stage; what is noted inside stands on its line."""
        begun, notes = perf_counter(), list[str]()
        yield notes.append
        self.over(name, perf_counter() - begun, ", ".join(notes))

    def over(self, name: str, seconds: float, notes: str) -> None:
        """A stage that was timed elsewhere is over."""
        self.seconds[name] = seconds
        self.say(name, f"[dim]{seconds:6.1f} s[/]  {escape(notes)}")

    def say(self, name: str, text: str) -> None:
        """One line."""
        self.console.print(f"[bold]{name:<13}[/]{text}", highlight=False, soft_wrap=True)
