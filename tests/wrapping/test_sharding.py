"""Models that fully_shard has shared out: what is gathered, what comes too late, and who refuses."""

import copy

import pytest
import torch
import torch._dynamo  # fully_shard and optimizers import it, and each process would again
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import tersor
from tersor import TorchEvaluator
from tersor.errors import ConflictError, TrainingError, WrapError
from tersor.pruning import AGPPruner, L1NormPruner, LevelPruner, OBSPruner
from tersor.quantization import PtqQuantizer, QATQuantizer
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.wrapping import is_sharded, whole

pytestmark = pytest.mark.skipif(bool(why_not_two()), reason=str(why_not_two()))
fsdp = pytest.importorskip("torch.distributed.fsdp")
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
HALF = [{"op_names": ["0"], "sparse_ratio": 0.5}]
INT8 = [{"op_names": ["0"], "target_names": ["weight"], "quant_dtype": "int8"}]


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def shard(model):
    fsdp.fully_shard(model[0])
    return fsdp.fully_shard(model)


def both(work):
    """Run a check in two processes that returns nothing."""
    in_two_processes(lambda rank: work(rank) or {})


def test_gathered_as_it_was():
    def tied():
        model = net().append(nn.Linear(8, 8))
        model[2] = nn.Linear(8, 8)
        model[2].weight = model[3].weight
        model[0].bias.requires_grad_(False)
        return model

    def work(rank):
        model = tied()
        before = copy.deepcopy(model)
        shard(model)
        assert is_sharded(model)
        assert model[0].weight.to_local().shape == (4, 6)
        assert torch.equal(whole(model[0].weight), before[0].weight)
        with torch.no_grad():
            model(X)
        assert type(model[2].weight) is nn.Parameter  # the root is left whole
        assert tersor.gather_model(model) is model
        assert not is_sharded(model)
        assert [type(module) for module in model] == [type(module) for module in before]
        assert model[3].weight is model[2].weight
        assert [own.requires_grad for own in model[0].parameters()] == [True, False]
        assert vars(model[0]).keys() == vars(before[0]).keys()
        assert torch.equal(copy.deepcopy(model)(X), before(X))
        shard(model)  # nothing is left that would be in the way
        model(X).sum().backward()
        before(X).sum().backward()
        for own, expected in zip(model.parameters(), before.parameters(), strict=True):
            if own.requires_grad:
                assert torch.allclose(whole(own.grad), expected.grad, rtol=1e-5, atol=1e-5)

    both(work)


def test_gradients_pass_through_the_gathering():
    def work(rank):
        model = net()
        LevelPruner(model, HALF)
        shard(model)
        model[0].weight.square().sum().backward()  # a penalty outside of forward
        latent = model[0].parametrizations["weight"].original
        assert torch.allclose(whole(latent.grad), 2 * whole(latent))

    both(work)


def test_too_late():
    def work(rank):
        model = net()
        pruner = LevelPruner(model, HALF)
        shard(model)
        with pytest.raises(WrapError, match="Make the compressors first, then call fully_shard"):
            LevelPruner(shard(net()), HALF)
        with pytest.raises(WrapError, match="Make the compressors first"):
            QATQuantizer.from_compressor(pruner, INT8)
        with pytest.raises(WrapError, match=r"2\.weight: its parameters are shared out .* no target before that"):
            pruner.update_masks({"2": {"weight": torch.eye(3, 8)}})
        for refusing in (
            lambda: tersor.finalize(pruner, X),
            lambda: tersor.speedup.ModelSpeedup(model, X, pruner.get_masks()),
            lambda: tersor.save(model, "never"),
        ):
            with pytest.raises(
                WrapError, match=r"shared out over processes .* Call tersor.gather_model\(model\) first"
            ):
                refusing()

    both(work)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: OBSPruner(model, HALF, calibration=[X], example_inputs=X),
        lambda model: PtqQuantizer(model, INT8, calibration=[X]),
        lambda model: AGPPruner(LevelPruner(model, HALF)),
    ],
)
def test_who_needs_whole_parameters(make):
    def work(rank):
        compressor = make(net())
        shard(compressor.model)
        with pytest.raises(ConflictError, match=f"{type(compressor).__name__}.* works on whole parameters"):
            compressor.start()

    both(work)


def test_folded_norms_need_whole_parameters():
    def work(rank):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        quantizer = QATQuantizer(model, [{**INT8[0], "fuse_names": [("0", "1")]}])
        shard(model)
        with pytest.raises(ConflictError, match="QATQuantizer works on whole parameters"):
            quantizer.start()

    both(work)


def test_with_an_evaluator():
    data = TensorDataset(X, Y)

    def train(world, rank):
        model = net()
        old = torch.optim.SGD(model.parameters(), 0.1)
        pruner = AGPPruner(L1NormPruner(model, HALF, example_inputs=X), interval_steps=2, total_times=2)
        if world > 1:
            shard(model)
        sampler = DistributedSampler(data, world, rank, shuffle=False)
        loader = DataLoader(data, 16 // world, sampler=sampler)
        loss = nn.functional.cross_entropy
        if world > 1:
            pruner.evaluator = TorchEvaluator.from_loader(loader, loss, old)
            with pytest.raises(TrainingError, match="none of their 4 parameters belongs to this"):
                pruner.compress(max_steps=6)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        pruner.evaluator = TorchEvaluator.from_loader(loader, loss, optimizer, clip_norm=1.0)
        _, masks = pruner.compress(max_steps=6)
        pruner.unwrap_model(bake=True)
        return {"mask": masks["0"]["weight"].clone(), **{n: p.detach() for n, p in model.named_parameters()}}

    first, second = in_two_processes(lambda rank: train(2, rank))
    alone = train(1, 0)
    assert int(first["mask"].sum()) == 24
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        assert torch.allclose(tensor.float(), alone[name].float(), atol=1e-5), name
