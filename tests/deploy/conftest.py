"""Fixtures of the tests of deployment."""

import pytest


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """In place of the fixture for all tests: lowering and ``torch.export`` put hooks on copies, which go with them."""
