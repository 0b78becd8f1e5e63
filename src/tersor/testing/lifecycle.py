"""What the suites of all compressors share: a loop of one's own, a crash in it, two processes, nothing left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tersor.compressor import Compressor
from tersor.testing.checks import assert_equal, hooks_of
from tersor.testing.toys import ToyTraining

Entry = dict[str, Any]
Way = Literal["evaluator", "loop"]


class Session(Protocol):
    """One network that is being compressed."""

    @property
    def training(self) -> ToyTraining:
        """How it is trained."""
        ...

    @property
    def compressor(self) -> Compressor:
        """The one under test."""
        ...

    def result(self, *, buffers: bool = True) -> dict[str, Tensor]:
        """What came of it; the model is unwrapped for that."""
        ...


SessionT = TypeVar("SessionT", bound=Session)
AfterEach = Callable[[int], object]
Loop = Callable[[SessionT, range, AfterEach], None]


def nothing(number: int) -> None:
    """After a step."""


def run_loop(session: Session, numbers: range, after_each: AfterEach = nothing) -> None:
    """A training loop of one's own, from the beginning or from a later step on, to its end.

    Args:
        session: what is trained.
        numbers: of the steps, from 0.
        after_each: is given how many steps are done.
    """
    if numbers.start == 0:
        session.compressor.start()
    for number in numbers:
        session.training.step(session.compressor, number)
        after_each(number + 1)
    session.compressor.finish()


def assert_goes_on(
    make: Callable[[int], AbstractContextManager[SessionT]],
    loop: Loop[SessionT],
    steps: int,
    crashes: Iterable[int],
    *,
    at_end: bool = False,
) -> None:
    """A loop that ends after some of its steps and goes on in objects that are made anew comes to the same bits.

    Args:
        make: a session without an evaluator, on a network of that seed.
        loop: see :func:`run_loop`.
        steps: of the loop.
        crashes: after how many steps it ends.
        at_end: try also what was saved when all was finished.
    """
    saved: dict[int, bytes] = {}
    with make(0) as session:
        training, compressor = session.training, session.compressor
        loop(session, range(steps), lambda number: saved.update({number: training.save(compressor)}))
        done = training.save(compressor)
        expected = session.result()
    for number in crashes:
        with make(1) as session:
            session.training.load(session.compressor, saved[number])
            loop(session, range(number, steps), nothing)
            assert_equal(expected, session.result(), f"when step {number} was the last before a crash")
    if at_end:
        with make(1) as session:
            session.training.load(session.compressor, done)
            assert_equal(expected, session.result(), "when it was saved at the end")


def by_both_ways(
    make: Callable[[Way], AbstractContextManager[SessionT]],
    compress: Callable[[SessionT], object],
    loop: Loop[SessionT],
    steps: int,
) -> dict[str, Tensor]:
    """What comes of an evaluator, and of a loop of one's own; buffers depend on the data, and are left out.

    Args:
        make: a session.
        compress: runs it by its evaluator.
        loop: see :func:`run_loop`.
        steps: of the loop.
    """
    found: dict[str, Tensor] = {}
    ways: Sequence[Way] = ("evaluator", "loop")
    for way in ways:
        with make(way) as session:
            if way == "loop":
                loop(session, range(steps), nothing)
            else:
                compress(session)
            found |= {f"{name} by {way}": value for name, value in session.result(buffers=False).items()}
    return found


def assert_nothing_left(model: nn.Module, hooks: Sequence[tuple[str, object]]) -> None:
    """No hook but those that were there, and no parametrization."""
    left = [f"{hook} on {name}" for name, hook in hooks_of(model) if (name, hook) not in hooks]
    assert not left, f"hooks are left behind: {'; '.join(left)}"
    assert not any(is_parametrized(module) for module in model.modules()), "a parametrization is left behind"
