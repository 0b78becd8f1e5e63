"""A fused run in two processes: one set of masks, scales and projections, and the weights of one process."""

import hashlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tersor.distillation import Adaptive1dLayerwiseDistiller
from tersor.pruning import AGPPruner, L1NormPruner, LevelPruner, MovementPruner, TaylorPruner
from tersor.quantization import LsqPlusQuantizer, LsqQuantizer, QATQuantizer
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.training.ranks import mean_over_processes, of_each_process

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
STEPS = 8


def net(width, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


ENTRIES = {"op_types": ["Linear"], "target_names": ["weight", "_input_"], "quant_dtype": "int8"}
PRUNERS = {
    "norm": lambda model: L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=X[:2]),
    "level": lambda model: LevelPruner(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]),
    "taylor": lambda model: TaylorPruner(
        model, [{"op_names": ["0"], "sparse_ratio": 0.5}], training_steps=2, example_inputs=X[:2]
    ),
    "movement": lambda model: MovementPruner(
        model, [{"op_names": ["0"], "sparse_ratio": 0.5}], None, 0, 4, learning_rate=0.1, example_inputs=X[:2]
    ),
}


def shared_out(model):
    """By FSDP2: two layers as one, the third on its own, with the root."""
    from torch.distributed.fsdp import fully_shard  # takes half a second

    fully_shard([model[0], model[2]])
    return fully_shard(model)


def train(rank, quantizer_kind=None, *, pruner="norm", over=DistributedDataParallel):
    """Half of each batch in each process; all of it in one, where ``rank`` is None."""
    model, teacher = net(8, 1), net(12, 2)
    own = PRUNERS[pruner](model)
    last = own if pruner == "movement" else AGPPruner(own, interval_steps=2, total_times=2)
    if quantizer_kind is not None:
        last = quantizer_kind.from_compressor(last, [ENTRIES])
    distiller = Adaptive1dLayerwiseDistiller.from_compressor(last, [{"op_names": ["2"], "lambda": 0.1}], teacher)
    trained = model if rank is None else over(model)
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    distiller.start()
    losses = []
    for step in range(STEPS):
        images, labels = (values[16 * (step % 2) :][:16] for values in (X, Y))
        if rank is not None:
            images, labels = images[rank::2], labels[rank::2]
        optimizer.zero_grad()
        loss = distiller.loss(F.cross_entropy(trained(images), labels), (images, labels))
        loss.backward()
        losses.append(loss.detach())
        distiller.before_step()
        optimizer.step()
        distiller.after_step()
    distiller.finish()
    found = {f"mask {m}.{t}": mask.clone() for m, masks in own.get_masks().items() for t, mask in masks.items()}
    found |= {f"projection {k}": v for k, v in distiller.projections.state()["2._output_0"]["values"].items()}
    if quantizer_kind is not None:
        calibration = last.get_calibration_config()
        found |= {f"scale {m}.{t}": said["scale"] for m, own in calibration.items() for t, said in own.items()}
    distiller.unwrap_model()
    assert [type(module) for module in model] == [type(module) for module in net(8, 1)]
    weights = {name: own.detach().clone() for name, own in model.named_parameters()}
    return {**found, **weights, "loss": mean_over_processes(torch.stack(losses))}


def digest(found):
    """One number for all tensors, as each process can tell it to the others."""
    content = b"".join(name.encode() + own.numpy().tobytes() for name, own in sorted(found.items()))
    return hashlib.sha256(content).hexdigest()


def in_two(kind, **settings):
    """What both processes have, which are asked whether it is the same."""

    def work(rank):
        found = train(rank, kind, **settings)
        assert len(set(of_each_process(digest(found)))) == 1
        return found

    first, second = in_two_processes(work)
    assert first.keys() == second.keys()
    return first


RANGES = 0.05  # each process's ranges are those of its own half of the batch, and are then averaged
CASES = [("norm", None, 1e-5), ("norm", QATQuantizer, RANGES), ("norm", LsqQuantizer, RANGES)]
OTHERS = [("level", None, 1e-5), ("level", LsqPlusQuantizer, RANGES), ("taylor", None, 1e-3), ("movement", None, 0.01)]


@pytest.mark.skipif(bool(why_not_two()), reason=str(why_not_two()))
@pytest.mark.parametrize(
    ("over", "pruner", "kind", "tolerance"),
    [(over, *case) for over in (DistributedDataParallel, shared_out) for case in CASES]
    + [(shared_out, *case) for case in OTHERS],
)
def test_both_have_the_same_and_what_one_would_have(over, pruner, kind, tolerance):
    both, alone = in_two(kind, pruner=pruner, over=over), train(None, kind, pruner=pruner)
    assert both.keys() == alone.keys()
    for name, tensor in both.items():
        if name.startswith("mask"):
            assert torch.equal(tensor, alone[name]), name
        assert torch.allclose(tensor.float(), alone[name].float(), atol=tolerance, rtol=tolerance), name
    assert both["loss"].shape == (STEPS,)
