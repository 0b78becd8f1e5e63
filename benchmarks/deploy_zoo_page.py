"""``docs/deploy_zoo.md`` from its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "deploy_zoo.md"


def page(document: Mapping[str, Any]) -> str:
    """The whole page."""
    return ""
