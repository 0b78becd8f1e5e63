"""Operations as modules: what a function call of a model becomes, so that a config list can name it."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Operand:
    """A place among the arguments of a call that a tensor or a number of the graph takes.

    Attributes:
        key: the position of a floating tensor; the name of anything else, such as a size or a mask of bools.
    """

    key: int | str

    def __repr__(self) -> str:
        return f"_input_{self.key}"


class Operation(nn.Module, ABC):
    """One call of a function of torch. Subclasses say of which, so that ``op_types`` can select them.

    Floating tensors are given by position: they are the targets ``_input_0``, ``_input_1`` and so on, whatever their
    places among the function's arguments. What the graph computes besides (sizes, indices, masks of bools) is given by
    name. Numbers that stand in the model's code stay here.

    Args:
        function: what is called.
        arguments: its positional arguments, an :class:`Operand` in each place that is given later; nested in lists and
            tuples.
        keywords: likewise by name.

    Attributes:
        inputs: how many tensors it is given by position.

    >>> add = Add(torch.add, [Operand(0), Operand(1)], {"alpha": 2})
    >>> add, add(torch.tensor(1.0), torch.tensor(3.0))
    (Add(add(_input_0, _input_1, alpha=2)), tensor(7.))
    """

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        super().__init__()
        self.function = function
        self.arguments = tuple(arguments)
        self.keywords = dict(keywords)
        self.inputs = sum(isinstance(operand.key, int) for operand in _operands((arguments, keywords)))

    def forward(self, *operands: Tensor, **others: Any) -> Any:
        """Call the function."""
        given = {**dict(enumerate(operands)), **others}
        arguments = [_filled(argument, given) for argument in self.arguments]
        return self.function(*arguments, **{name: _filled(value, given) for name, value in self.keywords.items()})

    def extra_repr(self) -> str:
        """The call."""
        keywords = [f"{name}={value!r}" for name, value in self.keywords.items()]
        return f"{self.function.__name__}({', '.join([*map(repr, self.arguments), *keywords])})"


def _filled(value: Any, given: Mapping[int | str, Any]) -> Any:
    if isinstance(value, Operand):
        return given[value.key]
    return type(value)(_filled(item, given) for item in value) if isinstance(value, (list, tuple)) else value


def _operands(value: Any) -> list[Operand]:
    if isinstance(value, Operand):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [operand for part in parts for operand in _operands(part)]


@final
class Add(Operation):
    """The sum of two tensors, or of a tensor and a number."""


@final
class Sub(Operation):
    """The difference of two tensors, or of a tensor and a number."""


@final
class Mul(Operation):
    """The product, element by element, of two tensors, or of a tensor and a number."""


@final
class Div(Operation):
    """The quotient of two tensors, or of a tensor and a number."""


@final
class MatMul(Operation):
    """The matrix product of two tensors."""


@final
class Einsum(Operation):
    """A sum of products, in the notation of Einstein."""


@final
class Concat(Operation):
    """Tensors one after the other along a dimension."""


@final
class Stack(Operation):
    """Tensors beside each other along a new dimension."""


@final
class Mean(Operation):
    """The mean of a tensor, along some dimensions or all."""


@final
class Sum(Operation):
    """The sum of a tensor's elements, along some dimensions or all."""


@final
class Interpolate(Operation):
    """A tensor resized in space."""


@final
class FunctionalLinear(Operation):
    """A linear layer whose weight is given as an operand."""


@final
class FunctionalConv(Operation):
    """A convolution whose weight is given as an operand."""


@final
class FunctionalNorm(Operation):
    """A layer, group or RMS norm whose scale and shift are given as operands."""


def _by_function(names: Mapping[type[Operation], str]) -> dict[str, type[Operation]]:
    return {name: operation for operation, listed in names.items() for name in listed.split()}


OPERATIONS: Mapping[str, type[Operation]] = _by_function(
    {
        Add: "add __radd__",
        Sub: "sub subtract rsub __rsub__",
        Mul: "mul multiply __rmul__",
        Div: "div divide true_divide __rtruediv__",
        MatMul: "matmul __rmatmul__ bmm mm",
        Einsum: "einsum",
        Concat: "cat concat concatenate",
        Stack: "stack",
        Mean: "mean",
        Sum: "sum",
        Interpolate: "interpolate",
        FunctionalLinear: "linear",
        FunctionalConv: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        FunctionalNorm: "layer_norm group_norm rms_norm",
    }
)
"""By the name of a function or of a tensor's method, what its call becomes."""

