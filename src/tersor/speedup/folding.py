"""Constants that removed channels carry, folded into the biases of the layers that read them.

A channel whose weights are masked still carries what its bias, its batch norm and ``f(0)`` make of nothing: a constant
``k``. A layer that reads it computes ``W x + b``, and of that ``W[:, removed] k`` is the same for every input: it
moves into ``b``, and the channel leaves without a trace. That is exact where the constant arrives the same everywhere:

- linear layers, and convolutions without padding or with one that repeats values (reflect, replicate, circular);
- not convolutions with zero padding, unless the constant is zero (ReLU of a negative shift): it lacks at the border;
- not where the value depends on the input, or on the place within a feature map.

Where it is not exact, the channel's bias and norm are masked too, as :meth:`Coupling.complete` does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from tersor.errors import TraceError
from tersor.graph.coupling import Coupling, Masks
from tersor.graph.inputs import batch_size, copied, evaluating, fresh_inputs, named_tensors, run, tensors_of
from tersor.graph.labels import Axis
from tersor.speedup.slicing import Snapshot, bake

READING = (F.linear, torch.conv1d, torch.conv2d, torch.conv3d)
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The arguments of a convolution; those of ``linear`` are the first three."""

LOOKING_UP = (F.embedding, F.embedding_bag, torch.embedding)


@dataclass(frozen=True)
class Shift:
    """What removed channels add to the output of one layer that reads them.

    Attributes:
        weight: the layer's weight.
        bias: its bias, which does not exist yet where the layer has none.
        values: one number for each output, before any of these leave, shape ``(out,)``, float64.
    """

    weight: str
    bias: str
    values: Tensor


@dataclass(frozen=True)
class NotFolded:
    """Channels whose constants could not be folded where they are read.

    Attributes:
        target: the weight that reads them, and the dimension.
        count: how many of its indices.
        reason: why.
    """

    target: str
    count: int
    reason: str


@dataclass(frozen=True)
class Constants:
    """What removed channels carry, as far as it is the same for every input.

    Attributes:
        shifts: what goes into which bias.
        masked: the removed classes whose constants cannot be folded, boolean, indexed by class.
        not_folded: where these are read, and why they cannot.
    """

    shifts: tuple[Shift, ...]
    masked: np.ndarray
    not_folded: tuple[NotFolded, ...] = ()


def find_constants(
    model: nn.Module,
    coupling: Coupling,
    masks: Masks,
    removed: np.ndarray,
    *,
    never: np.ndarray | None = None,
    batch_dim: int = 0,
) -> Constants:
    """Run the masked model and see what its removed channels carry to the layers that read them.

    Nothing but the given masks is burnt in, apart from the classes that turn out not to be foldable: these are
    completed, and the model is run again, because what they carried may have been part of other constants.

    Args:
        model: at its full size; it is left as it was.
        coupling: of the model.
        masks: what was asked for.
        removed: the classes that leave, boolean, indexed by class.
        never: classes that are masked in any case.
        batch_dim: the dimension of the inputs that holds the batch.

    Returns:
        shifts and masked classes: the model without the removed classes, with its biases shifted, computes what the
        model with ``coupling.complete(masks, constants.masked)`` computes.

    Raises:
        TraceError: the model runs on no fresh inputs.
    """
    tensors = named_tensors(model)
    masked = np.zeros_like(removed) if never is None else never & removed
    not_folded: list[NotFolded] = []
    for axis in coupling.axes:
        count = int((masked[coupling.classes[axis.span]] & coupling.written[axis.span]).sum())
        if count:
            not_folded.append(
                NotFolded(f"{axis.name} dim {axis.dim}", count, "something else than a layer sums over it")
            )
    while True:  # each turn masks more, or is the last
        snapshot = Snapshot(model)
        try:
            bake(tensors, coupling.complete(masks, masked))
            readers = _watched(model, coupling, removed & ~masked, batch_dim)
            problems = [(reader, *problem) for reader in readers for problem in reader.problems()]
            if not problems:
                return Constants(tuple(reader.shift() for reader in readers), masked, tuple(not_folded))
        finally:
            snapshot.restore()
        for reader, places, reason in problems:
            not_folded.append(NotFolded(f"{reader.axis.name} dim {reader.axis.dim}", len(places), reason))
            masked[coupling.classes[reader.axis.span][places]] = True


