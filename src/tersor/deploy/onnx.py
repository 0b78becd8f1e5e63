"""ONNX: one file with a free batch size, and the proof that ONNX Runtime computes what the model computes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tersor.analysis.batches import batch_size_of, with_batch_size
from tersor.deploy.lowering import Program, export_arguments
from tersor.errors import TraceError, VerificationError
from tersor.extras import require
from tersor.graph.inputs import evaluating, tensors_of
from tersor.speedup.verify import outputs_of, relative_error
from tersor.storage import replacing_file

TO_WRITE = ("onnx", "onnxscript")
"""What a file is written with; other engines than ONNX Runtime read it, too."""
OPSET = 21
"""The first with types of four bits and with blocks; of what stands here nothing needs a later one."""

_RULES = "_DEFAULT_REWRITE_RULES"
_QUADRATIC = ("SlicesSplit",)


def require_onnx() -> None:
    """Refuse to begin what would end without ONNX.

    Raises:
        MissingExtraError: one of its packages is not installed.
    """
    require("onnx", "tersor[onnx]", *TO_WRITE, "onnxruntime")


def export_onnx(model: nn.Module, example_inputs: Any, path: str | os.PathLike[str]) -> Path:
    """Write a model as one ONNX file, in eval mode and with a free batch size.

    Args:
        model: any model that `torch.export` can follow; it is left as it was.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Tensors whose dimension 0 is
            that of the first one get a free batch size.
        path: the file to write or replace.

    Returns:
        The path.

    Raises:
        MissingExtraError: ONNX is not installed.
        TraceError: the exporter rejects the model.
    """
    require_onnx()
    args, kwargs, shapes = export_arguments(model, example_inputs)
    with evaluating(model), replacing_file(path) as temporary, _exporter(), _traced_errors(type(model).__name__):
        torch.onnx.export(
            model,
            args,
            temporary,
            kwargs=kwargs,
            dynamo=True,
            external_data=False,
            verbose=False,
            dynamic_shapes=shapes,
        )
    return Path(path)


def write_program(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a lowered model as one ONNX file: ``QuantizeLinear`` and ``DequantizeLinear``, weights as stored numbers.

    Args:
        program: of :func:`tersor.deploy.lowering.lower`, prepared for an engine or not.
        path: the file to write or replace.
        opset: of the standard's operators.
        metadata: to be found in the file.

    Raises:
        MissingExtraError: ONNX is not installed.
        TraceError: the exporter knows no translation of an operator.
    """
    require("onnx", "tersor[onnx]", *TO_WRITE)
    import onnx

    from tersor.deploy.onnx_operators import (
        join_dynamic,
        name_by_module,
        pack_small_types,
        pads_into_convolutions,
        translations,
    )

    with replacing_file(path) as temporary, _exporter(), _traced_errors(type(program).__name__):
        exported = torch.onnx.export(
            program.exported,
            (),
            dynamo=True,
            verbose=False,
            custom_translation_table=translations(),
            opset_version=opset,
        )
        assert exported is not None
        pack_small_types(exported.model)
        join_dynamic(exported.model)
        pads_into_convolutions(exported.model)
        exported.model.metadata_props.update(metadata or {})
        name_by_module(exported.model)
        exported.save(temporary, external_data=False)
        onnx.checker.check_model(os.fspath(temporary))
    return Path(path)


@contextmanager
def _traced_errors(where: str) -> Iterator[None]:
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        raise TraceError(
            f"torch.onnx.export cannot follow it: {str(error.__cause__ or error).splitlines()[0]}",
            where=where,
            remedy="Leave the export out, or change what torch.export rejects.",
        ) from error


@contextmanager
def _exporter() -> Iterator[None]:
    """The exporter, silent about itself (deprecations, optional packages that nobody asked for), and in linear time.

    Its optimizer has one rule that looks through the whole graph at each node of it: minutes for some thousand nodes.
    What that rule does, ``Split`` for two ``Slice``, is not missed.
    """
    from onnxscript import rewriter

    logger = logging.getLogger("torch.onnx")
    level, rules = logger.level, getattr(rewriter, _RULES, ())
    logger.setLevel(logging.ERROR)
    try:
        setattr(rewriter, _RULES, tuple(rule for rule in rules if rule.name not in _QUADRATIC))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        setattr(rewriter, _RULES, rules)


def check_onnx(
    path: str | os.PathLike[str], model: nn.Module, example_inputs: Any, *, tolerance: float = 1e-4
) -> float:
    """Run an ONNX file in ONNX Runtime beside the model, at another batch size than the example's.

    Args:
        path: what `export_onnx` wrote.
        model: the model that was exported.
        example_inputs: as for `export_onnx`.
        tolerance: the largest accepted error.

    Returns:
        The largest difference of the outputs, relative to the largest output.

    Raises:
        VerificationError: the error is above the tolerance.
    """
    require_onnx()
    import onnxruntime  # here, because the package is optional

    args, kwargs = with_batch_size(example_inputs, batch_size_of(example_inputs) + 2)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feed = {name: tensor for name, tensor in kwargs.items() if isinstance(tensor, Tensor)}
    feed |= dict(zip((name for name in names if name not in kwargs), tensors_of(args), strict=False))
    results = session.run(None, {name: feed[name].cpu().numpy() for name in names})
    expected = [tensor.cpu() for tensor in outputs_of(model, kwargs if kwargs else args)]
    error = relative_error([torch.from_numpy(result) for result in results], expected)
    if not error <= tolerance:
        raise VerificationError(
            f"ONNX Runtime's outputs differ from the model's by {error:.2g} relative, more than {tolerance:g}",
            where=os.fspath(path),
            remedy="Report it with the model: the exporter or an operator of the runtime computes something else.",
        )
    return error
