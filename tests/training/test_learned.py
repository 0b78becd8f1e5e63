"""What pruners learn beside the weights stays out of the user's way, and is the same on all processes."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from tersor.pruning.movement import MovementPruner
from tersor.training.learned import Learned, Learner
from tests.networks import randomize

RATIO = [{"op_names": ["0"], "sparse_ratio": 0.5}]


def network():
    return randomize(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))


def test_it_is_no_parameter_and_stays_the_same_tensor():
    model = network()
    names = [name for name, _ in model.named_parameters()]
    pruner = MovementPruner(model, RATIO, None, 1, 3)
    pruner.start()
    (learned,) = pruner._learner.learned.values()
    value = learned.value
    assert len(list(model.parameters())) == len(names)
    assert sum(name.endswith("scores.value") for name in model.state_dict()) == 1
    twin = copy.deepcopy(model)
    model.to(torch.float64)
    assert learned.value is value
    assert (value.dtype, value.is_leaf, value.requires_grad) == (torch.float32, True, True)
    model(torch.ones(3, 4, dtype=torch.float64)).sum().backward()
    pruner.before_step()
    assert (value != 0).all()
    assert not twin.state_dict()["0.parametrizations.weight.0.mask.scores.value"].any()
    assert value.grad is None
    pruner.unwrap_model()


def test_a_step_with_an_infinite_gradient_is_left_out():
    first, second = Learned(torch.ones(2)), Learned(torch.ones(2))
    learner = Learner({"a": first, "b": second}, 0.01)
    learner.start()
    (first.value * torch.tensor([1.0, float("inf")])).sum().backward()
    learner.step()
    assert torch.equal(first.value, torch.ones(2))
    (first.value * torch.tensor([1.0, -1.0])).sum().backward()
    learner.step()
    torch.testing.assert_close(first.value.detach(), torch.tensor([0.99, 1.01]))
    assert torch.equal(second.value, torch.ones(2))


def on_one_of_two(rank, folder):
    """Each process has its own half of the samples; with the gradients' mean both learn what one would from all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(learned_from(samples().chunk(2)[rank]), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def samples():
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(3))


def learned_from(x):
    model = network()
    pruner = MovementPruner(model, RATIO, None, 1, 4)
    pruner.start()
    for _ in range(5):
        pruner.loss(model(x).square().mean()).backward()
        pruner.step()
    found = pruner.own_state()["learner"]["values"]["0.weight"], pruner.get_masks()["0"]["weight"].clone()
    pruner.unwrap_model()
    return found


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_learn_the_same(tmp_path):
    mp.start_processes(on_one_of_two, (str(tmp_path),), nprocs=2, start_method="fork")  # spawning imports torch anew
    (one, its_mask), (other, other_mask) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(one, other)
    assert torch.equal(its_mask, other_mask)
    torch.testing.assert_close(one, learned_from(samples())[0])
