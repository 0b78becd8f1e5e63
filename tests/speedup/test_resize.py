"""The sizes that modules keep beside their tensors follow what is sliced."""

import copy

import pytest
import torch
from torch import nn

from tersor.speedup.resize import size_attributes, sizes_from_inputs, update_sizes
from tests.torchvision_stub import import_torchvision


def keep(module, **indices):
    """Slice tensors in place, as the speedup does: ``name=(dim, indices)``; the same parameter objects stay."""
    for name, (dim, index) in indices.items():
        tensor = module.get_parameter(name)
        tensor.data = tensor.data.index_select(dim, torch.as_tensor(index))
    update_sizes(module)
    return module


EVEN = [0, 2]
CASES = [
    (nn.Linear(4, 4), {"weight": (1, EVEN)}, {"in_features": 2, "out_features": 4}),
    (nn.Conv2d(4, 6, 3), {"weight": (0, EVEN), "bias": (0, EVEN)}, {"out_channels": 2, "in_channels": 4, "groups": 1}),
    (nn.Conv2d(4, 8, 1, groups=4), {"weight": (0, EVEN)}, {"out_channels": 2, "in_channels": 4, "groups": 4}),
    (nn.ConvTranspose1d(4, 6, 1), {"weight": (1, EVEN)}, {"in_channels": 4, "out_channels": 2, "groups": 1}),
    (nn.Bilinear(3, 4, 5), {"weight": (2, EVEN)}, {"in1_features": 3, "in2_features": 2, "out_features": 5}),
    (nn.BatchNorm1d(4), {"weight": (0, EVEN)}, {"num_features": 2}),
    (nn.BatchNorm1d(4, affine=False, track_running_stats=False), {}, {"num_features": 4}),
    (nn.InstanceNorm1d(4, affine=True), {"weight": (0, EVEN)}, {"num_features": 2}),
    (nn.InstanceNorm1d(4), {}, {"num_features": 4}),
    (nn.GroupNorm(4, 8), {"weight": (0, [2, 3, 6, 7])}, {"num_channels": 4, "num_groups": 2}),
    (nn.GroupNorm(1, 8), {"weight": (0, [2, 3, 6])}, {"num_channels": 3, "num_groups": 1}),
    (nn.GroupNorm(4, 8, affine=False), {}, {"num_channels": 8, "num_groups": 4}),
    (nn.LayerNorm(4), {"weight": (0, EVEN)}, {"normalized_shape": (2,)}),
    (nn.LayerNorm((3, 4)), {"weight": (1, EVEN)}, {"normalized_shape": (3, 2)}),
    (nn.LayerNorm(4, elementwise_affine=False), {}, {"normalized_shape": (4,)}),
    (nn.RMSNorm(4), {"weight": (0, EVEN)}, {"normalized_shape": (2,)}),
    (nn.Embedding(9, 4), {"weight": (1, EVEN)}, {"num_embeddings": 9, "embedding_dim": 2}),
    (nn.EmbeddingBag(9, 4), {"weight": (1, EVEN)}, {"num_embeddings": 9, "embedding_dim": 2}),
    (nn.PReLU(4), {"weight": (0, EVEN)}, {"num_parameters": 2}),
    (nn.GRUCell(3, 2), {"weight_ih": (1, EVEN)}, {"input_size": 2, "hidden_size": 2}),
    (nn.LSTMCell(3, 2), {"weight_hh": (1, [1])}, {"input_size": 3, "hidden_size": 1}),
    (nn.Unflatten(1, (2, 2)), {}, {}),
    (nn.ReLU(), {}, {}),
]


