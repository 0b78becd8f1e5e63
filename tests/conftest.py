"""Fixtures that every test runs under."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tersor.wrapping import ModelWrappers
from tests.leaks import no_leaks


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves a hook, a parametrization or a changed setting of torch behind."""
    with no_leaks():
        yield


@pytest.fixture
def unwrapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Unwrap every model at the end, so that what is left behind then is found."""
    made: list[ModelWrappers] = []
    first = ModelWrappers.__init__

    def watched(self: ModelWrappers, *args: Any, **kwargs: Any) -> None:
        first(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(ModelWrappers, "__init__", watched)
    yield
    for wrappers in made:
        wrappers.detach()
