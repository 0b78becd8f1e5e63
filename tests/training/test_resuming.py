"""A run that is killed at any step and started again ends as one that was not."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tersor import TorchEvaluator
from tersor.distillation import Adaptive1dLayerwiseDistiller, LogitDistiller
from tersor.errors import CheckpointError, InvalidValueError, TrainingError
from tersor.pruning import AGPPruner, L1NormPruner, MovementPruner
from tersor.quantization import LsqQuantizer, QATQuantizer
from tersor.training.resuming import CHECKPOINT_FILE

STEPS = 20
INT8 = [{"op_types": ["Linear"], "target_names": ["weight", "_input_"], "quant_dtype": "int8"}]


class Noisy(nn.Module):
    """Dropout draws random numbers, and a batch norm has buffers."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.drop(F.relu(self.second(F.relu(self.norm(self.first(x)))))))


class Augmented(TensorDataset):
    """Draws from all three generators for each sample."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.01 * (torch.randn(()) + random.random()), y


WRAPPED = []


@pytest.fixture(autouse=True)
def _unwrapped():
    """Leave no model wrapped."""
    yield
    while WRAPPED:
        WRAPPED.pop().unwrap_model()


def made(seed=0, quantizer=QATQuantizer, *, pruner=L1NormPruner, **options):
    """Everything that a run is made of, as a script would at its start."""
    torch.manual_seed(seed)
    random.seed(seed)
    x = torch.randn(44, 6)
    data = Augmented(x, (x.sum(dim=1) > 0).long() + (x[:, 0] > 0).long())
    loader = DataLoader(data, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(seed + 1))
    model, teacher = Noisy(), Noisy(12)
    optimizers = [torch.optim.AdamW(model.parameters(), 0.02)]
    schedule = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[0], STEPS)]
    evaluator = TorchEvaluator.from_loader(
        loader, F.cross_entropy, optimizers, schedule, dummy_input=x[:4], progress=False, **options
    )
    entries = [{"op_names": ["first", "second"], "sparse_ratio": 0.5}]
    if pruner is L1NormPruner:
        first = AGPPruner(L1NormPruner(model, entries, evaluator), interval_steps=3, total_times=3)
    else:
        first = pruner(model, entries, evaluator, 4, 12)
    last = quantizer.from_compressor(first, INT8)
    distiller = Adaptive1dLayerwiseDistiller.from_compressor(last, [{"op_names": ["second"], "lambda": 0.1}], teacher)
    whole = LogitDistiller.from_compressor(distiller, None, teacher)
    WRAPPED.append(whole)
    return whole, evaluator


def found(compressor, evaluator):
    """What a run came to: weights, buffers, masks, scales, optimizer states."""
    return {
        "model": compressor.model.state_dict(),
        "compressors": compressor.state_dict(),
        "evaluator": evaluator.state_dict(),
        "drawn": torch.rand(3),
    }


def assert_same(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (of, its) in enumerate(zip(one, other, strict=True)):
            assert_same(of, its, f"{where}[{number}]")
    else:
        assert one == other, where


class Killed(Exception):
    pass


def killed_after(evaluator, steps):
    """Let the training end after so many more steps, without warning."""
    optimizer = evaluator._optimizers[0]
    left = [steps]

    def count(*_):
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    optimizer.register_step_post_hook(count)


CASES = {
    "qat": {},
    "lsq": {"quantizer": LsqQuantizer},
    "movement": {"pruner": MovementPruner},
    "averaged, accumulated, clipped": {"ema_decay": 0.9, "accumulate": 2, "clip_norm": 1.0},
    "scheduler by step": {"scheduler_interval": "step"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("deaths", [(8, 3), (9, 9, 1)])
def test_deaths_change_nothing(case, deaths, tmp_path):
    """An epoch has 9 batches: deaths lie within epochs, and at their very end."""
    options = CASES[case]
    whole, evaluator = made(**options)
    whole.compress(max_steps=STEPS, checkpoint_dir=tmp_path / "whole", checkpoint_steps=1)
    expected = found(whole, evaluator)
    for steps in deaths:
        compressor, evaluator = made(**options)
        killed_after(evaluator, steps)
        with pytest.raises(Killed):
            compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path / "torn", checkpoint_steps=1)
    compressor, evaluator = made(**options)
    compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path / "torn", checkpoint_steps=1)
    assert_same(found(compressor, evaluator), expected)


def test_keeping_changes_nothing(tmp_path):
    plain, evaluator = made()
    plain.compress(max_steps=STEPS)
    expected = found(plain, evaluator)
    kept, evaluator = made()
    kept.compress(max_steps=STEPS, checkpoint_dir=tmp_path, checkpoint_steps=7)
    assert_same(found(kept, evaluator), expected)


@pytest.mark.parametrize("limits", [{"max_steps": STEPS}, {"max_epochs": 2}, {"max_steps": 18}])
def test_a_run_that_is_over_is_not_trained_again(limits, tmp_path):
    """Two epochs are 18 steps: the last one may be an epoch's end."""
    first, evaluator = made()
    first.compress(**limits, checkpoint_dir=tmp_path)
    expected = found(first, evaluator)
    again, evaluator = made()
    killed_after(evaluator, 0)
    again.compress(**limits, checkpoint_dir=tmp_path)
    assert_same(found(again, evaluator), expected)


