"""Work on many items, each in a process of its own that is forked from a warm one and has a time limit.

A crash, a hang or a leak of one item is that item's alone, and its peak memory is its own; nothing is imported twice.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")
Record = dict[str, Any]
Work = Callable[[Item, Callable[[Record], None]], Record]
"""Gets an item, and what to call with how far it got; returns the record."""


@dataclass
class Outcome(Generic[Item]):
    """What became of one item.

    Attributes:
        item: the item.
        record: what its process returned; where it did not get there, the last that it published.
        ended: None where it returned, else why it did not.
    """

    item: Item
    record: Record = field(default_factory=dict)
    ended: str | None = "crashed"


def run_each(
    work: Work[Item], items: Iterable[Item], *, jobs: int = 1, limit: float = 120.0
) -> Iterator[Outcome[Item]]:
    """Yield outcomes as they come.

    Args:
        work: done once for each item. A record must be what pickle can send.
        items: need not be picklable.
        jobs: how many processes at a time; each computes on one thread.
        limit: seconds of wall time for one item.
    """
    torch.set_num_threads(1)
    gc.freeze()  # what is never looked at is never copied
    waiting = iter(items)
    running: dict[Connection, _Process[Item]] = {}
    while True:
        while len(running) < jobs and (item := next(waiting, None)) is not None:
            process = _Process(work, item, limit)
            running[process.connection] = process
        if not running:
            return
        soonest = min(process.deadline for process in running.values())
        ready = wait(list(running), timeout=max(soonest - time.monotonic(), 0))
        for connection, process in list(running.items()):
            if process.is_done(connection in ready):
                del running[connection]
                yield process.outcome


class _Process(Generic[Item]):
    """One item at work."""

    def __init__(self, work: Work[Item], item: Item, limit: float) -> None:
        context = multiprocessing.get_context("fork")
        self.outcome = Outcome(item)
        self.limit = limit
        self.deadline = time.monotonic() + limit
        self.connection, theirs = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(work, item, theirs))
        with warnings.catch_warnings():  # that a fork takes along no other thread is no harm: none computes
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        theirs.close()

    def is_done(self, has_news: bool) -> bool:
        """Take in what was sent, and whether it is over."""
        if has_news:
            try:
                self.outcome.record, is_last = self.connection.recv()
                if is_last:
                    self.outcome.ended = None
            except EOFError:
                self._process.join()
                if self.outcome.ended is not None:
                    self.outcome.ended = f"ended with exit code {self._process.exitcode}"
                return True
        if time.monotonic() < self.deadline:
            return False
        if self.outcome.ended is not None:
            self.outcome.ended = f"still running after {self.limit:.0f} s"
        self._process.kill()
        self._process.join()
        return True


def _work(work: Work[Item], item: Item, connection: Connection) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    connection.send((work(item, lambda record: connection.send((record, False))), True))
