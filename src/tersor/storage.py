"""Files that are written whole or not at all, and the safetensors format; nothing here ever unpickles.

A file is written under a temporary name in the same folder, flushed to the disk and then renamed over the old one; a
folder is filled as a hidden sibling and then takes the place of the old one. Whoever is interrupted in between,
with Ctrl-C or by a crash, keeps what was there before.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersor.errors import CheckpointError, MaskError

MASKS_FORMAT = "tersor-masks"
CALIBRATION_FORMAT = "tersor-calibration"
CALIBRATION_FILE = "calibration.safetensors"
"""What a calibration is called beside the files of a checkpoint."""


@contextmanager
def replacing_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; what is written there becomes ``path`` when the block ends well.

    Args:
        path: the file to write or replace. Missing folders above it are made.

    Yields:
        The path to write to. If the block raises, it is removed and the old file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(path, "tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path``, which becomes ``path`` when the block ends well.

    An older folder is renamed away, the new one renamed in, and only then is the older one deleted.

    Args:
        path: the folder to write or replace. Missing folders above it are made.

    Yields:
        The folder to fill. If the block raises, it is removed and the old folder stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, older = _hidden_sibling(path, "tmp"), _hidden_sibling(path, "old")
    temporary.mkdir()
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            _flush(file)
        if path.exists():
            path.rename(older)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if older.exists() and not path.exists():
            older.rename(path)
        raise
    _flush(path.parent)
    shutil.rmtree(older, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_text(Path(folder) / "reports" / "a.txt", "half the channels").read_text()
    'half the channels'
    """
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write tensors of any device, stride and sharing to one safetensors file, whole or not at all.

    Args:
        path: the file to write or replace.
        tensors: what to write. Tensors that share memory are written each in full.
        metadata: strings for the header of the file.

    Returns:
        The path.

    Raises:
        CheckpointError: a tensor has no values (meta device) or a dtype or layout that safetensors does not know.
    """
    path = Path(path)
    with replacing_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(_separate(tensors), temporary, metadata=dict(metadata or {}))
            temporary.chmod(mode)  # safetensors would leave it readable by its owner alone
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"cannot be written as safetensors: {error}",
                where=str(path),
                remedy="Only dense tensors of the ordinary dtypes, with values, can be saved.",
            ) from error
    return path


def read_tensors(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the header's strings of a safetensors file.

    Args:
        path: the file to read.
        device: where the tensors are put.

    Returns:
        The tensors, which own their memory, and the metadata.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or is cut short.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     read_tensors(write_tensors(f"{folder}/a", {"step": torch.tensor(3)}, {"by": "me"}))
    ({'step': tensor(3)}, {'by': 'me'})
    """
    mapped, metadata = map_tensors(path)
    # A copy, because what is mapped changes with the file, which others may write.
    return {name: tensor.to(device, copy=True) for name, tensor in mapped.items()}, metadata


def map_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As :func:`read_tensors`, but the tensors are maps of the file: only what is used of them is read from the disk.

    The file must not be written to while they are in use; replaced or removed it may be.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, or is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError("there is no such file", where=str(path), remedy="Check the path.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"is damaged or no safetensors file ({error})",
            where=str(path),
            remedy="Copy or save it again. Pickled files (.pt, .pth) are not read, because they can run code.",
        ) from error


def save_masks(masks: Mapping[str, Mapping[str, Tensor]], path: str | os.PathLike[str]) -> Path:
    """Write masks to one safetensors file, under the keys ``module::target``.

    Args:
        masks: module name -> target name -> mask; true (or 1) keeps, false (or 0) removes. The root module is ``""``.
        path: the file to write or replace.

    Returns:
        The path.

    Raises:
        MaskError: a mask holds something other than zeros and ones.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_masks(save_masks({"fc": {"weight": torch.tensor([True, False])}}, f"{folder}/masks.safetensors"))
    {'fc': {'weight': tensor([ True, False])}}
    """
    flat: dict[str, Tensor] = {}
    for module, targets in masks.items():
        for target, mask in targets.items():
            if mask.dtype != torch.bool and not torch.all((mask == 0) | (mask == 1)):
                raise MaskError("a mask holds only ones, which keep, and zeros", where=f"masks[{module!r}][{target!r}]")
            flat[f"{module}::{target}"] = mask.bool()
    return write_tensors(path, flat, {"format": MASKS_FORMAT})


def load_masks(path: str | os.PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """Read the masks that `save_masks` wrote.

    Args:
        path: the file to read.

    Returns:
        Module name -> target name -> bool mask.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something other than masks.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != MASKS_FORMAT:
        raise CheckpointError(
            "is a safetensors file, but holds no masks", where=str(path), remedy="Give a file written by save_masks."
        )
    masks: dict[str, dict[str, Tensor]] = {}
    for key, mask in tensors.items():
        module, _, target = key.rpartition("::")
        masks.setdefault(module, {})[target] = mask
    return masks


def save_calibration(calibration: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Write a calibration config to one safetensors file: tensors as they are, all else as JSON in its header.

    Args:
        calibration: ``{module: {target: {key: tensor, number, string, list or None}}}``.
        path: the file to write or replace.

    Returns:
        The path.

    Raises:
        CheckpointError: it holds something else.

    >>> import tempfile
    >>> config = {"fc": {"weight": {"scale": torch.tensor(0.5), "quant_dtype": "int8"}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     load_calibration(save_calibration(config, f"{folder}/calibration.safetensors"))
    {'fc': {'weight': {'quant_dtype': 'int8', 'scale': tensor(0.5000)}}}
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, dict[str, Any]]] = {}
    for module, targets in calibration.items():
        for target, keys in targets.items():
            tensors.update({f"{module}::{target}::{key}": v for key, v in keys.items() if isinstance(v, Tensor)})
            others = {key: value for key, value in keys.items() if not isinstance(value, Tensor)}
            plain.setdefault(module, {})[target] = others
    try:
        text = json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"holds what JSON does not: {error}",
            where=str(path),
            remedy="A calibration config holds tensors, numbers, strings, lists and None.",
        ) from None
    return write_tensors(path, tensors, {"format": CALIBRATION_FORMAT, "calibration": text})


def load_calibration(path: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Read what :func:`save_calibration` wrote.

    Raises:
        CheckpointError: there is no such file, or it is no calibration.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != CALIBRATION_FORMAT:
        raise CheckpointError(
            "is no file of calibrations", where=str(path), remedy="Write one with tersor.storage.save_calibration."
        )
    calibration: dict[str, dict[str, dict[str, Any]]] = json.loads(metadata["calibration"])
    for name, tensor in tensors.items():
        module, target, key = name.rsplit("::", 2)
        calibration[module][target][key] = tensor
    return calibration


def sha256_of(path: Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, no two of which share memory: safetensors accepts nothing else."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def _hidden_sibling(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{suffix}")


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder, and keeps its names by itself.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
