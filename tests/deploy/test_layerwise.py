"""Each layer from the same inputs: what a deep network's own rounding noise would hide is found."""

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy import QuantizationSpeedup
from tersor.deploy.engines import engine_of
from tersor.deploy.graph import DEQUANTIZE, Graph
from tersor.deploy.layerwise import layerwise
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.errors import VerificationError
from tersor.graph.inputs import tensors_of
from tests.deploy.lowered import program_of, ptq

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))


def entries(value="uint8"):
    """Weights, inputs and outputs of all linear layers."""
    return [
        {"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8", "granularity": "out_channel"},
        {
            "op_types": ["Linear"],
            "target_names": ["_input_", "_output_"],
            "quant_dtype": value,
            "quant_scheme": "affine",
        },
    ]


@pytest.fixture(scope="module")
def chaotic():
    """Each of its layers adds to what two inputs differ by."""
    torch.manual_seed(0)
    layers = []
    for _ in range(16):
        layers += [nn.Linear(64, 64), nn.Tanh()]
        nn.init.normal_(layers[-2].weight, std=3 / 8)
    return ptq(nn.Sequential(*layers, nn.Linear(64, 10)), entries(), X)


def test_a_deep_network_agrees_layer_by_layer(chaotic):
    report = QuantizationSpeedup(chaotic, X, engine="onnxruntime").compile().report
    assert report.simulation_snr < 30
    assert report.floor < 30
    assert report.layers.snr > 60
    assert report.layers.top1 == 1
    assert report.layers.unchanged == float("inf")


def test_a_wrong_layer_is_found_under_the_noise_of_all(chaotic, monkeypatch):
    build = OnnxRuntime.build

    def faulty(self, program, folder, options):
        graph = Graph(program)
        weight = [node for node in graph.calls(DEQUANTIZE) if graph.constant(node.args[0]) is not None][-3]
        weight.update_arg(1, graph.new_constant(graph.constant(weight.args[1]) * 1.02, "scale"))
        build(self, graph.close(), folder, options)

    monkeypatch.setattr(OnnxRuntime, "build", faulty)
    with pytest.raises(VerificationError, match=r"28 departs from the simulation's, from the same inputs: 3\d\.\d dB"):
        QuantizationSpeedup(chaotic, X, engine="onnxruntime").compile()


@pytest.mark.parametrize("value", ["uint4", "int16"])
def test_numbers_that_an_engine_does_not_hand_out_are_looked_at_as_values(value):
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
    engine = engine_of("onnxruntime")
    program, _ = engine.prepare(program_of(ptq(model, entries(value), X), X))
    outputs = tensors_of(program.exported.module()(X))
    found = layerwise(engine, program, ((X,), {}), [X], outputs)
    assert found.snr > 40
    assert found.top1 == 1
