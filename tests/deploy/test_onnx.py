"""Export to ONNX and the check against ONNX Runtime."""

import importlib.util

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy import check_onnx, export_onnx
from tersor.deploy.lowering import lower
from tersor.deploy.onnx import write_program
from tersor.errors import MissingExtraError, TraceError, VerificationError

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_one_file_runs_at_any_batch_size(tmp_path):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    example = torch.randn(1, 1, 4, 4)
    path = export_onnx(net, example, tmp_path / "model.onnx")
    assert check_onnx(path, net, example) < 1e-5
    assert net.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class TwoInputs(nn.Module):
    def forward(self, x, scale, *, shift):
        return x * scale + shift


def test_positional_and_keyword_inputs(tmp_path):
    example = {"x": torch.randn(2, 3), "scale": torch.ones(3), "shift": torch.randn(2, 3)}
    path = export_onnx(TwoInputs(), example, tmp_path / "model.onnx")
    assert check_onnx(path, TwoInputs(), example) < 1e-6


def test_another_model_is_told_apart(tmp_path):
    example = torch.randn(2, 3)
    path = export_onnx(nn.Linear(3, 2), example, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match=r"model\.onnx: ONNX Runtime's outputs differ"):
        check_onnx(path, nn.Linear(3, 2), example)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_model_that_cannot_be_followed_leaves_the_older_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("older")
    with pytest.raises(TraceError, match=r"Branching: torch\.onnx\.export cannot follow it"):
        export_onnx(Branching(), torch.ones(2, 3), path)
    assert path.read_text() == "older"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"onnx, onnxscript, onnxruntime.*tersor\[onnx\]"):
        export_onnx(nn.Linear(3, 2), torch.zeros(1, 3), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_for_another_engine_is_written_without_onnx_runtime(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "onnxruntime" else there(name, *a))
    program = lower(nn.Linear(3, 2), torch.zeros(2, 3))
    assert write_program(program, tmp_path / "model.onnx").stat().st_size > 0
    with pytest.raises(MissingExtraError, match="not installed: onnxruntime"):
        check_onnx(tmp_path / "model.onnx", nn.Linear(3, 2), torch.zeros(2, 3))


def test_the_exporter_takes_linear_time_and_has_its_rules_back(tmp_path, monkeypatch):
    """Each rule looks at one node at a time, not for one node through the whole graph for others."""
    from onnxscript import rewriter
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    monkeypatch.setattr(SimplePatternMatcher, "_multi_match", lambda *_, **__: pytest.fail("looks for pairs of nodes"))
    own = rewriter._DEFAULT_REWRITE_RULES

    class Halves(nn.Module):
        def forward(self, x):
            return x[:, :2] + x[:, 2:].relu()

    model = Halves()
    export_onnx(model, torch.ones(2, 4), tmp_path / "model.onnx")
    assert rewriter._DEFAULT_REWRITE_RULES is own
    assert check_onnx(tmp_path / "model.onnx", model, torch.ones(2, 4)) < 1e-6
