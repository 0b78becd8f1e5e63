"""Mixed precision: more bits for the layers that need them, within a budget of memory, arithmetic or time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from rich.table import Table
from torch import nn

from tersor.config import parse_config_list
from tersor.config.parse import ConfigList
from tersor.config.values import is_activation
from tersor.quantization.base import spec_of
from tersor.quantization.bit_allocation import PerWidth, allocate_bits, weight_bytes
from tersor.quantization.sensitivity import TARGETS, Loss, at_width, sensitivities, targets_named
from tersor.targets.plan import make_plan
from tersor.targets.planned import PlannedTarget


def mixed_precision(
    model: nn.Module,
    config_list: ConfigList,
    calibration: Iterable[Any],
    *,
    budget: float,
    choices: Sequence[int] = (2, 4, 8),
    costs: PerWidth | None = None,
    targets: Sequence[str] = TARGETS,
    loss: Loss | None = None,
) -> tuple[list[dict[str, Any]], BitAllocation]:
    """Choose how many bits each module gets, and write it into a config list for any quantizer.

    Each module is quantized alone at each width to see what harm that does (:func:`sensitivities`); then the widths of
    least total harm whose costs fit into the budget are found (:func:`~tersor.quantization.allocate_bits`). The model
    is as it was afterwards.

    Papers: Dong et al.: HAWQ (ICCV 2019) and HAWQ-V2 (NeurIPS 2020); Wu et al.: Mixed Precision Quantization of
    ConvNets via Differentiable Neural Architecture Search (2018), which searches by training instead.

    Args:
        model: the model.
        config_list: what is quantized and how; the widths in it are replaced.
        calibration: batches like those of training; some hundred samples.
        budget: the most that all modules may cost together.
        choices: widths in bits.
        costs: ``{module: {bits: cost}}`` in the unit of the budget: :func:`~tersor.quantization.bit_operations`, or
            milliseconds that you have measured. By default the bytes of the weights.
        targets: which targets of a module get its width; others stay as the config list has them.
        loss: measure the harm by gradients of this loss, not by the change of outputs.

    Returns:
        A new config list: a copy of the given one, followed by an entry for each module. And a report, which ``rich``
        prints as a table.

    Raises:
        InvalidValueError: the budget cannot be reached, and what could be; or a choice is no width.
        UnmatchedError: no module has any of these targets, or a cost is missing.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> config_list = [{"op_types": ["Linear"], "quant_dtype": "int8"}]
    >>> config_list, report = mixed_precision(model, config_list, [torch.randn(16, 8)], budget=48)
    >>> report.cost <= 48, sorted(report.bits)
    (True, ['0', '2'])
    >>> config_list[1]["op_names"], list(config_list[1]["target_settings"])
    (['0'], ['_input_0', 'weight'])
    """
    entries = parse_config_list(config_list, "quantization")
    harm = sensitivities(model, entries, calibration, choices, targets=targets, loss=loss)
    own: dict[str, list[PlannedTarget]] = {name: [] for name in harm}
    for target in targets_named(make_plan(model, entries, "quantization", None).targets, targets):
        own[target.config.module_name].append(target)
    if costs is None:
        costs = weight_bytes({name: sum(map(_elements, found)) for name, found in own.items()}, choices)
    bits = allocate_bits(harm, costs, budget)
    written = [entry.as_config() for entry in entries]
    for name, width in bits.items():
        starts = {target: entries[target.config.entry_index].quant_start_step for target in own[name]}
        for start in dict.fromkeys(starts.values()):
            specs = {t.config.target_name: at_width(spec_of(t), width) for t in own[name] if starts[t] == start}
            settings = {target: spec.as_config() for target, spec in specs.items()}
            entry = {"op_names": [name], "target_names": list(settings), "target_settings": settings}
            written.append(entry if start is None else {**entry, "quant_start_step": start})
    return written, BitAllocation(bits, harm, {name: dict(costs[name]) for name in bits}, budget)


@final
@dataclass(frozen=True)
class BitAllocation:
    """What :func:`mixed_precision` chose, and why.

    Attributes:
        bits: by module.
        sensitivities: the harm of each width, by module.
        costs: the cost of each width, by module.
        budget: what the costs had to stay within.
    """

    bits: Mapping[str, int]
    sensitivities: PerWidth
    costs: PerWidth
    budget: float

    @property
    def cost(self) -> float:
        """What the chosen widths cost together."""
        return sum(self.costs[name][width] for name, width in self.bits.items())

    def __rich__(self) -> Table:
        table = Table("module", caption=f"cost {self.cost:g} of {self.budget:g}")
        for heading in ("bits", "cost", "sensitivity"):
            table.add_column(heading, justify="right")
        for name, width in self.bits.items():
            numbers = self.costs[name][width], self.sensitivities[name][width]
            table.add_row(name or "(the model)", str(width), *(f"{number:.4g}" for number in numbers))
        return table


def _elements(target: PlannedTarget) -> int:
    """How many values are stored; inputs and outputs are not."""
    name = target.config.target_name
    return 0 if is_activation(name) else getattr(target.config.module, name).numel()
