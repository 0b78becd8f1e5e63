"""How the samples of a loader are told apart, by index or by content, and how a random augmentation is replayed."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tersor.distillation.content import checksum, content_of
from tersor.errors import InvalidValueError


class Keyed(NamedTuple):
    """A batch as it comes out of the workers.

    Attributes:
        batch: what the loader's own collate function made.
        keys: one for each sample, or a single one for a batch that came in one piece.
        checks: what the content of each sample was, by which a key that means another sample now is found out; empty
            where nobody looked.
        whole: the batch came in one piece, so how many rows it has is not known.
    """

    batch: Any
    keys: list[str]
    checks: list[str]
    whole: bool


class Asked(NamedTuple):
    """What a data set is asked for: an index, its key (theirs, if it is a list), the random state to start from."""

    index: Any
    keys: list[str]
    seed: int | None


class Sample(NamedTuple):
    """What a data set gave when it was asked."""

    value: Any
    keys: list[str]
    checks: list[str]


@final
class NumberedSampler:
    """Asks for what a sampler or a batch sampler asks for, with a key and the seed of this pass.

    All that differs between passes goes with the indices, since workers that persist keep the data set of the first.

    Attributes:
        variant: of the samples in passes that begin from now on.

    Args:
        sampler: the loader's own.
        batched: whether it gives lists of indices.
        seed: of the variants; None where nothing is replayed.
        known: keys that are not to be asked for.
    """

    def __init__(self, sampler: Any, batched: bool, seed: int | None, known: Container[str] = ()) -> None:
        self.variant = 0
        self._sampler = sampler
        self._batched = batched
        self._seed = seed
        self._known = known

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        # Not a generator itself: the variant is that of the moment when the pass begins.
        return self._asking(iter(self._sampler), self.variant)

    def _asking(self, indices: Iterator[Any], variant: int) -> Iterator[Any]:
        for index in indices:
            asked = [self._asked(one, variant) for one in index] if self._batched else [self._asked(index, variant)]
            asked = [one for one in asked if not all(key in self._known for key in one.keys)]
            if asked:
                yield asked if self._batched else asked[0]

    def _asked(self, index: Any, variant: int) -> Asked:
        listed = index.tolist() if isinstance(index, (Tensor, np.ndarray)) and index.ndim else index
        if isinstance(listed, list):
            if self._seed is not None:
                raise InvalidValueError(
                    "the sampler gives lists of indices, and a random state belongs to one sample.",
                    where="variants",
                    legal=("None",),
                    remedy="Give a batch_sampler to the loader in the place of its sampler, or replay nothing.",
                )
            return Asked(index, [_name_of(one) for one in listed], None)
        name = _name_of(index)
        if self._seed is None:
            return Asked(index, [name], None)
        key = f"{name}:{variant}"
        digest = hashlib.blake2b(f"{self._seed}/{key}".encode(), digest_size=8).digest()
        return Asked(index, [key], int.from_bytes(digest, "little"))


@final
class KeyedData(Dataset[Any]):
    """A map-style data set that gives each sample with its key; for whoever looks at it, it is the data set itself.

    >>> state = torch.get_rng_state()
    >>> noisy = KeyedData([torch.zeros(2)])
    >>> noisy[Asked(0, ["0:1"], seed=7)].keys, torch.equal(torch.get_rng_state(), state)
    (['0:1'], True)
    """

    def __init__(self, data: Any) -> None:
        self.__dict__["_data"] = data

    def __getattr__(self, name: str) -> Any:
        # A worker_init_fn may open the files of torch.utils.data.get_worker_info().dataset: of this. What begins
        # with underscores is asked for by pickle, and is about the one that is asked.
        if name == "_data" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._data, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._data, name, value)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, asked: Asked) -> Sample:
        (value,) = [self._data[asked.index]] if asked.seed is None else self._replayed([asked])
        return _sample(asked, value)

    def __getitems__(self, asked: list[Asked]) -> list[Sample]:
        """The samples of a batch, fetched at once where the data set can and nothing is replayed."""
        together = getattr(self._data, "__getitems__", None)
        if any(one.seed is not None for one in asked):
            values = self._replayed(asked)
        elif together:
            values = together([one.index for one in asked])
        else:
            values = [self._data[one.index] for one in asked]
        return [_sample(one, value) for one, value in zip(asked, values, strict=True)]

    def _replayed(self, asked: list[Asked]) -> list[Any]:
        values: list[Any] = []
        with _kept_random_state():
            for index, _, seed in asked:
                assert seed is not None
                # Not torch.manual_seed: that reaches for accelerators too, which a worker must not.
                torch.default_generator.manual_seed(seed)
                np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
                random.seed(seed)
                values.append(self._data[index])
        return values


@final
class IndexedCollate:
    """The loader's collate function on the samples of a `KeyedData`; keys go beside the batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Sample] | Sample) -> Keyed:
        """The batch, from a list of samples; or what came in one piece."""
        if isinstance(samples, Sample):
            whole = len(samples.keys) == 1
            return Keyed(self._collate(samples.value), samples.keys, samples.checks, whole)
        keys = [key for sample in samples for key in sample.keys]
        checks = [check for sample in samples for check in sample.checks]
        return Keyed(self._collate([sample.value for sample in samples]), keys, checks, False)


