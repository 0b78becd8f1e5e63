"""Programs in the operators that torch's own compilers know: the same bits."""

import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy.decomposed import decompose
from tersor.deploy.graph import CHOOSE, DEQUANTIZE, QUANTIZE, module_of
from tersor.deploy.lowering import lower
from tersor.deploy.plain import plain_copy
from tersor.quantization import PtqQuantizer

INT8 = {"quant_dtype": "int8", "quant_scheme": "symmetric"}
UINT8 = {"quant_dtype": "uint8", "quant_scheme": "affine"}


class Parallel(nn.Module):
    """One linear layer for each way to quantize, so that one export tests them all."""

    def __init__(self, ways):
        super().__init__()
        self.layers = nn.ModuleDict({way: nn.Linear(8, 6) for way in ways})

    def forward(self, x):
        return [layer(x) for layer in self.layers.values()]


def program_of(ways):
    """A program with weights and inputs stored as named."""
    config = [
        {
            "op_names": [f"layers.{way}"],
            "target_names": ["weight", "_input_"],
            "target_settings": {"weight": weight, "_input_": value},
        }
        for way, (weight, value) in ways.items()
    ]
    batches = [torch.randn(4, 3, 8) for _ in range(2)]
    quantizer = PtqQuantizer(Parallel(ways).eval(), config, calibration=batches)
    quantizer.compress()
    plain = plain_copy(quantizer)
    return lower(plain.model, batches[0], plain.calibration)


def operators(program):
    """The operators of ``quantized_decomposed``, by the layer that they belong to."""
    found = {}
    for node in program.exported.graph.nodes:
        if str(node.target).startswith("quantized_decomposed."):
            layer = module_of(node).split(".")[1]
            found.setdefault(layer, []).append(str(node.target).split(".")[1])
    return found


def assert_same_bits(program, decomposed):
    """At another batch size, and on values that leave the calibrated range."""
    x = 3 * torch.randn(7, 3, 8)
    with torch.no_grad():
        before, after = program.exported.module()(x), decomposed.exported.module()(x)
    for layer, one, other in zip(program.modules, before, after, strict=True):
        assert torch.equal(one, other), layer
    assert not [node for node in decomposed.exported.graph.nodes if node.target in (QUANTIZE, DEQUANTIZE, CHOOSE)]


WHOLE = ["quantize_per_tensor", "dequantize_per_tensor"]


def test_static_scales_are_named_operators_of_the_same_bits():
    channels = {**UINT8, "granularity": [-1, -1, 1]}
    ways = {
        "channels": (INT8, UINT8),
        "tensor": ({**INT8, "granularity": [-1, -1]}, INT8),
        "zero_points": ({**UINT8, "granularity": [1, -1]}, UINT8),
        "narrow": ({"quant_dtype": "int4", "quant_scheme": "affine"}, {"quant_dtype": "uint3"}),
        "wide": (INT8, {"quant_dtype": "int16", "quant_scheme": "symmetric"}),
        "features": (INT8, channels),
        "groups": ({"quant_dtype": "int4", "granularity": [1, 4]}, UINT8),
    }
    program = program_of(ways)
    decomposed = decompose(program)
    each = "dequantize_per_channel"
    assert operators(decomposed) == {
        "channels": [*WHOLE, each],
        "tensor": [*WHOLE, "dequantize_per_tensor"],
        "zero_points": [*WHOLE, each],
        "narrow": [*WHOLE, each],
        "wide": [*WHOLE, each],
        "features": ["quantize_per_channel", each, each],
        "groups": [*WHOLE, "dequantize_per_channel_group"],
    }
    first = next(node for node in decomposed.exported.graph.nodes if "quantize_per_tensor" in str(node.target))
    stored = program.targets["layers.channels._input_0"]
    assert first.args[1:] == (float(stored.scale), int(stored.zero_point), 0, 255, torch.uint8)
    assert_same_bits(program, decomposed)


def test_what_has_no_named_operator_is_arithmetic_of_the_same_bits():
    dynamic = {**INT8, "dynamic": True}
    ways = {
        "dynamic": (INT8, dynamic),
        "tokens": (INT8, {**dynamic, "granularity": [-1]}),
        "fp8": ({"quant_dtype": "fp8_e4m3"}, {"quant_dtype": "fp8_e5m2"}),
        "columns": ({"quant_dtype": "int8", "granularity": [3, 1]}, UINT8),
    }
    program = program_of(ways)
    decomposed = decompose(program)
    assert operators(decomposed) == {
        "dynamic": [*WHOLE, "dequantize_per_channel"],
        "tokens": ["dequantize_per_channel"],
        "columns": WHOLE,
    }
    assert_same_bits(program, decomposed)


def test_types_that_are_not_wanted_by_name_are_arithmetic():
    program = program_of({"wide": (INT8, {"quant_dtype": "int16", "quant_scheme": "symmetric"})})
    decomposed = decompose(program, named=(torch.int8, torch.uint8))
    assert operators(decomposed) == {"wide": ["dequantize_per_channel"]}
    assert_same_bits(program, decomposed)
