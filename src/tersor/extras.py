"""Optional packages: which are missing, and the error that names them."""

from __future__ import annotations

import importlib.util

from tersor.errors import MissingExtraError


def missing(*packages: str) -> str:
    """Which packages are not installed, in words; empty where all are.

    >>> missing("torch", "no_such_package")
    'not installed: no_such_package'
    """
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def require(where: str, extra: str, *packages: str) -> None:
    """Refuse to begin what would end without optional packages.

    Args:
        where: what wants them.
        extra: what to give to pip.
        packages: as they are imported.

    Raises:
        MissingExtraError: saying what is missing.
    """
    if reason := missing(*packages):
        raise MissingExtraError(reason, where=where, remedy=f"Install it: pip install '{extra}'.")