@pytest.mark.parametrize(("module", "cut", "sizes"), CASES, ids=lambda value: type(value).__name__)
def test_sizes_follow_the_tensors(module, cut, sizes):
    module = copy.deepcopy(module)
    untouched = size_attributes(module)
    assert untouched == {name: getattr(module, name) for name in untouched}
    keep(module, **cut)
    assert size_attributes(module) == sizes == {name: getattr(module, name) for name in sizes}
    update_sizes(module)
    assert sizes == {name: getattr(module, name) for name in sizes}, "following twice changes nothing"


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("kind", "projected"), [(nn.RNN, 0), (nn.GRU, 0), (nn.LSTM, 0), (nn.LSTM, 3)])
def test_a_narrow_recurrent_network_computes_and_learns(kind, bidirectional, projected):
    """Gates stand one under the other, so the rows of one unit leave each of them; inputs leave too."""
    options = {"proj_size": projected} if projected else {}
    big = kind(5, 6, 2, bidirectional=bidirectional, **options).double()
    gates = big.weight_hh_l0.shape[0] // 6
    units, outs, ins = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 2]) if projected else None, torch.tensor([0, 1, 4])
    rows = torch.cat([units + 6 * gate for gate in range(gates)])
    outs = units if outs is None else outs
    width = projected or 6
    columns = torch.cat([outs, outs + width]) if bidirectional else outs
    small = copy.deepcopy(big)
    for name, parameter in small.named_parameters():
        if name.startswith("weight_hr"):
            kept = parameter.data[outs][:, units]
        elif name.startswith("bias"):
            kept = parameter.data[rows]
        else:
            inner = outs if name.startswith("weight_hh") else ins if "_l0" in name else columns
            kept = parameter.data[rows][:, inner]
        parameter.data = kept
    update_sizes(small)
    assert (small.input_size, small.hidden_size, small.proj_size) == (3, 4, 2 if projected else 0)

    with torch.no_grad():  # what leaves, silent: no unit reads it, and its own gates are zero
        for name, parameter in big.named_parameters():
            if name.startswith("weight_hr"):
                parameter[:, [1, 4]] = 0
                parameter[[1]] = 0
            elif name.startswith("weight_hh"):
                parameter[:, [i for i in range(width) if i not in outs]] = 0
            elif name.startswith("weight_ih") and "_l0" in name:
                parameter[:, [2, 3]] = 0
            elif name.startswith("weight_ih"):
                parameter[:, [i for i in range(parameter.shape[1]) if i not in columns]] = 0
    x = torch.randn(7, 2, 5, dtype=torch.float64)
    expected = big(x)[0][..., columns]
    torch.testing.assert_close(small(x[..., ins])[0], expected)
    small.flatten_parameters()
    result = small(x[..., ins])[0]
    torch.testing.assert_close(result, expected)
    result.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in small.parameters())
    assert type(copy.deepcopy(small)(x[..., ins])[0]) is torch.Tensor
    torch.testing.assert_close(small.float()(x[..., ins].float())[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("norm", "big", "small", "sizes"),
    [
        (nn.GroupNorm(4, 8, affine=False), (2, 8, 3), (2, 4, 3), {"num_channels": 4, "num_groups": 2}),
        (nn.LayerNorm(8, elementwise_affine=False), (2, 8), (2, 5), {"normalized_shape": (5,)}),
        (nn.RMSNorm((2, 8), elementwise_affine=False), (1, 2, 8), (1, 2, 3), {"normalized_shape": (2, 3)}),
        (nn.InstanceNorm1d(8), (2, 8, 3), (2, 5, 3), {"num_features": 5}),
        (nn.InstanceNorm2d(8), (8, 3, 3), (5, 3, 3), {"num_features": 5}),
        (nn.BatchNorm1d(8, affine=False, track_running_stats=False), (3, 8), (3, 5), {"num_features": 5}),
    ],
)
def test_a_norm_without_parameters_follows_its_input(norm, big, small, sizes):
    before = size_attributes(norm)
    with sizes_from_inputs(norm):
        norm(torch.randn(big))
    assert size_attributes(norm) == before
    with sizes_from_inputs(norm):
        norm(torch.randn(small))  # an instance norm of another size would warn
    assert size_attributes(norm) == sizes == {name: getattr(norm, name) for name in sizes}
    assert norm(torch.randn(small)).shape == small


def test_a_norm_with_parameters_does_not_follow_its_input():
    norm = nn.GroupNorm(4, 8)
    with sizes_from_inputs(norm), pytest.raises(RuntimeError, match="channels"):
        norm(torch.randn(1, 7, 3))
    assert norm.num_channels == 8


def test_layers_of_libraries_that_are_not_imported():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    assert keep(pytorch_utils.Conv1D(6, 4), weight=(1, EVEN)).nf == 2


def test_subclasses_of_timm():
    import_torchvision()  # timm needs it
    layers = pytest.importorskip("timm.layers")
    assert keep(layers.LayerNorm2d(4), weight=(0, EVEN)).normalized_shape == (2,)
    assert keep(layers.BatchNormAct2d(4), weight=(0, EVEN)).num_features == 2
    assert keep(layers.GroupNormAct(8, 4), weight=(0, [0, 1])).num_groups == 1
    assert keep(layers.RmsNorm(4), weight=(0, EVEN)).normalized_shape == (2,)
    assert keep(layers.SimpleNorm2d(4), weight=(0, EVEN)).normalized_shape == (2,)
