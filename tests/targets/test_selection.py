import pytest
from torch import nn
from torch.nn.utils import parametrize

from tersor.config import parse_config_list
from tersor.errors import UnmatchedError
from tersor.targets import select_modules


class MyConv(nn.Conv2d):
    """A subclass of a user."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.layer1 = nn.Sequential(MyConv(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.layer10 = nn.Sequential(nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(4, 2)
        self.head = self.fc


def select(entry, default_types=()):
    (parsed,) = parse_config_list([entry], "pruning")
    return select_modules(Net(), parsed, default_types)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"op_names": ["fc", "conv1"]}, ["conv1", "fc"]),
        ({"op_names": ["head"]}, ["fc"]),
        ({"op_names": ["fc", "head"]}, ["fc"]),
        ({"op_names": [""]}, [""]),
        ({"op_types": ["Conv2d"]}, ["conv1", "layer1.0", "layer10.0"]),
        ({"op_types": [nn.Conv2d]}, ["conv1", "layer1.0", "layer10.0"]),
        ({"op_types": ["MyConv"]}, ["layer1.0"]),
        ({"op_types": [MyConv, "Linear"]}, ["layer1.0", "fc"]),
        ({"op_names_re": [r"layer1\..*"]}, ["layer1.0", "layer1.1", "layer1.2"]),
        ({"op_names_re": ["conv"]}, ["conv1"]),
        ({"op_names_re": ["layer1"]}, ["layer1", "layer1.0", "layer1.1", "layer1.2", "layer10", "layer10.0"]),
        ({"op_partial_names": ["r1.0", "fc"]}, ["layer1.0", "fc"]),
        ({"op_names": ["conv1"], "op_names_re": [r"layer10\."]}, ["conv1", "layer10.0"]),
        ({"op_names_re": ["layer"], "op_types": ["Conv2d"]}, ["layer1.0", "layer10.0"]),
        ({"op_partial_names": ["layer"], "op_types": ["BatchNorm2d", "ReLU"]}, ["layer1.1", "layer1.2"]),
        ({"op_types": ["Conv2d"], "exclude_op_names": ["conv1"]}, ["layer1.0", "layer10.0"]),
        ({"op_types": ["Conv2d"], "exclude_op_names_re": ["layer"]}, ["conv1"]),
        ({"op_types": ["Conv2d"], "exclude_op_types": [MyConv]}, ["conv1", "layer10.0"]),
        ({"op_types": ["Linear", "ReLU"], "exclude_op_names": ["head"]}, ["layer1.2"]),
    ],
)
def test_selection(entry, expected):
    assert select(entry) == expected


def test_default_stands_for_the_types_given():
    assert select({"op_types": ["default"]}, [nn.Linear, "BatchNorm2d"]) == ["layer1.1", "fc"]


@pytest.mark.parametrize(
    ("entry", "place", "texts"),
    [
        ({"op_names": ["conv1", "cnv1"]}, "['op_names']", ["'cnv1'", "Did you mean 'conv1'?"]),
        ({"op_names": ["zzz"]}, "['op_names']", ["'zzz'", "Look at the model's modules"]),
        ({"op_names_re": ["onv1"]}, "['op_names_re']", ["'onv1'", "Did you mean 'conv1'?"]),
        ({"op_partial_names": ["layr10"]}, "['op_partial_names']", ["'layr10'", "Did you mean 'layer10'?"]),
        ({"op_types": ["Conv2d", "Liner"]}, "['op_types']", ["'Liner'", "Did you mean 'Linear'?"]),
        ({"op_types": ["nn.Conv2d"]}, "['op_types']", ["'nn.Conv2d'", "Did you mean 'Conv2d'?"]),
        ({"op_types": [nn.LSTM]}, "['op_types']", ["'LSTM'", "Legal: Net, Conv2d"]),
        ({"op_types": ["default"]}, "['op_types']", ["'default'"]),
        ({"op_types": ["Embeding"]}, "['op_types']", ["Did you mean 'Embedding'?"]),
        ({"op_types": ["Embedding"]}, "['op_types']", ["Look at the model's module types."]),
        ({"op_names": "fc", "exclude_op_names": "fcc"}, "['exclude_op_names']", ["'fcc'", "Did you mean 'fc'?"]),
        ({"op_names": "fc", "exclude_op_names_re": "x"}, "['exclude_op_names_re']", ["'x'"]),
        ({"op_names": "fc", "exclude_op_types": "Line"}, "['exclude_op_types']", ["'Line'", "'Linear'"]),
        ({"op_names": "fc", "op_types": "Conv2d"}, "", ["fits both op_names and op_types"]),
        ({"op_names": "fc", "exclude_op_names": "fc"}, "", ["leave out all that op_names select"]),
    ],
)
def test_what_matches_nothing(entry, place, texts):
    with pytest.raises(UnmatchedError) as caught:
        select(entry, [nn.Embedding])
    assert caught.value.where == f"config_list[0]{place}"
    for text in texts:
        assert text in str(caught.value)


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def test_parametrized_modules_are_what_they_were():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    parametrize.register_parametrization(model[0], "weight", Halved())
    by_type, by_pattern = parse_config_list([{"op_types": [nn.Linear]}, {"op_names_re": [".+"]}], "pruning")
    assert select_modules(model, by_type, ()) == ["0"]
    assert select_modules(model, by_pattern, ()) == ["0", "1"]
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
