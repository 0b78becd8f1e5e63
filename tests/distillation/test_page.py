"""The page on distillation: its examples run; so does the distiller in the page on extending."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor import TorchEvaluator
from tersor.wrapping import is_wrapped

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "distillation.md").read_text(encoding="utf-8")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(4, 6), nn.Linear(6, 6)
        self.layer4, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.layer4(self.layer2(self.layer1(x).relu()).relu()).relu())


def test_the_examples_run(tmp_path, monkeypatch):
    student, teacher = Net(), Net()
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    evaluator = TorchEvaluator.from_loader([(x, y)], nn.functional.cross_entropy, optimizer, progress=False)
    scope = {"student": student, "teacher": teacher, "evaluator": evaluator, "torch": torch, "loader": [(x, y)]}
    first, last, offline = CODE.findall(PAGE)
    exec(first, scope)
    assert not is_wrapped(student)
    assert set(scope["distiller"].losses) == {"layer1._output_0", "layer2._output_0", "head._output_0"}
    exec(last, scope)
    own = scope["CosineDistiller"](student, [{"op_names": ["head"]}], evaluator, teacher)
    own.compress(max_steps=2)
    own.unwrap_model()
    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    exec(offline, {"student": student, "teacher": teacher, "loader": loader, "optimizer": optimizer})
    assert any(Path("teacher_values").iterdir())
    assert 0 < own.losses["head._output_0"].item() < 2


(_EXAMPLE,) = [code for code in CODE.findall((DOCS / "extending.md").read_text("utf-8")) if "Distiller" in code]
_SCOPE: dict = {}
exec(_EXAMPLE, _SCOPE)
TestTheDistillerOfThePageOnExtending = _SCOPE["TestSimilarityDistiller"]
