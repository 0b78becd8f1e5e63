"""Work that two processes do together, joined by gloo: what a test on several machines would show, on one."""

from __future__ import annotations

import io
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

Work = Callable[[int], dict[str, Tensor]]
"""Gets the rank, 0 or 1; returns tensors by name."""


def why_not_two() -> str | None:
    """Why two processes cannot be joined here; None where they can."""
    if not (dist.is_available() and dist.is_gloo_available()):
        return "this build of torch has no gloo"
    if dist.is_initialized():
        return "torch.distributed is in use already"
    if "fork" not in multiprocessing.get_all_start_methods():
        return "this system cannot fork"
    if torch.accelerator.is_available():
        return "autograd cannot be used in a fork beside an accelerator; hide it (CUDA_VISIBLE_DEVICES='') to run this"
    return None


def in_two_processes(work: Work, limit: float = 60.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run ``work`` in two processes that are joined by ``torch.distributed``, and return what both returned.

    Each is forked from this one, computes on one thread, and ends with the work, so nothing of it stays here.

    Args:
        work: need not be picklable; it is called with the rank.
        limit: seconds of wall time for both.

    Raises:
        AssertionError: one of them raised, died, or was not ready in time.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children: list[tuple[BaseProcess, Connection]] = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_child, args=(work, rank, Path(folder) / "store", limit, theirs))
            with warnings.catch_warnings():  # of other threads, which a fork does not take along: none is needed
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            children.append((process, ours))
        deadline = time.monotonic() + limit
        try:
            answers = [_answer(ours, deadline) for _, ours in children]
        finally:
            for process, ours in children:
                with suppress(OSError):
                    ours.send("done")
                process.join(1)
                process.kill()
                process.join()
                ours.close()
    errors = [f"process {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
    assert not errors, "\n".join(errors)
    return answers[0][0], answers[1][0]


def _answer(connection: Connection, deadline: float) -> tuple[dict[str, Tensor], str]:
    if not connection.poll(max(0.0, deadline - time.monotonic())):
        return {}, "was not ready in time"
    try:
        content, error = connection.recv()
    except EOFError:
        return {}, "died"
    return torch.load(io.BytesIO(content), weights_only=True) if content else {}, error


def _child(work: Work, rank: int, store: Path, limit: float, connection: Connection) -> None:
    torch.set_num_threads(1)  # threads that compute are not there in a fork
    try:
        timeout = timedelta(seconds=limit)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
        dist.barrier()  # whoever has done its work sooner must not leave while the other still connects
        content = io.BytesIO()
        torch.save(work(rank), content)
        connection.send((content.getvalue(), ""))
        connection.recv()  # nor while the other still computes
    except BaseException:  # noqa: BLE001 - whatever it is, the other side shall know
        connection.send((b"", traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
