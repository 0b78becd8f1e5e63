"""Scales moved between layers: divide what one layer writes, multiply what the next ones read, change nothing else.

A channel that a linear layer, a convolution or a norm writes is divided by ``s > 0``, and the weights that read it are
multiplied by ``s``. Where only operators lie between that pass a factor on (ReLU, pooling, reshaping, the product of
values with attention scores), the model computes what it did. Cross-layer equalisation, SmoothQuant and AWQ differ only
in how they choose ``s``.

:func:`find_scaling` finds all channels for which that holds (:mod:`tersor.quantization.scale_flow`), and
says of every other layer why not. Residual additions share their factors among all that write them, grouped queries
share those of their values; a gate that passes SiLU keeps its own, while the projection that it multiplies is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tersor.errors import EquivalenceError, InvalidValueError
from tersor.graph.inputs import copied, evaluating, named_tensors, run, tensors_of
from tersor.quantization import scale_rules as scale_rules  # registers them
from tersor.quantization.scale_flow import ScaleFlow, Sides, Unseen

NONE = -1
"""The number of a channel that takes no factor."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """A parameter, and the numbers of the channels that it writes and reads.

    Attributes:
        name: the qualified name; the first one, where it is tied.
        sides: the parameter as a matrix product.
        outputs: the channel that each output belongs to, :data:`NONE` where it takes no factor, shape ``(outputs,)``.
        inputs: likewise of each input; empty for a bias or the scale of a norm.
    """

    name: str
    sides: Sides
    outputs: Tensor
    inputs: Tensor

    @property
    def is_matrix(self) -> bool:
        """Whether it reads channels: the weight of a linear layer or a convolution."""
        return len(self.inputs) > 0

    def matrices(self, values: Tensor) -> Tensor:
        """A view of anything of the parameter's shape as ``(groups, outputs, inputs, *positions)``."""
        return self.sides.matrices(values)

    @torch.no_grad()
    def rescale(self, matrices: Tensor, *, divide: Tensor | None = None, multiply: Tensor | None = None) -> None:
        """Divide the outputs and multiply the inputs, in place.

        Args:
            matrices: as :meth:`matrices` gives them.
            divide: a factor for each output, shape ``(outputs,)``; None divides nothing.
            multiply: a factor for each input, shape ``(inputs,)``; empty or None multiplies nothing.
        """
        scale = torch.ones((), dtype=torch.float64, device="cpu")
        groups, positions = len(matrices), [1] * (matrices.dim() - 3)
        if divide is not None:
            scale = scale / divide.view(groups, -1, 1, *positions)
        if multiply is not None and self.is_matrix:
            scale = scale * multiply.view(groups, 1, -1, *positions)
        # Rounded once, from the wider type.
        matrices.copy_((matrices.double() * scale.to(matrices.device)).to(matrices.dtype))

    def multiplied(self, values: Tensor, factors: Tensor) -> Tensor:
        """A copy of values, with their inputs multiplied by factors.

        Args:
            values: of the parameter's shape.
            factors: one for each input, shape ``(inputs,)``.
        """
        result = values.clone()
        self.rescale(self.matrices(result), multiply=factors)
        return result


def output_ranges(matrices: Tensor) -> Tensor:
    """The largest magnitude among the weights of each output, shape ``(outputs,)``.

    >>> output_ranges(torch.tensor([[[1.0, -3.0], [2.0, 0.5]]]))
    tensor([3., 2.])
    """
    return matrices.abs().flatten(2).amax(2).flatten()


def input_ranges(matrices: Tensor) -> Tensor:
    """The largest magnitude among the weights of each input, shape ``(inputs,)``.

    >>> input_ranges(torch.tensor([[[1.0, -3.0], [2.0, 0.5]]]))
    tensor([2., 3.])
    """
    return output_ranges(matrices.transpose(1, 2))


