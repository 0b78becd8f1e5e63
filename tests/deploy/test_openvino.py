"""OpenVINO's engine: exact against the simulation, in integers by its own profile, and clear about what is wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.config.dtypes import parse_dtype
from tersor.deploy import CompiledModel, QuantizationSpeedup, engine_config
from tersor.deploy.engines import engine_of
from tersor.deploy.graph import Graph
from tersor.deploy.placement import join_twins
from tersor.deploy.sums import is_added_unrounded
from tersor.errors import CheckpointError, InvalidValueError, MissingExtraError
from tersor.quantization import PtqQuantizer
from tests.networks import Residual

pytest.importorskip("openvino", reason="OpenVINO is not installed (pip install 'tersor[openvino]')")
pytest.importorskip("onnxscript", reason="ONNX is not installed (pip install 'tersor[onnx]')")

EXACT = 100.0
"""dB: what is left are last digits of float32."""


class Blocks(nn.Module):
    """A pool, a depthwise convolution and a sum of a convolution with what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = x + self.narrow(torch.nn.functional.relu6(self.depthwise(x)))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class Layers(nn.Module):
    """Linear layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def images(batch: int = 4, seed: int = 0) -> Tensor:
    """Images of noise."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(batch: int = 4) -> Tensor:
    """Rows of noise."""
    return torch.randn(batch, 32, generator=torch.Generator().manual_seed(1))


def quantized(model: nn.Module, config_list: list[dict[str, Any]], example: Tensor) -> PtqQuantizer:
    """A calibrated quantizer."""
    quantizer = PtqQuantizer(model.eval(), config_list, calibration=[example])
    quantizer.compress()
    return quantizer


def compiled(quantizer: PtqQuantizer, example: Tensor, **more: Any) -> CompiledModel:
    """With one thread, and exact."""
    settings: dict[str, Any] = {"threads": 1, "min_snr": EXACT, **more}
    return QuantizationSpeedup(quantizer, example, engine="openvino", **settings).compile()


@pytest.fixture(scope="module")
def artefact() -> tuple[CompiledModel, nn.Module]:
    """The blocks as OpenVINO wants them quantized, and their simulation."""
    torch.manual_seed(0)
    model, config_list = engine_config(Blocks(), images(), "openvino")
    quantizer = quantized(model, config_list, images())
    return compiled(quantizer, 1.2 * images(seed=2)), quantizer.model


def test_it_computes_the_simulation_in_int8(artefact: tuple[CompiledModel, nn.Module]) -> None:
    """Pool, depthwise, sum, mean: all products in integers, at another batch size and beyond the calibrated range."""
    model, simulation = artefact
    with torch.no_grad():
        for batch in (1, 7):
            x = 1.5 * images(batch, seed=batch)
            assert torch.allclose(model(x), simulation(x), atol=1e-5)
    assert model.report.simulation_snr >= EXACT
    assert (model.report.asked, model.report.int8, model.report.coverage) == (5, 5, 1.0)
    computing = [operator for operator in model.report.operators if operator.computes]
    assert [operator.kind for operator in computing] == ["Convolution"] * 4 + ["FullyConnected"]
    assert {operator.precision for operator in computing} == {"int8"}
    assert "Pooling" in {operator.kind for operator in model.report.operators if operator.precision == "int8"}
    assert all(operator.milliseconds is not None for operator in model.report.operators)
    assert model.report.fallbacks == ()


def test_weights_are_bytes_in_the_file(artefact: tuple[CompiledModel, nn.Module]) -> None:
    """As many as there are weights, and little else."""
    model, simulation = artefact
    weights = sum(parameter.numel() for parameter in simulation.parameters() if parameter.dim() > 1)
    assert weights < (model.folder / "model.bin").stat().st_size < weights + 1500
    assert sorted(file.name for file in model.folder.iterdir()) == ["model.bin", "model.xml"]


