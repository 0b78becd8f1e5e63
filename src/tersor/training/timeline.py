"""What compressors do at which step of one training run: for people to read before it begins."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Event:
    """Something that a compressor does.

    Attributes:
        action: in words.
        first: after how many optimizer steps it happens first; 0 is before the first one, None after the last.
        last: after how many it happens last; None where it goes on to the end, or happens once (``every`` 0).
        every: how many steps lie between; 0 for once.
        compressor: whose class does it.

    >>> Event("prunes to 0.5", 10, every=0).when, Event("rounds", 0, every=1).when, Event("calibrates", None).when
    ('after step 10', 'every step', 'at the end')
    """

    action: str
    first: int | None = 0
    last: int | None = None
    every: int = 0
    compressor: str = ""

    @property
    def when(self) -> str:
        """In words."""
        if self.first is None:
            return "at the end"
        if self.every == 0:
            return f"after step {self.first}" if self.first else "at the start"
        often = "every step" if self.every == 1 else f"every {self.every} steps"
        begin = f" from step {self.first} on" if self.first else ""
        if self.last is None:
            return f"{often}{begin}"
        return f"{often}, {self.first} to {self.last}"


@dataclass(frozen=True)
class Timeline:
    """All that fused compressors do, in the order in which it happens. Printing it with rich shows a table.

    Attributes:
        events: what happens.
    """

    events: tuple[Event, ...]

    @classmethod
    def of(cls, events: Iterable[Event]) -> Timeline:
        """In order: what goes on all the time stands where it begins."""
        return cls(tuple(sorted(events, key=lambda event: float("inf") if event.first is None else event.first)))

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"events": [{**asdict(event), "when": event.when} for event in self.events]}

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        width = max((len(event.when) for event in self.events), default=0)
        return "\n".join(f"{event.when:<{width}}  {event.compressor}: {event.action}" for event in self.events)

    def __rich__(self) -> Table:
        table = Table("when", "compressor", "what", box=None, padding=(0, 2, 0, 0))
        for event in self.events:
            table.add_row(event.when, event.compressor, event.action)
        return table
