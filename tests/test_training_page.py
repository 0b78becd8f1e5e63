"""The page on training: its examples run, one after another."""

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import tersor
from tests.torchvision_stub import import_torchvision

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
SECTIONS = {title: CODE.findall(text) for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)}
BEGINNING = CODE.findall(PAGE)[0]
PACKAGES = {"Lightning": "lightning", "Transformers": "transformers", "Accelerate": "accelerate"}


def run(*titles):
    scope = {}
    for code in [BEGINNING, *(code for title in titles for code in SECTIONS[title])]:
        exec(code, scope)
    return scope


def pruned(*weights):
    """The shares that are zero; with example inputs known, all of a row goes with its output."""
    return all((weight == 0).float().mean() > 0.78 for weight in weights)


@pytest.mark.parametrize("title", ["A data loader and a loss", "A loop that stays as it is"])
def test_plain_loops(title, capsys):
    model = run(title)["model"]
    assert pruned(model[0].weight, model[2].weight)


def test_going_on_after_a_crash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = run("A data loader and a loss", "Going on after a crash")["model"]
    assert pruned(model[0].weight, model[2].weight)
    assert (tmp_path / "runs" / "level" / "training.pt").exists()


def test_a_training_function():
    model = run("A data loader and a loss", "A training function")["model"]
    assert pruned(model[0].weight, model[2].weight)


@pytest.mark.parametrize(("title", "package"), PACKAGES.items())
def test_frameworks(title, package, capsys):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if find_spec("torchvision"):
        import_torchvision()
    scope = run(title)
    weights = {
        "Lightning": lambda: scope["classifier"].net[0].weight,
        "Transformers": lambda: scope["bert"].bert.pooler.dense.weight,
        "Accelerate": lambda: scope["model"][0].weight,
    }
    assert pruned(weights[title]())


@pytest.mark.filterwarnings("ignore")
def test_deepspeed(monkeypatch):
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29617}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    try:
        model = run("A data loader and a loss", "A training function", "DeepSpeed")["model"]
    finally:
        deepspeed.comm.destroy_process_group()
    assert pruned(model[0].weight)


def test_every_way_in_is_on_the_page():
    for name in tersor.training.OPTIONAL:
        assert f"`{name}`" in PAGE
