"""Cross-layer equalisation: the channels between two layers get scales that serve both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tersor.config import values
from tersor.quantization.scaling import Kernel, ScaleGroup, Scaling, find_scaling, input_ranges, output_ranges

CONVERGED = 1e-7
"""A pass that moves no factor by more than this, in logarithms, is the last."""


@dataclass(frozen=True, eq=False)
class Equalization:
    """What equalisation did to a model.

    Attributes:
        groups: the channels that were equalised, by the layers that write and read them.
        refused: of each weight whose inputs were left alone, why.
        iterations: how many passes over all groups it took.
        replaced: modules that were ReLU6 and are ReLU now.
    """

    groups: tuple[ScaleGroup, ...]
    refused: Mapping[str, str]
    iterations: int
    replaced: tuple[str, ...] = ()


def equalize(
    model: nn.Module,
    example_inputs: Any,
    *,
    iterations: int = 200,
    replace_relu6: bool = False,
    masks: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Equalization:
    r"""Rescale the channels between layers until the weights on both sides span the same range; no data is needed.

    One scale for a whole weight serves a channel badly whose weights are a hundred times smaller than another's. With
    :math:`r^1_i = \max_j |W^1_{ij}|` over the outputs of the first layer and :math:`r^2_i = \max_j |W^2_{ji}|` over the
    inputs of the second,

    .. math:: s_i = \frac{1}{r^2_i} \sqrt{r^1_i r^2_i}, \qquad W^1_i \leftarrow W^1_i / s_i, \quad b_i \leftarrow
        b_i / s_i, \quad W^2_{:i} \leftarrow W^2_{:i} s_i

    both ranges become :math:`\sqrt{r^1_i r^2_i}`, and the model computes what it did. Pairs are visited in turn until
    nothing moves, so chains (a depthwise convolution in the middle) come to equal ranges all along. Where several
    layers write or read a channel (residual additions, gates, queries in groups), the largest range of each side
    counts.

    Use it before quantizing weights with one scale a tensor, above all with depthwise convolutions. Fold batch norms
    before: a channel that a norm writes is refused, since to scale the norm would leave the weight as it is, which is
    folded with it later. ReLU6 clips at a fixed value and lets no factor pass. Absorbing high biases is not done: it
    needs the statistics that folding has used up; correct biases on data instead.

    Paper: Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization through Weight Equalization and Bias
    Correction (ICCV 2019), section 4.1.

    Args:
        model: changed in place: its weights and biases.
        example_inputs: what the model can be run on; what depends on what is found there, and the result is checked.
        iterations: the most passes over all pairs.
        replace_relu6: first turn every ``nn.ReLU6`` into ``nn.ReLU``, as the paper does with MobileNetV2. That alone
            changes what the model computes, where activations exceed 6.
        masks: of parameters that are pruned, as a pruner's ``get_masks()`` gives them; what they remove has no range.

    Returns:
        what was equalised, and what was not, with the reason.

    Raises:
        InvalidValueError: ``iterations`` is no positive int.
        TraceError: the model does not run on the example inputs.
        EquivalenceError: the outputs changed by more than rounding; the weights are as they were.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[8.0], [1.0]]))
        >>> _ = net[2].weight.data.copy_(torch.tensor([[2.0, 4.0]]))
        >>> _ = equalize(net, torch.ones(1, 1))
        >>> net[0].weight.data.tolist(), net[2].weight.data.tolist()
        ([[4.0], [2.0]], [[4.0, 2.0]])
    """
    with values.at("iterations"):
        values.whole(iterations, "number of passes", low=1)
    relu6 = dict(_relu6(model)) if replace_relu6 else {}
    if replace_relu6:
        relu_for_relu6(model)
    try:
        scaling = find_scaling(model, example_inputs)
        refused = {**scaling.refused, **_written_by_norms(scaling.groups)}
        groups = tuple(group for group in scaling.groups if not any(own.name in refused for own in group.readers))
        factors, passes = _converged(scaling, groups, iterations, masks or {})
        scaling.apply(factors)
    except BaseException:
        for name, module in relu6.items():
            model.set_submodule(name, module)
        raise
    return Equalization(groups, refused, passes, tuple(relu6))


def equalizing(written: Tensor, read: Tensor) -> Tensor:
    r"""The factor :math:`s_i = \sqrt{r^1_i r^2_i} / r^2_i` of each channel; 1 where one of the ranges is 0.

    >>> equalizing(torch.tensor([8.0, 1.0]), torch.tensor([2.0, 0.0]))
    tensor([2., 1.])
    """
    return torch.where((written > 0) & (read > 0), (written * read).sqrt() / read, 1)


def relu_for_relu6(model: nn.Module) -> tuple[str, ...]:
    """Replace each ``nn.ReLU6`` by ``nn.ReLU``, in place; returns their names.

    >>> relu_for_relu6(nn.Sequential(nn.Linear(2, 2), nn.ReLU6()))
    ('1',)
    """
    found = dict(_relu6(model))
    for name, old in found.items():
        model.set_submodule(name, nn.ReLU(old.inplace).train(old.training))
    return tuple(found)


def _relu6(model: nn.Module) -> Iterator[tuple[str, nn.ReLU6]]:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and isinstance(module, nn.ReLU6):
            yield name, module


def _converged(
    scaling: Scaling, groups: Sequence[ScaleGroup], iterations: int, masks: Mapping[str, Mapping[str, Tensor]]
) -> tuple[Tensor, int]:
    """The factors of all channels, shape ``(channels,)``, and the number of passes."""
    weights = {kernel: kernel.matrices(_kept(kernel, masks)).double() for kernel in scaling.kernels}
    factors = torch.ones(scaling.count, dtype=torch.float64, device="cpu")
    for passes in range(1, iterations + 1):
        moved = 0.0
        for group in groups:
            writers = [kernel for kernel in group.writers if kernel.is_matrix]
            own = equalizing(
                group.largest((kernel.outputs, output_ranges(weights[kernel])) for kernel in writers),
                group.largest((kernel.inputs, input_ranges(weights[kernel])) for kernel in group.readers),
            )
            for kernel in writers:
                kernel.rescale(weights[kernel], divide=group.spread(kernel.outputs, own))
            for kernel in group.readers:
                kernel.rescale(weights[kernel], multiply=group.spread(kernel.inputs, own))
            factors[group.channels] *= own
            moved = max(moved, float(own.log().abs().max()))
        if moved < CONVERGED:
            return factors, passes
    return factors, iterations


def _kept(kernel: Kernel, masks: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """A parameter with zeros where it is masked."""
    module, _, name = kernel.name.rpartition(".")
    value, mask = kernel.sides.parameter.detach(), masks.get(module, {}).get(name)
    return value if mask is None else value * mask.to(value.device)


def _written_by_norms(groups: Iterable[ScaleGroup]) -> dict[str, str]:
    """The readers of channels that are written by the scale of a norm, or another vector that is no layer's bias."""
    found: dict[str, str] = {}
    for group in groups:
        layers = {kernel.name.rpartition(".")[0] for kernel in group.writers if kernel.is_matrix}
        norms = [kernel.name.rpartition(".")[0] for kernel in group.writers if not kernel.is_matrix]
        norm = next((name for name in norms if name not in layers), None)
        if norm is not None:
            reason = f"is written by {norm}, which multiplies each channel: fold it into the layer before it first"
            found.update((reader.name, reason) for reader in group.readers)
    return found
