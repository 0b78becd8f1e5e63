"""Which dimension of a parameter holds output channels and which holds input channels."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd


def channel_dims(module: nn.Module, target: str, rank: int) -> tuple[int | None, int | None]:
    """Output and input channel dimension of a module's tensor.

    Transposed convolutions and embeddings store their weight as (in, out, ...), everything else as (out, in, ...).

    Args:
        module: the owner.
        target: the tensor's name in it.
        rank: its number of dimensions.

    Returns:
        ``(out, in)``; None where the tensor has no such dimension.

    >>> channel_dims(nn.ConvTranspose2d(3, 8, 2), "weight", 4)
    (1, 0)
    """
    if rank == 0:
        return None, None
    if rank == 1:
        return 0, None
    if target == "weight" and isinstance(module, (_ConvTransposeNd, nn.Embedding)):
        return 1, 0
    return 0, 1
