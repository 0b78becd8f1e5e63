"""Does the small model compute what the masked one does? And where not, from which module on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import TraceError, VerificationError
from tersor.graph.coupling import Coupling
from tersor.graph.follow import follow
from tersor.graph.inputs import copied, evaluating, run, tensors_of

ModuleOutputs = list[tuple[str, Tensor]]


def outputs_of(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Every tensor that the model returns for the inputs, in eval mode."""
    with evaluating(model):
        return tensors_of(run(model, copied(inputs)))


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference, relative to the largest expected value; infinite where shapes differ.

    >>> relative_error([torch.tensor([1.0, 2.5])], [torch.tensor([1.0, 2.0])])
    0.25
    """
    if len(actual) != len(expected):
        return float("inf")
    return max((_relative_error(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = actual.double(), expected.double()
    scale = float(b.abs().max())
    error = float((a - b).abs().max())
    if not np.isfinite(error):
        return 0.0 if torch.equal(a.nan_to_num(), b.nan_to_num()) else float("inf")
    return error / scale if scale else error


def module_outputs(model: nn.Module, inputs: Any) -> tuple[ModuleOutputs, str]:
    """Every tensor that every module call returned, in order, and the model's own error if it could not finish."""
    recorded: ModuleOutputs = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            recorded.extend((name, tensor.detach().clone()) for tensor in tensors_of(output))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    try:
        with evaluating(model):
            run(model, copied(inputs))
    except TraceError as error:
        return recorded, error.what
    finally:
        for handle in handles:
            handle.remove()
    return recorded, ""


def first_divergence(
    model: nn.Module,
    coupling: Coupling,
    removed: np.ndarray,
    masked: ModuleOutputs,
    small: ModuleOutputs,
    tolerance: float,
) -> str:
    """The first module whose output, without what was removed, differs; in words.

    Args:
        model: at its full size, where its labels are read off once more.
        coupling: of the model.
        removed: the classes that leave.
        masked: the outputs of the model's modules.
        small: the outputs of the small model's modules, as far as it ran.
        tolerance: the relative error that passes.
    """
    labelled = follow(model, coupling.example_inputs, record_outputs=True).outputs
    for (name, fields), (_, expected), (_, actual) in zip(labelled, masked, small, strict=False):
        for dim, vector in coupling.settled(fields).items():
            kept = torch.from_numpy(np.flatnonzero(~removed[coupling.classes[vector.numpy()]]))
            if expected.dim() > dim and expected.shape[dim] == len(vector):
                expected = expected.index_select(dim, kept.to(expected.device))
        if actual.shape != expected.shape:
            return f"{name or 'the model'} (shape {tuple(actual.shape)} in place of {tuple(expected.shape)})"
        error = _relative_error(actual, expected)
        if error > tolerance:
            return f"{name or 'the model'} (relative error {error:.2g})"
    if len(small) < len(masked):
        return f"{masked[len(small)][0] or 'the model'} (it does not run)"
    return "no module's output: only the model's own code differs"


def divergence_error(where: str, cause: str) -> VerificationError:
    """The error that names the first diverging module."""
    return VerificationError(
        "the small model does not compute what the masked one does" + (f": {cause}" if cause else ""),
        where=where,
        remedy=(
            "The model is unchanged. A channel count that stands in forward as a number must be taken from a tensor "
            "instead (x.shape[1]); or exclude this layer from the config list."
        ),
    )
