"""What a simulation has against itself, for engines that compute it otherwise."""

import math

import pytest
import torch
from torch import nn

from tersor.deploy.lowering import lower
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.deploy.simulation import Simulation, floor_of
from tests.deploy.lowered import entries, ptq

X = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("distance", "tips"), [(0.05, True), (0.6, False)])
def test_a_bias_in_integers_tips_over_what_is_nearer_than_half_a_step(distance, tips):
    """A convolution whose first value lies so many steps of its sums below the middle between two numbers."""
    config_list = [{**entry, "op_types": ["Conv2d"]} for entry in entries(granularity="out_channel")]
    config_list += [{**config_list[-1], "target_names": ["_output_"]}]
    quantizer = ptq(nn.Sequential(nn.Conv2d(1, 1, 1)), config_list, X)
    calibration, model = quantizer.get_calibration_config(), quantizer.unwrap_model()
    scale = {name: float(said["scale"]) for name, said in calibration["0"].items()}
    x = (X[0, 0, 0, 0].double() / scale["_input_0"]).round() * scale["_input_0"]
    weight = (model[0].weight.double() / scale["weight"]).round() * scale["weight"]
    wanted = (10.5 * scale["_output_0"]) - distance * scale["_input_0"] * scale["weight"]
    with torch.no_grad():
        model[0].bias.copy_((wanted - x * weight).flatten())
    program = lower(model, X, calibration, dynamic_batch=False)
    simulation = Simulation(program.exported.module(), X, dynamic_batch=False)
    prepared, _ = OnnxRuntime().prepare(program)
    assert floor_of(program, program, simulation) == math.inf
    assert (floor_of(program, prepared, simulation) < math.inf) == tips
