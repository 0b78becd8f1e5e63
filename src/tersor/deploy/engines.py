"""Which inference engines there are."""

from __future__ import annotations

from tersor.deploy.engine import Engine
from tersor.deploy.executorch import ExecuTorch
from tersor.deploy.inductor import Inductor
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.deploy.openvino import OpenVino
from tersor.deploy.tensorrt import TensorRT
from tersor.errors import InvalidValueError, nearest


def engines() -> dict[str, type[Engine]]:
    """All engines by name, in the order in which ``auto`` prefers them."""
    return {engine.name: engine for engine in (OnnxRuntime, OpenVino, Inductor, TensorRT, ExecuTorch)}


def engine_of(name: str, *, to_open: bool = False) -> Engine:
    """An engine by its name; ``auto`` is the first that is installed.

    Args:
        name: one of :func:`engines`, or ``auto``.
        to_open: whether it has only to run what was built, which may need less.

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
    known[name].require(to_open=to_open)
    return known[name]()
