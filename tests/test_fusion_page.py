"""The page on fusion: its examples run, one after another."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault

from tersor import TorchEvaluator
from tersor.testing.toys import BATCHES, ToyNetwork

pytest.importorskip("onnxruntime")
PAGE = (Path(__file__).parents[1] / "docs" / "fusion.md").read_text(encoding="utf-8")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """In place of the fixture for all tests: lowering and ``torch.export`` put hooks on copies, which go with them."""


def evaluator_of(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    return TorchEvaluator.from_loader(BATCHES, torch.nn.functional.cross_entropy, optimizer, progress=False)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ToyNetwork()
    teacher = copy.deepcopy(model)
    scope = {"model": model, "teacher": teacher, "evaluator": evaluator_of(model), "new_evaluator": evaluator_of}
    for code in CODE.findall(PAGE):
        exec(code.replace('"conv1", "conv2"', '"left", "hidden"'), scope)
    said = capsys.readouterr().out
    assert "after step 2" in said
    assert "AGPPruner(L1NormPruner): prunes, 0.5 -> 0.352" in said
    assert "sparsity" in said
    assert scope["final"].error < 1e-4
    assert sum(own.numel() for own in scope["final"].plain().parameters()) < sum(
        p.numel() for p in teacher.parameters()
    )
