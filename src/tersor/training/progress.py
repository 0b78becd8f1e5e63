"""The progress bar of a training: step, loss, time left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

_SECONDS_BETWEEN_READINGS = 0.2


class TrainingProgress:
    """A bar on the standard error stream while a training runs; it vanishes at the end.

    Where that stream is no terminal nothing is written. What the user prints meanwhile appears above the bar.

    Args:
        total: the number of steps, or None where it is not known.
        shown: False for no bar at all.
        made: steps that were made before.
    """

    def __init__(self, total: int | None, *, shown: bool, made: int = 0) -> None:
        console = Console(stderr=True)
        self._shown = shown and console.is_terminal
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            # rich would carry printed lines over to the standard error stream: out of a pipe they must not go.
            redirect_stdout=sys.stdout.isatty(),
            disable=not self._shown,
        )
        self._task = self._bar.add_task("training", total=total, completed=made, says="")
        self._read = -_SECONDS_BETWEEN_READINGS

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, loss: Tensor | None, status: Callable[[], Mapping[str, float | Tensor]] = dict) -> None:
        """One step more.

        Args:
            loss: of the step, if there is one.
            status: what else is shown, by a word for each. Both are read only now and then: reading waits for the
                accelerator.
        """
        if not self._shown:
            return
        now = monotonic()
        if now - self._read >= _SECONDS_BETWEEN_READINGS:
            self._read = now
            self._bar.update(self._task, says=said({**({} if loss is None else {"loss": loss}), **status()}))
        self._bar.advance(self._task)


def said(status: Mapping[str, float | Tensor]) -> str:
    """A status in one line.

    >>> import torch
    >>> said({"loss": torch.tensor(0.51234), "sparsity": 0.5})
    'loss 0.5123, sparsity 0.5'
    """
    return ", ".join(
        f"{name} {value.float().mean().item() if isinstance(value, Tensor) else value:.4g}"
        for name, value in status.items()
    )