def test_steps_of_a_result_are_those_of_the_whole_run(tmp_path):
    from tersor.training.resuming import ResumableRun

    compressor, evaluator = made()
    killed_after(evaluator, 5)
    with pytest.raises(Killed):
        compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path, checkpoint_steps=2)
    compressor, evaluator = made()
    run = ResumableRun(compressor, evaluator, tmp_path, 2, torch.load(tmp_path / CHECKPOINT_FILE)["settings"])
    assert run.resume()
    with run.kept():
        result = evaluator.train(compressor.model, compressor, max_steps=STEPS)
    assert (result.steps, result.epochs) == (STEPS, 2)


def test_another_run_is_refused(tmp_path):
    compressor, _ = made()
    compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path)
    other, _ = made()
    with pytest.raises(CheckpointError, match=r"another training, which differs in max_steps \(20, and 30 here\)"):
        other.compress(max_steps=30, checkpoint_dir=tmp_path)
    other, _ = made(quantizer=LsqQuantizer)
    with pytest.raises(CheckpointError, match="another training, which differs in"):
        other.compress(max_steps=STEPS, checkpoint_dir=tmp_path)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / CHECKPOINT_FILE).write_bytes(b"half")
    compressor, _ = made()
    with pytest.raises(CheckpointError, match=r"training\.pt: cannot be read.*Delete it to begin anew"):
        compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path)


def test_fewer_batches_are_refused(tmp_path):
    compressor, evaluator = made()
    killed_after(evaluator, 5)
    with pytest.raises(Killed):
        compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path, checkpoint_steps=1)
    compressor, evaluator = made()
    evaluator._loop._loader = [*evaluator._loop._loader][:3]
    with pytest.raises((CheckpointError, ValueError)):
        compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path, checkpoint_steps=1)


def test_what_cannot_be_gone_on_with_is_refused(tmp_path):
    compressor, _ = made()
    with pytest.raises(InvalidValueError, match="checkpoint_steps: 0 is no number of steps"):
        compressor.compress(max_steps=STEPS, checkpoint_dir=tmp_path, checkpoint_steps=0)
    model, x = Noisy(), torch.randn(4, 6)
    entries = [{"op_names": ["first"], "sparse_ratio": 0.5}]
    alone = L1NormPruner(model, entries, example_inputs=x)
    with pytest.raises(TrainingError, match="nothing is trained"):
        alone.compress(checkpoint_dir=tmp_path)
    alone.unwrap_model()

    def training_func(model, optimizer, training_step, lr_scheduler, max_steps, max_epochs):
        raise AssertionError("not reached")

    own = TorchEvaluator(training_func, torch.optim.SGD(model.parameters(), 0.1), lambda batch, model: model(x).sum())
    pruner = AGPPruner(L1NormPruner(model, entries, own, example_inputs=x), interval_steps=1, total_times=2)
    with pytest.raises(TrainingError, match=r"only the loop of TorchEvaluator\.from_loader"):
        pruner.compress(max_steps=3, checkpoint_dir=tmp_path)
    pruner.unwrap_model()
    rounds = AGPPruner(L1NormPruner(model, entries, own, example_inputs=x), total_times=2)
    with pytest.raises(TrainingError, match=r"AGPPruner\(L1NormPruner\) trains in rounds.*log_dir"):
        rounds.compress(max_steps=3, checkpoint_dir=tmp_path)
    rounds.unwrap_model()


def run_to_the_end(folder):
    """The whole script, in a process of its own: tells of each step, and at the end what came out."""
    compressor, evaluator = made()
    evaluator._optimizers[0].register_step_post_hook(lambda *_: print("step", flush=True))
    compressor.compress(max_steps=STEPS, checkpoint_dir=folder, checkpoint_steps=3)
    torch.save(found(compressor, evaluator), Path(folder) / "end.pt")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_killed_without_mercy(tmp_path):
    """Twice at random moments; ``TERSOR_KILLS`` asks for more."""
    kills, draw = int(os.environ.get("TERSOR_KILLS", "2")), random.Random(3)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    code = "import sys; from tests.training.test_resuming import run_to_the_end; run_to_the_end(sys.argv[1])"

    def start(folder):
        command = [sys.executable, "-c", code, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    with start(tmp_path / "whole") as process:
        assert process.stdout is not None
        process.stdout.read()
    assert process.returncode == 0
    expected = torch.load(tmp_path / "whole" / "end.pt", weights_only=True)
    done = 0
    while done < kills:
        with start(tmp_path / "torn") as process:
            assert process.stdout is not None
            for _ in range(draw.randint(1, 6)):
                if not process.stdout.readline():
                    break  # it came to its end
            process.send_signal(signal.SIGKILL)
        if process.returncode == -signal.SIGKILL:
            done += 1
        if (tmp_path / "torn" / "end.pt").exists():
            assert_same(torch.load(tmp_path / "torn" / "end.pt", weights_only=True), expected)
            for file in (tmp_path / "torn").iterdir():
                file.unlink()
    with start(tmp_path / "torn") as process:
        assert process.stdout is not None
        process.stdout.read()
    assert process.returncode == 0
    assert_same(torch.load(tmp_path / "torn" / "end.pt", weights_only=True), expected)
    files = sorted(path.name for path in (tmp_path / "torn").iterdir() if path.suffix != ".tmp")
    assert files == ["end.pt", CHECKPOINT_FILE]
