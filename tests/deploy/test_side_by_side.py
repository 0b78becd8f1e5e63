"""Models on everything that can run them: which are run, which are not and why, and how gains are stated."""

import importlib.util

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.analysis.latency import Latency
from tersor.deploy import SideBySide, engines, side_by_side
from tersor.deploy.onnx_runtime import OnnxRuntime
from tersor.deploy.side_by_side import Way
from tersor.errors import InvalidValueError, MissingExtraError
from tests.deploy.toy import data, net

X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))
QUICK = {"repeats": 3, "seconds": 0.2}


def way(model, runs_on, precision, *seconds):
    return Way(model, runs_on, precision, 1000, 40.0, {1: Latency(seconds)})


@pytest.fixture
def found():
    return SideBySide(
        (
            way("", "eager", "fp32", 0.008, 0.008, 0.008),
            way("", "openvino", "fp32", 0.004, 0.004, 0.004),
            way("", "openvino", "int8", 0.001, 0.001, 0.002),
            way("small", "openvino", "fp32", 0.004, 0.005, 0.006),
            Way("", "onnxruntime", "fp32", skipped="it cannot"),
        ),
        (1,),
        {},
    )


def test_gains_are_over_eager_and_over_fp32_on_the_same_engine(found):
    ours = found.way("openvino int8")
    assert found.gain(ours, 1).median == 8
    assert found.gain(ours, 1, found.base_of(ours)).median == 4
    assert found.gain(found.way("onnxruntime fp32"), 1) is None
    gains = {own["name"]: own["gains"]["1"] for own in found.to_dict()["ways"]}
    assert gains["small, openvino fp32"] == {"eager": 8 / 5, "fp32": 4 / 5}
    assert gains["onnxruntime fp32"] == {"eager": None, "fp32": None}


def test_notes_say_what_was_not_run_and_what_is_no_faster(found):
    assert found.notes == (
        "At batch 1 small, openvino fp32 is not measurably faster than openvino fp32 "
        "(0.80 times as fast, 95 % interval 0.67 to 1.00).",
        "onnxruntime fp32 was not run: it cannot",
    )
    with pytest.raises(InvalidValueError, match=r"there is no 'openvino int4'\. Legal: eager fp32, openvino fp32"):
        found.way("openvino int4")


def test_eager_and_bfloat16_agree_and_the_models_are_left_as_they_were():
    model, small = net(), nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = side_by_side(
        model, X, compressed={"small": small}, engines=(), eager_only=True, batch_sizes=(1, 6), **QUICK
    )
    assert [own.name for own in found.ways] == ["eager fp32", "small, eager fp32"]
    assert found.ways[0].snr == float("inf")
    model.eval()
    with torch.no_grad():
        exact, other = model(X[:1]).double(), small(X[:1]).double()
    # independent of the code: signal over noise, in dB
    expected = 10 * torch.log10(exact.square().sum() / (other - exact).square().sum())
    assert found.ways[1].snr == pytest.approx(float(expected), abs=1e-3)
    assert {len(own.latency[size].times) for own in found.ways for size in (1, 6)} == {3}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_fails_is_listed_with_its_reason(monkeypatch):
    def without_compiler(model):
        raise RuntimeError("No working C++ compiler found\nsee above")

    monkeypatch.setattr(torch, "compile", without_compiler)
    found = side_by_side(net(), X, engines=(), **QUICK)
    assert [(own.name, own.skipped) for own in found.ways if own.skipped] == [
        ("torch.compile fp32", "RuntimeError: No working C++ compiler found")
    ]
    assert found.way("torch.compile fp32").latency is None
    assert found.way("eager bf16").snr > 30
    assert "torch.compile fp32 was not run: RuntimeError: No working C++ compiler found" in found.notes


def test_engines_that_are_not_installed(monkeypatch):
    there = importlib.util.find_spec
    missing = ("onnxruntime", "openvino")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in missing else there(name, *a))
    with pytest.raises(MissingExtraError, match=r"ONNX Runtime: not installed: onnxruntime. .*tersor\[onnx\]"):
        side_by_side(net(), X, engines="onnxruntime", eager_only=True, **QUICK)
    known = {name: engine for name, engine in engines().items() if name in missing}
    monkeypatch.setitem(side_by_side.__globals__, "known_engines", lambda: known)
    assert len(known) == 2
    assert {own.runs_on for own in side_by_side(net(), X, eager_only=True, **QUICK).ways} == {"eager"}


def test_wrong_arguments():
    with pytest.raises(InvalidValueError, match=r"'onnxruntme' is no engine.*Did you mean 'onnxruntime'"):
        side_by_side(net(), X, engines=["onnxruntme"], **QUICK)
    with pytest.raises(InvalidValueError, match="batch_sizes: 0 is no batch size"):
        side_by_side(net(), X, batch_sizes=[0], **QUICK)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # the model's own error
        side_by_side(nn.Linear(3, 2), X, engines=(), eager_only=True, **QUICK)


@pytest.mark.skipif(bool(OnnxRuntime.why_not()), reason=OnnxRuntime.why_not())
def test_on_an_engine_in_fp32_and_int8():
    batches = [inputs for inputs, _ in data().train]
    found = side_by_side(net(), X, calibration=batches, engines="onnxruntime", eager_only=True, threads=1, **QUICK)
    full, ours = found.way("onnxruntime fp32"), found.way("onnxruntime int8")
    assert full.snr > 100
    assert 20 < ours.snr < 80
    assert (full.skipped, ours.skipped) == ("", "")
    assert ours.latency[4].median > 0
    ratio = sorted(a / b for a, b in zip(full.latency[4].times, ours.latency[4].times, strict=True))[1]
    assert found.gain(ours, 4, full).median == ratio


@pytest.mark.skipif(bool(OnnxRuntime.why_not()), reason=OnnxRuntime.why_not())
def test_a_model_that_an_engine_cannot_have_is_listed():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    found = side_by_side(Branching(), X, engines="onnxruntime", eager_only=True, **QUICK)
    assert "Branching: torch.export cannot follow it" in found.way("onnxruntime fp32").skipped
