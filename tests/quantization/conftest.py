"""Each model that a test wraps is given back at its end."""

from collections.abc import Iterator
from typing import Any

import pytest

from tersor.compressor import Compressor


@pytest.fixture(autouse=True)
def given_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remember every compressor, and unwrap what they wrapped."""
    made: list[Compressor] = []
    make = Compressor.__init__

    def remember(self: Compressor, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(Compressor, "__init__", remember)
    yield
    for compressor in made:
        compressor.unwrap_model()
