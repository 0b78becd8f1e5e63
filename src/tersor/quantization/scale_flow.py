"""Through which operators a factor on a channel passes: the rules by which scales can be moved between layers.

A layer's output channel may be divided by a positive number, if everything that reads it multiplies it by that number
again, and if all that lies between passes the number on: ``f(x / s) = f(x) / s``. To find such channels the model is
run once. Every tensor carries the *ids* of the unknown factors on its elements, as an integer tensor of its own shape
(expanded where it repeats, so that it takes next to no memory). Four things can happen to an id:

- a linear layer or a convolution reads it, and writes new ones;
- data movement moves it: the same function is called on the ids;
- an addition, or a sum over a dimension, joins ids: these factors must be equal;
- anything else (GELU, ReLU6, softmax, the statistics of a norm) fixes it: the factor is 1, for the given reason.

What no rule knows (:mod:`tersor.quantization.scale_rules`) fixes its inputs, so that nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from tersor.graph.inputs import tensors_of
from tersor.graph.labels import connected_components
from tersor.graph.modes import Mode
from tersor.graph.recorder import DECISIONS

ZERO = 0
"""The id of what is zero, whatever the factor: padding."""


@dataclass(frozen=True, eq=False)
class Sides:
    """A parameter as a matrix product, or a vector, and the ids along its sides.

    Attributes:
        parameter: the weight, bias, or scale of a norm.
        groups: of a convolution.
        transposed: whether inputs come before outputs in memory.
        outputs: ids of the factors that what it writes is divided by, shape ``(outputs,)``.
        inputs: ids of the factors on what it reads, shape ``(inputs,)``; empty for what reads nothing.
    """

    parameter: nn.Parameter
    groups: int
    transposed: bool
    outputs: Tensor
    inputs: Tensor

    def matrices(self, values: Tensor) -> Tensor:
        """A view of the parameter, or of anything of its shape, as ``(groups, outputs, inputs, *positions)``."""
        if not len(self.inputs):
            return values.view(1, -1, 1)
        grouped = values.unflatten(0, (self.groups, -1))
        return grouped.transpose(1, 2) if self.transposed else grouped


Rule: TypeAlias = "Callable[[ScaleFlow, Any, Any, Mapping[str, Any], Any], Any]"
"""``rule(flow, function, args, kwargs, result)`` returns the ids of the result, or None for what cannot be followed."""

RULES: dict[str, Rule] = {}

NAMES = {"hardtanh": "relu6 (hardtanh)", "pow": "a power", "__rdiv__": "an inverse"}
"""What reasons call functions, where their names say too little."""

_SAFE_IN_PLACE = "__iadd__ __isub__ add_ sub_ abs_ neg_ relu_ leaky_relu_ dropout_ requires_grad_ unsqueeze_"
"""Functions that leave the factors on their first argument where they are."""


class ScaleFlow(TorchFunctionMode):
    """Follows the factors through one run of a model.

    Args:
        parameters: the model's parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.busy = False
        self.sides: dict[int, Sides] = {}
        self._otherwise_used: dict[int, str] = {}
        self._known = {id(parameter) for parameter in parameters}
        self._ids: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._joins: list[tuple[Tensor, Tensor]] = []
        self._fixed = torch.zeros(1, dtype=torch.bool, device="cpu")
        self._reasons: list[tuple[Tensor, str]] = []
        self.constant = self.fixed("is added to, or comes from, what no layer writes")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and follow the factors through it."""
        kwargs, before, self.busy = kwargs or {}, self.busy, True
        try:
            result = func(*args, **kwargs)
            if not before:
                self._follow(func, args, kwargs, result)
            return result
        finally:
            self.busy = before

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = name_of(func)
        if not tensors_of(result):
            if name in DECISIONS or name in ("item", "tolist", "__setitem__", "__set__"):
                self.fix_all((args, kwargs), f"is used by {name}")
            return
        rule = RULES.get(name if name.endswith("__") else name.removesuffix("_"))
        if writes(name) and not _in_place_is_safe(name, args):
            rule = None
        try:
            ids = rule(self, func, args, kwargs, result) if rule else None
        except (LookupError, RuntimeError, TypeError, ValueError):  # called in a way that the rule does not know
            ids = None
        if ids is None:
            # Of these no more is taken than the shape and type of a tensor, if there is one at all.
            if "_like" in name or name.startswith("new_") or not tensors_of((args, kwargs)):
                return
            reason = f"passes {NAMES.get(name, name.strip('_'))}, which does not commute with a factor"
            self.fix_all((args, kwargs), reason)
            result = tensors_of(result)
            ids = [self.fixed(reason)] * len(result)
        pairs: Any = [(result, ids)] if isinstance(result, Tensor) else zip(result, ids, strict=True)
        for tensor, own in pairs:
            self.give(tensor, own)

    def give(self, tensor: Tensor, ids: Tensor) -> None:
        """A tensor carries these ids; where they repeat, they are kept once."""
        for dim in range(ids.dim()):
            if ids.stride(dim) and ids.shape[dim] > 1 and bool((ids == ids.narrow(dim, 0, 1)).all()):
                ids = ids.narrow(dim, 0, 1)
        self._ids[tensor] = ids.expand(tensor.shape)

    def of(self, tensor: Tensor) -> Tensor:
        """The ids of a tensor, of its shape, on the CPU."""
        ids = self._ids.get(tensor)
        if ids is None and id(tensor) in self._known and sum(size > 1 for size in tensor.shape) <= 1:
            sides = self.vector(tensor)  # a parameter that is used as it is, such as the scale of a norm
            ids = None if sides is None else sides.outputs.view(tensor.shape)
        elif id(tensor) in self._known:
            self._fix_parameter(tensor, "meets a weight that is used by something else than a layer, too")
        return self.constant.expand(tensor.shape) if ids is None else ids

    def owns(self, tensor: Tensor) -> bool:
        """Whether it is a parameter of the model."""
        return id(tensor) in self._known

    def new(self, count: int) -> Tensor:
        """Unknown factors."""
        start = len(self._fixed)
        self._fixed = torch.cat([self._fixed, torch.zeros(count, dtype=torch.bool, device="cpu")])
        return torch.arange(start, start + count, device="cpu")

    def fixed(self, reason: str) -> Tensor:
        """A factor that is 1, with the reason; shape ()."""
        number = self.new(1)
        self.fix(number, reason)
        return number[0]

    def fix(self, ids: Tensor, reason: str) -> None:
        """These factors are 1."""
        ids = compact(ids).reshape(-1)
        self._fixed[ids] = True
        self._fixed[ZERO] = False
        self._reasons.append((ids, reason))

    def fix_all(self, values: Any, reason: str) -> None:
        """The factors on all tensors in nested containers are 1."""
        for tensor in tensors_of(values):
            if tensor.is_floating_point() or tensor.is_complex():
                self.fix(self.of(tensor), reason)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """These factors are equal; returns the ids of the sum."""
        a, b = compact(*torch.broadcast_tensors(a, b))
        known = (a != ZERO) & (b != ZERO) & (a != b)
        if bool(known.any()):
            count = len(self._fixed)
            pairs = (a[known] * count + b[known]).unique()
            self._joins.append((pairs // count, pairs % count))
            of_a, of_b = self._fixed[a] & known, self._fixed[b] & known
            self._fixed[a[of_b]] = self._fixed[b[of_a]] = True
        # Of two that are fixed the sum goes on as the older one: then much of it repeats, and is kept once.
        older = self._fixed[b] & (b < a) & (b != ZERO)
        return torch.where((a == ZERO) | older, b, a)

    def alike(self, ids: Tensor, dims: Iterable[int]) -> Tensor:
        """The factors along these dimensions are equal; returns the ids with size 1 there."""
        ids, dims = compact(ids), tuple(dims)
        if not dims:
            return ids
        first = ids.amax(dims, keepdim=True)
        self.join(first, ids)
        return first

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """The ids of a product: one of the two operands keeps its own factors, and those of the other are 1."""
        a, b = torch.broadcast_tensors(a, b)
        both = ~self._fixed[a] & ~self._fixed[b] & (a != ZERO) & (b != ZERO)
        if bool(both.any()):
            self.fix(a[both], "is multiplied by another layer's output, which takes the factor")
        ids = torch.where(self._fixed[b], a, b)
        return ids.masked_fill((a == ZERO) | (b == ZERO), ZERO)

    def matrix(self, weight: Tensor, *, groups: int = 1, transposed: bool = False) -> Sides | None:
        """The sides of a layer's weight; None where it is computed from others, or used in two ways."""
        if id(weight) not in self._known:
            return None
        sides = self.sides.get(id(weight))
        if sides is None:
            assert isinstance(weight, nn.Parameter)
            first, second = weight.shape[:2]
            rows, columns = (second * groups, first) if transposed else (first, second * groups)
            sides = self._register(Sides(weight, groups, transposed, self.new(rows), self.new(columns)))
        if (sides.groups, sides.transposed, len(sides.inputs) > 0) != (groups, transposed, True):
            self._fix_parameter(weight, "meets a weight that is used in two ways")
            return None
        return sides

    def vector(self, parameter: Tensor) -> Sides | None:
        """The sides of a bias or of the scale of a norm; None where it is computed, or used in another way too."""
        if id(parameter) not in self._known:
            return None
        sides = self.sides.get(id(parameter))
        if sides is None:
            assert isinstance(parameter, nn.Parameter)
            empty = torch.zeros(0, dtype=torch.int64, device="cpu")
            sides = self._register(Sides(parameter, 1, False, self.new(parameter.numel()), empty))
        if len(sides.inputs):
            self._fix_parameter(parameter, "meets a weight that is used in two ways")
            return None
        return sides

    def written(self, sides: Sides | None, bias: Tensor | None) -> Tensor:
        """The ids that a layer writes: those of its weight's outputs and its bias, which agree."""
        ids = self.constant if sides is None else sides.outputs
        if bias is None:
            return ids
        own = self.vector(bias)
        return self.join(ids, self.constant if own is None else own.outputs)

    def _fix_parameter(self, parameter: Tensor, reason: str) -> None:
        """A parameter takes no factors, whether a layer has used it already or will."""
        self._otherwise_used[id(parameter)] = reason
        if id(parameter) in self.sides:
            self._register(self.sides[id(parameter)])

    def _register(self, sides: Sides) -> Sides:
        self.sides[id(sides.parameter)] = sides
        if id(sides.parameter) in self._otherwise_used:
            ids = torch.cat([sides.outputs, sides.inputs])
            self.fix(ids, self._otherwise_used[id(sides.parameter)])
        return sides

    def solve(self) -> tuple[np.ndarray, dict[int, str]]:
        """The class of each id, ids of one class being equal, and why a class is fixed (the first reason)."""
        joins = [side.numpy() for side in map(torch.cat, zip(*self._joins, strict=True))] if self._joins else ()
        empty = np.zeros(0, np.int64)
        classes = connected_components(len(self._fixed), *(joins or (empty, empty)))
        reasons: dict[int, str] = {}
        for ids, reason in self._reasons:
            for number in np.unique(classes[ids.numpy()]).tolist():
                reasons.setdefault(number, reason)
        return classes, reasons


