"""MACs against counts by hand, and what cannot be counted is listed."""

import pytest
import torch
from torch import nn

from tersor.analysis import Uncounted, count
from tersor.errors import InvalidValueError, TraceError


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x))


CASES = {
    "linear": (nn.Linear(3, 5), (torch.zeros(2, 3),), 3 * 5),
    "linear without bias on sequences": (nn.Linear(3, 5, bias=False), (torch.zeros(2, 7, 3),), 7 * 3 * 5),
    "conv": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (torch.zeros(2, 3, 8, 8),), 4 * 4 * 8 * 3 * 9),
    "conv1d dilated": (nn.Conv1d(3, 8, 3, dilation=2), (torch.zeros(2, 3, 10),), 6 * 8 * 3 * 3),
    "grouped conv": (nn.Conv2d(8, 16, 3, groups=4), (torch.zeros(2, 8, 5, 5),), 3 * 3 * 16 * 2 * 9),
    "depthwise conv": (nn.Conv2d(8, 8, 3, groups=8), (torch.zeros(2, 8, 5, 5),), 3 * 3 * 8 * 9),
    "transposed conv": (nn.ConvTranspose2d(4, 6, 2, stride=2), (torch.zeros(2, 4, 5, 5),), 5 * 5 * 4 * 6 * 4),
    "grouped transposed conv": (nn.ConvTranspose2d(4, 6, 2, groups=2), (torch.zeros(2, 4, 5, 5),), 25 * 4 * 3 * 4),
    "bmm": (Call(torch.bmm), (torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)), 3 * 4 * 5),
    "einsum": (
        Call(lambda a, b: torch.einsum("bij,bjk->bik", a, b)),
        (torch.zeros(2, 3, 4), torch.zeros(2, 4, 5)),
        3 * 4 * 5,
    ),
    "matrix times vector": (Call(lambda a: a @ torch.ones(4)), (torch.zeros(2, 3, 4),), 3 * 4),
    "sdpa": (
        Call(nn.functional.scaled_dot_product_attention),
        (torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 8)),
        3 * 5 * 7 * (8 + 8),
    ),
    "multi-head attention with weights": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        (torch.zeros(2, 5, 8),) * 3,
        5 * 8 * 24 + 2 * 5 * 5 * (4 + 4) + 5 * 8 * 8,
    ),
    "transformer encoder layer": (
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (torch.zeros(2, 5, 8),),
        5 * 8 * 24 + 2 * 5 * 5 * (4 + 4) + 5 * 8 * 8 + 2 * 5 * 8 * 16,
    ),
    "lstm, both directions": (
        nn.LSTM(3, 4, batch_first=True, bidirectional=True),
        (torch.zeros(2, 5, 3),),
        2 * 5 * (3 * 16 + 4 * 16),
    ),
    "gru": (nn.GRU(3, 4, batch_first=True), (torch.zeros(2, 5, 3),), 5 * (3 * 12 + 4 * 12)),
    "nothing but cheap operators": (
        nn.Sequential(nn.BatchNorm2d(3), nn.Hardswish(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(), nn.Softmax(1)),
        (torch.zeros(2, 3, 4, 4),),
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_macs_per_sample_equal_those_counted_by_hand(case):
    model, inputs, expected = CASES[case]
    counts = count(model, inputs)
    assert (counts.macs, counts.batch_size, counts.uncounted) == (expected, 2, ())
    assert sum(counts.modules.values()) == expected


def test_tied_parameters_count_once_and_buffers_apart():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    counts = count(model, torch.zeros(2, 4))
    assert (counts.parameters, counts.buffers, counts.macs) == (16 + 4 + 4 + 8, 4 + 4 + 1, 32)


def test_macs_go_to_the_innermost_module_and_a_shared_module_has_all_its_calls():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Sequential(shared), Twice(), nn.Sequential(shared))
    counts = count(model, torch.zeros(3, 4))
    assert counts.modules == {"0.0": 32, "1.fc": 32}
    assert [counts.macs_of(name) for name in ("", "0", "1", "2")] == [64, 32, 32, 0]


def test_functional_arithmetic_belongs_to_the_module_that_does_it():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True))
    attention = Call(lambda x: model[0](x, x, x)[0])
    attention.attention = model[0]
    counts = count(attention, torch.zeros(1, 5, 8))
    assert counts.modules == {"attention": 5 * 8 * 24 + 2 * 5 * 5 * (4 + 4) + 5 * 8 * 8}


def test_a_module_outside_the_tree_counts_for_its_caller():
    hidden = [nn.Linear(4, 4)]
    assert count(Call(lambda x: hidden[0](x)), torch.zeros(1, 4)).modules == {"": 16}


@torch.library.custom_op("tersor_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: torch.cdist(x, x), "aten._cdist_forward"),
        (lambda x: torch.fft.fft(x).real, "aten._fft_r2c"),
        (lambda x: x.sort().values, "aten.sort"),
        (cube, "tersor_tests.cube"),
    ],
)
def test_what_no_formula_counts_is_listed_with_its_module(function, operator):
    model = nn.Sequential(nn.Linear(4, 4), Call(function), Call(function))
    counts = count(model, torch.zeros(2, 4))
    assert counts.macs == 16
    assert counts.uncounted == (Uncounted(operator, "1", 1), Uncounted(operator, "2", 1))


def test_counting_leaves_flags_values_hooks_and_gradient_mode_as_they_were():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    count(model, torch.randn(2, 1, 8, 8))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()) == (True, fastpath)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_model_that_fails_leaves_nothing_behind():
    with pytest.raises(TraceError, match="Sequential cannot run"):
        count(nn.Sequential(nn.Linear(3, 4)), torch.zeros(2, 5))
    assert not nn.modules.module._global_forward_pre_hooks


def test_keyword_inputs_and_an_empty_batch():
    assert count(nn.Linear(3, 4), {"input": torch.zeros(2, 3)}).macs == 12
    with pytest.raises(InvalidValueError, match="batch is empty"):
        count(nn.Linear(3, 4), torch.zeros(0, 3))
