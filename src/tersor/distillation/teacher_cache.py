"""What a teacher gave for each sample: in memory, or in files that another run opens again.

Files come in pairs with a name of their own, so that no process ever writes to another's: ``NAME.safetensors`` holds
the values of many samples, row after row, and ``NAME.json`` says whose they are, which teacher gave them, and the
checksum of the other. The values are written first: without its JSON a file does not count.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tersor.errors import CheckpointError, NumericalError, TrainingError
from tersor.storage import map_tensors, sha256_of, write_tensors, write_text

FORMAT = "tersor-teacher-values"
BYTES_A_FILE = 64 << 20
SECONDS_A_FILE = 120.0

Schema = dict[str, list[Any]]
"""For each name of a value, its dtype and the shape of one row."""


@final
class TeacherCache:
    """The values of a teacher by the keys of samples. ``len()`` says of how many samples.

    New values are collected in memory, and written where 64 MB have come together, two minutes have gone by since the
    last file, or :meth:`flush` is called: that much a killed run loses, and no more.

    Attributes:
        hits: how many samples were answered without the teacher.
        misses: how many the teacher was asked for.

    Args:
        directory: where files are kept; None for memory alone.
        made_by: whatever must agree for values to be the same: written into each file, and compared.
        dtype: in which floating point numbers are kept; None for the teacher's own.

    Raises:
        CheckpointError: the directory holds values that something else gave, or a damaged file.
    """

    def __init__(self, directory: Path | None, made_by: Mapping[str, Any], dtype: torch.dtype | None) -> None:
        self.hits = 0
        self.misses = 0
        self._directory = directory
        self._made_by = {**made_by, "dtype": None if dtype is None else _name_of(dtype)}
        self._dtype = dtype
        self._places: dict[str, tuple[_Block, int]] = {}
        self._schema: Schema | None = None
        self._pending: list[_Block] = []
        self._pending_bytes = 0
        self._written = time.monotonic()
        self._files: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def missing(self, keys: Sequence[str], checks: Sequence[str]) -> list[int]:
        """The positions of keys that are not known, each key once.

        Raises:
            TrainingError: under a key there is another sample now than when the teacher saw it.
        """
        positions: list[int] = []
        new: dict[str, str] = {}
        for position, (key, check) in enumerate(zip(keys, checks, strict=True)):
            if key in self._places:
                block, number = self._places[key]
                known = block.checks[number]
            elif key in new:
                known = new[key]
            else:
                new[key] = check
                positions.append(position)
                continue
            if known and check and known != check:
                raise TrainingError(
                    f"sample {key} is another one than when the teacher saw it.",
                    where=str(self._directory or "the data set"),
                    remedy="Where its augmentation is random, replay it (variants=1). Where its random numbers come "
                    "from elsewhere than random, numpy.random and torch on the CPU, use by='content'. "
                    "Where the data changed, give another directory.",
                )
        return positions

    def add(self, keys: Sequence[str], checks: Sequence[str], values: Mapping[str, Tensor], whole: bool) -> None:
        """Keep the rows of new samples.

        Args:
            keys: one for each row; a single one for all rows where they are `whole`.
            checks: what the samples' contents were.
            values: the teacher's, of any device.
            whole: all rows belong to one key.

        Raises:
            TrainingError: names, dtypes or shapes of rows are others than those of earlier samples.
            NumericalError: a number is too large for the dtype of the cache.
        """
        tensors = {name: self._kept(name, tensor) for name, tensor in values.items()}
        schema = _schema_of(tensors)
        if self._schema is None:
            self._schema = schema
        elif schema != self._schema:
            raise TrainingError(
                f"the teacher gives {_text_of(schema)}, and for earlier samples it gave {_text_of(self._schema)}.",
                where=str(self._directory or "compute"),
                remedy="A sample's values must not depend on its batch: pad all batches to one length. "
                "Where the teacher changed, give it another fingerprint and directory.",
            )
        count = len(next(iter(tensors.values())))
        block = _Block(list(keys), [count] if whole else [1] * count, list(checks), lambda: tensors)
        self._enter(block)
        if self._directory is not None:
            self._pending.append(block)
            self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
            if self._pending_bytes >= BYTES_A_FILE or time.monotonic() - self._written > SECONDS_A_FILE:
                self.flush()

    def get(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """The rows of known samples, one after another, as new tensors; float32 where the cache has a dtype of its own.

        Raises:
            CheckpointError: a file is damaged.
        """
        assert self._schema is not None
        places = [self._places[key] for key in keys]
        values = {name: torch.cat([block.rows(name, number) for block, number in places]) for name in self._schema}
        if self._dtype is None:
            return values
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in values.items()}

    def flush(self) -> None:
        """Write what is not in files yet; nothing for a cache in memory."""
        if self._directory is None or not self._pending:
            return
        assert self._schema is not None
        tensors = {name: torch.cat([block.tensors[name] for block in self._pending]) for name in self._schema}
        path = write_tensors(self._directory / f"{secrets.token_hex(8)}.safetensors", tensors, {"format": FORMAT})
        content = {
            "format": FORMAT,
            "version": 1,
            **self._made_by,
            "values": self._schema,
            "sha256": sha256_of(path),
            "keys": list(chain.from_iterable(block.keys for block in self._pending)),
            "rows": list(chain.from_iterable(block.counts for block in self._pending)),
            "checks": list(chain.from_iterable(block.checks for block in self._pending)),
        }
        index = write_text(path.with_suffix(".json"), json.dumps(content))
        self._files.add(index.name)
        self._pending.clear()
        self._pending_bytes = 0
        self._written = time.monotonic()
        for key in content["keys"]:
            del self._places[key]  # so that the memory goes
        self._enter(_Block(content["keys"], content["rows"], content["checks"], lambda: map_tensors(path)[0]))

    def refresh(self) -> None:
        """Look for files that were written since, by other processes.

        Raises:
            CheckpointError: one of them is damaged, or something else gave its values.
        """
        if self._directory is None or not self._directory.is_dir():
            return
        for path in sorted(self._directory.glob("*.json")):
            if path.name not in self._files and path.with_suffix(".safetensors").exists():
                self._enter(self._opened(path))
                self._files.add(path.name)

    def _enter(self, block: _Block) -> None:
        for number, key in enumerate(block.keys):
            self._places.setdefault(key, (block, number))

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        dtype = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        kept = tensor.to("cpu", dtype, copy=True).contiguous()  # a copy: teachers may write to their outputs again
        if dtype != tensor.dtype and not torch.equal(kept.isfinite(), tensor.isfinite().cpu()):
            raise NumericalError(
                f"{name!r} holds {tensor[tensor.isfinite()].abs().max().item():g}, which is beyond {_name_of(dtype)}.",
                where="dtype",
                legal=("torch.bfloat16", "None"),
            )
        return kept

    def _opened(self, path: Path) -> _Block:
        """The samples of a file, whose values are read when one of them is asked for."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT or content["version"] != 1:
                raise ValueError(f"format {content['format']} {content['version']}")
            keys, counts, checks = content["keys"], content["rows"], content["checks"]
            if not len(keys) == len(counts) == len(checks):
                raise ValueError("keys, rows and checks differ in number")
            schema, made_by = content["values"], {name: content[name] for name in self._made_by}
            values = _Checked(path.with_suffix(".safetensors"), content["sha256"], schema, sum(counts))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        for name, wanted in self._made_by.items():
            if made_by[name] != wanted:
                raise CheckpointError(
                    f"was made with {name}={made_by[name]!r}, and not with {wanted!r}.",
                    where=str(path),
                    remedy="Give another directory, or delete this one.",
                )
        if self._schema not in (None, schema):
            raise CheckpointError(
                f"holds {_text_of(schema)}, and other values of this cache are {_text_of(self._schema or {})}.",
                where=str(path),
                remedy="Delete it, and its samples are computed again.",
            )
        self._schema = schema
        return _Block(keys, counts, checks, values)


