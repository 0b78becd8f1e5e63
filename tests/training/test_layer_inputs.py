"""Layers as matrix products, against the layers themselves; moments against numpy in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from tersor.errors import InvalidValueError
from tersor.training.layer_inputs import FeatureNorms, SecondMoment, from_rows, unfold_inputs, weight_rows


class Conv1D(nn.Module):
    """What Transformers' GPT-2 has for a linear layer: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class OwnConv(nn.Conv2d):
    pass


LAYERS = [
    (nn.Linear(5, 3), (4, 5)),
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (2, 4, 5)),
    (Conv1D(3, 5), (2, 4, 5)),
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv1d(4, 6, 3), (4, 9)),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 11)),
    (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular", groups=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (2, 4, 9, 7)),
    (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, 3, padding="valid", groups=2), (4, 5, 6)),
    (nn.Conv2d(4, 8, 3, padding=1, groups=4, stride=2), (3, 4, 6, 5)),
    (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 5, 6)),
    (nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="replicate", dilation=(3, 1)), (2, 4, 5, 6)),
    (OwnConv(4, 6, 1, stride=3), (2, 4, 7, 7)),
    (nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0), groups=2), (2, 4, 3, 5, 4)),
    (nn.Conv3d(2, 3, 2, padding="same", padding_mode="circular"), (2, 3, 4, 5)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # PyTorch's own, on its copies
@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=str)
def test_rows_times_inputs_is_the_output(module, shape):
    x = torch.randn(shape)
    rows, inputs = weight_rows(module, module.weight), unfold_inputs(module, x)
    product = rows @ inputs.mT + module.bias.view(inputs.shape[0], -1, 1)
    output = module(x)
    if isinstance(module, nn.Linear | Conv1D):
        expected = output.reshape(-1, output.shape[-1]).T
    else:
        batched = output if output.dim() == len(module.kernel_size) + 2 else output.unsqueeze(0)
        expected = batched.transpose(0, 1).reshape(module.out_channels, -1)
    torch.testing.assert_close(product.reshape(expected.shape), expected)
    assert not inputs.requires_grad
    assert torch.equal(from_rows(module, rows), module.weight)
    mask = torch.rand(module.weight.shape) < 0.5
    assert torch.equal(from_rows(module, weight_rows(module, mask)), mask)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("module", [nn.Linear(4, 2), nn.Conv1d(4, 2, 1)])
def test_inputs_come_in_float32_or_wider(module, given, expected):
    assert unfold_inputs(module, torch.ones(4, 4, dtype=given)).dtype == expected


@pytest.mark.parametrize("module", [nn.ConvTranspose2d(2, 2, 1), nn.Embedding(2, 2), nn.LayerNorm(2)])
@pytest.mark.parametrize("function", [unfold_inputs, weight_rows, from_rows])
def test_other_modules_are_refused_with_the_legal_ones(module, function):
    with pytest.raises(InvalidValueError, match=f"{type(module).__name__} .*Legal: Linear, Conv1d, Conv2d, Conv3d"):
        function(module, torch.ones(2, 2, 2, 2))


def batches() -> list[torch.Tensor]:
    mix = torch.randn(2, 4, 4)
    return [torch.randn(2, samples, 4) @ mix + 3 for samples in (5, 1, 8)]


def test_moment_mean_and_covariance():
    moment = SecondMoment.zeros(2, 4)
    for batch in (parts := batches()):
        moment.add(batch)
    samples = torch.cat(parts, dim=1).double().numpy()
    assert moment.count.item() == 14
    for group in range(2):
        x = samples[group]
        np.testing.assert_allclose(moment.matrix[group], x.T @ x / 14, rtol=1e-5)
        np.testing.assert_allclose(moment.x_mean[group], x.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(moment.covariance[group], np.cov(x.T, bias=True), atol=1e-4)
    assert moment.matrix.dtype == torch.float32


def test_moments_of_parts_add_up():
    first, second, third = batches()
    whole, one, other = (SecondMoment.zeros(2, 4, dtype=torch.float64) for _ in range(3))
    whole.add(torch.cat([first, second, third], dim=1))
    one.add(first)
    other.add(second)
    other.add(third)
    for a, b in zip((one + other).tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(a, b)
    assert one.count.item() == 5


def test_cross_moment():
    x, y = torch.randn(1, 50, 3).double() + 1, torch.randn(1, 50, 3).double() - 2
    cross = SecondMoment.zeros(1, 3, dtype=torch.float64)
    cross.add(x, y)
    a, b = x[0].numpy(), y[0].numpy()
    np.testing.assert_allclose(cross.matrix[0], a.T @ b / 50)
    np.testing.assert_allclose(cross.covariance[0], np.cov(a.T, b.T, bias=True)[:3, 3:], atol=1e-12)
    np.testing.assert_allclose(cross.y_mean[0], b.mean(axis=0))


def test_double_inputs_widen_the_sums():
    moment, norms = SecondMoment.zeros(1, 2), FeatureNorms.zeros(1, 2)
    x = torch.tensor([[[1.0, 1e-9]]], dtype=torch.float64) + 1
    moment.add(x)
    norms.add(x)
    assert moment.matrix[0, 1, 1].item() == x[0, 0, 1].item() ** 2
    assert norms.squares[0, 1].item() == x[0, 0, 1].item() ** 2


def test_half_inputs_beyond_float16():
    moment, norms = SecondMoment.zeros(1, 4), FeatureNorms.zeros(1, 4)
    x = torch.full((1, 100, 4), 300.0, dtype=torch.float16)
    moment.add(x)
    norms.add(x)
    assert moment.matrix.unique().tolist() == [90000.0]
    assert norms.norms.unique().tolist() == [3000.0]


def test_no_samples():
    with pytest.raises(InvalidValueError, match=r"no samples.*calibration data"):
        _ = SecondMoment.zeros(1, 2).matrix


def test_feature_norms():
    norms, moment = FeatureNorms.zeros(2, 4), SecondMoment.zeros(2, 4)
    first, *rest = parts = batches()
    norms.add(first)
    other = FeatureNorms.zeros(2, 4)
    for batch in rest:
        other.add(batch)
    for batch in parts:
        moment.add(batch)
    expected = np.linalg.norm(torch.cat(parts, dim=1).double().numpy(), axis=1)
    np.testing.assert_allclose((norms + other).norms, expected, rtol=1e-6)
    np.testing.assert_allclose(moment.products.diagonal(dim1=1, dim2=2).sqrt(), expected, rtol=1e-6)
