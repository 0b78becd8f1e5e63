"""Which inference engines there are."""

from __future__ import annotations

from tersor.deploy.engine import Engine
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.deploy.openvino import OpenVino
from tersor.errors import InvalidValueError, nearest


def engines() -> dict[str, type[Engine]]:
    """All engines by name, in the order in which ``auto`` prefers them."""
    return {engine.name: engine for engine in (OnnxRuntime, OpenVino)}


def engine_of(name: str) -> Engine:
    """An engine by its name; ``auto`` is the first that is installed.

    Raises:
        InvalidValueError: there is none of that name.
        MissingExtraError: it is not installed.
    """
    known = engines()
    if name == "auto":
        name = next((own for own, engine in known.items() if not engine.why_not()), next(iter(known)))
    if name not in known:
        raise InvalidValueError(
            f"{name!r} is no engine", where="engine", legal=("auto", *known), remedy=nearest(name, known)
        )
    known[name].require()
    return known[name]()
