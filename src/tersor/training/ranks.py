"""Several processes that train one model: statistics over all of them, and decisions that are the same on each.

Without ``torch.distributed``, or with one process, every function gives back what it was given.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_joined() -> bool:
    """Whether ``torch.distributed`` is in use, be it by one process."""
    return dist.is_available() and dist.is_initialized()


def processes() -> int:
    """How many processes train together; 1 outside of ``torch.distributed``."""
    return dist.get_world_size() if is_joined() else 1


def process() -> int:
    """The number of this process, from 0."""
    return 0 if processes() == 1 else dist.get_rank()


def is_first_process() -> bool:
    """Whether this is the process that writes files."""
    return process() == 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, which must have the same shape and type on each.

    >>> import torch
    >>> sum_over_processes(torch.ones(2))
    tensor([1., 1.])
    """
    if processes() == 1:
        return tensor
    total = tensor.detach().clone().contiguous()
    dist.all_reduce(total)
    return total


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return tensor if processes() == 1 else sum_over_processes(tensor) / processes()


def of_first_process(tensor: Tensor) -> Tensor:
    """The first process's tensor, on all: what was decided there holds everywhere."""
    if processes() == 1:
        return tensor
    agreed = tensor.detach().clone().contiguous()
    dist.broadcast(agreed, src=0)
    return agreed


def of_each_process(value: T) -> list[T]:
    """What each process gave, in their order; any object that can be pickled.

    >>> of_each_process("here")
    ['here']
    """
    if processes() == 1:
        return [value]
    gathered: list[Any] = [None] * processes()
    dist.all_gather_object(gathered, value)
    return gathered
