"""Several processes that train one model: statistics over all of them, and decisions that are the same on each.

Without ``torch.distributed``, or with one process, every function gives back what it was given.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def processes() -> int:
    """How many processes train together; 1 outside of ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_process() -> bool:
    """Whether this is the process that writes files."""
    return processes() == 1 or dist.get_rank() == 0


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
