"""A fused run in two processes: one set of masks, scales and projections, and the weights of one process."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tersor.distillation import Adaptive1dLayerwiseDistiller
from tersor.pruning import AGPPruner, L1NormPruner
from tersor.quantization import LsqQuantizer, QATQuantizer
from tersor.testing.processes import in_two_processes, why_not_two

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
STEPS = 8


def net(width, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def train(rank, quantizer_kind=None):
    """Half of each batch in each process; all of it in one, where ``rank`` is None."""
    model, teacher = net(8, 1), net(12, 2)
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}], example_inputs=X[:2])
    last = AGPPruner(pruner, interval_steps=2, total_times=2)
    if quantizer_kind is not None:
        entries = [{"op_types": ["Linear"], "target_names": ["weight", "_input_"], "quant_dtype": "int8"}]
        last = quantizer_kind.from_compressor(last, entries)
    distiller = Adaptive1dLayerwiseDistiller.from_compressor(last, [{"op_names": ["2"], "lambda": 0.1}], teacher)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    distiller.start()
    trained = model if rank is None else DistributedDataParallel(model)
    for step in range(STEPS):
        images, labels = (own[16 * (step % 2) :][:16] for own in (X, Y))
        if rank is not None:
            images, labels = images[rank::2], labels[rank::2]
        optimizer.zero_grad()
        distiller.loss(F.cross_entropy(trained(images), labels), (images, labels)).backward()
        distiller.before_step()
        optimizer.step()
        distiller.after_step()
    distiller.finish()
    found = {f"mask {m}.{t}": mask for m, own in pruner.get_masks().items() for t, mask in own.items()}
    found |= {f"projection {k}": v for k, v in distiller.projections.state()["2._output_0"]["values"].items()}
    if quantizer_kind is not None:
        calibration = last.get_calibration_config()
        found |= {f"scale {m}.{t}": said["scale"] for m, own in calibration.items() for t, said in own.items()}
    distiller.unwrap_model()
    return {**found, **{name: own.detach().clone() for name, own in model.named_parameters()}}


@pytest.mark.skipif(bool(why_not_two()), reason=str(why_not_two()))
@pytest.mark.parametrize("kind", [None, QATQuantizer, LsqQuantizer])
def test_both_have_the_same_and_what_one_would_have(kind):
    first, second = in_two_processes(lambda rank: train(rank, kind))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    alone = train(None, kind)
    for name, tensor in first.items():
        tolerance = 1e-5 if kind is None else 0.05  # each process's ranges are those of its own half, and then averaged
        assert torch.allclose(tensor.float(), alone[name].float(), atol=tolerance, rtol=tolerance), name
