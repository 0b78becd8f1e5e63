"""The ordered stack of transforms on one target, and the mask, the transform that pruning puts there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tersor.errors import ConflictError, MaskError
from tersor.wrapping.sharding import whole

ApplyMethod = Literal["bypass", "mul", "add"]


class Stage(IntEnum):
    """Where a transform stands on its target. The order is the same for every combination of compressors."""

    SCALE = 0
    QUANTIZE = 1
    MASK = 2
    OBSERVE = 3


class Transform(nn.Module, ABC):
    """One step of the simulation on one target: value in, value of the same shape out."""

    stage: ClassVar[Stage]
    watching: bool = False
    """Whether it sees what passes, before it is applied."""

    @abstractmethod
    def forward(self, value: Tensor) -> Tensor:
        """The simulated value."""

    def watch(self, value: Tensor) -> None:
        """See what passes, with masked elements as zeros."""

    def fold(self, latent: Tensor) -> None:
        """Leave in the latent parameter, in place, what is to stay there when the simulation ends."""


class TargetStack(nn.Module):
    """All transforms on one target, applied in the order of their stages.

    It is the parametrization of a parameter, or what a hook applies to an input or output.

    Attributes:
        target: ``module.target``, for messages.
        shape: of the last input or output that passed; None before the first (parameters: their own shape).
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.shape: torch.Size | None = None

    def add(self, transform: Transform) -> None:
        """Put a transform at its stage.

        Raises:
            ConflictError: the stage is taken: two compressors of one kind were given the same target.
        """
        if self.find(transform.stage) is not None:
            raise ConflictError(
                f"two compressors want the {transform.stage.name.lower()} stage of the same target",
                where=self.target,
                remedy="Give each target to one compressor of a kind; exclude it from the other's config list.",
            )
        self.put(transform)

    def put(self, transform: Transform) -> None:
        """Put a transform at its stage, in place of any that is there."""
        self.add_module(transform.stage.name.lower(), transform)

    def find(self, stage: Stage) -> Transform | None:
        """The transform at a stage, or None."""
        transform = self._modules.get(stage.name.lower())
        return transform if isinstance(transform, Transform) else None

    def forward(self, value: Tensor) -> Tensor:
        """The value after all transforms; of a parameter that is shared out over processes the whole value."""
        value = whole(value)
        for stage in Stage:
            transform = self.find(stage)
            if transform is not None:
                if transform.watching:
                    transform.watch(self._kept(value))
                value = transform(value)
        return value

    def _kept(self, value: Tensor) -> Tensor:
        mask = self.find(Stage.MASK)
        return mask.kept(value) if isinstance(mask, Mask) else value

    def fold(self, latent: Tensor) -> None:
        """All transforms leave in the latent parameter what is to stay there."""
        for stage in Stage:
            transform = self.find(stage)
            if transform is not None:
                transform.fold(latent)


