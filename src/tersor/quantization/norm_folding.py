"""A batch norm folded into the weight in front of it, in simulation only: both stay as they are, and learn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.quantization.fake_quantize import FakeQuantize
from tersor.quantization.module_fusion import norm_scale
from tersor.targets.channels import channel_dims
from tersor.targets.fused import over_outputs


class Folded(FakeQuantize):
    """Quantizes what the target becomes when the norm is folded, by another fake quantization.

    Args:
        inner: how the folded value is quantized; whether it does anything, its scales and its state are the inner's.
        head: the layer in front of the norm.
        norm: the batch norm.
    """

    def __init__(self, inner: FakeQuantize, head: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        # In a tuple, since they are no parts of this module: the model holds them.
        self._group: tuple[Any, Any] = (head, norm)

    @abstractmethod
    def part(self, value: Tensor) -> Tensor:
        """The norm's part in what is stored, in float32 at least."""

    @abstractmethod
    def folded(self, value: Tensor, part: Tensor) -> Tensor:
        """What is stored of the target."""

    @abstractmethod
    def unfolded(self, stored: Tensor, part: Tensor) -> Tensor:
        """The target of which this is stored."""

    def forward(self, value: Tensor) -> Tensor:
        """The target of which the quantized value is stored, same shape and dtype."""
        part = self.part(value)
        folded = self.folded(value, part)
        simulated = self.inner(folded)
        # While the inner one waits, the value passes as it is, not by way of two roundings.
        return value if simulated is folded else self.unfolded(simulated, part).to(value.dtype)

    @property
    def watching(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner one does."""
        return self.inner.watching

    @torch.no_grad()
    def watch(self, value: Tensor) -> None:
        """Show the inner one the folded value."""
        self.inner.watch(self.folded(value, self.part(value)))

    def calibration(self) -> dict[str, Any]:
        """That of the folded value."""
        return self.inner.calibration()

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Take over one of the folded value."""
        self.inner.load_calibration(calibration)


@final
class NormFolded(Folded):
    r"""Simulates, on the weight alone, that the weight is quantized with its batch norm folded in.

    With the norm's running statistics and :math:`s = \gamma / \sqrt{\sigma^2 + \epsilon}` for each output channel,

    .. math:: W_{sim} = Q(s W) / s

    and the convolution and the norm run as they are. A convolution is linear in its weight, so in eval mode their
    output is exactly that of the convolution with the quantized folded weight :math:`Q(s W)`. In training the norm goes
    on with the live statistics of what the quantized convolution gives, and what is rounded goes by the running ones,
    which do not jump from batch to batch. No second convolution is computed. Gradients reach :math:`W` and
    :math:`\gamma` through both, as they do where the folded weight is written out.

    Where :math:`s` is zero or next to it (:math:`\gamma = 0`: the last norm of a residual block often starts so),
    nothing could be divided by it. The average magnitude of the other channels' takes its place there: the norm
    multiplies what comes of it by zero anyway, and the channel can still learn.

    Papers: Krishnamoorthi: Quantizing deep convolutional networks for efficient inference: A whitepaper (2018), section
    3.2.2; Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference
    (CVPR 2018), section 3.2.

    Args: those of the base; the target is the weight of ``head``.
    """

    def part(self, value: Tensor) -> Tensor:
        """:math:`s`, beside each weight; never zero."""
        head, norm = self._group
        out_dim, _ = channel_dims(head, "weight", value.dim())
        return over_outputs(away_from_zero(scale_of(norm, value.device)), value.shape, out_dim or 0)

    def folded(self, value: Tensor, part: Tensor) -> Tensor:
        """:math:`s W`."""
        return value * part

    def unfolded(self, stored: Tensor, part: Tensor) -> Tensor:
        """Divided by :math:`s`."""
        return stored / part


@final
class NormFoldedBias(Folded):
    r"""Simulates that the folded bias is quantized, on the bias of the norm.

    The folded bias is :math:`\beta + (b - \mu) s`. The norm adds :math:`\beta` last of all, so that

    .. math:: \beta_{sim} = Q(\beta + (b - \mu) s) - (b - \mu) s

    makes up for what rounding does to all of it, in training too; on the bias of the layer in front it would vanish
    with the mean of the batch.

    Args: those of the base; the target is the bias of ``norm``.
    """

    def part(self, value: Tensor) -> Tensor:
        r""":math:`(b - \mu) s`."""
        head, norm = self._group
        mean = _statistic(norm, "running_mean").to(value.device)
        return (-mean if head.bias is None else head.bias.to(value.device) - mean) * scale_of(norm, value.device)

    def folded(self, value: Tensor, part: Tensor) -> Tensor:
        r""":math:`\beta + (b - \mu) s`."""
        return value + part

    def unfolded(self, stored: Tensor, part: Tensor) -> Tensor:
        r"""Without :math:`(b - \mu) s`."""
        return stored - part


def scale_of(norm: Any, device: torch.device) -> Tensor:
    """What a batch norm multiplies each channel by in eval mode, in float32 at least."""
    variance = _statistic(norm, "running_var")
    dtype = torch.promote_types(variance.dtype, torch.float32)
    gamma = None if norm.weight is None else norm.weight.to(device, dtype)
    return norm_scale(gamma, variance.to(device, dtype), norm.eps)


def _statistic(norm: nn.Module, name: str) -> Tensor:
    statistic = getattr(norm, name)
    return snapshot(statistic) if norm.training and torch.compiler.is_compiling() else statistic


@torch.library.custom_op("tersor::snapshot", mutates_args=())
def snapshot(value: Tensor) -> Tensor:
    """A copy that compilers keep for the backward pass.

    They rather compute what is cheap a second time there, from a buffer into which the norm has written meanwhile: the
    gradient would be that of other statistics. They do not look into an operator of our own.
    """
    return value.clone()


@snapshot.register_fake
def _(value: Tensor) -> Tensor:
    return torch.empty_like(value)


def away_from_zero(scale: Tensor) -> Tensor:
    """Numbers to divide by: one that is next to zero beside the largest gives way to the average of the others.

    >>> away_from_zero(torch.tensor([2.0, -4.0, 0.0])), away_from_zero(torch.zeros(1))
    (tensor([ 2., -4.,  3.]), tensor([1.]))
    """
    size = scale.detach().abs()
    lives = size > torch.finfo(size.dtype).eps * size.max()
    average = (size * lives).sum() / lives.sum().clamp(min=1)
    return torch.where(lives, scale, torch.where(lives.any(), average, torch.ones_like(average)))


@final
class FrozenNorms:
    """Batch norms that keep their running statistics, and use them, while the model trains on.

    In the last part of a training with quantization the statistics of a batch are noise that inference will not have.
    Scales and shifts still learn. Each norm is in eval mode while it is called, whatever the model's mode, and back in
    its own after that.

    Args:
        norms: whose statistics are frozen, until :meth:`remove`.

    >>> norm, x = nn.BatchNorm1d(1), torch.tensor([[3.0], [5.0]])
    >>> frozen = FrozenNorms([norm])
    >>> bool(torch.allclose(norm(x), x, atol=1e-3)), norm.training, int(norm.num_batches_tracked)
    (True, True, 0)
    >>> frozen.remove()
    >>> norm(x).detach().flatten().round().tolist()
    [-1.0, 1.0]
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for norm in norms:
            mode = _EvalMode()
            self._handles.append(norm.register_forward_pre_hook(mode.enter))
            self._handles.append(norm.register_forward_hook(mode.leave))

    def remove(self) -> None:
        """The norms follow the model's mode again; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _EvalMode:
    """Remembers the mode of one norm while it is called."""

    def __init__(self) -> None:
        self.was_training = False

    def enter(self, module: nn.Module, args: Any) -> None:
        """Before the call."""
        self.was_training = module.training
        module.training = False

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """After it."""
        module.training = self.was_training
