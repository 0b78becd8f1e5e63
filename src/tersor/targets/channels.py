"""Which dimension of a tensor holds the channels."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.RNNBase)


def channel_dims(module: nn.Module, target: str, rank: int) -> tuple[int | None, int | None]:
    """Output and input channel dimension of a module's tensor.

    Transposed convolutions, embeddings and the ``Conv1D`` of Transformers store their weight as (in, out, ...),
    everything else as (out, in, ...).

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
    if target == "weight" and (isinstance(module, (_ConvTransposeNd, nn.Embedding)) or is_conv1d(module)):
        return 1, 0
    return 0, 1


def is_norm_scale(module: nn.Module, target: str) -> bool:
    """Whether a target is what a norm multiplies each channel by: where it is zero, only the shift is left.

    >>> is_norm_scale(nn.BatchNorm2d(8), "weight"), is_norm_scale(nn.BatchNorm2d(8), "bias")
    (True, False)
    """
    return target == "weight" and isinstance(module, (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm))


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Transformers' linear layer that stores (in, out). Known by its name: the package is optional."""
    return hasattr(module, "nf") and any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def is_linear_or_convolution(module: nn.Module) -> bool:
    """Whether its weight is a matrix that reads input channels and writes output channels, transposed or not.

    >>> is_linear_or_convolution(nn.ConvTranspose2d(3, 8, 3)), is_linear_or_convolution(nn.Embedding(3, 8))
    (True, False)
    """
    return isinstance(module, (nn.Linear, _ConvNd)) or is_conv1d(module)


def activation_channel_dim(module: nn.Module, rank: int) -> int | None:
    """The dimension of a module's inputs and outputs that holds the channels; None where its type does not tell.

    Args:
        module: convolutions have them before the dimensions that they slide over, norms of images second, what works
            on tokens last.
        rank: the number of dimensions of the input or output.

    >>> activation_channel_dim(nn.Conv2d(3, 8, 3), 4), activation_channel_dim(nn.Linear(4, 8), 3)
    (1, 2)
    """
    if isinstance(module, _ConvNd):
        return rank - 1 - len(module.kernel_size)
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return 1
    return rank - 1 if isinstance(module, _LAST) or is_conv1d(module) else None
