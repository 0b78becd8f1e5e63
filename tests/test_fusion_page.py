"""The page on fusion: its examples run, one after another."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault

import tersor
from tersor import TorchEvaluator
from tersor.testing.toys import BATCHES, ToyNetwork
from tests.recipe import toy

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
PAGE, README = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/fusion.md", "README.md"))
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
RECIPE = re.compile(r"```yaml\n(.*?)```", re.DOTALL)
IN_THE_TOY = {
    "my_package.models:trained_resnet": "tests.recipe.toy:net",
    "my_package.models:large_resnet": "tests.recipe.toy:teacher",
    "my_package.data:cifar": "tests.recipe.toy:data",
    "interval_steps: 100": "interval_steps: 1",
    "total_times: 10": "total_times: 3",
    "quant_start_step: 1200": "quant_start_step: 4",
}


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """In place of the fixture for all tests: lowering and ``torch.export`` put hooks on copies, which go with them."""


def evaluator_of(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return TorchEvaluator.from_loader(BATCHES, torch.nn.functional.cross_entropy, optimizer, progress=False)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = RECIPE.search(PAGE).group(1)
    for name, own in IN_THE_TOY.items():
        assert name in text
        text = text.replace(name, own)
    Path("recipe.yaml").write_text(text)
    tersor.save(toy.teacher(), "runs/large")
    model = ToyNetwork()
    teacher = copy.deepcopy(model)
    scope = {"model": model, "teacher": teacher, "evaluator": evaluator_of(model), "new_evaluator": evaluator_of}
    for code in CODE.findall(PAGE):
        exec(code.replace('"conv1", "conv2"', '"left", "hidden"'), scope)
    said = capsys.readouterr().out
    assert "after step 2" in said
    assert "AGPPruner(L1NormPruner): prunes, 0.5 -> 0.352" in said
    assert "sparsity" in said
    assert scope["result"].model.conv1.out_channels == 4
    assert Path("runs/small/checkpoint/calibration.safetensors").is_file()
    assert scope["final"].error < 1e-4
    assert sum(own.numel() for own in scope["final"].plain().parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )


def test_the_example_of_the_readme_runs(capsys):
    model = ToyNetwork()
    scope = {
        "tersor": tersor,
        "model": model,
        "teacher": ToyNetwork(seed=1),
        "evaluator": evaluator_of(model),
        "config_list": [{"op_names": ["left"], "sparse_ratio": 0.5}],
    }
    exec(next(code for code in CODE.findall(README) if "tersor.compress" in code).replace("500", "200"), scope)
    final = scope["final"]
    assert "after step 200" in capsys.readouterr().out
    assert final.model.left.out_channels == 3
    assert final.error < 1e-4
