"""The batch of example inputs: its size, and the same inputs at another size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor.errors import InvalidValueError
from tersor.graph.inputs import as_call, map_tensors, tensors_of


def batch_size_of(example_inputs: Any) -> int:
    """The size of dimension 0 of the first tensor that has one; 1 where there is none.

    Raises:
        InvalidValueError: the batch is empty.
    """
    size = next((tensor.shape[0] for tensor in tensors_of(as_call(example_inputs)) if tensor.dim()), 1)
    if size < 1:
        raise InvalidValueError("the batch is empty", where="example_inputs", remedy="Give at least one sample.")
    return size


def with_batch_size(example_inputs: Any, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments with another batch: rows are repeated in turn, or the first are taken.

    >>> (x, scale), _ = with_batch_size((torch.tensor([[1], [2]]), torch.ones(())), 3)
    >>> x.flatten().tolist(), scale.shape
    ([1, 2, 1], torch.Size([]))
    """
    batch = batch_size_of(example_inputs)

    def resize(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != batch:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % batch]

    return map_tensors(as_call(example_inputs), resize)
