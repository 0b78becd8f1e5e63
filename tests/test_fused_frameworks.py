"""A fused run in two processes that Accelerate, DeepSpeed or Lightning joins: what one process has on both halves."""

import os
import warnings
from importlib.util import find_spec

import pytest
import torch
import torch._dynamo  # optimizers import it, and each process would again
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import tersor
from tersor.distillation import Adaptive1dLayerwiseDistiller
from tersor.pruning import AGPPruner, L1NormPruner, LinearPruner, MovementPruner, TaylorPruner
from tersor.quantization import LsqQuantizer, QATQuantizer
from tersor.testing.processes import in_two_processes, why_not_two
from tersor.training.ranks import mean_over_processes
from tests.torchvision_stub import import_torchvision

pytestmark = [
    pytest.mark.skipif(bool(why_not_two()), reason=str(why_not_two())),
    pytest.mark.filterwarnings("ignore"),  # those of the frameworks
]
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 3
STEPS = 8


class Net(nn.Module):
    """Remembers its losses."""

    def __init__(self, width=8, seed=1):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
            self.head = nn.Linear(width, 3)
        self.losses = []

    def forward(self, x):
        return self.head(self.net(x))


def batches(size):
    return DataLoader(TensorDataset(X, Y), size)


def step(batch, model):
    return F.cross_entropy(model(batch[0]), batch[1])


def remembering(model):
    def remembered(batch, trained):
        loss = step(batch, trained)
        model.losses.append(loss.detach())
        return loss

    return remembered


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def alone(model):
    def training(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        while True:
            for batch in batches(16):
                optimizer.zero_grad()
                training_step(batch, model).backward()
                optimizer.step()

    return tersor.TorchEvaluator(training, sgd(model), remembering(model))


def by_accelerate(model):
    from accelerate import Accelerator

    def training(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        loader = accelerator.prepare(batches(8))
        while True:
            for batch in loader:
                optimizer.zero_grad()
                accelerator.backward(training_step(batch, model))
                optimizer.step()

    accelerator = Accelerator(cpu=True)
    return tersor.AccelerateEvaluator(accelerator, training, sgd(model), remembering(model))


def by_deepspeed(stage, model):
    rank = torch.distributed.get_rank()

    def training(engine, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        while True:
            for x, y in batches(16):
                engine.backward(training_step((x[rank::2], y[rank::2]), engine))
                engine.step()

    config = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return tersor.DeepspeedTorchEvaluator(training, remembering(model), config, sgd(model))


def by_lightning(model):
    import lightning as pl

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            data = TensorDataset(X, Y)
            return DataLoader(data, 8, sampler=DistributedSampler(data, shuffle=False))

    settings = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}  # its own would shuffle
    trainer = pl.Trainer(accelerator="cpu", barebones=True, **settings)
    return tersor.LightningEvaluator(trainer, Data())


def lightning_net():
    import lightning as pl

    class Module(Net, pl.LightningModule):
        def training_step(self, batch, batch_idx):
            return remembering(self)(batch, self)

        def configure_optimizers(self):
            return sgd(self)

    return Module()


def compress(model, evaluator):
    """Prune by a schedule, quantize and distil."""
    half = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]
    pruner = L1NormPruner(model, half, evaluator, example_inputs=X[:2])
    last = AGPPruner(pruner, interval_steps=2, total_times=2)
    int8 = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"}]
    last = quantizer = QATQuantizer.from_compressor(last, int8)
    distilled = [{"op_names": ["net.2"], "lambda": 0.1}]
    last = Adaptive1dLayerwiseDistiller.from_compressor(last, distilled, Net(12, 2))
    last.compress(max_steps=STEPS)
    found = {f"mask {m}.{t}": mask.clone() for m, own in pruner.get_masks().items() for t, mask in own.items()}
    calibration = quantizer.get_calibration_config()
    found |= {f"scale {m}.{t}": said["scale"] for m, own in calibration.items() for t, said in own.items()}
    last.unwrap_model()
    assert len(model.losses) == STEPS
    found["loss"] = mean_over_processes(torch.stack(model.losses))
    return found | {name: own.detach().clone() for name, own in model.named_parameters()}


def learn(model, evaluator, pruner_of):
    """Prune by what gradients say, and learn steps."""
    half = [{"op_names": ["net.0"], "sparse_ratio": 0.5}]
    pruner = pruner_of(model, half, evaluator)
    int8 = [{"op_types": ["Linear"], "target_names": ["weight"], "quant_dtype": "int8"}]
    last = LsqQuantizer.from_compressor(pruner, int8)
    last.compress(max_steps=STEPS)
    found = {f"mask {m}.{t}": mask.clone() for m, own in pruner.get_masks().items() for t, mask in own.items()}
    last.unwrap_model()
    return found | {name: own.detach().clone() for name, own in model.named_parameters()}


def movement(model, config_list, evaluator):
    return MovementPruner(model, config_list, evaluator, warmup_step=2, cooldown_begin_step=6)


def soft_movement(model, config_list, evaluator):
    config_list = [{"op_names": ["net.0"], "sparse_threshold": 0.5}]
    return MovementPruner(model, config_list, evaluator, warmup_step=2, cooldown_begin_step=6, regular_scale=1.0)


def taylor(model, config_list, evaluator):
    return LinearPruner(TaylorPruner(model, config_list, evaluator, training_steps=4), interval_steps=4, total_times=1)


def check(evaluator_of, make=Net, compress=compress):
    """Two processes, each with half of every batch, and one with all of it."""

    def work(rank):
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}  # asked for, and not used: the group is there already
        place |= {"TORCHELASTIC_RUN_ID": "none", "ACCELERATE_USE_CPU": True}
        os.environ.update({name: str(value) for name, value in place.items()})
        model = make()
        return compress(model, evaluator_of(model))

    first, second = in_two_processes(work)
    model = Net()
    expected = compress(model, alone(model))
    assert first.keys() == second.keys() == expected.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if name.startswith("mask"):
            assert torch.equal(tensor, expected[name]), name
        assert torch.allclose(tensor.float(), expected[name].float(), rtol=1e-3, atol=1e-3), name


def test_accelerate():
    pytest.importorskip("accelerate")
    check(by_accelerate)


def test_lightning():
    if find_spec("torchvision"):
        import_torchvision()
    pytest.importorskip("lightning")
    check(by_lightning, lightning_net)


def deepspeed_on_the_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        deepspeed = pytest.importorskip("deepspeed")
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # which would be compiled


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed(stage, monkeypatch):
    deepspeed_on_the_cpu(monkeypatch)
    check(lambda model: by_deepspeed(stage, model))


@pytest.mark.parametrize("pruner_of", [movement, soft_movement, taylor])
def test_deepspeed_whose_parameters_are_in_slices(pruner_of, monkeypatch):
    deepspeed_on_the_cpu(monkeypatch)
    check(lambda model: by_deepspeed(3, model), compress=lambda *of: learn(*of, pruner_of))