def fold(model: nn.Module, shifts: Iterable[Shift], kept: Mapping[str, Mapping[int, Tensor]]) -> tuple[str, ...]:
    """Add shifts to the biases of a model that is cut already; where a layer has no bias, it gets one.

    Args:
        model: changed in place.
        shifts: of :func:`find_constants`.
        kept: what was left of each tensor, as :meth:`Coupling.kept` says it.

    Returns:
        the biases that are new.
    """
    tensors = named_tensors(model)
    made: list[str] = []
    for shift in shifts:
        rows = kept.get(shift.weight, {}).get(0)
        values = shift.values if rows is None else shift.values[rows]
        bias, weight = tensors.get(shift.bias), tensors[shift.weight]
        if bias is not None:
            bias.data = (bias.data.cpu().double() + values).to(bias)
        elif bool(values.any()):
            module, _, name = shift.bias.rpartition(".")
            new = nn.Parameter(values.to(weight.data), requires_grad=weight.requires_grad)
            model.get_submodule(module).register_parameter(name, new)
            made.append(shift.bias)
    return tuple(made)


@dataclass
class _Reader:
    """A weight that reads removed channels, and what it saw of them.

    ``places`` are the channels' indices along ``axis``: the same in each group of a convolution. ``low`` and ``high``
    are the least and the largest value that arrived, shape ``(groups, places)``; ``biases`` what each call added.
    ``bias`` is the name of the bias that can take the shift, ``refusal`` says why there is none.
    """

    axis: Axis
    weight: Tensor
    places: np.ndarray
    low: Tensor = field(default_factory=lambda: torch.tensor(float("inf"), dtype=torch.float64, device="cpu"))
    high: Tensor = field(default_factory=lambda: torch.tensor(-float("inf"), dtype=torch.float64, device="cpu"))
    biases: list[Tensor | None] = field(default_factory=list)
    pads: bool = False
    tolerance: float = 1e-6
    bias: str = ""
    refusal: str = ""

    def see(self, function: Any, call: Mapping[str, Any]) -> None:
        """Take in one call of the layer."""
        x: Tensor = call["input"]
        dim = x.dim() - (1 if function is F.linear else self.weight.dim() - 1)
        groups = x.unflatten(dim, (-1, self.weight.shape[1]))
        removed = groups.index_select(dim + 1, torch.from_numpy(self.places).to(x.device))
        arrived = removed.movedim((dim, dim + 1), (0, 1)).flatten(2)
        if arrived.shape[2]:
            self.low = torch.minimum(self.low, arrived.amin(2).cpu().double())
            self.high = torch.maximum(self.high, arrived.amax(2).cpu().double())
        self.biases.append(call.get("bias"))
        self.pads |= _pads(call.get("padding", 0), self.weight.shape[2:])
        self.tolerance = max(self.tolerance, 8 * torch.finfo(x.dtype).eps)

    def problems(self) -> Iterator[tuple[np.ndarray, str]]:
        """Places whose constants cannot be folded, and why."""
        if self.refusal:
            yield self.places, self.refusal
            return
        largest = torch.maximum(self.low.abs(), self.high.abs())
        # Written so that a nan is no constant.
        constant = (self.high - self.low <= self.tolerance * largest).all(0).numpy()
        if not constant.all():
            yield self.places[~constant], "what it carries is not the same everywhere"
        absent = constant & (largest > 0).any(0).numpy()
        if self.pads and absent.any():
            yield self.places[absent], "zero padding meets its constant at the border"

    def shift(self) -> Shift:
        """``W[:, removed] k``, summed over kernel positions, for each group of outputs."""
        constants = (self.low + self.high) / 2
        columns = self.weight.data.cpu().index_select(1, torch.from_numpy(self.places)).double()
        positions = constants.repeat_interleave(columns[0, 0].numel(), 1)
        sums = columns.reshape(len(positions), -1, positions.shape[1]) @ positions[:, :, None]
        return Shift(self.axis.name, self.bias, sums.flatten())


