"""Packages that are optional: not imported before they are asked for, and named where they are missing."""

import json
import subprocess
import sys

import pytest

import tersor
from tersor.errors import MissingExtraError
from tersor.training import TorchEvaluator

WITHOUT = """
import json, sys
sys.modules.update(dict.fromkeys(["lightning", "pytorch_lightning", "transformers", "accelerate", "deepspeed"]))
import torch, tersor
told = {}
step = lambda batch, model: None
function = lambda model, optimizers, training_step, lr_schedulers, max_steps, max_epochs: None
optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
for name, make in {
    "LightningEvaluator": lambda: tersor.LightningEvaluator(None, None),
    "TransformersEvaluator": lambda: tersor.TransformersEvaluator(None),
    "AccelerateEvaluator": lambda: tersor.AccelerateEvaluator(None, function, optimizer, step),
    "DeepspeedTorchEvaluator": lambda: tersor.DeepspeedTorchEvaluator(function, step, {}),
}.items():
    try:
        make()
    except tersor.errors.MissingExtraError as error:
        told[name] = str(error)
print(json.dumps(told))
"""
WITH = """
import json, sys
import tersor, tersor.training
names = ["lightning", "pytorch_lightning", "transformers", "accelerate", "deepspeed"]
print(json.dumps([name for name in names if name in sys.modules]))
"""


def run(code):
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_missing_package_is_named():
    told = run(WITHOUT)
    assert told["LightningEvaluator"].endswith("not installed: lightning. Install it: pip install 'tersor[lightning]'.")
    assert "tersor[transformers]" in told["TransformersEvaluator"]
    assert told["AccelerateEvaluator"].startswith("AccelerateEvaluator: not installed: accelerate. Install it")
    assert "tersor[deepspeed]" in told["DeepspeedTorchEvaluator"]


def test_nothing_of_them_is_imported_at_first():
    assert run(WITH) == []


def test_names_resolve():
    assert tersor.training.TorchEvaluator is TorchEvaluator
    for module in (tersor, tersor.training):
        with pytest.raises(AttributeError, match="has no attribute 'NoEvaluator'"):
            module.NoEvaluator  # noqa: B018
    for name in tersor.training.OPTIONAL:
        try:
            assert getattr(tersor, name).__name__ == name
        except (MissingExtraError, RuntimeError):  # not installed, or beside a broken torchvision
            continue
