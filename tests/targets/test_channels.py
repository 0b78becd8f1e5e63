import pytest
from torch import nn

from tersor.targets.channels import activation_channel_dim, channel_dims


@pytest.mark.parametrize(
    ("module", "target", "rank", "expected"),
    [
        (nn.Conv2d(3, 8, 3), "weight", 4, (0, 1)),
        (nn.Conv1d(3, 8, 3), "bias", 1, (0, None)),
        (nn.Linear(3, 8), "weight", 2, (0, 1)),
        (nn.ConvTranspose1d(3, 8, 3), "weight", 3, (1, 0)),
        (nn.ConvTranspose2d(3, 8, 3), "bias", 1, (0, None)),
        (nn.Embedding(11, 6), "weight", 2, (1, 0)),
        (nn.BatchNorm2d(8), "running_mean", 1, (0, None)),
        (nn.BatchNorm2d(8), "num_batches_tracked", 0, (None, None)),
        (nn.GRU(4, 6), "weight_ih_l0", 2, (0, 1)),
        (type("Upsampler", (nn.ConvTranspose2d,), {})(3, 8, 3), "weight", 4, (1, 0)),
    ],
)
def test_channels_of_parameters(module, target, rank, expected):
    assert channel_dims(module, target, rank) == expected


@pytest.mark.parametrize(
    ("module", "rank", "expected"),
    [
        (nn.Conv2d(3, 8, 3), 4, 1),
        (nn.Conv2d(3, 8, 3), 3, 0),  # unbatched
        (nn.ConvTranspose1d(3, 8, 3), 3, 1),
        (nn.BatchNorm1d(8), 3, 1),
        (nn.GroupNorm(2, 8), 4, 1),
        (nn.Linear(3, 8), 2, 1),
        (nn.Linear(3, 8), 4, 3),
        (nn.LayerNorm(8), 3, 2),
        (nn.Embedding(11, 6), 3, 2),
        (nn.ReLU(), 4, None),
    ],
)
def test_channels_of_inputs_and_outputs(module, rank, expected):
    assert activation_channel_dim(module, rank) == expected
