"""Types that an engine lacks: refused by name, or held otherwise with the same values."""

import pytest
import torch
from torch import nn

from tersor.config.dtypes import parse_dtype
from tersor.deploy.engine import Engine
from tersor.deploy.graph import DEQUANTIZE, QUANTIZE
from tersor.deploy.inductor import Inductor
from tersor.deploy.lowering import lower
from tersor.deploy.openvino import OpenVino
from tersor.deploy.unsupported import fit_types
from tersor.errors import InvalidValueError
from tersor.quantization import PtqQuantizer


class Lacking(Engine):
    """An engine that has some types and nothing else."""

    name, title, packages, extra, file = "lacking", "Lacking", (), "", ""

    def __init__(self, *types):
        self.types = [parse_dtype(kind) for kind in types]

    def lacks(self, dtype, *, is_activation):
        return "" if dtype in self.types else f"has no {dtype.as_config()}"

    def prepare(self, program):
        return program, ()

    def build(self, program, folder, options):
        raise NotImplementedError

    def open(self, folder, *, threads, options):
        raise NotImplementedError


def lowered(weight, activation="int8", **settings):
    torch.manual_seed(0)
    net, example = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(4, 6)
    forms = {"weight": {"quant_dtype": weight, **settings}, "_input_0": {"quant_dtype": activation}}
    config = [{"op_types": ["Linear"], "target_names": list(forms), "target_settings": forms}]
    quantizer = PtqQuantizer(net, config, calibration=[example])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    return lower(net, example, calibration), example


def kinds(program):
    calls = [node for node in program.exported.graph.nodes if node.target in (QUANTIZE, DEQUANTIZE)]
    return {node.args[3] for node in calls}


def test_a_type_that_is_there_stays():
    program, _ = lowered("int4")
    same, fallbacks = fit_types(program, Lacking("int4", "int8"), "error")
    assert same is program
    assert fallbacks == ()


def test_an_error_names_engine_operator_and_type():
    program, _ = lowered("int3")
    message = r"0\.weight: Lacking has no int3 for weights of Linear \(nor 1 others"
    with pytest.raises(InvalidValueError, match=message):
        fit_types(program, Lacking("int4", "int8"), "error")
    program, _ = lowered("int8", "uint6")
    with pytest.raises(InvalidValueError, match=r"0\._input_0: Lacking has no uint6 for activations of Linear"):
        fit_types(program, Lacking("int8"), "error")


@pytest.mark.parametrize(
    ("weight", "has", "wide"),
    [("int3", ("int4", "int8"), "int4"), ("int2", ("int8",), "int8"), ("uint3", ("uint8", "int8"), "uint8")],
)
def test_a_wider_type_holds_the_same_values(weight, has, wide):
    program, example = lowered(weight)
    changed, fallbacks = fit_types(program, Lacking(*has), "widen")
    assert kinds(changed) == {"int8", wide}
    assert torch.equal(changed.exported.module()(example), program.exported.module()(example))
    assert [(own.where, own.reason) for own in fallbacks] == [
        (f"{module}.weight", f"Lacking has no {weight}: stored as {wide}") for module in ("0", "2")
    ]
    assert changed.targets["0.weight"].kind == wide
    assert kinds(program) == {"int8", weight}


def test_what_has_no_wider_type_stays_in_floating_point():
    program, example = lowered("int8")
    changed, fallbacks = fit_types(program, Lacking("int4", "uint16"), "widen")
    assert kinds(changed) == set()
    assert torch.equal(changed.exported.module()(example), program.exported.module()(example))
    assert fallbacks[0].reason == "Lacking has no int8: its values stay in floating point"


def test_wider_numbers_are_held_in_a_wider_type_of_torch():
    program, example = lowered("int8")
    changed, _ = fit_types(program, Lacking("int16"), "widen")
    assert kinds(changed) == {"int16"}
    assert torch.equal(changed.exported.module()(example), program.exported.module()(example))
    assert {tensor.dtype for tensor in changed.exported.constants.values()} >= {torch.int16}


@pytest.mark.parametrize("settings", [{}, {"granularity": [1, 2]}, {"granularity": "per_channel"}])
def test_rounded_values_in_floating_point_are_the_same(settings):
    program, example = lowered("int3", "uint6", **settings)
    changed, fallbacks = fit_types(program, Lacking("int8"), "float")
    assert kinds(changed) == set()
    assert torch.equal(changed.exported.module()(example), program.exported.module()(example))
    assert len(fallbacks) == 4
    assert "its values stay in floating point" in fallbacks[0].reason
    assert changed.targets == {}


@pytest.mark.parametrize("types", [("fp8_e4m3", "int8"), ("int8", "fp8_e4m3")])
def test_values_of_eight_bit_floats_are_rounded_without_them(types):
    program, example = lowered(*types)
    changed, _ = fit_types(program, Lacking("int8"), "float")
    assert kinds(changed) == {"int8"}
    assert torch.equal(changed.exported.module()(example), program.exported.module()(example))


@pytest.mark.parametrize(("has", "unsupported"), [("int8", "widen"), ("int4", "float")])
@pytest.mark.parametrize("scale", [torch.tensor([[4.0]]), torch.tensor([[0.3, 4.0, 2.0, 1.0, 7.0, 0.1]])])
def test_signs_have_any_scale_elsewhere_too(has, unsupported, scale):
    grid = {"quant_dtype": "int1", "quant_scheme": "symmetric", "quant_min": -1, "quant_max": 1}
    grid |= {"scale": scale, "zero_point": torch.zeros_like(scale)}
    example = torch.randn(4, 6)
    program = lower(nn.Sequential(nn.Linear(6, 8)), example, {"0": {"_input_0": grid}})
    changed, _ = fit_types(program, Lacking(has), unsupported)
    assert kinds(changed) == ({"int8"} if unsupported == "widen" else set())
    assert torch.equal(changed.exported.module()(example), program.exported.module()(example))


@pytest.mark.parametrize("engine", [OpenVino(), Inductor()])
def test_no_engine_takes_signs_for_small_numbers(engine):
    assert engine.lacks(parse_dtype("int1"), is_activation=True) == "has no int1 inputs and outputs"
    assert engine.lacks(parse_dtype("int1"), is_activation=False) == ""
