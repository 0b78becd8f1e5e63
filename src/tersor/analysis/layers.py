"""The layers of a model one by one, and how compression changed each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from tersor.analysis.macs import Counts, count
from tersor.analysis.metrics import si


@dataclass(frozen=True)
class Layer:
    """A module that holds parameters or computes MACs itself (not only through its children).

    Attributes:
        name: of the module; ``""`` is the model itself.
        type: class name.
        shape: of ``weight``, or of the largest parameter; empty where there is none.
        width: outgoing channels or features; 0 where the layer has no weight of two or more dimensions.
        parameters: own parameters; tied ones count for the first layer that has them.
        macs: per sample; None where nothing was run.
        sparsity: share of exact zeros in its parameters other than biases, as ``forward`` sees them (masked).
    """

    name: str
    type: str
    shape: tuple[int, ...]
    width: int
    parameters: int
    macs: int | None
    sparsity: float


def layers_of(model: nn.Module, counts: Counts | None = None) -> tuple[Layer, ...]:
    """The layers in the order of ``named_modules``; their parameters and MACs add up to the model's.

    >>> [(layer.name, layer.shape, layer.parameters) for layer in layers_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))]
    [('0', (4, 3), 16)]
    """
    macs: Counter[str] = Counter()
    for name, number in counts.modules.items() if counts else ():
        macs[_owner(name)] += number
    seen: set[Tensor] = set()
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if _owner(name) != name:
            continue
        own = list(_own_parameters(module))
        if not own and not macs[name]:
            continue
        tensors = {tensor_name: getattr(module, tensor_name).detach() for tensor_name, _ in own}
        weight = tensors.get("weight", max(tensors.values(), key=Tensor.numel, default=None))
        new = {parameter for _, parameter in own} - seen
        seen |= new
        layers.append(
            Layer(
                name=name,
                type=type_before_parametrizations(module).__name__,
                shape=() if weight is None else tuple(weight.shape),
                width=_width(module, weight),
                parameters=sum(parameter.numel() for parameter in new),
                macs=None if counts is None else macs[name],
                sparsity=_sparsity({key: value for key, value in tensors.items() if "bias" not in key}),
            )
        )
    return tuple(layers)


def _owner(name: str) -> str:
    """The module that a parametrization belongs to, and any other module itself."""
    return f".{name}".partition(".parametrizations")[0].removeprefix(".")


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    if is_parametrized(module):
        parametrizations = cast(nn.ModuleDict, module.parametrizations)
        for name, parametrization in parametrizations.items():
            for parameter in parametrization.parameters(recurse=False):
                yield name, parameter


def _width(module: nn.Module, weight: Tensor | None) -> int:
    if weight is None or weight.dim() < 2:
        return 0
    for attribute in ("out_channels", "out_features", "embedding_dim"):
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    return weight.shape[0]


def _sparsity(tensors: dict[str, Tensor]) -> float:
    size = sum(tensor.numel() for tensor in tensors.values())
    return sum(int((tensor == 0).sum()) for tensor in tensors.values()) / size if size else 0.0


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after; one side is None where the layer was removed or is new.

    >>> wide, narrow = (Layer("fc", "Linear", (width, 3), width, 3 * width, None, 0.0) for width in (8, 2))
    >>> change = LayerChange("fc", wide, narrow)
    >>> change.widths, change.kept
    ((8, 2), 0.25)
    """

    name: str
    before: Layer | None
    after: Layer | None

    @property
    def type(self) -> str:
        """Class name, of the layer after where it still exists."""
        return next(layer.type for layer in (self.after, self.before) if layer)

    @property
    def widths(self) -> tuple[int, int]:
        """Outgoing channels or features before and after; 0 on a side where there is no such layer."""
        return (self.before.width if self.before else 0, self.after.width if self.after else 0)

    @property
    def parameters(self) -> tuple[int, int]:
        """Own parameters before and after."""
        return (self.before.parameters if self.before else 0, self.after.parameters if self.after else 0)

    @property
    def macs(self) -> tuple[int, int]:
        """Own MACs per sample before and after."""
        return ((self.before.macs or 0) if self.before else 0, (self.after.macs or 0) if self.after else 0)

    @property
    def kept(self) -> float:
        """Share of the parameters that is left (1 where there were none)."""
        before, after = self.parameters
        return after / before if before else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "name": self.name,
            "type": self.type,
            "kept": self.kept,
            "before": self.before and asdict(self.before),
            "after": self.after and asdict(self.after),
        }


def changes_between(before: tuple[Layer, ...], after: tuple[Layer, ...]) -> tuple[LayerChange, ...]:
    """Layers matched by name, in the order of the model before; new ones at the end."""
    left, right = ({layer.name: layer for layer in layers} for layers in (before, after))
    return tuple(LayerChange(name, left.get(name), right.get(name)) for name in {**left, **right})


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. Printing it with rich shows the table."""

    layers: tuple[Layer, ...]
    counts: Counts | None

    def table(self) -> Table:
        """One row a layer, and the sums."""
        table = Table("layer", "type", "weight", show_footer=True)
        parameters = sum(layer.parameters for layer in self.layers)
        table.add_column("parameters", si(parameters), justify="right")
        table.add_column("MACs", "" if self.counts is None else si(self.counts.macs), justify="right")
        for layer in self.layers:
            macs = "" if layer.macs is None else si(layer.macs)
            table.add_row(layer.name or "(model)", layer.type, shape_text(layer), si(layer.parameters), macs)
        for missing in self.counts.uncounted if self.counts else ():
            table.add_row(missing.module or "(model)", missing.operator, "", "", f"not counted ({missing.calls}x)")
        return table

    __rich__ = table

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "parameters": sum(layer.parameters for layer in self.layers),
            "macs": self.counts and self.counts.macs,
            "uncounted": [asdict(missing) for missing in self.counts.uncounted] if self.counts else [],
        }


def inspect(model: nn.Module, example_inputs: Any = None) -> Inspection:
    """List the layers of a model with type, weight shape, parameters, and MACs where example inputs are given.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> import torch
    >>> inspection = inspect(model, torch.zeros(1, 1, 4, 4))
    >>> [(layer.name, layer.parameters, layer.macs) for layer in inspection.layers]
    [('0', 40, 144), ('2', 34, 32)]
    """
    counts = None if example_inputs is None else count(model, example_inputs)
    return Inspection(layers_of(model, counts), counts)


def shape_text(layer: Layer | None) -> str:
    """A weight's shape for people: ``64x32x3x3``."""
    return "" if layer is None else "x".join(map(str, layer.shape))
