"""Offline distillation: what a teacher gives is computed once a sample, and afterwards comes from memory or from files.

A teacher is often far larger than its student, so most of the time of a distillation is its. Where it is asked again
about the same samples, epoch after epoch and run after run, the answers can be kept.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from tersor.distillation.samples import HashedCollate, IndexedCollate, Keyed, KeyedData, NumberedSampler, rows_of
from tersor.distillation.teacher_cache import TeacherCache
from tersor.errors import ConflictError, InvalidValueError, TrainingError
from tersor.training.batches import Distilled
from tersor.training.position import loader_state, set_loader_state, undrawn
from tersor.training.random_state import random_state, set_random_state

By = Literal["index", "content"]
Compute = Callable[[Any], Mapping[str, Tensor]]
"""Gets a batch as the loader gives it; returns the teacher's values, each with one row for each sample."""


def cached_loader(
    loader: DataLoader[Any],
    compute: Compute,
    *,
    by: By = "index",
    variants: int | None = 1,
    directory: str | os.PathLike[str] | None = None,
    fingerprint: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> CachedLoader:
    """A loader that gives the same batches with the teacher's values beside them, each sample's computed only once.

    By default, the random augmentation of a data set is *replayed*: while a sample is read, the random numbers of
    Python, NumPy and torch begin at a state that belongs to this sample, and are put back afterwards. So the teacher's
    values are those of the very sample that the student sees. With `variants=k`, a sample is augmented in k ways that
    take turns. ``variants=1`` is the default since it is right for every data set, whether it draws random numbers or
    not. ``None`` replays nothing, for data sets that are deterministic: then batches are the plain loader's to the
    bit, and data sets that fetch a whole batch at once may do so.

    Where an index means another sample than when the teacher saw it (random numbers from elsewhere, ``None`` with a
    random augmentation, an old directory with other data), that is an error: the student never sees wrong values.

    Args:
        loader: a ``DataLoader``. Its samplers, workers, collate function, pinning and subclass are respected.
        compute: ``compute(batch)`` gives the teacher's values by name, one row a sample. It is called without
            gradients, on batches or some rows of them; put the teacher in eval mode. What it gives for a sample must
            not depend on what else is in the batch.
        by: how a sample is told: by its ``"index"`` in a map-style data set, or by a checksum of its ``"content"``,
            which stays the same in another order, in a subset and in an iterable-style data set. Nothing is replayed
            with the latter: a random augmentation gives new samples each time.
        variants: in how many ways a random augmentation augments each sample; None to replay none. In pass p it is
            variant ``p % variants``.
        directory: where values are kept in files; None for memory. Several processes may share it, each writes files of
            its own. Another run with the same directory computes only what is not there.
        fingerprint: names the teacher, and must with a `directory`: what another one gave is an error. Any string; a
            checksum of its weights is ``content_of(teacher.state_dict())``.
        dtype: ``torch.float16`` or ``torch.bfloat16`` to keep floating point numbers in half of the memory; given back
            in float32. None keeps and gives them as the teacher does.
        seed: of the replayed random states.

    Returns:
        An iterable of :class:`Distilled`, whose teacher's values are on the CPU, pinned where the loader pins.

    Raises:
        InvalidValueError: an argument is none of these; the data set is iterable-style and samples are told by index.
        ConflictError: variants of samples that are told by content; a directory without a fingerprint.
        CheckpointError: the directory holds another teacher's values, or a damaged file.

    >>> from torch.utils.data import TensorDataset
    >>> data = TensorDataset(torch.arange(6.0).reshape(3, 2), torch.tensor([0, 1, 0]))
    >>> teacher = torch.nn.Linear(2, 5).eval()
    >>> batches = cached_loader(DataLoader(data, batch_size=2), lambda batch: {"logits": teacher(batch[0])})
    >>> for epoch in range(3):
    ...     for (inputs, targets), values in batches:
    ...         assert torch.allclose(values["logits"], teacher(inputs))
    >>> len(batches), len(batches.cache), batches.cache.misses, batches.cache.hits
    (2, 3, 3, 6)
    """
    if not isinstance(loader, DataLoader):
        raise InvalidValueError(f"a {type(loader).__name__}.", where="loader", legal=("a torch.utils.data.DataLoader",))
    if by not in get_args(By):
        raise InvalidValueError(f"{by!r} is unknown.", where="by", legal=map(repr, get_args(By)))
    if variants is not None and (isinstance(variants, bool) or not isinstance(variants, int) or variants < 1):
        raise InvalidValueError(f"{variants!r}.", where="variants", legal=("1 and more", "None"))
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise InvalidValueError(f"{dtype!r}.", where="dtype", legal=("None", "torch.float16", "torch.bfloat16"))
    if by == "index" and isinstance(loader.dataset, IterableDataset):
        raise InvalidValueError(
            f"the samples of a {type(loader.dataset).__name__} have no index, as it is iterable-style.",
            where="by",
            legal=("'content'",),
            remedy="Use by='content'.",
        )
    if by == "content" and variants not in (None, 1):
        raise ConflictError(
            f"{variants} with by='content': variants are told by the index of their sample.",
            where="variants",
            remedy="Use by='index', or leave variants out.",
        )
    if directory is not None and fingerprint is None:
        raise ConflictError(
            "is not given, but a directory is: its values could later be taken for another teacher's.",
            where="fingerprint",
            remedy="Give any string that names the teacher, such as content_of(teacher.state_dict()).",
        )
    variants = None if by == "content" else variants
    made_by = {"fingerprint": fingerprint, "by": by, "seed": None if variants is None else seed}
    cache = TeacherCache(None if directory is None else Path(directory), made_by, dtype)
    return CachedLoader(loader, compute, cache, by=by, variants=variants, seed=seed)


@final
class CachedLoader:
    """What :func:`cached_loader` gives: iterates like the loader, and asks the teacher only for what is new.

    Attributes:
        loader: the plain one; ``dataset``, ``sampler``, ``batch_sampler`` and ``batch_size`` are its own.
        cache: with ``len(cache)`` samples, ``cache.hits`` and ``cache.misses``.
        passes: how many were begun, which chooses the variants; a run that goes on where another stopped sets it.
    """

    def __init__(
        self, loader: DataLoader[Any], compute: Compute, cache: TeacherCache, *, by: By, variants: int | None, seed: int
    ) -> None:
        self.loader = loader
        self.cache = cache
        self.passes = 0
        self.dataset = loader.dataset
        self.sampler = loader.sampler
        self.batch_sampler = loader.batch_sampler
        self.batch_size = loader.batch_size
        self._compute = compute
        self._by: By = by
        self._variants = variants or 1
        self._seed = None if variants is None else seed
        self._keyed, self._numbered = self._remade(loader)

    def __len__(self) -> int:
        return len(self._keyed)

    def __iter__(self) -> Iterator[Distilled]:
        # Not a generator itself: the plain loader draws its first random number when iter() is called, and not later.
        self.cache.refresh()
        self._numbered.variant = self.passes % self._variants
        self.passes += 1
        return self._distilled(iter(self._keyed))

    def state_dict(self) -> dict[str, Any]:
        """What the next pass depends on: its number, and the loader's generators."""
        return {"passes": self.passes, "loader": loader_state(self.loader)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the pass that was next when :meth:`state_dict` was called."""
        self.passes = state["passes"]
        set_loader_state(self.loader, state["loader"])

    def fill(self) -> None:
        """Compute what is missing in one pass ahead of training (one for each variant), and write it.

        That is what the loader's sampler gives in a pass, with the last partial batch that the loader may drop. The
        random state, the loader's generators and `passes` are afterwards as if this had not been called.
        """
        self.cache.refresh()
        with undrawn(self.loader):
            for variant in range(self._variants):
                keyed, numbered = self._remade(_without_drops(self.loader), known=self.cache)
                numbered.variant = variant
                for _ in self._distilled(iter(keyed)):
                    pass

    def _remade(self, loader: DataLoader[Any], known: Container[str] = ()) -> tuple[DataLoader[Any], NumberedSampler]:
        """The loader with keys beside its batches, and what asks for them by index."""
        batched = loader.batch_sampler is not None
        numbered = NumberedSampler(loader.batch_sampler if batched else loader.sampler, batched, self._seed, known)
        if self._by == "content":
            return _changed(loader, collate_fn=HashedCollate(loader.collate_fn, whole=not batched)), numbered
        sampler = {"batch_sampler" if batched else "sampler": numbered}
        collate = IndexedCollate(loader.collate_fn)
        return _changed(loader, dataset=KeyedData(loader.dataset), collate_fn=collate, **sampler), numbered

    def _distilled(self, batches: Iterable[Any]) -> Iterator[Distilled]:
        try:
            for keyed in batches:
                if not isinstance(keyed, Keyed):
                    raise TrainingError(
                        f"its batches are not what its collate function gives, but a {type(keyed).__name__}.",
                        where=f"the {type(self.loader).__name__}",
                        remedy="Give a plain torch.utils.data.DataLoader.",
                    )
                yield Distilled(keyed.batch, self._values(keyed))
        finally:  # whoever leaves in the middle of a pass keeps what was computed
            self.cache.flush()

    def _values(self, keyed: Keyed) -> dict[str, Tensor]:
        missing = self.cache.missing(keyed.keys, keyed.checks)
        if missing:
            keys, checks = [keyed.keys[at] for at in missing], [keyed.checks[at] for at in missing]
            self.cache.add(keys, checks, self._computed(keyed, missing), keyed.whole)
        self.cache.misses += len(missing)
        self.cache.hits += len(keyed.keys) - len(missing)
        values = self.cache.get(keyed.keys)
        if self.loader.pin_memory and torch.accelerator.is_available():
            return {name: tensor.pin_memory() for name, tensor in values.items()}
        return values

    def _computed(self, keyed: Keyed, missing: list[int]) -> dict[str, Tensor]:
        """The teacher's values for some samples of a batch."""
        size = len(keyed.keys)
        part = rows_of(keyed.batch, missing, size) if len(missing) < size else None
        # A warm cache must not change what a seeded run does, even where a teacher draws random numbers.
        state = random_state()
        with torch.no_grad():
            values = self._compute(keyed.batch if part is None else part)
        set_random_state(state)
        rows = None if keyed.whole else size if part is None else len(missing)
        _check(values, rows)
        cut = part is None and len(missing) < size
        return {name: tensor[missing] if cut else tensor for name, tensor in values.items()}


def _check(values: Any, rows: int | None) -> None:
    """Whether a teacher's values have a name and a row for each sample; `rows` None for any number of them.

    Raises:
        TrainingError: they do not.
    """
    legal = ("a mapping from names to tensors, each with one row for each sample",)
    if not isinstance(values, Mapping) or not values:
        raise TrainingError(f"it gave a {type(values).__name__}, or nothing.", where="compute(batch)", legal=legal)
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.dim():
            got = f"a tensor of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TrainingError(f"it gave {got} as {name!r}.", where="compute(batch)", legal=legal)
        rows = len(tensor) if rows is None else rows
        if len(tensor) != rows:
            raise TrainingError(
                f"it gave {len(tensor)} rows as {name!r} for {rows} samples.",
                where="compute(batch)",
                legal=legal,
                remedy="A collate function must not leave samples out either: leave them out in the sampler.",
            )


def _changed(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A copy of a loader with some of its attributes changed.

    Not made anew by its class: subclasses have constructors of their own, and some settings cannot be read back.
    """
    other = copy.copy(loader)
    other.__dict__.update(changes, _iterator=None)  # a loader refuses to have these set one by one
    return other


def _without_drops(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader, but it gives the last partial batch too, and its workers end with the pass."""
    sampler = loader.batch_sampler
    if type(sampler) is BatchSampler:
        sampler = BatchSampler(sampler.sampler, sampler.batch_size, False)
    return _changed(loader, batch_sampler=sampler, drop_last=False, persistent_workers=False)
