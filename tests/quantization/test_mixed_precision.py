import copy
import io
import itertools

import pytest
import torch
from rich.console import Console
from torch import nn

from tersor.analysis import count
from tersor.config import IntDtype, parse_config_list
from tersor.errors import InvalidValueError
from tersor.quantization import bit_operations, mixed_precision, sensitivities
from tersor.targets import resolve_targets
from tersor.testing.toys import BATCHES, EXAMPLE, ToyNetwork

CONFIG = [
    {
        "op_types": ["Conv2d", "Linear"],
        "quant_dtype": "int8",
        "target_settings": {"_output_0": {"quant_dtype": "uint8"}},
    }
]
CHOICES = (2, 4, 8)
DATA = BATCHES[:2]


def network():
    return ToyNetwork().eval()


def specs(model, config_list):
    entries = parse_config_list(config_list, "quantization")
    return {(t.module_name, t.target_name): t.spec for t in resolve_targets(model, entries, "quantization").targets}


def test_the_list_holds_the_least_harm_that_fits_into_the_bytes():
    model = network()
    elements = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    budget = sum(elements.values()) / 2
    given = copy.deepcopy(CONFIG)
    config_list, report = mixed_precision(model, given, DATA, budget=budget, choices=CHOICES)
    assert given == CONFIG
    harm = sensitivities(model, CONFIG, DATA, CHOICES)
    best = min(
        sum(harm[name][bits] for name, bits in zip(elements, widths, strict=True))
        for widths in itertools.product(CHOICES, repeat=len(elements))
        if sum(n * bits / 8 for n, bits in zip(elements.values(), widths, strict=True)) <= budget
    )
    assert sum(harm[name][bits] for name, bits in report.bits.items()) == pytest.approx(best)
    assert report.cost == sum(elements[name] * bits / 8 for name, bits in report.bits.items()) <= budget
    assert len(set(report.bits.values())) > 1

    assert config_list[0] == CONFIG[0]
    assert config_list[0] is not given[0]
    found, before = specs(model, config_list), specs(model, CONFIG)
    assert found.keys() == before.keys()
    for (module, target), spec in found.items():
        dtype = IntDtype(8, signed=False) if target == "_output_0" else IntDtype(report.bits[module])
        assert spec == before[module, target].model_copy(update={"quant_dtype": dtype})


def test_other_costs_and_targets():
    model = network()
    macs = count(model, EXAMPLE).modules
    costs = bit_operations({name: macs[name] for name in ("stem", "left", "right", "hidden", "head")}, CHOICES)
    budget = sum(widths[4] for widths in costs.values())
    _, report = mixed_precision(model, CONFIG, DATA, budget=budget, choices=CHOICES, costs=costs)
    assert report.cost == sum(macs[name] * bits**2 for name, bits in report.bits.items()) <= budget
    config_list, report = mixed_precision(
        model, CONFIG, DATA, budget=1e9, choices=CHOICES, targets=["_output_0"]
    )  # no bytes of weights
    assert set(report.bits.values()) == {8}
    assert config_list[1]["target_settings"]["_output_0"]["quant_dtype"] == "uint8"
    assert config_list[1]["target_names"] == ["_output_0"]


def test_steps_are_carried_over_and_a_later_entry_wins():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    given = [
        {"op_types": ["Linear"], "quant_dtype": "int8", "quant_start_step": 7},
        {
            "op_names": ["1"],
            "quant_dtype": "int8",
            "quant_scheme": "affine",
            "granularity": [1, 2],
            "target_names": ["weight"],
        },
    ]
    config_list, report = mixed_precision(model, given, [torch.randn(8, 4)], budget=8, choices=(2, 4))
    assert report.cost <= 8
    starts = [(entry.get("target_names"), entry.get("quant_start_step")) for entry in config_list[2:]]
    assert starts == [(["_input_0", "weight"], 7), (["_input_0"], 7), (["weight"], None)]
    spec = specs(model, config_list)["1", "weight"]
    assert (spec.quant_scheme, spec.granularity.block) == ("affine", (1, 2))


def test_more_budget_never_harms_and_too_little_says_what_is_possible():
    model = network()
    least = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))) * 2 / 8
    total = []
    for factor in (1, 1.5, 2, 3, 4):
        _, report = mixed_precision(model, CONFIG, DATA, budget=least * factor, choices=CHOICES)
        total.append(sum(report.sensitivities[name][bits] for name, bits in report.bits.items()))
    assert total == sorted(total, reverse=True)
    assert total[0] > total[-1]
    with pytest.raises(InvalidValueError, match=rf"the least that is possible is {least:g}"):
        mixed_precision(model, CONFIG, DATA, budget=least - 1, choices=CHOICES)


def test_the_report_is_a_table():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    costs = {"0": {4: 3, 8: 70}, "1": {4: 2, 8: 5}}
    config_list, data = [{"op_types": ["Linear"], "quant_dtype": 8}], [torch.randn(8, 4)]
    _, report = mixed_precision(model, config_list, data, budget=9, choices=(4, 8), costs=costs)
    assert report.bits == {"0": 4, "1": 8}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report)
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if line.startswith("│")]
    harm = report.sensitivities
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "4", "3", f"{harm['0'][4]:.4g}"],
        ["1", "8", "5", f"{harm['1'][8]:.4g}"],
    ]
