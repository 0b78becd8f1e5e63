"""NNI 2.x's calls, on an engine that runs here."""

import pytest
import torch
import torch._dynamo  # slow to import, which is no test's fault
from torch import nn

from tersor.deploy import CalibrateType, Calibrator, ModelSpeedupTensorRT, engine_config
from tersor.errors import CheckpointError, InvalidValueError, MissingExtraError
from tersor.quantization import PtqQuantizer
from tests.deploy.lowered import simulated

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def network():
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()


def made(model, **arguments):
    return ModelSpeedupTensorRT(model, (2, 2, 6, 6), engine="onnxruntime", **{"onnx_path": None, **arguments})


def test_calibrate_run_export_and_load(tmp_path):
    data, model = torch.randn(20, 2, 6, 6), network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    speedup = made(model, onnx_path=tmp_path / "default_model.onnx")
    calibrator = Calibrator(data, tmp_path / "calibration.cache", batch_size=8, algorithm=CalibrateType.MINMAX)
    speedup.compress_with_calibrator(calibrator)
    output, seconds = speedup.inference(data[:5])
    assert 0 < seconds < 60
    with torch.no_grad():
        expected = model(data[:5])
    assert float((output - expected).norm() / expected.norm()) < 0.05
    assert (tmp_path / "default_model.onnx").stat().st_size > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    other = made(None)
    other.load_quantized_model(speedup.export_quantized_model(tmp_path / "exported"))
    assert torch.equal(other.inference(data[:5], reset_context=True)[0], output)
    # Ranges come from the cache now: no data is run for them.
    again = made(model)
    cached = Calibrator(1000 * torch.ones(4, 2, 6, 6), tmp_path / "calibration.cache")
    again.compress_with_calibrator(cached)
    assert torch.equal(again.inference(data[:5])[0], output)


def test_observers_find_other_ranges():
    data = torch.randn(61, 2, 6, 6)
    data[-1, 0, 0, 0] = 40
    ranges = {}
    for algorithm in (CalibrateType.MINMAX, CalibrateType.ENTROPY, CalibrateType.LEGACY):
        calibrator = Calibrator(data, None, 8, algorithm)
        model, config_list = engine_config(network(), data[:2], "onnxruntime")
        for entry in config_list:
            for target, settings in entry["target_settings"].items():
                if target.startswith("_"):
                    settings["observer"] = calibrator.algorithm.observer
        _, calibration = PtqQuantizer(model, config_list, calibration=calibrator.batches()).compress()
        ranges[algorithm.name] = float(calibration["0"]["_input_0"]["scale"])
    assert ranges["MINMAX"] == pytest.approx((40 - float(data.min())) / 255, rel=1e-4)
    assert ranges["ENTROPY"] < ranges["MINMAX"]
    assert ranges["LEGACY"] < ranges["MINMAX"]
    assert CalibrateType.ENTROPY2.observer == CalibrateType.ENTROPY.observer == "entropy"


def test_a_config_and_a_compressor():
    data = torch.randn(12, 2, 6, 6)
    model, config_list = engine_config(network(), data, "onnxruntime")
    quantizer = PtqQuantizer(model, config_list, calibration=[data])
    _, calibration = quantizer.compress()
    expected = simulated(model, data)[0]
    of_compressor = made(quantizer)
    of_compressor.compress()
    quantizer.unwrap_model()
    of_config = made(model, config=calibration)
    of_config.compress()
    outputs = [speedup.inference((data,))[0] for speedup in (of_compressor, of_config)]
    assert torch.equal(*outputs)
    assert float((outputs[0] - expected).abs().max()) < 1e-4
    with pytest.raises(InvalidValueError, match="has ranges of its own"):
        of_compressor.compress_with_calibrator(Calibrator(data))


def test_data_of_a_loader():
    data = torch.randn(12, 2, 6, 6)
    loader = [(data[:6], torch.zeros(6)), (data[6:], torch.zeros(6))]
    speedup = made(network(), calib_data_loader=loader, calibrate_type=CalibrateType.MINMAX)
    speedup.compress()
    same = made(speedup.model, calib_data_loader=data, batchsize=6, calibrate_type=CalibrateType.MINMAX)
    same.compress()
    assert torch.equal(speedup.inference(data)[0], same.inference(data)[0])


def test_what_is_refused(tmp_path):
    with pytest.raises(InvalidValueError, match="config: there is nothing to take ranges from"):
        made(network()).compress()
    with pytest.raises(InvalidValueError, match="nothing is built yet"):
        made(network()).inference(torch.randn(2, 2, 6, 6))
    with pytest.raises(CheckpointError, match=r"holds no deployment\.json"):
        made(network()).load_quantized_model(tmp_path)
    with pytest.raises(InvalidValueError, match=r"extra_layer_bits: 8 is not accepted.*Legal: 32"):
        made(network(), extra_layer_bits=8)
    with pytest.raises(InvalidValueError, match="batch_size"):
        Calibrator(torch.randn(2, 3), batch_size=0)
    with pytest.raises(InvalidValueError, match="there is no sample"):
        Calibrator(torch.randn(0, 3))
    with pytest.raises(InvalidValueError, match="'minmax' is no CalibrateType"):
        Calibrator(torch.randn(2, 3), algorithm="minmax")
    (tmp_path / "cache").write_text("no calibration")
    with pytest.raises(CheckpointError):
        made(network()).compress_with_calibrator(Calibrator(torch.randn(2, 2, 6, 6), tmp_path / "cache"))


def test_tensorrt_is_the_engine_where_none_is_named(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    speedup = ModelSpeedupTensorRT(network(), (2, 2, 6, 6))
    with pytest.raises(MissingExtraError, match="TensorRT"):
        speedup.compress_with_calibrator(Calibrator(torch.randn(2, 2, 6, 6)))