@final
class _Block:
    """The rows of some samples, in memory or in a file that is opened when it is needed."""

    def __init__(
        self, keys: list[str], counts: list[int], checks: list[str], values: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        self.keys = keys
        self.counts = counts
        self.checks = checks
        self._starts = [0, *accumulate(counts)]
        self._values = values
        self._tensors: Mapping[str, Tensor] | None = None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        if self._tensors is None:
            self._tensors = self._values()
        return self._tensors

    def rows(self, name: str, number: int) -> Tensor:
        return self.tensors[name][self._starts[number] : self._starts[number + 1]]


@final
class _Checked:
    """The values in a file that an earlier run or another process wrote; it is looked through before it is believed."""

    def __init__(self, path: Path, sha256: str, schema: Schema, rows: int) -> None:
        self._path = path
        self._sha256 = sha256
        self._schema = schema
        self._rows = rows

    def __call__(self) -> Mapping[str, Tensor]:
        try:
            if sha256_of(self._path) != self._sha256:
                raise _damaged(self._path, "its checksum is another")
        except OSError as error:
            raise _damaged(self._path, str(error)) from error
        tensors, _ = map_tensors(self._path)
        if _schema_of(tensors) != self._schema or any(len(tensor) != self._rows for tensor in tensors.values()):
            raise _damaged(self._path, "it holds something else than its .json says")
        return tensors


def _damaged(path: Path, why: str) -> CheckpointError:
    # Not computed again silently: whoever has a disk that loses bits wants to know.
    return CheckpointError(
        f"is damaged ({why}).", where=str(path), remedy="Delete it, and its samples are computed again."
    )


def _schema_of(tensors: Mapping[str, Tensor]) -> Schema:
    return {name: [_name_of(tensors[name].dtype), list(tensors[name].shape[1:])] for name in sorted(tensors)}


def _text_of(schema: Schema) -> str:
    return ", ".join(f"{name} {dtype} {tuple(shape)}" for name, (dtype, shape) in schema.items()) or "nothing"


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
