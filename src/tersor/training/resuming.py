"""Training that survives a crash: everything that a run has come to, in one file, written every so many steps."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch

from tersor.errors import CheckpointError, InvalidValueError, TrainingError
from tersor.storage import replacing_file
from tersor.training.evaluator import CompressorLike, Evaluator, Loop
from tersor.training.random_state import random_state
from tersor.training.ranks import is_first_process, of_each_process, process
from tersor.wrapping.sharding import refuse_sharded

CHECKPOINT_FILE = "training.pt"


def state_of_compressed(compressor: CompressorLike) -> dict[str, Any]:
    """The model, simulated, and what the compressors know."""
    return {"compressors": compressor.state_dict(), "model": compressor.model.state_dict()}


def load_compressed(compressor: CompressorLike, state: Mapping[str, Any]) -> None:
    """Take that over; the compressors go on without being started."""
    compressor.wrap_model()
    compressor.load_state_dict(state["compressors"])
    compressor.model.load_state_dict(state["model"])


@final
class ResumableRun:
    """One training run and the file from which it goes on.

    The file holds the model, what the compressors know, optimizers and schedulers, averaged weights, the position in
    the data and the state of every random number generator. It is replaced whole or not at all, so a process may be
    killed at any moment. Of several processes the first writes, and all read: the folder must be one that all see.

    Args:
        compressor: any of the fused ones.
        evaluator: whose loop trains.
        directory: where the file is kept.
        interval: optimizer steps between two writings; after the last step of all it is written too.
        settings: what makes two runs the same, in plain values.

    Raises:
        InvalidValueError: `interval` is no number of steps.
        TrainingError: the evaluator's loop cannot be gone on with.
        WrapError: the model is sharded.
    """

    def __init__(
        self,
        compressor: CompressorLike,
        evaluator: Evaluator,
        directory: str | os.PathLike[str],
        interval: int,
        settings: Mapping[str, Any],
    ) -> None:
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise InvalidValueError(
                f"{interval!r} is no number of steps.", where="checkpoint_steps", legal=("a positive int",)
            )
        refuse_sharded(
            compressor.model,
            remedy="One process writes the whole state: save compressor.state_dict() beside a "
            "torch.distributed.checkpoint of your own.",
        )
        self._loop = _loop_of(evaluator)
        self._compressor = compressor
        self._evaluator = evaluator
        self._file = Path(directory) / CHECKPOINT_FILE
        self._interval = interval
        self._settings = dict(settings)
        self._steps = self._written = 0

    def resume(self) -> bool:
        """Go back to where the file was written; False where there is none.

        Raises:
            CheckpointError: it is damaged, or that of another run.
        """
        if not any(of_each_process(self._file.exists())):
            return False
        try:
            # weights_only reads tensors, numbers and strings, and runs no code.
            state = torch.load(self._file, weights_only=True)
            saved = state["settings"]
        except Exception as error:
            raise CheckpointError(
                f"cannot be read ({type(error).__name__})",
                where=str(self._file),
                remedy="Delete it to begin anew.",
            ) from error
        if differing := [key for key in {**saved, **self._settings} if saved.get(key) != self._settings.get(key)]:
            told = ", ".join(f"{key} ({saved.get(key)}, and {self._settings.get(key)} here)" for key in differing)
            raise CheckpointError(
                f"holds another training, which differs in {told}",
                where=str(self._file),
                remedy="Delete the file to begin anew, or give another checkpoint_dir.",
            )
        load_compressed(self._compressor, state)
        self._evaluator.load_state_dict(state["evaluator"])
        loop = state["loop"]
        loop["position"]["now"] = state["random"][process() % len(state["random"])]
        self._loop.load_state_dict(loop)
        return True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context in which the loop's steps are counted, and the file is written."""
        self._loop.on_complete = self._on_complete
        try:
            yield
            if self._steps > self._written:
                self._write()
        finally:
            self._loop.on_complete = None

    def _on_complete(self) -> None:
        self._steps += 1
        if self._steps - self._written == self._interval:
            self._write()

    def _write(self) -> None:
        random_states = of_each_process(random_state())
        self._written = self._steps
        if not is_first_process():
            return
        state = {
            "settings": self._settings,
            **state_of_compressed(self._compressor),
            "evaluator": self._evaluator.state_dict(),
            "loop": self._loop.state_dict(),
            "random": random_states,
        }
        with replacing_file(self._file) as temporary:
            torch.save(state, temporary)


def _loop_of(evaluator: Evaluator) -> Loop:
    if evaluator.resumable is None:
        raise TrainingError(
            "only the loop of TorchEvaluator.from_loader can be gone on with in the middle.",
            where="checkpoint_dir",
            remedy="Save compressor.state_dict() with your own loop's checkpoints, and load it before the model's.",
        )
    return evaluator.resumable
