"""What is in a batch."""

from collections import namedtuple

import pytest
import torch

from tersor.errors import TrainingError
from tersor.training.batches import Distilled, batch_size, take_apart, to_device
from tersor.training.stages import inputs_of

Item = namedtuple("Item", ["inputs", "targets"])


def test_moving_keeps_containers_and_what_is_no_tensor():
    batch = Item({"ids": torch.ones(2, 3), "names": ["a", "b"]}, (torch.ones(2), None))
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is Item
    assert moved.inputs["ids"].device.type == "meta"
    assert moved.inputs["names"] == ["a", "b"]
    assert moved.targets[0].device.type == "meta"
    assert moved.targets[1] is None
    assert batch.inputs["ids"].device.type == "cpu"


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.ones(3, 2), 3),
        ({"scale": torch.tensor(1.0), "ids": torch.ones(5)}, 5),
        (["name", (torch.ones(7, 1),)], 7),
        ("abc", 1),
    ],
)
def test_batch_size(batch, size):
    assert batch_size(batch) == size


def test_the_last_item_is_the_target():
    assert take_apart([1, 2, 3]).args == (1, 2)
    assert take_apart(Item("x", "y")).targets == "y"
    with pytest.raises(TrainingError, match="a batch is a str"):
        take_apart("xy")


def test_what_a_teacher_gave_is_looked_through():
    inputs, targets = torch.ones(3, 2), torch.zeros(3)
    batch = Distilled([inputs, targets], {"logits": torch.ones(3, 5)})
    assert take_apart(batch) == ((inputs,), {}, targets)
    assert batch_size(batch) == 3
    assert batch_size(Distilled("abc", batch.teacher)) == 1
    assert inputs_of(batch) == ((inputs,), {})
    assert inputs_of(Distilled(inputs, {})) == ((inputs,), {})
    assert inputs_of(Distilled({"x": inputs}, {})) == ((), {"x": inputs})
    with pytest.raises(TrainingError, match="a batch is a str"):
        take_apart(Distilled("xy", {}))
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is Distilled
    assert moved.batch[0].device.type == moved.teacher["logits"].device.type == "meta"
