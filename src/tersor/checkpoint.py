"""Checkpoints of models whose sizes have changed: safetensors for the values, JSON for the shapes, never pickle.

A model that was sped up has the classes and the code of the original, with smaller tensors. So a checkpoint holds the
tensors and what differs from the original, and loading builds the original and gives every tensor its small shape.

    checkpoint/
      model.safetensors     every parameter and buffer once, persistent or not
      architecture.json     their shapes, dtypes and ties, the sizes of the modules, a checksum, the user's metadata
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx, nn

from tersor.errors import CheckpointError, nearest
from tersor.graph.inputs import named_tensors
from tersor.speedup.attention import narrow_attention
from tersor.speedup.resize import CORRECTED, size_attributes
from tersor.speedup.slicing import Snapshot
from tersor.storage import CALIBRATION_FILE, read_tensors, replacing_folder, sha256_of, write_tensors, write_text
from tersor.wrapping import is_wrapped, refuse_sharded

TENSORS_FILE = "model.safetensors"
ARCHITECTURE_FILE = "architecture.json"
DEPLOYMENT_FILE = "deployment.json"  # of another kind of folder, which is told apart
FORMAT = "tersor-checkpoint"
VERSION = 1


class TensorRecord(BaseModel):
    """One parameter or buffer; one that is ``tied_to`` an earlier name is the same tensor and is stored once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["parameter", "buffer"]
    shape: tuple[int, ...]
    dtype: str
    requires_grad: bool
    tied_to: str | None


class Architecture(BaseModel):
    """What ``architecture.json`` holds, beside its own checksum.

    ``sha256`` is that of the tensor file, ``tensors`` has their names as keys, ``sizes`` those of modules (the root is
    ``""``) and then of attributes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["tersor-checkpoint"]
    version: Literal[1]
    tersor: str
    model: str
    sha256: str
    tensors: dict[str, TensorRecord]
    sizes: dict[str, dict[str, int | tuple[int, ...]]]
    metadata: dict[str, Any]


def save(model: nn.Module, directory: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Save a model, pruned or not, whole or not at all; an older checkpoint in the folder is replaced.

    Where several processes train, one of them calls it.

    Args:
        model: the unwrapped model. It is not changed.
        directory: a folder of the checkpoint's own, made if missing.
        metadata: what JSON can hold (accuracy, recipe ...); `read_architecture` gives it back.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model is still wrapped, the folder holds other files, or something cannot be saved.
        WrapError: its parameters are shared out over processes (``fully_shard``).

    Example:
        >>> import tempfile
        >>> small = nn.Linear(8, 2)  # what is left of nn.Linear(8, 4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save(small, f"{folder}/small", metadata={"accuracy": 0.99})
        ...     loaded = load(lambda: nn.Linear(8, 4), f"{folder}/small")
        >>> loaded, torch.equal(loaded.weight, small.weight)
        (Linear(in_features=8, out_features=2, bias=True), True)
    """
    directory = Path(directory)
    refuse_sharded(model)
    _refuse_wrapped(model)
    _refuse_graph(model)
    _refuse_foreign_folder(directory)
    try:
        plain_metadata = json.loads(json.dumps(dict(metadata or {})))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"metadata must be what JSON can hold: {error}", where=str(directory)) from error
    named = named_tensors(model)
    records = _describe(named)
    with replacing_folder(directory) as folder:
        tensors = {name: named[name] for name, record in records.items() if record.tied_to is None}
        tensors_file = write_tensors(folder / TENSORS_FILE, tensors, {"format": "pt"})
        architecture = Architecture(
            format=FORMAT,
            version=VERSION,
            tersor=version("tersor"),
            model=f"{type(model).__module__}.{type(model).__qualname__}",
            sha256=sha256_of(tensors_file),
            tensors=records,
            sizes={name: sizes for name, module in model.named_modules() if (sizes := size_attributes(module))},
            metadata=plain_metadata,
        )
        content = architecture.model_dump(mode="json")
        write_text(folder / ARCHITECTURE_FILE, json.dumps({**content, "checksum": _checksum(content)}, indent=1))
    return directory


