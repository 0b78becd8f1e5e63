"""The page on many machines: its script runs, shared out or whole; killed, it goes on from its last checkpoint."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tersor
from tersor.storage import load_calibration, read_tensors
from tersor.testing.processes import in_two_processes, why_not_two

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")
(SCRIPT,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KILLED = """
import os, signal, threading, time

def kill():
    while not os.path.exists("run.pt"):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "1":
    threading.Thread(target=kill, daemon=True).start()
"""
"""Process 1 dies as soon as there is a checkpoint to go on from, wherever it is by then."""

pytestmark = pytest.mark.skipif(bool(why_not_two()), reason=str(why_not_two()))


def run_in_two(folder, sharded):
    """The script in two processes of this one, which is faster than by torchrun; what each has at the end."""

    def work(rank):
        os.chdir(folder)
        os.environ["SHARDED"] = sharded
        scope = {"__name__": "train"}
        exec(SCRIPT, scope)
        masks, calibration = scope["train"]()
        found = {f"mask {m}.{t}": mask.clone() for m, own in masks.items() for t, mask in own.items()}
        for module, targets in calibration.items():
            for target, said in targets.items():
                found |= {f"{module}.{target}.{key}": said[key] for key in ("scale", "zero_point")}
        return found

    folder.mkdir()
    return in_two_processes(work)


def torchrun(folder, script):
    """Start a script of two processes; it computes on the CPU, whatever else there is."""
    (folder / "train.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    paths = os.pathsep.join([str(Path(tersor.__file__).parents[1]), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    begun = time.monotonic()
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    return run, time.monotonic() - begun


def small(folder):
    tensors, _ = read_tensors(folder / "small" / "model.safetensors")
    return tensors, load_calibration(folder / "small" / "calibration.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "run"
    return run_in_two(folder, "1"), folder


def check_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert int(first["mask 0.weight"].sum()) == 4 * 6


def test_shared_out(uninterrupted):
    check_same(*uninterrupted[0])


def test_whole_on_each(uninterrupted, tmp_path):
    first, second = run_in_two(tmp_path / "run", "0")
    check_same(first, second)
    for name, tensor in uninterrupted[0][0].items():  # sums in another order may round a value the other way
        assert torch.allclose(tensor.float(), first[name].float(), atol=1e-3), name
    tensors, _ = small(tmp_path / "run")
    for name, tensor in small(uninterrupted[1])[0].items():
        assert tensor.shape == tensors[name].shape
        assert torch.allclose(tensor, tensors[name], atol=0.02), name


def test_a_killed_process(uninterrupted, tmp_path):
    run, seconds = torchrun(tmp_path, KILLED + SCRIPT)
    assert run.returncode != 0
    assert seconds < 60
    assert f"exitcode  : {-signal.SIGKILL}" in run.stderr
    assert not (tmp_path / "small").exists()
    assert torch.load(tmp_path / "run.pt", weights_only=True)["steps"] in (10, 20, 30)
    run, _ = torchrun(tmp_path, SCRIPT)
    assert run.returncode == 0, run.stderr
    tensors, calibration = small(tmp_path)
    expected, scales = small(uninterrupted[1])
    for name, tensor in expected.items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(scales["0"]["weight"]["scale"], calibration["0"]["weight"]["scale"])


def test_every_way_in_is_on_the_page():
    for name in tersor.training.OPTIONAL:
        assert name.removesuffix("Evaluator") in PAGE or f"`{name}`" in PAGE
