"""Batch sizes of inputs of several kinds."""

import torch

from tersor.analysis.batches import batch_size_of, with_batch_size


def test_size_is_that_of_the_first_tensor_with_dimensions():
    assert batch_size_of((torch.zeros(()), [torch.zeros(5, 2)], torch.zeros(3))) == 5
    assert batch_size_of({"scale": torch.zeros(())}) == 1


def test_other_batch_sizes_repeat_or_cut_the_rows():
    (args, kwargs) = with_batch_size({"ids": torch.arange(6).view(3, 2), "table": torch.zeros(7)}, 4)
    assert args == ()
    assert kwargs["ids"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert kwargs["table"].shape == (7,)
    assert with_batch_size(torch.arange(3), 2)[0][0].tolist() == [0, 1]