def load(
    build_fn_or_model: Callable[[], nn.Module] | nn.Module,
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Rebuild the model that `save` wrote.

    Every tensor gets its saved shape, dtype, ``requires_grad`` and ties, and every module its sizes. Parameters stay
    the same objects, so an optimizer that holds them stays valid. A model built on the ``meta`` device is filled too.

    Args:
        build_fn_or_model: what makes the model at its original sizes (a function without arguments), or such a
            model, which is changed in place. Its code must be the one that was saved.
        directory: the checkpoint.
        device: where the tensors are put.

    Returns:
        The model, in the training mode in which it was built.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, foreign or newer, or is that of another model. A given
            model is then left as it was.
    """
    directory = Path(directory)
    architecture = read_architecture(directory)
    tensors = _read_verified(directory, architecture, device)
    model = build_fn_or_model if isinstance(build_fn_or_model, nn.Module) else build_fn_or_model()
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"the function returned {type(model).__name__}",
            where="build_fn_or_model",
            remedy="Return a torch.nn.Module.",
        )
    _refuse_wrapped(model)
    _refuse_other_model(model, architecture, directory)
    with Snapshot(model):
        _place(model, architecture, tensors)
    return model


def read_architecture(directory: str | os.PathLike[str]) -> Architecture:
    """Read and validate the ``architecture.json`` of a checkpoint, without its tensors.

    Raises:
        CheckpointError: the folder is no checkpoint, or the file is damaged, foreign or of a newer format.
    """
    path = Path(directory) / ARCHITECTURE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if (path.parent / DEPLOYMENT_FILE).exists():
            raise CheckpointError(
                "is a deployment: a file for an engine, from which no model can be rebuilt",
                where=str(directory),
                remedy="Open it with tersor.deploy.CompiledModel.load, or give the checkpoint that it was made of.",
            ) from error
        raise CheckpointError(
            f"is no checkpoint: {ARCHITECTURE_FILE} cannot be read ({error.strerror})",
            where=str(directory),
            remedy="Give the folder that tersor.save wrote.",
        ) from error
    except ValueError as error:
        raise CheckpointError(f"is damaged ({error})", where=str(path), remedy="Copy or save it again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            "was not written by Tersor", where=str(path), remedy="Give the folder that tersor.save wrote."
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"has format version {content.get('version')!r}, written by Tersor {content.get('tersor')}",
            where=str(path),
            legal=[VERSION],
            remedy="Update Tersor.",
        )
    try:
        if content.pop("checksum", None) != _checksum(content):
            raise ValueError("the checksum differs")
        return Architecture.model_validate(content)
    except ValueError as error:  # that of pydantic is one too
        raise CheckpointError(f"is damaged ({error})", where=str(path), remedy="Copy or save it again.") from error


def _describe(named: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    records: dict[str, TensorRecord] = {}
    first_names: dict[int, str] = {}
    for name, tensor in named.items():
        first = first_names.setdefault(id(tensor), name)
        records[name] = TensorRecord(
            kind=_kind(tensor),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            requires_grad=tensor.requires_grad,
            tied_to=None if first == name else first,
        )
    return records


def _read_verified(directory: Path, architecture: Architecture, device: str | torch.device) -> dict[str, Tensor]:
    """The tensors, after the file's checksum and the tensors' names, shapes and dtypes were found to be as recorded."""
    path = directory / TENSORS_FILE
    tensors, _ = read_tensors(path, device=device)
    written = {name: record for name, record in architecture.tensors.items() if record.tied_to is None}
    described = {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()
    }
    if sha256_of(path) != architecture.sha256 or described != {n: (r.shape, r.dtype) for n, r in written.items()}:
        raise CheckpointError(
            f"does not belong to its {ARCHITECTURE_FILE}: the checksum or the shapes differ, so one of them is damaged",
            where=str(path),
            remedy="Copy or save the checkpoint again.",
        )
    return tensors


def _place(model: nn.Module, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Give the model its tensors and sizes."""
    placed: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, record in architecture.tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        current = getattr(owner, attribute)
        if record.tied_to is not None:
            current = placed[record.tied_to]
        elif id(current) in taken or current.is_meta:  # tied here but not there; or without memory to put values in
            current = tensors[name] if record.kind == "buffer" else nn.Parameter(tensors[name], record.requires_grad)
        else:
            current.grad = None
            current.data = tensors[name]
            current.requires_grad_(record.requires_grad)
        setattr(owner, attribute, current)
        placed[name] = current
        taken.add(id(current))
    for module_name, sizes in architecture.sizes.items():
        module = model.get_submodule(module_name)
        corrected = tuple(name for name in sizes if name not in size_attributes(module))
        for attribute, value in sizes.items():
            setattr(module, attribute, value)
        if corrected:
            setattr(module, CORRECTED, corrected)
    narrow_attention(model)


def _refuse_wrapped(model: nn.Module) -> None:
    if is_wrapped(model):
        raise CheckpointError(
            "the model is wrapped: a compressor's simulation is in place",
            where=type(model).__name__,
            remedy="Call unwrap_model() of the compressor first.",
        )


def _refuse_graph(model: nn.Module) -> None:
    if isinstance(model, fx.GraphModule):
        raise CheckpointError(
            "a traced graph is code, which safetensors cannot hold",
            where=type(model).__name__,
            remedy=(
                "Take the sizes in forward from tensors (x.flatten(1) in place of x.view(-1, 400)), so that the "
                "speedup keeps the model's own class; or save the graph with torch.export.save."
            ),
        )


def _refuse_foreign_folder(directory: Path) -> None:
    """Replacing a checkpoint deletes the older folder, so it must hold nothing else."""
    if directory.exists() and not directory.is_dir():
        raise CheckpointError("is a file", where=str(directory), remedy="Give a folder of the checkpoint's own.")
    others = {path.name for path in directory.glob("*")} - {TENSORS_FILE, ARCHITECTURE_FILE, CALIBRATION_FILE}
    if others:
        raise CheckpointError(
            f"holds other files too ({_few(others)}), which replacing the folder would delete",
            where=str(directory),
            remedy="Give a folder of the checkpoint's own.",
        )


def _refuse_other_model(model: nn.Module, architecture: Architecture, directory: Path) -> None:
    named, modules = named_tensors(model), dict(model.named_modules(remove_duplicate=False))
    records = architecture.tensors
    missing = [name for name in named if name not in records]
    unexpected = [name for name in records if name not in named]
    unlike = [
        name
        for name in records.keys() & named.keys()
        if records[name].kind != _kind(named[name]) or len(records[name].shape) != named[name].dim()
    ]
    unlike += [
        name
        for name, sizes in architecture.sizes.items()
        if name not in modules or not all(_is_size(getattr(modules[name], key, None)) for key in sizes)
    ]
    findings = {
        "the checkpoint does not have": missing,
        "only the checkpoint has": unexpected,
        "of another kind are": sorted(unlike),
    }
    if any(findings.values()):
        spelling = nearest(unexpected[0], missing) if unexpected else ""
        raise CheckpointError(
            "is the checkpoint of another model: "
            + "; ".join(f"{text} {_few(names)}" for text, names in findings.items() if names),
            where=str(directory),
            remedy=f"{spelling} Build the model that was saved, {architecture.model}, at its original sizes.".strip(),
        )


def _is_size(value: object) -> bool:
    """Whether an attribute holds a size, or several."""
    return type(value) is int or (isinstance(value, (tuple, list)) and all(type(item) is int for item in value))


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kind(tensor: Tensor) -> Literal["parameter", "buffer"]:
    return "parameter" if isinstance(tensor, nn.Parameter) else "buffer"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
