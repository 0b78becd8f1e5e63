"""File size against safetensors itself, peak memory against a chain worked out by hand."""

import pytest
import torch
from safetensors.torch import save
from torch import nn

from tersor.analysis import file_size, peak_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_file_size_is_that_of_safetensors(dtype):
    model = nn.Sequential(nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11), nn.Sequential(nn.Linear(7, 5))).to(dtype)
    assert file_size(model) == len(save(model.state_dict()))


def test_tied_weights_are_stored_once():
    tied = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    tied[1].weight = tied[0].weight
    assert file_size(tied) == len(save({"0.weight": tied[0].weight.detach()}))


def test_peak_memory_of_a_chain():
    # Floats alive while each layer runs, as (its input, its output): 8 + 100, 100 + 100, 100 + 30, 30 + 2 without the
    # model's own input; the most is 200.
    model = nn.Sequential(nn.Linear(8, 100), nn.Tanh(), nn.Linear(100, 30), nn.Linear(30, 2))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert peak_memory(model, torch.zeros(1, 8)) == 4 * (weights + 200)
    assert peak_memory(model, torch.zeros(6, 8)) == 4 * (weights + 6 * 200)


class Views(nn.Module):
    """Views and in-place operators hold no new memory; what is kept for later does."""

    def forward(self, x):
        kept = x + 1  # 40 floats until the end
        halves = kept.view(2, 20).t()
        halves.add_(1)
        for _ in range(3):
            last = halves[:5] * 2  # 10 floats; two of them while the name is bound anew
        return kept.sum() + last.sum()


def test_views_and_freed_tensors_do_not_add_up():
    assert peak_memory(Views(), torch.zeros(40)) == 4 * (40 + 2 * 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_on_a_gpu_is_at_least_the_tensors():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Tanh()).cuda()
    assert peak_memory(model, torch.zeros(512, 1024, device="cuda")) >= 4 * (1024 * 1024 + 2 * 512 * 1024)
