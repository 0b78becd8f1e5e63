"""Parameters, and the multiply-accumulates (MACs) of one forward pass, with what could not be counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from tersor.analysis.batches import batch_size_of
from tersor.graph.inputs import evaluating, run

aten = torch.ops.aten

# Operators of aten that move data, or cost a few additions or comparisons an element: by convention no MACs.
_CHEAP_FAMILIES = (
    *("pool", "norm", "softmax", "upsample", "grid_sampler", "dropout", "fake_quantize"),
    *("pad", "embedding", "index", "scatter", "gather", "shuffle", "_like", "new_", "loss", "cross_entropy"),
)
_CHEAP = frozenset(
    (
        *("_unsafe_view", "cat", "stack", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "clone", "copy"),
        *("_to_copy", "repeat", "repeat_interleave", "roll", "flip", "im2col", "col2im", "tril", "triu", "nonzero"),
        *("masked_select", "bernoulli", "fill", "zero", "resize", "set", "lift_fresh", "_local_scalar_dense", "isin"),
        *("bucketize", "searchsorted", "equal", "dequantize", "quantize_per_tensor"),
        *("sum", "mean", "nansum", "prod", "max", "min", "amax", "amin", "aminmax", "argmax", "argmin", "any", "all"),
        *("var", "std", "var_mean", "std_mean", "logsumexp", "cumsum", "cumprod", "_cummax_helper", "count_nonzero"),
        # Activations that torch does not tag as pointwise, and views in place.
        *("glu", "hardswish", "log_sigmoid_forward", "mish", "_prelu_kernel", "rrelu_with_noise", "threshold"),
        *("squeeze", "unsqueeze", "transpose", "as_strided", "resize_as", "uniform", "normal"),
    )
)


@dataclass(frozen=True)
class Uncounted:
    """An operator that does arithmetic which no formula counts.

    Attributes:
        operator: its name, such as ``aten._cdist_forward``.
        module: the innermost module that was running; ``""`` is the model itself.
        calls: how many times it ran.
    """

    operator: str
    module: str
    calls: int


@dataclass(frozen=True)
class Counts:
    """What `count` found.

    Attributes:
        parameters: number of parameters; tied ones are counted once.
        buffers: number of elements of all buffers.
        macs: multiply-accumulates per sample.
        batch_size: the size of dimension 0 of the first example tensor, by which MACs were divided.
        modules: module name -> MACs per sample that ran in that very module, not in its children; they add up to
            ``macs``. A module that is used twice has both uses; a module with two names has the first.
        uncounted: operators that are missing from ``macs``.
    """

    parameters: int
    buffers: int
    macs: int
    batch_size: int
    modules: Mapping[str, int]
    uncounted: tuple[Uncounted, ...]

    def macs_of(self, name: str) -> int:
        """MACs per sample in a module and everything below it (``""``: in the whole model).

        >>> model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), nn.Linear(5, 2))
        >>> counts = count(model, torch.zeros(8, 3))
        >>> counts.modules
        {'0.0': 12, '0.1': 20, '1': 10}
        >>> counts.macs_of("0"), counts.macs
        (32, 42)
        """
        below = f"{name}." if name else ""
        return sum(macs for module, macs in self.modules.items() if module == name or module.startswith(below))


def count(model: nn.Module, example_inputs: Any) -> Counts:
    r"""Count parameters, and the MACs of one forward pass, by running it.

    The formulas are those of ``torch.utils.flop_counter`` (one MAC is two FLOPs) for convolutions, matrix products and
    attention, on the shapes that the operators really get; a few that it lacks are added here (recurrent layers,
    attention on a CPU, matrix times vector). A convolution costs

    .. math:: \text{output positions} \cdot C_{out} \cdot \frac{C_{in}}{\text{groups}} \cdot \text{kernel size}

    and attention of :math:`s` queries and :math:`t` keys :math:`h \, s \, t \, (d_k + d_v)`, whether masked or not.

    By convention these cost nothing: views, operators tagged ``torch.Tag.pointwise``, operators without a tensor among
    their arguments, and in aten data movement, reductions, normalizations, softmax, pooling and interpolation. Every
    other operator is listed in ``uncounted``, never taken as zero.

    Args:
        model: it runs once in eval mode without gradients, and is left as it was.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments. Dimension 0 of the first
            tensor is taken as the batch.

    Raises:
        TraceError: the model cannot run on the inputs.

    >>> count(nn.Conv2d(16, 32, 3, padding=1, groups=4), torch.zeros(2, 16, 8, 8)).macs == 8 * 8 * 32 * (16 // 4) * 9
    True
    >>> class Distances(nn.Module):
    ...     def forward(self, x):
    ...         return torch.cdist(x, x)
    >>> count(Distances(), torch.zeros(4, 3)).uncounted
    (Uncounted(operator='aten._cdist_forward', module='', calls=1),)
    """
    batch_size = batch_size_of(example_inputs)
    counter = FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)
    tracker = _InnermostModule(model)
    counter.mod_tracker = tracker
    listing = _UncountedMode(tracker, counter.flop_registry)
    with evaluating(model), listing, counter:
        run(model, example_inputs)
    flops = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    return Counts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffers=sum(buffer.numel() for buffer in model.buffers()),
        macs=round(sum(flops.values()) / 2 / batch_size),
        batch_size=batch_size,
        modules={name: round(number / 2 / batch_size) for name, number in flops.items()},
        uncounted=tuple(Uncounted(operator, module, calls) for (operator, module), calls in listing.calls.items()),
    )


class _InnermostModule(ModuleTracker):
    """Tells the counter which module of the model is running; unlike its base only the innermost, by its first name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._running = [""]
        self.parents = {""}

    def __enter__(self) -> _InnermostModule:
        self._handles = (
            nn.modules.module.register_module_forward_pre_hook(self._begin),
            nn.modules.module.register_module_forward_hook(self._end, always_call=True),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, _inputs: Any) -> None:
        # A module that is not registered in the model counts for the one that calls it.
        self._running.append(self._names.get(module, self._running[-1]))
        self.parents = {self._running[-1]}

    def _end(self, _module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        self._running.pop()
        self.parents = {self._running[-1]}


class _UncountedMode(TorchDispatchMode):
    """Lists operators that are neither counted nor cheap. Entered before the counter: it sees what that runs."""

    def __init__(self, tracker: _InnermostModule, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self._tracker = tracker
        self._formulas = formulas

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in self._formulas and not _is_cheap(func, args, kwargs):
            (module,) = self._tracker.parents
            self.calls[str(func._overloadpacket), module] += 1
        return func(*args, **kwargs)


def _is_cheap(func: Any, args: Any, kwargs: Any) -> bool:
    if func.is_view or torch.Tag.pointwise in func.tags:
        return True
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        return True  # a factory
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    return func.namespace == "aten" and (name in _CHEAP or any(family in name for family in _CHEAP_FAMILIES))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and their product with the values; shapes are (batch, heads, positions, head size)."""
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[2] * (size + value[3])


def _recurrent_flops(inputs: Any, weights: Any) -> int:
    """Every weight matrix once for each step of each sequence."""
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


# Formulas get the shapes of the tensors.
_MORE_FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._cudnn_rnn: lambda inputs, weights, *_, **__: _recurrent_flops(inputs, weights),
    aten.mkldnn_rnn_layer: lambda inputs, w_ih, w_hh, *_, **__: _recurrent_flops(inputs, (w_ih, w_hh)),
    aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
    aten.addmv: lambda bias, matrix, vector, **_: 2 * math.prod(matrix),
    aten.dot: lambda vector, other, **_: 2 * math.prod(vector),
}