class Mask(Transform):
    """Removes elements of its target: ``mul`` makes them exactly zero, ``add`` adds a large negative number.

    A mask that is a product of one vector per dimension (channels, heads) is stored as these vectors, so it takes next
    to no memory; any other is stored as one bool for each element.

    Attributes:
        method: ``mul`` multiplies by the mask, ``add`` adds ``value`` where the mask is 0 (for what feeds a softmax),
            ``bypass`` leaves the target as it is.
        value: added by ``add``.
    """

    stage = Stage.MASK

    def __init__(self, target: str, method: ApplyMethod = "mul", value: float = -1000.0) -> None:
        super().__init__()
        self.target = target
        self.method: ApplyMethod = method
        self.value = value
        self._factors: list[str] = []

    @property
    def factors(self) -> list[Tensor]:
        """Bool tensors that broadcast against the target; their product is the mask. Empty: nothing is masked."""
        return [getattr(self, name) for name in self._factors]

    def set(self, factors: Sequence[Tensor], device: torch.device | None = None) -> None:
        """Replace the mask by the product of some masks; none at all removes it.

        Args:
            factors: bool, or numbers that are all 0 or 1; of the target's shape or broadcastable to it.
            device: where the target lives.

        Raises:
            MaskError: one holds something else than 0 and 1.
        """
        for name in self._factors:
            delattr(self, name)
        self._factors = []
        vectors = [vector for factor in factors for vector in factorize(as_bool(factor, self.target))]
        for number, vector in enumerate(vectors):
            self.register_buffer(f"factor_{number}", vector.to(device) if device else vector)
            self._factors.append(f"factor_{number}")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A mask takes the factors that a checkpoint holds, however many they are."""
        names = [name for name in state_dict if name.startswith(f"{prefix}factor_")]
        device = self.factors[0].device if self.factors else None
        self.set([state_dict[name].clone() for name in names], device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def product(self, shape: Sequence[int] | None = None) -> Tensor:
        """The mask as one bool tensor: of the given shape, or as small as broadcasting allows."""
        mask = reduce(torch.logical_and, self.factors)
        return mask if shape is None else mask.expand(tuple(shape))

    def forward(self, value: Tensor) -> Tensor:
        """The masked value, same shape and dtype."""
        if self.method == "mul":
            return self.kept(value)
        for factor in self._fitting(value) if self.method == "add" else ():
            value = torch.where(factor, value, value + self.value)
        return value

    def kept(self, value: Tensor) -> Tensor:
        """The value with zeros where it is masked, whatever the method."""
        return multiply(value, self._fitting(value))

    def _fitting(self, value: Tensor) -> list[Tensor]:
        factors = [fitted(factor, value.shape, self.target) for factor in self.factors]
        return [factor.to(value.device) for factor in factors]  # model.to() does not reach a hook's masks


def multiply(value: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """A value times all factors of its mask.

    A kernel's factors are multiplied with each other first, where they are small; a matrix's would be as large as it.
    """
    if value.dim() > 2 and len(factors) > 1:
        factors = [reduce(torch.logical_and, factors)]
    for factor in factors:
        value = value * factor
    return value


def fitted(mask: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """A mask as it fits what passes: the same channels are masked where a module is called without a batch.

    Args:
        mask: of an input, an output or a parameter.
        shape: of what passes; dimensions of size 1 that it lacks in front are left out of the mask.
        where: what errors name.

    Raises:
        MaskError: it does not fit.

    >>> fitted(torch.ones(1, 1, 3, dtype=torch.bool), (5, 3), "fc").shape
    torch.Size([1, 3])
    """
    lacking = max(mask.dim() - len(shape), 0)
    if mask.shape[:lacking].numel() == 1:
        mask = mask.reshape(mask.shape[lacking:])
    sizes = shape[len(shape) - mask.dim() :] if mask.dim() <= len(shape) else ()
    if len(sizes) < mask.dim() or any(own not in (1, size) for own, size in zip(mask.shape, sizes, strict=True)):
        raise MaskError(
            f"a mask of shape {tuple(mask.shape)} does not fit a tensor of shape {tuple(shape)}",
            where=where,
            remedy="It was made for inputs of other sizes. Where sizes differ from batch to batch, use a granularity "
            "that is whole along them, such as 'per_channel'.",
        )
    return mask


def check_shape(mask: Tensor, shape: Sequence[int], where: str) -> None:
    """Refuse a mask that does not broadcast to its target.

    Raises:
        MaskError: naming both shapes.
    """
    if mask.dim() != len(shape) or any(own not in (1, size) for own, size in zip(mask.shape, shape, strict=True)):
        raise MaskError(
            f"a mask of shape {tuple(mask.shape)} does not fit a tensor of shape {tuple(shape)}",
            where=where,
            remedy="Were these masks made for another model, or for this one before it was made small?",
        )


def as_bool(mask: Tensor, target: str) -> Tensor:
    """A bool mask from a bool or a 0/1 mask (NNI's masks are float).

    Raises:
        MaskError: it holds something else than 0 and 1.
    """
    if mask.dtype is torch.bool:
        return mask
    if bool(((mask != 0) & (mask != 1)).any()):
        raise MaskError(
            f"a mask holds 0 (removes) and 1 (keeps), this one ranges from {mask.min()} to {mask.max()}",
            where=target,
            remedy="Compare the scores with a threshold first: mask = scores > threshold.",
        )
    return mask.bool()


def compact(mask: Tensor) -> Tensor:
    """An expanded mask without its repetitions: size 1 along each dimension in which it is the same by construction.

    >>> compact(torch.ones(3, 1, dtype=torch.bool).expand(3, 5)).shape
    torch.Size([3, 1])
    """
    for dim in range(mask.dim()):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def factorize(mask: Tensor) -> list[Tensor]:
    """Write a mask as a product of one bool vector per dimension, or as itself where it is no such product.

    Vectors of ones are left out. Each factor has the mask's number of dimensions and broadcasts against it; what is no
    product is not copied.

    >>> [tuple(f.shape) for f in factorize(torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool))]
    [(2, 1), (1, 3)]
    """
    if sum(size > 1 for size in mask.shape) <= 1:
        return [] if bool(mask.all()) else [mask]
    factors: list[Tensor] = []
    for dim in range(mask.dim()):
        others = [other for other in range(mask.dim()) if other != dim]
        vector = mask.any(dim=others, keepdim=True) if others else mask
        if not bool(vector.all()):
            factors.append(vector.clone())
    product = torch.ones_like(mask)
    for factor in factors:
        product &= factor
    return factors if torch.equal(product, mask) else [mask]