@final
class HashedCollate:
    """The loader's collate function; the content of each sample is its key."""

    def __init__(self, collate: Callable[[Any], Any], whole: bool) -> None:
        self._collate = collate
        self._whole = whole

    def __call__(self, samples: Any) -> Keyed:
        """The batch, from a list of samples; or what came in one piece."""
        keys = [content_of(sample) for sample in ([samples] if self._whole else samples)]
        return Keyed(self._collate(samples), keys, [""] * len(keys), self._whole)


def rows_of(batch: Any, rows: list[int], size: int) -> Any:
    """Some samples of a batch, or None where the batch cannot be cut.

    It can where it is made of plain containers and tensors, and each tensor has one row for each sample: there, nothing
    else can be meant by a row.

    >>> rows_of((torch.arange(3), {"mask": torch.eye(3)}), [2], size=3)
    (tensor([2]), {'mask': tensor([[0., 0., 1.]])})
    >>> rows_of((torch.arange(3), "train"), [2], size=3)
    """
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() and batch.shape[0] == size else None
    if type(batch) is dict:
        cut = [rows_of(value, rows, size) for value in batch.values()]
        return None if any(part is None for part in cut) else dict(zip(batch, cut, strict=True))
    if type(batch) in (tuple, list) or (isinstance(batch, tuple) and hasattr(batch, "_fields")):
        cut = [rows_of(value, rows, size) for value in batch]
        if any(part is None for part in cut):
            return None
        return type(batch)(*cut) if hasattr(batch, "_fields") else type(batch)(cut)
    return None


def _name_of(index: Any) -> str:
    """An index as text: numbers of any kind, strings, tuples of them."""
    if isinstance(index, str):
        return repr(index)
    if isinstance(index, tuple):
        return f"({','.join(map(_name_of, index))})"
    try:
        return str(operator.index(index))
    except TypeError:
        raise InvalidValueError(
            f"the sampler gives a {type(index).__name__} as an index, which tells no sample again.",
            where="by='index'",
            legal=("integers", "strings", "tuples of them"),
            remedy="Use by='content'.",
        ) from None


def _sample(asked: Asked, value: Any) -> Sample:
    # What holds several samples cannot be told apart into them.
    checks = [checksum(value, strict=False)[:16]] if len(asked.keys) == 1 else [""] * len(asked.keys)
    return Sample(value, asked.keys, checks)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    # Lighter than tersor.training.random_state: this runs once a batch, in workers too, and knows no accelerators.
    state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])