@dataclass(frozen=True, eq=False)
class ScaleGroup:
    """Channels with the same writers and readers.

    Attributes:
        channels: their numbers, shape ``(channels of the group,)``.
        writers: the parameters that are divided by the factors.
        readers: the weights that are multiplied by them.
    """

    channels: Tensor
    writers: tuple[Kernel, ...]
    readers: tuple[Kernel, ...]

    def __str__(self) -> str:
        writers, readers = (", ".join(kernel.name for kernel in kernels) for kernels in (self.writers, self.readers))
        return f"{len(self.channels)} channels: {writers} -> {readers}"

    def largest(self, sides: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """For each channel the largest of the values that belong to it, shape ``(channels of the group,)``, float64.

        Args:
            sides: the channels along a side of a kernel (``kernel.outputs``) and a value for each, none negative.
        """
        found = torch.zeros(int(self.channels.max()) + 1, dtype=torch.float64, device="cpu")
        for numbers, values in sides:
            own = torch.isin(numbers, self.channels)
            found.scatter_reduce_(0, numbers[own], values.double().cpu()[own], "amax")
        return found[self.channels]

    def spread(self, numbers: Tensor, factors: Tensor) -> Tensor:
        """The factor of each index along a side of a kernel; 1 for indices of other channels, or of none.

        Args:
            numbers: the channels along the side (``kernel.inputs``).
            factors: one for each channel of the group.
        """
        of_all = torch.ones(int(torch.cat([self.channels, numbers]).max()) + 2, dtype=torch.float64, device="cpu")
        of_all[self.channels] = factors.double().cpu()
        return of_all[numbers]  # NONE is the last one, which is 1


@dataclass(frozen=True, eq=False)
class Scaling:
    """Where factors can be moved in one model.

    Attributes:
        model: the model.
        example_inputs: what it is checked on.
        count: how many channels take a factor of their own.
        kernels: every parameter that writes or reads one of them.
        groups: the channels, by who writes and reads them.
        refused: of each weight whose inputs take no factor, why.
    """

    model: nn.Module
    example_inputs: Any
    count: int
    kernels: tuple[Kernel, ...]
    groups: tuple[ScaleGroup, ...]
    refused: Mapping[str, str]

    @torch.no_grad()
    def apply(self, factors: Tensor) -> None:
        """Divide what writes each channel by its factor, multiply what reads it, and check that nothing else changed.

        Args:
            factors: shape ``(count,)``, positive; 1 changes nothing.

        Raises:
            InvalidValueError: a factor that is not positive and finite.
            EquivalenceError: the outputs on the example inputs differ by more than rounding; every weight is as it was.
        """
        factors = factors.double().cpu()
        if factors.shape != (self.count,) or not bool((torch.isfinite(factors) & (factors > 0)).all()):
            raise InvalidValueError(
                f"a factor is not positive and finite, or their shape {tuple(factors.shape)} is wrong",
                where="factors",
                legal=(f"{self.count} positive numbers",),
            )
        of_all = torch.cat([factors, factors.new_ones(1)])  # NONE is the last one
        expected = _outputs(self.model, self.example_inputs)
        before = [(kernel, kernel.sides.parameter.detach().clone()) for kernel in self.kernels]
        try:
            for kernel in self.kernels:
                on_outputs, on_inputs = (of_all[numbers] for numbers in (kernel.outputs, kernel.inputs))
                kernel.rescale(kernel.matrices(kernel.sides.parameter.data), divide=on_outputs, multiply=on_inputs)
            self._check(expected)
        except BaseException:
            for kernel, values in before:
                kernel.sides.parameter.copy_(values)
            raise

    def _check(self, expected: list[Tensor]) -> None:
        for actual, wanted in zip(_outputs(self.model, self.example_inputs), expected, strict=True):
            finite = wanted.isfinite()
            if not wanted.is_floating_point() or not bool(finite.any()):
                continue
            error = float((actual - wanted).double()[finite].abs().max())
            scale = float(wanted.double()[finite].abs().max())
            tolerance = max(1e-4, 16 * torch.finfo(wanted.dtype).eps)
            if not error <= tolerance * scale:  # not a number is no small one
                raise EquivalenceError(
                    f"moving scales changed an output by {error:.2g}, where its largest value is {scale:.2g}",
                    where=type(self.model).__name__,
                    remedy="Every weight is as it was. Code that depends on the magnitude of its input was taken for "
                    "code that does not: leave the layers before it out, or report the model.",
                )


def find_scaling(model: nn.Module, example_inputs: Any) -> Scaling:
    """Run a model once and find the channels on which factors can be moved.

    Args:
        model: any module; it is left as it was. What it computes its weights from (parametrizations) is not followed.
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.

    Raises:
        TraceError: the model does not run on these inputs.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    >>> scaling = find_scaling(net, torch.zeros(1, 4))
    >>> print(*scaling.groups)
    8 channels: 0.weight, 0.bias -> 2.weight
    >>> scaling.refused["4.weight"]
    'passes gelu, which does not commute with a factor'
    """
    names = {tensor: name for name, tensor in reversed(named_tensors(model).items())}
    flow = ScaleFlow(parameter for parameter in names if isinstance(parameter, nn.Parameter))
    inputs = copied(example_inputs)
    for tensor in tensors_of(inputs):
        flow.give(tensor, flow.fixed("is an input of the model"))
    with evaluating(model), Unseen(flow), flow:
        outputs = run(model, inputs)
    flow.fix_all(outputs, "is an output of the model")
    classes, reasons = flow.solve()
    free = _free(classes, reasons, flow.sides.values())
    number = np.where(free, np.cumsum(free) - 1, NONE)
    kernels = [
        Kernel(
            names[sides.parameter], sides, *(_numbers(number[classes[ids]]) for ids in (sides.outputs, sides.inputs))
        )
        for sides in flow.sides.values()
    ]
    order = {name: place for place, name in enumerate(named_tensors(model))}
    kernels.sort(key=lambda kernel: order[kernel.name])
    refused = {
        kernel.name: reasons.get(int(classes[kernel.sides.inputs[0]]), "no layer writes what it reads")
        for kernel in kernels
        if kernel.is_matrix and bool((kernel.inputs == NONE).all())
    }
    used = [kernel for kernel in kernels if bool((torch.cat([kernel.outputs, kernel.inputs]) != NONE).any())]
    count = int(free.sum())
    return Scaling(model, example_inputs, count, tuple(used), tuple(_groups(used, count)), refused)


def _free(classes: np.ndarray, reasons: Mapping[int, str], sides: Iterable[Sides]) -> np.ndarray:
    """Which classes are written and read by layers, and are not fixed; bool, indexed by class."""
    written, read = np.zeros(len(classes), dtype=bool), np.zeros(len(classes), dtype=bool)
    for own in sides:
        written[classes[own.outputs]] = True
        read[classes[own.inputs]] = True
    free = written & read
    free[list(reasons)] = False
    return free


def _numbers(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _groups(kernels: Sequence[Kernel], count: int) -> Iterable[ScaleGroup]:
    """Channels with the same writers and readers, in the order of their first writer."""
    members: list[list[tuple[int, str]]] = [[] for _ in range(count)]
    for place, kernel in enumerate(kernels):
        for side in ("outputs", "inputs"):
            for channel in torch.unique(getattr(kernel, side)).tolist():
                if channel != NONE:
                    members[channel].append((place, side))
    by_members: dict[tuple[tuple[int, str], ...], list[int]] = {}
    for channel, own in enumerate(members):
        by_members.setdefault(tuple(own), []).append(channel)
    for own, channels in sorted(by_members.items()):
        writers = tuple(kernels[place] for place, side in own if side == "outputs")
        readers = tuple(kernels[place] for place, side in own if side == "inputs")
        yield ScaleGroup(torch.tensor(channels, device="cpu"), writers, readers)


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with evaluating(model):
        return tensors_of(run(model, copied(inputs)))
