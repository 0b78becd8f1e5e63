"""Scales moved between layers on whole networks: what is found, and that nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from tersor.errors import EquivalenceError, InvalidValueError, TraceError
from tersor.quantization.scale_flow import RULES
from tersor.quantization.scaling import find_scaling
from tests.networks import IMAGE, Dense, Plain, Residual, Separable, Tokens, Upsampling, randomize
from tests.torchvision_stub import import_torchvision

IDS = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
GROUPS = {
    Plain: ["8 channels: 1.weight, 1.bias -> 3.weight", "6 channels: 3.weight, 3.bias -> 7.weight"],
    Residual: [
        "8 channels: bn.weight, bn.bias, bn2.weight, bn2.bias -> conv1.weight, conv3.weight, project.weight",
        "10 channels: bn1.weight, bn1.bias -> conv2.weight",
        "12 channels: conv3.weight, conv3.bias, project.weight, project.bias -> fc.weight",
    ],
    Dense: ["4 channels: norm.weight, norm.bias -> conv1.weight", "15 channels: last.weight, last.bias -> fc.weight"],
    Separable: [
        "12 channels: expand.weight, expand.bias -> depthwise.weight",
        "4 channels: squeeze.weight, squeeze.bias -> excite.weight",
        "8 channels: project.weight, project.bias -> grouped.weight",
        "8 channels: grouped.weight, grouped.bias -> head.weight",
    ],
    Upsampling: [
        "8 channels: down.weight, down.bias -> up.weight",
        "6 channels: up.weight, up.bias, skip.weight, skip.bias -> head.weight",
    ],
    Tokens: ["6 channels: norm.weight, norm.bias -> out.weight"],
}


def transformer(kind, **options):
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **options)
    return getattr(transformers, f"{kind}Model")(config).eval()


def scaled(model, x):
    """Move random factors and check the function against a copy in float64."""
    scaling = find_scaling(model, x)
    before = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    factors = torch.rand(scaling.count, dtype=torch.float64, generator=generator) * 4 + 0.1
    scaling.apply(factors)
    return scaling, before, factors


@pytest.mark.parametrize("network", GROUPS, ids=lambda network: network.__name__)
def test_small_networks(network):
    model = randomize(network())
    x = IMAGES if network is not Tokens else torch.randint(11, (2, 5))
    scaling, before, _ = scaled(model, x)
    assert [str(group) for group in scaling.groups] == GROUPS[network]
    with torch.no_grad():
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)


def test_every_parameter_is_multiplied_by_its_own_factors():
    model = randomize(Separable())
    scaling, before, factors = scaled(model, IMAGES)
    first, _, third, fourth = (factors[group.channels] for group in scaling.groups)
    expected = {
        "expand.weight": before.expand.weight.double() / first.view(-1, 1, 1, 1),
        "expand.bias": before.expand.bias.double() / first,
        "depthwise.weight": before.depthwise.weight.double() * first.view(-1, 1, 1, 1),
        "depthwise.bias": before.depthwise.bias.double(),
        "project.weight": before.project.weight.double() / third.view(-1, 1, 1, 1),
        # four groups of two inputs and two outputs
        "grouped.weight": before.grouped.weight.double()
        * third.view(4, 2).repeat_interleave(2, 0)[:, :, None, None]
        / fourth.view(-1, 1, 1, 1),
        "head.weight": before.head.weight.double() * fourth.view(1, -1, 1, 1),
    }
    for name, values in expected.items():
        torch.testing.assert_close(model.get_parameter(name).double(), values, rtol=1e-6, atol=1e-9)


def test_a_norm_before_queries_keys_and_values():
    model = transformer("ViT", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                        image_size=16, patch_size=8)  # fmt: skip
    x = torch.randn(2, 3, 16, 16)
    scaling, before, _ = scaled(model, x)
    names = [(len(group.channels), len(group.writers), len(group.readers)) for group in scaling.groups]
    assert names == [(16, 2, 3), (16, 2, 1), (16, 2, 1)]  # norm to q, k, v; values to the output; norm to the first
    assert "gelu" in scaling.refused["layers.0.mlp.fc2.weight"]
    with torch.no_grad():
        torch.testing.assert_close(model(x)[0], before(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gated_units_and_queries_in_groups(attention):
    model = transformer("Llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                        intermediate_size=48, attn_implementation=attention)  # fmt: skip
    scaling, before, factors = scaled(model, IDS)
    names = [str(group).replace("layers.0.", "").replace(".weight", "") for group in scaling.groups]
    assert names == [
        "32 channels: input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj",
        "16 channels: self_attn.v_proj -> self_attn.o_proj",
        "32 channels: post_attention_layernorm -> mlp.gate_proj, mlp.up_proj",
        "48 channels: mlp.up_proj -> mlp.down_proj",
    ]
    # Two queries share the values of one head: heads of 8 channels, each twice.
    of_values = factors[scaling.groups[1].channels].view(2, 8)
    wanted = before.layers[0].self_attn.o_proj.weight.double() * of_values.repeat_interleave(2, 0).flatten()
    torch.testing.assert_close(model.layers[0].self_attn.o_proj.weight.double(), wanted, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], before(IDS)[0], rtol=1e-4, atol=1e-5)


def test_a_norm_whose_output_is_also_added_is_refused():
    model = transformer("Bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    scaling, _, _ = scaled(model, IDS)
    assert [str(group).partition(" -> ")[2] for group in scaling.groups] == [
        "encoder.layer.0.attention.output.dense.weight"
    ]
    for layer in ("attention.self.query", "intermediate.dense"):
        assert "is read by a norm" in scaling.refused[f"encoder.layer.0.{layer}.weight"]


def test_weights_of_which_only_a_part_is_free():
    model = transformer("GPT2", n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    scaling, before, factors = scaled(model, IDS)
    values = next(group for group in scaling.groups if group.readers[0].name.endswith("attn.c_proj.weight"))
    packed, old = model.h[0].attn.c_attn.bias, before.h[0].attn.c_attn.bias
    assert torch.equal(packed[:32], old[:32])  # queries and keys
    torch.testing.assert_close(packed[32:].double(), old[32:].double() / factors[values.channels])
    with torch.no_grad():
        torch.testing.assert_close(model(IDS)[0], before(IDS)[0], rtol=1e-4, atol=1e-5)


def test_what_changes_the_outputs_is_taken_back(monkeypatch):
    monkeypatch.setitem(RULES, "gelu", RULES["relu"])  # a rule that is wrong
    model = randomize(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)))
    before = copy.deepcopy(model.state_dict())
    scaling = find_scaling(model, torch.randn(3, 4))
    with pytest.raises(EquivalenceError, match="Sequential: moving scales changed an output by"):
        scaling.apply(torch.full((6,), 1e-2))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("factors", [torch.zeros(8), -torch.ones(8), torch.full((8,), torch.inf), torch.ones(3)])
def test_factors_are_positive_numbers(factors):
    scaling = find_scaling(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), torch.zeros(1, 3))
    with pytest.raises(InvalidValueError, match="8 positive numbers"):
        scaling.apply(factors)


def test_a_model_that_does_not_run_says_so():
    with pytest.raises(TraceError, match="cannot run on the example inputs"):
        find_scaling(nn.Linear(3, 2), torch.zeros(1, 4))


def test_the_model_is_left_as_it_was():
    model = randomize(Plain()).train()
    before = copy.deepcopy(model.state_dict())
    find_scaling(model, IMAGES)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
