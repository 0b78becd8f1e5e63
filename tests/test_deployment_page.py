"""The page on deployment: its examples run, one after another; so does the README's."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tersor
from tersor.deploy import CompiledModel
from tersor.testing.toys import BATCHES, EXAMPLE, ToyNetwork

pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[1]
PAGE, README = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/deployment.md", "README.md"))
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """In place of the fixture for all tests: lowering and ``torch.export`` put hooks on copies, which go with them."""


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = ToyNetwork().eval()
    scope = {"model": model, "x": EXAMPLE, "batches": BATCHES}
    first, *others = CODE.findall(PAGE)
    exec(first, scope)
    scope["quantizer"].unwrap_model()
    assert scope["report"].simulation_snr >= 40
    assert scope["report"].coverage == 1
    layers = [{"op_types": ["Conv2d", "Linear"], "quant_dtype": "int8"}]
    plain = tersor.quantization.PtqQuantizer(model, layers, calibration=BATCHES)
    _, calibration = plain.compress()
    plain.unwrap_model()
    tersor.save_calibration(calibration, "calibration.safetensors")
    for code in others:
        exec(code, scope)
    assert scope["compiled"](EXAMPLE).shape == model(EXAMPLE).shape


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("openvino")
    monkeypatch.chdir(tmp_path)
    x = torch.randn(4, 3, 32, 32)
    model = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    before = model.eval()(x)
    scope = {"model": model, "x": x, "loader": [(x, torch.zeros(4))], "PtqQuantizer": tersor.quantization.PtqQuantizer}
    exec(next(code for code in CODE.findall(README) if "tersor.deploy" in code), scope)
    scope["quantizer"].unwrap_model()
    assert capsys.readouterr().out.startswith("1.0 ")
    loaded = CompiledModel.load("deployed")
    assert torch.equal(loaded(x), scope["compiled"](x))
    assert 0 < (loaded(x) - before).abs().max() < 0.05
