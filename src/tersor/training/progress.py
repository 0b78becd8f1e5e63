"""The progress bar of a training: step, loss, time left."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

_SECONDS_BETWEEN_LOSSES = 0.2


class TrainingProgress:
    """A bar on the standard error stream while a training runs; it vanishes at the end.

    Where that stream is no terminal nothing is written. What the user prints meanwhile appears above the bar.

    Args:
        total: the number of steps, or None where it is not known.
        shown: False for no bar at all.
    """

    def __init__(self, total: int | None, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._shown = shown and console.is_terminal
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # rich would carry printed lines over to the standard error stream: out of a pipe they must not go.
            redirect_stdout=sys.stdout.isatty(),
            disable=not self._shown,
        )
        self._task = self._bar.add_task("training", total=total, loss="-")
        self._loss_read = -_SECONDS_BETWEEN_LOSSES

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, loss: Tensor | None) -> None:
        """One step more. `loss` is read only now and then: reading waits for the accelerator."""
        if not self._shown:
            return
        now = monotonic()
        if loss is not None and now - self._loss_read >= _SECONDS_BETWEEN_LOSSES:
            self._loss_read = now
            self._bar.update(self._task, loss=f"{loss.float().mean().item():.4g}")
        self._bar.advance(self._task)