def test_saved_and_loaded(artefact: tuple[CompiledModel, nn.Module], tmp_path: Path) -> None:
    """The same bits, with two threads and from several callers at once; outputs own their memory."""
    model, _ = artefact
    loaded = CompiledModel.load(model.save(tmp_path / "saved"), threads=2)
    expected = model(images())
    first = loaded(images())
    assert torch.equal(first, expected)
    loaded(images(seed=9))
    assert torch.equal(first, expected)
    results: list[Tensor] = []
    callers = [threading.Thread(target=lambda: results.append(loaded(images()))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results)


def test_inputs_need_not_be_contiguous(artefact: tuple[CompiledModel, nn.Module]) -> None:
    """A view is read as what it is."""
    model, _ = artefact
    turned = images().transpose(2, 3)
    assert torch.equal(model(turned), model(turned.contiguous()))


def test_a_sum_is_rounded_where_the_quantizer_rounds() -> None:
    """Whose operands are int4: OpenVINO would add what is not rounded (19 dB here), and is kept from it."""
    torch.manual_seed(0)
    settings = {name: {"quant_dtype": "int4", "quant_scheme": "affine"} for name in ("_input_0", "_output_0")}
    settings["weight"] = {"quant_dtype": "int8"}
    config_list = [{"op_types": ["Conv2d", "Linear"], "target_names": list(settings), "target_settings": settings}]
    model = compiled(quantized(Blocks(), config_list, images()), 1.3 * images(seed=3), min_snr=60.0)
    assert model.report.int8 == model.report.asked == 5
    assert [fallback.where for fallback in model.report.fallbacks] == ["narrow"]


def test_which_values_are_not_rounded_before_a_sum() -> None:
    """What a convolution alone gives to a sum that is rounded; int16 in the config list, int8 in the file."""
    torch.manual_seed(0)
    model, config_list = engine_config(Residual(), images(), "openvino")
    wide = [entry for entry in config_list if "int16" in str(entry)]
    assert [(entry["op_names"], entry["target_names"]) for entry in wide] == [(["add"], ["_input_1"])]
    quantizer = quantized(model, config_list, images())
    program = QuantizationSpeedup(quantizer, images(), engine="openvino").lower()
    graph = Graph(program)
    join_twins(graph)
    assert sum(is_added_unrounded(node) for node in graph.calls(torch.ops.tersor.quantize.default)) == 1
    prepared, fallbacks = engine_of("openvino").prepare(program)
    kinds = [node.args[3] for node in Graph(prepared).calls(torch.ops.tersor.quantize.default)]
    assert set(kinds) == {"int8", "uint8"}
    assert fallbacks == ()


@pytest.mark.parametrize(("dtype", "granularity"), [("int8", "per_channel"), ("int4", [1, 16]), ("uint4", [1, 16])])
def test_weights_alone(dtype: str, granularity: Any) -> None:
    """Exact in all types, since inputs are not rounded on the way; small in the file, computed in floating point."""
    torch.manual_seed(0)
    weight = {
        "quant_dtype": dtype,
        "granularity": granularity,
        "quant_scheme": "affine" if dtype[0] == "u" else "symmetric",
    }
    config_list = [{"op_types": ["Linear"], "target_names": ["weight"], "target_settings": {"weight": weight}}]
    model = compiled(quantized(Layers(), config_list, rows()), rows(3))
    assert model.report.simulation_snr >= EXACT
    assert {operator.precision for operator in model.report.operators if operator.computes} == {"float"}


@pytest.mark.parametrize(("dtype", "precision"), [("int3", "int8"), ("int16", "float")])
def test_inputs_of_other_types(dtype: str, precision: str) -> None:
    """Less than 8 bits are stored in 8, more are rounded in floating point and reported."""
    torch.manual_seed(0)
    settings = {"weight": {"quant_dtype": "int8"}, "_input_0": {"quant_dtype": dtype, "quant_scheme": "affine"}}
    config_list = [{"op_types": ["Linear"], "target_names": list(settings), "target_settings": settings}]
    model = compiled(quantized(Layers(), config_list, rows()), 1.5 * rows(3), min_coverage=0.0)
    assert model.report.simulation_snr >= EXACT
    assert {operator.precision for operator in model.report.operators if operator.computes} == {precision}
    assert len(model.report.fallbacks) == (2 if dtype == "int16" else 0)


def test_floating_point_in_other_precisions() -> None:
    """float32 agrees to its last digits, bf16 where the processor has it to some 8 bits."""
    import openvino

    torch.manual_seed(0)
    model = Layers().eval()
    exact = QuantizationSpeedup(model, rows(), engine="openvino", min_snr=EXACT).compile()
    assert exact.report.simulation_snr >= EXACT
    if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        coarse = QuantizationSpeedup(
            model, rows(), engine="openvino", options={"precision": "bf16"}, min_snr=30
        ).compile()
        assert 30 < coarse.report.simulation_snr < 60
    with pytest.raises(
        InvalidValueError, match=r"options\['precision'\]: 'fp8' is not accepted\. Legal: f32, bf16, f16"
    ):
        QuantizationSpeedup(model, rows(), engine="openvino", options={"precision": "fp8"}).compile()
    with pytest.raises(InvalidValueError, match=r"options: there is no 'speed'\. Legal: precision"):
        QuantizationSpeedup(model, rows(), engine="openvino", options={"speed": 1}).compile()


def test_damaged_files_are_refused(artefact: tuple[CompiledModel, nn.Module], tmp_path: Path) -> None:
    """In one line that names the file and the version."""
    model, _ = artefact
    engine = engine_of("openvino")
    text = (model.folder / "model.xml").read_text(encoding="utf-8")
    weights = (model.folder / "model.bin").read_bytes()
    for xml, held in (
        (text[: len(text) // 2], weights),
        (text, weights[:100]),
        (text.replace("opset", "epoch"), weights),
    ):
        (tmp_path / "model.xml").write_text(xml, encoding="utf-8")
        (tmp_path / "model.bin").write_bytes(held)
        with pytest.raises(CheckpointError, match=r"model.xml: OpenVINO [\d.]+ cannot open it") as caught:
            engine.open(tmp_path, threads=1, options={})
        assert "\n" not in str(caught.value)
    (tmp_path / "model.xml").unlink()
    with pytest.raises(CheckpointError, match="cannot open it"):
        engine.open(tmp_path, threads=1, options={})


def test_what_it_lacks() -> None:
    """fp8 between layers, which it would round to int8 without a word, and more than 16 bits."""
    engine = engine_of("openvino")
    assert engine.lacks(parse_dtype("int4"), is_activation=True) == ""
    assert engine.lacks(parse_dtype("fp8_e4m3"), is_activation=False) == ""
    assert engine.lacks(parse_dtype("fp8_e4m3"), is_activation=True) == "has no fp8_e4m3 inputs and outputs"
    assert engine.lacks(parse_dtype("int32"), is_activation=False) == "has no int32 weights"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(
        MissingExtraError, match=r"OpenVINO: not installed: openvino. .*pip install 'tersor\[openvino\]'"
    ):
        engine_of("openvino")


SIGNALLED = """
import gc, signal, subprocess, sys, torch
from tersor.deploy import CompiledModel, QuantizationSpeedup
signal.signal(signal.SIGCHLD, lambda *_: None)  # as a data loader with workers has it
x = torch.randn(2, 4)
first = QuantizationSpeedup(torch.nn.Linear(4, 4), x, engine="openvino").compile()
first.save(sys.argv[1])
first(x)
second = CompiledModel.load(sys.argv[1])
second(x)
del first
gc.collect()
del second
gc.collect()
subprocess.run([sys.executable, "-c", ""], check=True)
print("alive")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="needs signals for processes that end")
def test_signals_arrive_after_sessions_have_ended(tmp_path: Path) -> None:
    """In the order in which they began; with a runtime for each, the process died of its next signal."""
    command = [sys.executable, "-X", "faulthandler", "-c", SIGNALLED, str(tmp_path / "model")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "alive\n"), ended.stderr