def _pads(padding: Any, kernel: Sequence[int]) -> bool:
    if isinstance(padding, str):
        return padding == "same" and any(size > 1 for size in kernel)
    return any(padding) if isinstance(padding, Sequence) else bool(padding)


class _Watch(TorchFunctionMode):
    """Shows each reader what arrives at it, and counts every other use of its weight and bias.

    Token ids of an example are often all alike. So what an embedding looks up is scaled at random, and whatever
    depends on the input varies; what is masked stays zero.
    """

    def __init__(self, readers: Iterable[_Reader]) -> None:
        super().__init__()
        self._readers = {id(reader.weight): reader for reader in readers if reader.axis.dim == 1}
        self.uses: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not tensors_of(result):  # a question about a shape or a type
            return result
        self.uses.update(id(tensor) for tensor in tensors_of((*args, *(kwargs or {}).values())))
        if func in READING:
            call = {**dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {})}
            reader = self._readers.get(id(call["weight"]))
            if reader is not None:
                reader.see(func, call)
        return result * (0.5 + torch.rand_like(result)) if func in LOOKING_UP else result


def _watched(model: nn.Module, coupling: Coupling, removed: np.ndarray, batch_dim: int) -> list[_Reader]:
    """Readers of removed channels, after two runs on different inputs."""
    given = batch_size(coupling.example_inputs, batch_dim)
    for samples in (2, given):
        readers = list(_readers(coupling, named_tensors(model), removed))
        watch = _Watch(readers)
        try:
            for seed in (1, 2):
                inputs = fresh_inputs(coupling.example_inputs, samples, batch_dim=batch_dim, seed=seed)
                with evaluating(model), watch:
                    run(model, copied(inputs))
            break
        except TraceError:
            if samples == given:
                raise
    for reader in readers:
        reader.bias, reader.refusal = _bias_of(reader, model, coupling, watch.uses)
    return readers


def _readers(coupling: Coupling, tensors: Mapping[str, Tensor], removed: np.ndarray) -> Iterator[_Reader]:
    """Weights that sum over removed channels with values other than zero."""
    wanted = coupling.read & removed[coupling.classes]
    for axis in coupling.axes:
        places = np.flatnonzero(wanted[axis.span])
        if len(places):
            weight = tensors[axis.name]
            columns = weight.data.index_select(axis.dim, torch.from_numpy(places).to(weight.device))
            places = places[columns.movedim(axis.dim, 0).flatten(1).any(1).cpu().numpy()]
            if len(places):
                yield _Reader(axis, weight, places)


def _bias_of(reader: _Reader, model: nn.Module, coupling: Coupling, uses: Mapping[int, int]) -> tuple[str, str]:
    """The name of the bias that can take a reader's constants; or none, and why."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {modules[name.rpartition(".")[0]] for name in reader.axis.names}
    if len(owners) > 1:
        return "", "its weight is tied to another layer's"
    if reader.low.isinf().any() or len(reader.biases) != uses.get(id(reader.weight)):
        return "", "it is read by something else than a linear layer or a convolution"
    bias, owner = reader.biases[0], owners.pop()
    if all(other is None for other in reader.biases):
        name = f"{reader.axis.name.rpartition('.')[0]}.bias".removeprefix(".")
        return (name, "") if _takes_bias(owner) else ("", "the layer that reads it takes no bias")
    names = [name for name, tensor in named_tensors(model).items() if tensor is bias]
    axis = coupling.axis(names[0], 0) if names else None
    holders = {modules[name.rpartition(".")[0]] for name in (axis.names if axis else names)}
    alone = len(holders) == 1 and uses.get(id(bias)) == len(reader.biases) and all(b is bias for b in reader.biases)
    if not alone or bias is None or bias.shape != reader.weight.shape[:1]:
        return "", "the bias of the layer that reads it is computed or shared"
    return names[0], ""


def _takes_bias(module: nn.Module) -> bool:
    """Whether a layer without a bias is torch's own, which adds a bias as soon as it has one."""
    own = isinstance(module, (nn.Linear, _ConvNd)) and module.bias is None
    codes = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    return own and all(code is None or code.__module__.startswith("torch.nn.modules") for code in codes)
