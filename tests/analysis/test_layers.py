"""Layers of models with ties, bare parameters, parametrizations and attention."""

import io
import json

import torch
from rich.console import Console
from torch import nn
from torch.nn.utils import parametrize

from tersor.analysis import count, inspect
from tersor.analysis.layers import changes_between, layers_of


class Half(nn.Module):
    """Masks the first half of a tensor."""

    def forward(self, tensor):
        mask = torch.ones_like(tensor)
        mask[: len(mask) // 2] = 0
        return tensor * mask


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x + self.position
        return self.head(self.attention(x, x, x)[0])


def test_layers_add_up_to_the_model():
    model = Bare()
    model.head.weight = nn.Parameter(torch.ones(3, 8))
    counts = count(model, torch.zeros(2, 5, 8))
    layers = layers_of(model, counts)
    assert [(layer.name, layer.type, layer.shape) for layer in layers] == [
        ("", "Bare", (1, 5, 8)),
        ("attention", "MultiheadAttention", (24, 8)),
        ("attention.out_proj", "NonDynamicallyQuantizableLinear", (8, 8)),
        ("head", "Linear", (3, 8)),
    ]
    assert sum(layer.parameters for layer in layers) == counts.parameters
    assert sum(layer.macs for layer in layers) == counts.macs


def test_tied_parameters_belong_to_the_first_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [layer.parameters for layer in layers_of(model)] == [20, 4]


def test_a_parametrized_layer_is_one_layer_with_the_zeros_that_forward_sees():
    model = nn.Sequential(nn.Conv2d(2, 8, 3))
    parametrize.register_parametrization(model[0], "weight", Half())
    (layer,) = layers_of(model, count(model, torch.zeros(1, 2, 3, 3)))
    parametrize.remove_parametrizations(model[0], "weight")
    assert (layer.type, layer.shape, layer.parameters) == ("Conv2d", (8, 2, 3, 3), 8 * 2 * 9 + 8)
    assert (layer.sparsity, layer.macs) == (0.5, 8 * 2 * 9)


def test_arithmetic_of_a_parametrization_belongs_to_its_layer():
    class Product(nn.Module):
        def forward(self, tensor):
            return tensor @ torch.eye(4)

    model = nn.Sequential(nn.Linear(4, 8, bias=False))
    parametrize.register_parametrization(model[0], "weight", Product())
    (layer,) = layers_of(model, count(model, torch.zeros(1, 4)))
    parametrize.remove_parametrizations(model[0], "weight")
    assert layer.macs == 8 * 4 + 8 * 4 * 4


def test_width_is_the_outgoing_one():
    model = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.Embedding(9, 5), nn.BatchNorm1d(5))
    assert [layer.width for layer in layers_of(model)] == [4, 5, 0]


def test_changes_match_by_name_and_keep_what_was_removed():
    before = layers_of(nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, 8)}))
    after = layers_of(nn.ModuleDict({"a": nn.Linear(4, 2), "c": nn.Linear(2, 8)}))
    changes = changes_between(before, after)
    assert [(change.name, change.widths, change.kept) for change in changes] == [
        ("a", (8, 2), 0.25),
        ("b", (8, 0), 0.0),
        ("c", (0, 8), 1.0),
    ]


def test_inspection_prints_and_serializes():
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x, x)

    model = nn.Sequential(nn.Linear(4, 1000), Distances())
    inspection = inspect(model, torch.zeros(2, 4))
    console = Console(width=100, file=io.StringIO())
    console.print(inspection)
    text = console.file.getvalue()
    assert "1000x4" in text
    assert "5.00 k" in text
    assert "not counted (1x)" in text
    assert json.loads(json.dumps(inspection.to_dict()))["macs"] == 4000
    assert inspect(model).to_dict()["macs"] is None
