"""The README's example does what it says."""

import re
from inspect import isabstract
from pathlib import Path

import torch
from torch import Tensor, nn

import tersor
from benchmarks.readme import SECTION, section
from tersor.quantization import Quantizer
from tersor.storage import load_calibration

README = Path(__file__).parents[1] / "README.md"
PRUNING, QUANTIZATION, *_ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(6, 20, 3, padding=1)
        self.conv2 = nn.Conv2d(20, 10, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.conv2(torch.relu(self.conv1(x)))


class Network(nn.Module):
    """The names that the example uses, on images of 224 x 224."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 16, stride=16)
        self.layer4 = nn.Sequential(Block())
        self.fc = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer4(self.conv1(x)).mean((2, 3)))


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trained = []
    scope = {"build_model": Network, "train": trained.append}
    exec(PRUNING, scope)
    small = scope["model"]
    block = small.layer4[0]
    assert (small.conv1.out_channels, block.conv1.out_channels) == (6, 6)  # nothing of 6, 70 % of 20
    assert block.conv2.out_channels == block.shortcut.out_channels == small.fc.in_features == 3
    assert len(trained) == 1
    assert "layer4.0.conv1" in capsys.readouterr().out
    assert isinstance(tersor.load(Network, tmp_path / "small"), Network)


def test_example_of_quantization_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(4, 3, 32, 32)
    model = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    before = model.eval()(x)
    scope = {"model": model, "x": x, "loader": [(x, torch.zeros(4))]}
    exec(QUANTIZATION, scope)
    assert scope["config_list"][0]["fuse_names"] == [("0", "1", "2")]
    written = load_calibration(tmp_path / "calibration.safetensors")
    assert list(written) == ["0", "4"]
    assert all(set(targets) == {"_input_0", "weight", "_output_0"} for targets in written.values())
    assert 0 < (scope["model"](x) - before).abs().max() < 0.05
    scope["quantizer"].unwrap_model()
    torch.testing.assert_close(model(x), before)


def test_every_quantizer_is_named():
    kinds = vars(tersor.quantization).values()
    final = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Quantizer) and not isabstract(kind)]
    text = README.read_text(encoding="utf-8")
    assert all(f"`{kind.__name__}`" in text for kind in final if kind.__name__ != "PtqQuantizer")
    assert len(final) == 10
    assert "| Quantizers | ten," in text


def test_measured_section_is_what_the_results_say():
    assert SECTION.search(README.read_text(encoding="utf-8")).group() == section()
