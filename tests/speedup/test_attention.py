"""Attention without some of its heads against torch's own with those heads masked, in float64."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tersor.errors import InvalidValueError, SpeedupError
from tersor.graph.inputs import named_tensors
from tersor.speedup.attention import NarrowMultiheadAttention, narrow_attention
from tersor.speedup.replace import replace_modules
from tersor.speedup.slicing import cut

HEADS, SIZE = 4, 3
WIDTH = HEADS * SIZE
KEPT_HEADS = [0, 2, 3]
L, S, N = 5, 6, 2


def flags(size, kept):
    vector = torch.zeros(size, dtype=torch.bool)
    vector[kept] = True
    return vector


def rows(times=1, kept=KEPT_HEADS):
    """Which rows stay where all heads stand ``times`` times."""
    return flags(HEADS, kept).repeat_interleave(SIZE).repeat(times)


def kept_of(attention, heads=KEPT_HEADS, prefix=""):
    """What the coupling groups say when heads leave."""
    found = {}
    for name in dict(attention.named_parameters()):
        if name.startswith("in_proj"):
            found[prefix + name] = {0: rows(3, heads)}
        elif name.endswith("_proj_weight"):
            found[prefix + name] = {0: rows(1, heads)}
        elif name in ("bias_k", "bias_v"):
            found[prefix + name] = {2: rows(1, heads)}
        elif name == "out_proj.weight":
            found[prefix + name] = {1: rows(1, heads)}
    return found


def shrink(model, kept):
    cut(model, named_tensors(model), kept, {})
    return replace_modules(model, kept)


def masked(attention, heads=KEPT_HEADS):
    """The heads that leave, masked in queries, keys, values and for the output projection, which reads them."""
    result = copy.deepcopy(attention)
    with torch.no_grad():
        for name, dims in kept_of(attention, heads).items():
            parameter = result.get_parameter(name)
            for dim, vector in dims.items():
                parameter[(slice(None),) * dim + (~vector,)] = 0
    return result


def build(**options):
    attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attention


def narrow_of(attention, heads=KEPT_HEADS):
    small = copy.deepcopy(attention)
    shrink(small, kept_of(attention, heads))
    assert type(small) is NarrowMultiheadAttention
    return small


def states(attention, batched=True):
    """Query, key and value; the same tensor for self-attention."""
    shapes = [(L, attention.embed_dim), (S, attention.kdim), (S, attention.vdim)]
    made = [torch.randn(N, *shape, dtype=torch.float64) for shape in shapes]
    if not batched:
        return [tensor[0] for tensor in made]
    return made if attention.batch_first else [tensor.transpose(0, 1) for tensor in made]


OPTIONS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 7, "vdim": 5},
    {"kdim": 7, "vdim": 5, "batch_first": True, "add_bias_kv": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"add_zero_attn": True, "batch_first": True},
]

MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(2)},
    "float": {"attn_mask": torch.arange(L * S, dtype=torch.float64).reshape(L, S) / 10},
    "padding": {"key_padding_mask": torch.arange(S).expand(N, S) >= torch.tensor([[4], [6]])},
    "padding and bool": {
        "key_padding_mask": torch.arange(S).expand(N, S) >= torch.tensor([[4], [6]]),
        "attn_mask": torch.ones(L, S, dtype=torch.bool).triu(2),
    },
    "padding and float": {
        "key_padding_mask": torch.arange(N * S, dtype=torch.float64).reshape(N, S) / 9,
        "attn_mask": torch.arange(L * S, dtype=torch.float64).reshape(L, S) / 10,
    },
    "causal": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masks", MASKS)
def test_equals_torch_with_masked_heads(options, masks):
    attention = build(**options)
    reference, small = masked(attention), narrow_of(attention)
    assert (small.num_heads, small.head_dim, small.embed_dim) == (3, SIZE, WIDTH)
    inputs = states(attention)
    for need, average in ((False, True), (True, False), (True, True)):
        call = {"need_weights": need, **MASKS[masks]}
        expected, weights = reference(*inputs, average_attn_weights=False, **call)
        actual, own = small(*inputs, average_attn_weights=average, **call)
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous() or attention.batch_first
        if not need:
            assert own is None
        else:
            torch.testing.assert_close(own, weights[:, KEPT_HEADS].mean(1) if average else weights[:, KEPT_HEADS])


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}], ids=str)
def test_self_attention_equals_torch_with_masked_heads(options):
    attention = build(**options)
    reference, small = masked(attention), narrow_of(attention)
    x = torch.randn(N, L, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(small(x, x, x)[0], reference(x, x, x)[0])
    torch.testing.assert_close(small(x, x, x, need_weights=False)[0], reference(x, x, x, need_weights=False)[0])
    torch.testing.assert_close(small(x, x * 2, x * 2)[0], reference(x, x * 2, x * 2)[0])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_a_batch(options):
    attention = build(**options)
    reference, small = masked(attention), narrow_of(attention)
    inputs = states(attention, batched=False)
    padding = torch.arange(S) >= 4
    expected, weights = reference(*inputs, key_padding_mask=padding, average_attn_weights=False)
    actual, own = small(*inputs, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(own, weights[KEPT_HEADS])
    torch.testing.assert_close(small(*inputs, need_weights=False)[0], reference(*inputs, need_weights=False)[0])


@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_a_mask_for_each_head_is_one_for_each_head_that_is_left(need, dtype):
    attention = build()
    reference, small = masked(attention), narrow_of(attention)
    mask = (torch.rand(N * HEADS, L, S) > 0.6).to(dtype)
    mask[..., 0] = 0
    left = mask.unflatten(0, (N, HEADS))[:, KEPT_HEADS].flatten(0, 1)
    inputs = states(attention)
    expected = reference(*inputs, attn_mask=mask, need_weights=need)[0]
    torch.testing.assert_close(small(*inputs, attn_mask=left, need_weights=need)[0], expected)
    with pytest.raises(InvalidValueError, match="8, which is not 2 samples times 3 heads"):
        small(*inputs, attn_mask=mask, need_weights=need)


def test_a_causal_hint_without_the_mask_is_refused():
    small = narrow_of(build())
    x = torch.randn(L, N, WIDTH, dtype=torch.float64)
    with pytest.raises(InvalidValueError, match="attn_mask"):
        small(x, x, x, is_causal=True)


@pytest.mark.parametrize("options", [{}, {"kdim": 7, "vdim": 5}], ids=str)
def test_a_narrower_stream(options):
    """The residual stream loses features: those that the projections read, and those that the output writes."""
    attention = build(**options)
    stream = [0, 1, 2, 5, 6, 7, 8, 11]
    kept = kept_of(attention)
    first = "in_proj_weight" if "in_proj_weight" in kept else "q_proj_weight"
    kept[first][1] = flags(WIDTH, stream)
    kept["out_proj.weight"][0] = kept.setdefault("out_proj.bias", {})[0] = flags(WIDTH, stream)
    small, inputs = copy.deepcopy(attention), states(attention)
    shrink(small, kept)
    assert (small.embed_dim, small.kdim, small.num_heads, small.head_dim) == (8, options.get("kdim", 8), 3, SIZE)
    assert (small.out_proj.in_features, small.out_proj.out_features) == (9, 8)
    reference = masked(attention)
    with torch.no_grad():
        outside = [index for index in range(WIDTH) if index not in stream]
        (reference.q_proj_weight if options else reference.in_proj_weight)[:, outside] = 0
    expected = reference(*inputs)[0][..., stream]
    narrow = [tensor[..., stream] if tensor.shape[-1] == WIDTH else tensor for tensor in inputs]
    torch.testing.assert_close(small(*narrow)[0], expected)


def test_where_heads_and_stream_leave_alike_the_class_stays():
    attention = build()
    half = rows(1, [0, 2])
    kept = kept_of(attention, [0, 2])
    kept["in_proj_weight"][1] = kept["out_proj.weight"][0] = half
    kept["out_proj.bias"] = {0: half}
    shrink(attention, kept)
    assert type(attention) is nn.MultiheadAttention
    assert (attention.num_heads, attention.embed_dim) == (2, 6)
    x = torch.randn(L, N, 6, dtype=torch.float64)
    assert attention(x, x, x)[0].shape == x.shape


def test_a_second_time():
    attention = build()
    once = narrow_of(attention)
    again = {name: {} for name in kept_of(attention)}
    left = flags(3, [0, 2]).repeat_interleave(SIZE)  # of the heads 0, 2, 3
    for name, dims in kept_of(attention).items():
        for dim, vector in dims.items():
            again[name][dim] = left.repeat(len(vector) // WIDTH)
    shrink(once, again)
    assert (type(once), once.num_heads) == (NarrowMultiheadAttention, 2)
    inputs = states(attention)
    torch.testing.assert_close(once(*inputs)[0], masked(attention, [0, 3])(*inputs)[0])


def test_it_is_the_same_object():
    attention = build(dropout=0.25).eval()
    attention.out_proj.bias.requires_grad_(False)
    calls = []
    handle = attention.register_forward_hook(lambda *_: calls.append(1))
    parameters, names = dict(attention.named_parameters()), list(attention.state_dict())
    model = nn.ModuleDict({"a": attention, "b": attention})
    replaced = shrink(model, kept_of(attention, prefix="a."))
    assert replaced.names == ["a"]
    assert model["a"] is model["b"] is attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert not attention.training
    assert list(attention.state_dict()) == names
    assert all(attention.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert not attention.out_proj.bias.requires_grad
    x = torch.randn(L, N, WIDTH, dtype=torch.float64)
    attention(x, x, x)
    handle.remove()
    attention(x, x, x)
    assert calls == [1]
    assert "num_heads=3, head_dim=3" in repr(attention)


def test_dropout_acts_in_training_only():
    small = narrow_of(build(dropout=0.5))
    x = torch.randn(L, N, WIDTH, dtype=torch.float64)
    for need in (False, True):
        small.train()
        assert not torch.equal(small(x, x, x, need_weights=need)[0], small(x, x, x, need_weights=need)[0])
        small.eval()
        assert torch.equal(small(x, x, x, need_weights=need)[0], small(x, x, x, need_weights=need)[0])


def test_it_learns_as_the_masked_one_does():
    attention = build()
    reference, small = masked(attention), narrow_of(attention)
    x = torch.randn(L, N, WIDTH, dtype=torch.float64)
    for model in (reference, small):
        model(x, x, x)[0].square().sum().backward()
    torch.testing.assert_close(small.in_proj_weight.grad, reference.in_proj_weight.grad[rows(3)])
    torch.testing.assert_close(small.out_proj.weight.grad, reference.out_proj.weight.grad[:, rows()])


def test_it_can_be_copied_pickled_and_exported():
    small = narrow_of(build(batch_first=True)).eval()
    x = torch.randn(3, L, WIDTH, dtype=torch.float64)
    expected = small(x, x, x, need_weights=False)[0]
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301
        torch.testing.assert_close(twin(x, x, x, need_weights=False)[0], expected)

    class Block(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    exported = torch.export.export(Block(small), (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    graph = exported.graph_module  # module() would leave hooks behind
    torch.testing.assert_close(graph(*exported.state_dict.values(), x)[0], expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_layers_of_torch_never_take_their_fused_path():
    """Those kernels compute the size of a head from the width: they would be wrong, or fail."""
    x, padding = torch.randn(N, L, WIDTH, dtype=torch.float64), torch.arange(L).expand(N, L) >= torch.tensor([[3], [5]])
    for heads, is_padded in itertools.product(([0, 3], [1, 2, 3]), (False, True)):
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True, dtype=torch.float64)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        reference = copy.deepcopy(encoder)
        for own in reference.layers:
            own.self_attn = masked(own.self_attn, heads)
        kept = kept_of(encoder.layers[1].self_attn, heads, prefix="layers.1.self_attn.")
        reference.layers[0] = copy.deepcopy(encoder.layers[0])
        with torch.no_grad():
            before = encoder.use_nested_tensor
            replaced = shrink(encoder, kept)
            assert torch.backends.mha.get_fastpath_enabled()
            mask = padding if is_padded else None
            actual, expected = (model(x, src_key_padding_mask=mask) for model in (encoder, reference))
        real = ~padding if is_padded else torch.ones_like(padding)  # torch zeroes padded positions where it is fused
        torch.testing.assert_close(actual[real], expected[real])
        assert (before, encoder.use_nested_tensor, replaced.names) == (True, False, ["layers.1.self_attn"])
        replaced.undo()
        assert encoder.use_nested_tensor
        assert type(encoder.layers[1].self_attn) is nn.MultiheadAttention


def test_a_decoder_layer_and_a_narrower_feed_forward():
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 8, dtype=torch.float64).eval()
    reference = copy.deepcopy(layer)
    reference.multihead_attn = masked(layer.multihead_attn)
    with torch.no_grad():
        reference.linear2.weight[:, [1, 4]] = 0
    hidden = flags(8, [0, 2, 3, 5, 6, 7])
    kept = kept_of(layer.multihead_attn, prefix="multihead_attn.")
    kept |= {"linear1.weight": {0: hidden}, "linear1.bias": {0: hidden}, "linear2.weight": {1: hidden}}
    shrink(layer, kept)
    x, memory = (torch.randn(length, N, WIDTH, dtype=torch.float64) for length in (L, S))
    with torch.no_grad():
        torch.testing.assert_close(layer(x, memory), reference(x, memory))


def test_a_layer_that_keeps_its_heads_keeps_its_fused_path():
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True, dtype=torch.float64).eval()
    hidden = flags(8, [0, 2, 3])
    shrink(layer, {"linear1.weight": {0: hidden}, "linear1.bias": {0: hidden}, "linear2.weight": {1: hidden}})
    x, fused = torch.randn(N, L, WIDTH, dtype=torch.float64), torch.ops.aten._transformer_encoder_layer_fwd.default
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = layer(x)
    assert fused.name() in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(actual, layer(x))  # with gradients it is not fused


def test_half_a_head_is_refused_and_nothing_remains():
    attention = build()
    kept = kept_of(attention)
    kept["out_proj.weight"][1] = rows(1, [0, 1, 3])
    cut(attention, named_tensors(attention), kept, {})
    with pytest.raises(SpeedupError, match=r"not the same whole heads leave out_proj\.weight"):
        replace_modules(attention, kept)
    half = rows()
    half[0] = False
    with pytest.raises(SpeedupError, match="heads of 3 rows"):
        replace_modules(attention, {"in_proj_weight": {0: half.repeat(3)}})
    assert type(attention) is nn.MultiheadAttention


def test_a_parametrized_one_stays_parametrized():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    attention = build()
    parametrize.register_parametrization(attention, "in_proj_weight", Doubled())
    reference = copy.deepcopy(attention)
    with torch.no_grad():
        reference.parametrizations.in_proj_weight.original[~rows(3)] = 0
        reference.in_proj_bias[~rows(3)] = 0
        reference.out_proj.weight[:, ~rows()] = 0
    kept = kept_of(attention)
    kept["parametrizations.in_proj_weight.original"] = {0: rows(3)}
    shrink(attention, kept)
    assert isinstance(attention, NarrowMultiheadAttention)
    inputs = states(attention)
    torch.testing.assert_close(attention(*inputs)[0], reference(*inputs)[0])
    torch.testing.assert_close(copy.deepcopy(attention)(*inputs)[0], reference(*inputs)[0])
    parametrize.remove_parametrizations(attention, "in_proj_weight")
    parametrize.remove_parametrizations(reference, "in_proj_weight")
    assert type(attention) is NarrowMultiheadAttention
    torch.testing.assert_close(attention(*inputs)[0], reference(*inputs)[0])


class Renamed(nn.MultiheadAttention):
    """A name of its own, and torch's forward."""


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


def test_subclasses():
    heads = Renamed(WIDTH, HEADS)
    shrink(heads, kept_of(heads))
    assert isinstance(heads, Renamed)
    x = torch.randn(L, N, WIDTH)
    assert heads(x, x, x)[0].shape == x.shape
    other = OwnForward(WIDTH, HEADS)
    with pytest.raises(SpeedupError, match="Register a replacer"):
        shrink(other, kept_of(other))
    assert type(other) is OwnForward


def test_small_tensors_that_were_loaded():
    """Tensors alone decide, so a model that is filled with small ones can be completed."""
    small = narrow_of(build())
    loaded = build()
    for name, parameter in small.named_parameters():
        loaded.get_parameter(name).data = parameter.data
    narrow_attention(loaded)
    inputs = states(small)
    assert torch.equal(loaded(*inputs)[0], small(*inputs)[0])
    assert (loaded.num_heads, loaded.head_dim) == (3, 3)
