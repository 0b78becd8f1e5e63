"""Fixtures that every test runs under."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

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
