"""Networks with outlier channels, and how well a quantized one keeps the outputs."""

import pytest
import torch
from torch import nn

from tersor.quantization import CalibratedQuantizer, MinMax, UniformQuantize
from tests.networks import randomize
from tests.torchvision_stub import import_torchvision


class RoundToNearest(CalibratedQuantizer):
    """What a quantizer that moves nothing does."""

    def fake_quantize(self, target):
        return UniformQuantize(target.name, self.form(target), self.cut(target), MinMax())

    def calibrate(self):
        for _, transform in self.transforms():
            transform.watching = True
        self.run_calibration()
        for _, transform in self.transforms():
            transform.watching = False
            transform.settle()
            transform.enabled = True


class Block(nn.Module):
    """A norm with loud channels that two layers read, one as the gate of the other."""

    def __init__(self, width=16, inner=24):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def block(loud=40.0, **sizes):
    model = randomize(Block(**sizes))
    with torch.no_grad():
        model.norm.weight[:2] = loud
        model.gate.weight[:, :2] *= 0.1
        model.up.weight[:, :2] *= 0.1
    return model


def tokens(width=16, seed=0, batches=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, width, generator=generator) for _ in range(batches)]


def llama(loud=30.0):
    """Llama with queries in groups, whose norms make a few channels loud."""
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[:3] *= loud
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj,
                           layer.mlp.gate_proj, layer.mlp.up_proj):  # fmt: skip
                linear.weight[:, :3] /= loud / 3
    return model


def decibels(actual, expected):
    """The signal to noise ratio of outputs."""
    noise = (actual.double() - expected.double()).square().sum()
    return 10 * float((expected.double().square().sum() / noise).log10())
