"""A layer as a matrix product, and the second moments of what its weight multiplies.

Second-order pruning asks what a layer's output loses when weights leave. For every layer here the output is
``rows @ inputs.T``, so all that has to be known of the data is one matrix, the second moment of the inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tersor.errors import InvalidValueError
from tersor.targets.channels import is_conv1d

_Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


@torch.no_grad()
def unfold_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """What a module's weight multiplies, as matrices.

    Each position of a sequence, and each place of a convolution's kernel, is a sample of its own. A convolution's
    matrix holds each input value as often as kernels cover it.

    Args:
        module: a linear layer (also Transformers' ``Conv1D``) or a convolution.
        x: an input of the module, with or without a batch dimension.

    Returns:
        Shape (groups, samples, columns), float32 or wider; one group, but for grouped convolutions. Where nothing had
        to be converted or moved, it is a view of ``x``.

    Raises:
        InvalidValueError: the module is of another type.

    Example:
        >>> conv = torch.nn.Conv1d(1, 1, kernel_size=2)
        >>> unfold_inputs(conv, torch.tensor([[[1.0, 2.0, 3.0]]]))
        tensor([[[1., 2.],
                 [2., 3.]]])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(module, _Convolution):
        return _patches(module, x)
    _require_linear(module)
    return x.reshape(1, -1, x.shape[-1])


def weight_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or its mask, as matrices: ``weight_rows(...) @ unfold_inputs(...).mT`` is the output without bias.

    Args:
        module: the module that ``weight`` belongs to.
        weight: a tensor of its weight's shape and any type.

    Returns:
        Shape (groups, rows, columns); a view where that is possible.

    Raises:
        InvalidValueError: the module is of another type than :func:`unfold_inputs` takes.

    Example:
        >>> conv = torch.nn.Conv2d(4, 6, kernel_size=3, groups=2)
        >>> weight_rows(conv, conv.weight).shape
        torch.Size([2, 3, 18])
    """
    if isinstance(module, _Convolution):
        return weight.reshape(module.groups, weight.shape[0] // module.groups, -1)
    _require_linear(module)
    return (weight.mT if is_conv1d(module) else weight).unsqueeze(0)


def from_rows(module: nn.Module, rows: Tensor) -> Tensor:
    """The inverse of :func:`weight_rows`.

    Args:
        module: the module that the rows belong to.
        rows: shape (groups, rows, columns), any type.

    Returns:
        A tensor of the weight's shape; a view where that is possible.

    Raises:
        InvalidValueError: the module is of another type than :func:`unfold_inputs` takes.

    Example:
        >>> conv = torch.nn.Conv2d(4, 6, kernel_size=3, groups=2)
        >>> bool((from_rows(conv, weight_rows(conv, conv.weight)) == conv.weight).all())
        True
    """
    if isinstance(module, _Convolution):
        groups, per_group, columns = rows.shape
        return rows.reshape(groups * per_group, columns // math.prod(module.kernel_size), *module.kernel_size)
    _require_linear(module)
    return rows[0].mT if is_conv1d(module) else rows[0]


@final
@dataclass(eq=False)
class SecondMoment:
    r"""The second moment of a layer's inputs, :math:`\frac1n \sum_i x_i y_i^\top`, gathered batch by batch.

    The y are the x themselves, unless others are given: then it is a cross moment, such as of the inputs in the
    original model (x) and in the pruned one (y). Moments of parts of the data add up to that of the whole; several
    processes sum :meth:`tensors` over all of them.

    Attributes:
        products: sums of x times y, shape (groups, columns, columns).
        x_total: sums of x, shape (groups, columns).
        y_total: sums of y, of the same shape.
        count: the number of samples, an integer tensor without dimensions.

    Example:
        >>> moment = SecondMoment.zeros(groups=1, columns=2)
        >>> moment.add(torch.tensor([[[1.0, 0.0], [3.0, 2.0]]]))
        >>> moment.matrix
        tensor([[[5., 3.],
                 [3., 2.]]])
        >>> moment.covariance
        tensor([[[1., 1.],
                 [1., 1.]]])
    """

    products: Tensor
    x_total: Tensor
    y_total: Tensor
    count: Tensor

    @classmethod
    def zeros(
        cls, groups: int, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> SecondMoment:
        """A moment without samples.

        Args:
            groups: groups of the layer.
            columns: columns of a group.
            dtype: type of the sums. Take float64 where means are large against deviations and ``covariance`` is used.
            device: where the sums lie.
        """
        products = torch.zeros(groups, columns, columns, dtype=dtype, device=device)
        count = torch.zeros((), dtype=torch.int64, device=device)
        return cls(products, products.new_zeros(groups, columns), products.new_zeros(groups, columns), count)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in a batch. Float64 batches widen the sums to float64.

        Args:
            x: shape (groups, samples, columns), as :func:`unfold_inputs` returns it.
            y: the same samples in another model, of the same shape; ``x`` where it is None.
        """
        dtype = torch.promote_types(self.products.dtype, x.dtype)
        x = x.to(self.products.device, dtype)
        y = x if y is None else y.to(x)
        self.products = self.products.to(dtype).baddbmm_(x.mT, y)
        self.x_total = self.x_total.to(dtype) + x.sum(dim=1)
        self.y_total = self.y_total.to(dtype) + y.sum(dim=1)
        self.count = self.count + x.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        """The sums, in a fixed order: what several processes all-reduce in place, by addition."""
        return self.products, self.x_total, self.y_total, self.count

    def __add__(self, other: SecondMoment) -> SecondMoment:
        """The moment of both parts of the data."""
        return SecondMoment(*(a + b.to(a.device) for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    @property
    def matrix(self) -> Tensor:
        """The moment, shape (groups, columns, columns).

        Raises:
            InvalidValueError: no sample has been added.
        """
        return self.products / self._samples()

    @property
    def x_mean(self) -> Tensor:
        """The mean of x, shape (groups, columns)."""
        return self.x_total / self._samples()

    @property
    def y_mean(self) -> Tensor:
        """The mean of y, shape (groups, columns)."""
        return self.y_total / self._samples()

    @property
    def covariance(self) -> Tensor:
        """The moment of the deviations from the means, which is the right one where a bias may follow."""
        return self.matrix - self.x_mean.unsqueeze(2) * self.y_mean.unsqueeze(1)

    def _samples(self) -> Tensor:
        if not self.count:
            raise InvalidValueError(
                "the second moment of no samples is not defined", remedy="Run the model on calibration data first."
            )
        return self.count


@final
@dataclass(eq=False)
class FeatureNorms:
    r"""The norm of each input feature over all samples, :math:`\lVert X_j \rVert_2`: the diagonal of a second moment.

    Wanda scores a weight by :math:`|w_{ij}| \lVert X_j \rVert_2` (Sun, Liu, Bair, Kolter: A Simple and Effective
    Pruning Approach for Large Language Models, ICLR 2024). Takes memory for one row, where :class:`SecondMoment` takes
    the square of it.

    Attributes:
        squares: sums of squares, shape (groups, columns); several processes sum them over all of them.

    Example:
        >>> norms = FeatureNorms.zeros(groups=1, columns=2)
        >>> norms.add(torch.tensor([[[3.0, 0.0], [4.0, 1.0]]]))
        >>> norms.norms
        tensor([[5., 1.]])
    """

    squares: Tensor

    @classmethod
    def zeros(
        cls, groups: int, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> FeatureNorms:
        """Norms without samples; the arguments are those of :meth:`SecondMoment.zeros`."""
        return cls(torch.zeros(groups, columns, dtype=dtype, device=device))

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in a batch of shape (groups, samples, columns). Float64 batches widen the sums to float64."""
        x = x.to(self.squares.device, torch.promote_types(self.squares.dtype, x.dtype))
        self.squares = self.squares + x.square().sum(dim=1)

    def __add__(self, other: FeatureNorms) -> FeatureNorms:
        """The norms over both parts of the data."""
        return FeatureNorms(self.squares + other.squares.to(self.squares.device))

    @property
    def norms(self) -> Tensor:
        """The norms, shape (groups, columns)."""
        return self.squares.sqrt()


def _patches(module: _Convolution, x: Tensor) -> Tensor:
    """What the kernel covers at each place, shape (groups, samples, input channels of a group x kernel)."""
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x = x.unsqueeze(0)
    x = F.pad(x, _padding(module), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    for axis in range(spatial):
        kernel, dilation = module.kernel_size[axis], module.dilation[axis]
        x = x.unfold(axis + 2, dilation * (kernel - 1) + 1, module.stride[axis])[..., ::dilation]
    x = x.unflatten(1, (module.groups, -1))
    places, kernels = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    x = x.permute(1, 0, *places, 2, *kernels)
    return x.reshape(module.groups, -1, math.prod(x.shape[-1 - spatial :]))


def _padding(module: _Convolution) -> list[int]:
    """Before and after each dimension, the last dimension first, as `F.pad` takes it."""
    padding: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            missing = module.dilation[axis] * (module.kernel_size[axis] - 1)
            padding += [missing // 2, missing - missing // 2]  # An odd one goes after, as in PyTorch.
        else:
            padding += [0, 0] if isinstance(module.padding, str) else [module.padding[axis]] * 2
    return padding


def _require_linear(module: nn.Module) -> None:
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        raise InvalidValueError(
            f"a {type(module).__name__} is no matrix product whose inputs can be laid out in rows",
            legal=("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D of Transformers"),
            remedy="Leave it out of the config list, or use a compressor that does not look at the inputs of layers.",
        )
