"""What the patterns of Inductor take, made without changing a value."""

import torch
from torch import nn

from tersor.deploy.graph import DEQUANTIZE
from tersor.deploy.inductor import Inductor
from tersor.deploy.lowering import lower
from tersor.quantization import PtqQuantizer


class PadsItself(nn.Conv2d):
    """A convolution whose own code pads what it was given."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


def test_a_convolution_that_pads_by_itself_reads_rounded_values():
    net, example = nn.Sequential(PadsItself(4, 4, 3)).eval(), torch.randn(2, 4, 6, 6)
    config_list = [{"op_types": [PadsItself], "target_names": ["weight", "_input_0"], "quant_dtype": "int8"}]
    quantizer = PtqQuantizer(net, config_list, calibration=[example])
    _, calibration = quantizer.compress()
    quantizer.unwrap_model()
    program = lower(net, example, calibration)
    prepared, _ = Inductor().prepare(program)
    (conv,) = [node for node in prepared.exported.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert conv.args[0].target is DEQUANTIZE
    assert torch.equal(prepared.exported.module()(example), program.exported.module()(example))
