"""A data loader and what is in its batches: inputs, targets, tensors to move and to count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tersor.errors import InvalidValueError, TrainingError


class Distilled(NamedTuple):
    """A batch and what a teacher gives for it; whoever looks for inputs, targets or samples looks into the batch.

    Attributes:
        batch: the loader's own batch, untouched.
        teacher: the teacher's values by name, with one row for each sample, in the order of the batch.
    """

    batch: Any
    teacher: dict[str, Tensor]


class Batch(NamedTuple):
    """A batch taken apart: ``model(*args, **kwargs)`` is to be compared with ``targets``."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any


def take_apart(batch: Any) -> Batch:
    """Tell inputs from targets: the last item of a tuple or list is the target; a mapping is all arguments.

    The targets of a mapping are the mapping itself, because only the user knows under which key they are.

    >>> take_apart(("x", "mask", "y"))
    Batch(args=('x', 'mask'), kwargs={}, targets='y')
    >>> take_apart({"input_ids": "x"})
    Batch(args=(), kwargs={'input_ids': 'x'}, targets={'input_ids': 'x'})
    >>> take_apart(Distilled(("x", "y"), {}))
    Batch(args=('x',), kwargs={}, targets='y')

    Raises:
        TrainingError: the batch is neither, or holds fewer than two items.
    """
    batch = own_batch(batch)
    if isinstance(batch, Mapping):
        return Batch((), batch, batch)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return Batch(tuple(batch[:-1]), {}, batch[-1])
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise TrainingError(
        f"a batch is a {type(batch).__name__}{size}: inputs and targets cannot be told apart.",
        where="data loader",
        legal=("(inputs, targets)", "(a, b, targets)", "a mapping of the model's arguments"),
        remedy="Let the loader return one of these, or write a training_func of your own for TorchEvaluator(...).",
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; what is no tensor stays as it is.

    >>> to_device([torch.ones(1), {"name": "a"}], torch.device("cpu"))
    [tensor([1.]), {'name': 'a'}]
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [to_device(value, device) for value in batch]
        if isinstance(batch, list):
            return moved
        return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)
    return batch


def batch_size(batch: Any) -> int:
    """The number of samples: the first dimension of the first tensor, or 1 where there is none.

    >>> batch_size((torch.zeros(8, 3), torch.zeros(8)))
    8
    """
    return next((tensor.shape[0] for tensor in _tensors(own_batch(batch)) if tensor.dim()), 1)


def own_batch(batch: Any) -> Any:
    """The loader's own batch, whether a teacher's values are with it or not.

    >>> own_batch(Distilled(["x", "y"], {})), own_batch("x")
    (['x', 'y'], 'x')
    """
    return batch.batch if isinstance(batch, Distilled) else batch


def repeatable(loader: Iterable[Any], where: str) -> Iterable[Any]:
    """The `loader`, if one can pass over it again and again.

    Raises:
        InvalidValueError: it cannot be iterated, or only once.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise InvalidValueError(
            f"the {type(loader).__name__} cannot be passed over once an epoch.",
            where=where,
            legal=("a DataLoader", "a list of batches", "anything whose __iter__ starts anew"),
        )
    return loader


def length_of(loader: Iterable[Any]) -> int | None:
    """The number of batches, or None where the loader does not know (a loader of an iterable data set)."""
    try:
        return len(loader)  # pyright: ignore[reportArgumentType]
    except TypeError:
        return None


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)
