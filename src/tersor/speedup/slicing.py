"""Changing a model's tensors in place: burn masks in, cut indices out, and take both back where something fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tersor.graph.inputs import named_tensors
from tersor.speedup.resize import groups_left, size_attributes, update_sizes

Factors = Mapping[str, Mapping[str, Sequence[Tensor]]]
"""For each target of each module its mask, as bool tensors that broadcast against it and whose product it is."""
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


class Snapshot:
    """Remembers tensors and sizes of a model, and puts them back if the block that it guards raises.

    Nothing is copied: tensors are never written in place here, only replaced, so the old values stay whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._data = {tensor: (tensor.data, tensor.grad) for tensor in named_tensors(model).values()}
        self._absent = [(m, name) for m in model.modules() for name, value in m._parameters.items() if value is None]
        self._sizes = {module: size_attributes(module) for module in model.modules()}

    def restore(self) -> None:
        """Put everything back."""
        for tensor, (data, grad) in self._data.items():
            tensor.grad = None
            tensor.data = data
            tensor.grad = grad
        for module, name in self._absent:
            module._parameters[name] = None
        for module, sizes in self._sizes.items():
            for name, value in sizes.items():
                setattr(module, name, value)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.restore()


def bake(tensors: Mapping[str, Tensor], masks: Factors) -> None:
    """Make masked values zero.

    Args:
        tensors: a model's parameters and buffers by qualified name; they get new data.
        masks: for each target its mask as factors. A tied parameter is masked under each of its names.
    """
    for module, targets in masks.items():
        for target, factors in targets.items():
            tensor = tensors[f"{module}.{target}" if module else target]
            values = tensor.data.clone()
            for factor in factors:
                _silence(values, factor)
            tensor.data = values


def _silence(values: Tensor, factor: Tensor) -> None:
    """Make masked values zero, in place. A vector of a mask is faster filled in than multiplied."""
    varying = [dim for dim, size in enumerate(factor.shape) if size > 1]
    if len(varying) == 1:
        values.index_fill_(varying[0], (~factor).flatten().nonzero().flatten().to(values.device), 0)
    else:
        values *= factor.to(values.device)


def cut(
    model: nn.Module, tensors: Mapping[str, Tensor], kept: Mapping[str, Mapping[int, Tensor]], masks: Factors
) -> Shapes:
    """Keep only the given indices of each named tensor, and let the modules' own sizes follow.

    What a mask removes without a whole index leaving is zero afterwards.

    A parameter stays the same object, with its flags and hooks; its gradient is cut alike.

    Args:
        model: changed in place.
        tensors: its parameters and buffers by qualified name.
        kept: qualified name to dimension to bool vector, True keeps.
        masks: for each target its mask as factors.

    Returns:
        the shape of each tensor that was cut, before and after.
    """
    shapes: Shapes = {}
    done: set[Tensor] = set()
    for name, dims in kept.items():
        tensor = tensors[name]
        before = tuple(tensor.shape)
        if tensor not in done:
            done.add(tensor)
            grad = None if tensor.grad is None else _select(tensor.grad, dims)
            tensor.grad = None
            tensor.data = _select(tensor.data, dims)
            tensor.grad = grad
        shapes[name] = (before, tuple(tensor.shape))
    for module, name in _owners(model, kept).items():
        rows = kept.get(f"{name}.weight" if name else "weight", {}).get(0)
        if isinstance(module, _ConvNd) and module.groups > 1 and rows is not None:
            module.groups = groups_left(module.groups, rows)
        update_sizes(module)
    bake(tensors, _remaining(masks, kept))
    return shapes


def _remaining(masks: Factors, kept: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[str, tuple[Tensor, ...]]]:
    """Masks cut like their tensors, as far as they still remove something."""
    remaining: dict[str, dict[str, tuple[Tensor, ...]]] = {}
    for module, targets in masks.items():
        for target, factors in targets.items():
            dims = kept.get(f"{module}.{target}" if module else target, {})
            cut_alike = (_select(mask, {d: v for d, v in dims.items() if mask.shape[d] > 1}) for mask in factors)
            left = tuple(mask for mask in cut_alike if not bool(mask.all()))
            if left:
                remaining.setdefault(module, {})[target] = left
    return remaining


def _select(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    whole = tensor
    for dim, vector in dims.items():
        tensor = tensor.index_select(dim, vector.nonzero().flatten().to(tensor.device))
    if whole.dim() == 4 and not whole.is_contiguous() and whole.is_contiguous(memory_format=torch.channels_last):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _owners(model: nn.Module, names: Iterable[str]) -> dict[nn.Module, str]:
    """The modules that own the named tensors, each with one of its names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {modules[owner]: owner for owner in (name.rpartition(".")[0] for name in names)}