class Unseen(Mode):
    """Fixes what code reads that torch's Python API does not show: scripted functions, C++."""

    def __init__(self, flow: ScaleFlow) -> None:
        super().__init__()
        self._flow = flow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator."""
        if not self._flow.busy:
            self._flow.busy = True
            try:
                self._flow.fix_all((args, kwargs or {}), f"passes {func}, which is no function of torch's Python API")
            finally:
                self._flow.busy = False
        return func(*args, **(kwargs or {}))


def compact(*given: Tensor) -> Any:
    """Tensors of one shape, with size 1 along each dimension in which all of them only repeat.

    >>> compact(torch.zeros(3, 1).expand(3, 5)).shape
    torch.Size([3, 1])
    """
    tensors = list(given)
    for dim in range(given[0].dim()):
        if all(tensor.stride(dim) == 0 for tensor in tensors):
            tensors = [tensor.narrow(dim, 0, min(tensor.shape[dim], 1)) for tensor in tensors]
    return tensors if len(tensors) > 1 else tensors[0]


def name_of(func: Any) -> str:
    """What a function, method, operator or property of torch is called."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return getattr(owner, "__name__", name) if name == "__get__" else name


def writes(name: str) -> bool:
    """Whether a function writes into its first argument, by its name.

    >>> writes("relu_"), writes("__iadd__"), writes("__add__")
    (True, True, False)
    """
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def _in_place_is_safe(name: str, args: Any) -> bool:
    """Whether other views of the tensor written to keep their ids."""
    if name in ("mul_", "div_", "__imul__", "__itruediv__"):
        return not isinstance(args[1], Tensor)
    return name in _SAFE_IN_PLACE.split()


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for functions, by their names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register