_AVG_POOL = "kernel_size stride padding ceil_mode count_include_pad"
_MAX_POOL = "kernel_size stride padding dilation ceil_mode return_indices"
_MODULES: Mapping[str, tuple[type[nn.Module], str]] = {
    "relu": (nn.ReLU, "inplace"),
    "relu6": (nn.ReLU6, "inplace"),
    "leaky_relu": (nn.LeakyReLU, "negative_slope inplace"),
    "elu": (nn.ELU, "alpha inplace"),
    "hardtanh": (nn.Hardtanh, "min_val max_val inplace"),
    "gelu": (nn.GELU, "approximate"),
    "silu": (nn.SiLU, "inplace"),
    "mish": (nn.Mish, "inplace"),
    "softplus": (nn.Softplus, "beta threshold"),
    "hardswish": (nn.Hardswish, "inplace"),
    "hardsigmoid": (nn.Hardsigmoid, "inplace"),
    "sigmoid": (nn.Sigmoid, ""),
    "tanh": (nn.Tanh, ""),
    "softmax": (nn.Softmax, "dim dtype"),
    "log_softmax": (nn.LogSoftmax, "dim dtype"),
    "dropout": (nn.Dropout, "p training inplace"),
    "dropout2d": (nn.Dropout2d, "p training inplace"),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d, "output_size"),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, "output_size"),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d, "output_size"),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d, "output_size return_indices"),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d, "output_size return_indices"),
    "avg_pool1d": (nn.AvgPool1d, _AVG_POOL),
    "avg_pool2d": (nn.AvgPool2d, f"{_AVG_POOL} divisor_override"),
    "avg_pool3d": (nn.AvgPool3d, f"{_AVG_POOL} divisor_override"),
    "max_pool1d": (nn.MaxPool1d, _MAX_POOL),
    "max_pool2d": (nn.MaxPool2d, _MAX_POOL),
    "max_pool3d": (nn.MaxPool3d, _MAX_POOL),
}
"""By the name of a function of one tensor: the module of torch.nn that computes it, and the function's arguments."""

UNARY = frozenset(_MODULES)
"""Functions that a module of torch.nn computes; their first argument is the tensor."""


def unary_module(name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> nn.Module | None:
    """The module of torch.nn that computes a function of one tensor, or None where none does exactly that.

    Args:
        name: one of :data:`UNARY`.
        arguments: what the function is called with, after the tensor.
        keywords: likewise by name; a ``dtype`` is the caller's to see to.

    >>> unary_module("leaky_relu", [0.2], {})
    LeakyReLU(negative_slope=0.2)
    """
    kind, listed = _MODULES[name]
    names = listed.split()
    given = {**dict(zip(names, arguments, strict=False)), **keywords}
    for ignored in ("inplace", "_stacklevel", "dtype"):
        given.pop(ignored, None)
    if given.pop("training", False) or given.get("return_indices") or not given.keys() <= set(names):
        return None  # dropout outside training, say, of which no module takes note
    return kind(**given)


def causal_mask(scores: Tensor) -> Tensor:
    """True where a query, in the second dimension from the end, may look: at keys up to its own position.

    >>> causal_mask(torch.zeros(2, 3))
    tensor([[ True, False, False],
            [ True,  True, False]])
    """
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Attention scores under a mask of bools (False is minus infinity) or of summands.

    Rows in which everything is masked are left as they are, so that their softmax is finite.

    >>> masked(torch.ones(2, 2), torch.tensor([[True, False], [False, False]]))
    tensor([[1., -inf],
            [1., 1.]])
    """
    empty = _all_masked(mask)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~(mask | empty), -math.inf)
    return scores + mask.masked_fill(empty, 0)


def zero_where_all_is_masked(weights: Tensor, mask: Tensor) -> Tensor:
    """Attention weights of rows in which everything is masked are zero, as in torch."""
    return weights.masked_fill(_all_masked(mask), 0)


def _all_masked(mask: Tensor) -> Tensor:
    return (~mask if mask.dtype == torch.bool else mask == -math.inf).all(-1, keepdim=True)
