"""What tests of lowered programs share: a network, its quantizers, and the program beside the simulation."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tersor.deploy.lowering import lower
from tersor.deploy.plain import plain_copy
from tersor.graph.inputs import as_call, evaluating, tensors_of
from tersor.quantization import PtqQuantizer
from tersor.training import TorchEvaluator

GROUPS = [("conv", "norm", "relu"), ("conv2", "relu2"), ("fc", "act")]


class Net(nn.Module):
    """Convolutions, one with a norm, one in groups; a sum; linear layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()
        self.fc, self.act, self.head = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
            nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = x + self.relu2(self.conv2(x))
        return self.head(self.act(self.fc(x.mean((2, 3)))))


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 2, 6, 6, generator=generator) for _ in range(count)]


def fresh():
    """What nothing has seen before, beyond the ranges seen, at another batch size."""
    return 1.5 * torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(2))


def entries(weight="int8", value="uint8", scheme="affine", **settings):
    """Weights and inputs of all layers."""
    return [
        {"op_types": ["Conv2d", "Linear"], "target_names": ["weight"], "quant_dtype": weight, **settings},
        {
            "op_types": ["Conv2d", "Linear"],
            "target_names": ["_input_"],
            "quant_dtype": value,
            "quant_scheme": scheme,
        },
    ]


def ptq(model, config_list, data, **arguments):
    """Calibrated on one example, or on a list of batches."""
    calibration = data if isinstance(data, list) else [data]
    quantizer = PtqQuantizer(model, config_list, calibration=calibration, **arguments)
    quantizer.compress()
    return quantizer


def evaluator(model):
    def train(model, optimizer, training_step, lr_scheduler=None, max_steps=None, max_epochs=None):
        for index in range(max_steps or 4):
            batch = batches()[index % 3]
            optimizer.zero_grad()
            training_step((batch, torch.arange(len(batch)) % 3), model).backward()
            optimizer.step()

    def step(batch, model):
        return F.cross_entropy(model(batch[0]), batch[1])

    return TorchEvaluator(train, torch.optim.SGD(model.parameters(), lr=0.01), step)


def run(model, inputs):
    args, kwargs = as_call(copy.deepcopy(inputs))
    with torch.no_grad():
        return model(*args, **kwargs)


def simulated(model, inputs):
    """The outputs in eval mode, without fused fast paths."""
    with evaluating(model):
        return [tensor.clone() for tensor in tensors_of(run(model, inputs))]


def program_of(quantizer, example, **arguments):
    plain = plain_copy(quantizer)
    return lower(plain.model, example, plain.calibration, masks=plain.activation_masks, **arguments)


def program_outputs(program, inputs):
    return tensors_of(run(program.exported.module(), inputs))


def departure(quantizer, example, inputs, **arguments):
    """The largest difference of a program's outputs from its simulation's."""
    expected = simulated(quantizer.model, inputs)
    program = program_of(quantizer, example, **arguments)
    return largest_difference(program_outputs(program, inputs), expected)


def largest_difference(values, expected):
    pairs = list(zip(values, expected, strict=True))
    assert all(own.shape == other.shape and own.dtype == other.dtype for own, other in pairs)
    return max(float((own.double() - other.double()).abs().max()) for own, other in pairs)
