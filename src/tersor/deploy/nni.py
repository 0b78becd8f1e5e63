"""NNI 2.x's quantization speedup, by its names: a model is calibrated, built and run by an inference engine.

NNI's ran on TensorRT alone, and wanted a config that its own quantizers did not write. Here the names sit on
:class:`tersor.deploy.QuantizationSpeedup`: any quantizer's calibration is taken, any engine can be named, and what is
built is compared with the simulation before it is handed out.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from tersor.deploy.compiled import CompiledModel
from tersor.deploy.engine_targets import engine_config
from tersor.deploy.engines import engine_of
from tersor.deploy.quantization_speedup import QuantizationSpeedup
from tersor.errors import InvalidValueError
from tersor.quantization import PtqQuantizer
from tersor.quantization.base import CalibrationConfig
from tersor.storage import load_calibration, replacing_file, save_calibration


class CalibrateType(Enum):
    """How ranges are found.

    ``MINMAX`` clips nothing; ``LEGACY`` leaves out the outermost values; both kinds of ``ENTROPY`` lose the least
    information on the distribution of values, and are one here.

    >>> CalibrateType.ENTROPY2.observer
    'entropy'
    """

    LEGACY = "legacy"
    ENTROPY = "entropy"
    ENTROPY2 = "entropy2"
    MINMAX = "minmax"

    @property
    def observer(self) -> str:
        """Its name among the observers of :class:`tersor.quantization.PtqQuantizer`."""
        return {"legacy": "percentile", "entropy2": "entropy"}.get(self.value, self.value)


@final
class Calibrator:
    """Data that ranges are found on, and where they are kept.

    Args:
        training_data: a tensor of samples, or an iterable of batches (a ``DataLoader``); of batches that are tuples or
            lists, the first element is the model's input.
        cache_file: where ranges are kept: if it is there, they are read from it, and no data is run.
        batch_size: how many samples of a tensor are run at once.
        algorithm: how ranges are found.

    Raises:
        InvalidValueError: no sample, or a batch size below 1.

    >>> calibrator = Calibrator(torch.randn(10, 3), "calibration.cache", batch_size=4)
    >>> [len(batch) for batch in calibrator.batches()]
    [4, 4, 2]
    """

    def __init__(
        self,
        training_data: Any,
        cache_file: str | Path | None = None,
        batch_size: int = 64,
        algorithm: CalibrateType = CalibrateType.ENTROPY2,
    ) -> None:
        if batch_size < 1:
            raise InvalidValueError(f"{batch_size!r} is no number of samples", where="batch_size", legal=["1 and more"])
        if not isinstance(algorithm, CalibrateType):
            raise InvalidValueError(f"{algorithm!r} is no CalibrateType", where="algorithm", legal=list(CalibrateType))
        self.data = torch.as_tensor(training_data) if hasattr(training_data, "__array__") else training_data
        self.cache_file = None if cache_file is None else Path(cache_file)
        self.batch_size, self.algorithm = batch_size, algorithm
        if isinstance(self.data, Tensor) and not len(self.data):
            raise InvalidValueError("there is no sample", where="training_data")

    def batches(self) -> list[Any]:
        """The inputs of the model, batch by batch."""
        if isinstance(self.data, Tensor):
            return list(self.data.split(self.batch_size))
        return [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in self.data]

    def read_calibration_cache(self) -> CalibrationConfig | None:
        """What the cache file holds; None where there is none.

        Raises:
            CheckpointError: it is another file.
        """
        if self.cache_file is None or not self.cache_file.exists():
            return None
        return load_calibration(self.cache_file)

    def write_calibration_cache(self, calibration: CalibrationConfig) -> None:
        """Keep ranges for the next time."""
        if self.cache_file is not None:
            save_calibration(calibration, self.cache_file)


@final
class ModelSpeedupTensorRT:
    """Makes a quantized model run in integers, by NNI's calls.

    Args:
        model: a plain model, or a finished compressor. It is left as it was.
        input_shape: of one batch: what is drawn from a normal distribution to trace the model, where there is no
            calibration data.
        config: a calibration, as ``get_calibration_config()`` gives it. Without one, :meth:`compress` calibrates on
            ``calib_data_loader``.
        onnx_path: where the ONNX file goes that an engine was built from; engines that read none write none.
        extra_layer_bits: of layers that the config does not name: 32. They stay in floating point; what is quantized
            has ranges, which for all layers :meth:`compress_with_calibrator` finds.
        strict_datatype: raise an error where too little runs in integers; else warn.
        calibrate_type: how ranges are found.
        calib_data_loader: a tensor of samples, or an iterable of batches.
        calibration_cache: the file that keeps ranges. None keeps none.
        batchsize: samples of a batch, where data is a tensor.
        input_names: accepted for NNI's sake: inputs are passed by position.
        output_names: likewise: outputs are nested as the model's.
        engine: see :func:`tersor.deploy.engines`.
        options: of :class:`tersor.deploy.QuantizationSpeedup`, such as ``min_snr``.

    Raises:
        InvalidValueError: a value that is not accepted.
        MissingExtraError: the engine is not installed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> speedup = ModelSpeedupTensorRT(net, (2, 4), engine="onnxruntime", onnx_path=None)
        >>> speedup.compress_with_calibrator(Calibrator(torch.randn(32, 4)))
        >>> output, seconds = speedup.inference(torch.randn(3, 4))
        >>> output.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Any,
        input_shape: Sequence[int],
        config: CalibrationConfig | None = None,
        onnx_path: str | Path | None = "default_model.onnx",
        extra_layer_bits: int = 32,
        strict_datatype: bool = True,
        calibrate_type: CalibrateType = CalibrateType.ENTROPY2,
        calib_data_loader: Any = None,
        calibration_cache: str | Path | None = None,
        batchsize: int = 1,
        input_names: Sequence[str] = ("actual_input_1",),
        output_names: Sequence[str] = ("output1",),
        *,
        engine: str = "tensorrt",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if extra_layer_bits != 32:
            raise InvalidValueError(
                f"{extra_layer_bits!r} is not accepted: a layer without ranges stays in floating point",
                where="extra_layer_bits",
                legal=[32],
                remedy="To quantize all layers, leave the config out and give calib_data_loader.",
            )
        self.model, self.config, self.engine = model, config, engine
        self.input_shape = tuple(input_shape)
        self.onnx_path = None if onnx_path is None else Path(onnx_path)
        self.strict_datatype = strict_datatype
        self.input_names, self.output_names = tuple(input_names), tuple(output_names)
        self.options = dict(options or {})
        self._calibrator = (
            None
            if calib_data_loader is None
            else Calibrator(calib_data_loader, calibration_cache, batchsize, calibrate_type)
        )
        self.compiled: CompiledModel | None = None

    def compress(self) -> None:
        """Build an engine from the config, or by calibration on ``calib_data_loader`` where there is none.

        Raises:
            InvalidValueError: there is neither.
            VerificationError: what was built departs from the simulation.
        """
        if self.config is None and self._calibrator is not None:
            self.compress_with_calibrator(self._calibrator)
        elif self.config is None and isinstance(self.model, nn.Module):
            raise InvalidValueError(
                "there is nothing to take ranges from",
                where="config",
                remedy="Give a calibration or calib_data_loader, or call compress_with_calibrator(calibrator).",
            )
        else:
            example = self._example() if self._calibrator is None else self._calibrator.batches()[0]
            self._build(self.model, example, self.config)

    def compress_with_calibrator(self, calib: Calibrator) -> None:
        """Find ranges on a calibrator's data, or in its cache file, and build an engine.

        All that the engine wants quantized is; see :func:`tersor.deploy.engine_config`.

        Raises:
            InvalidValueError: the model is a compressor, which has ranges.
            VerificationError: what was built departs from the simulation.
        """
        if not isinstance(self.model, nn.Module):
            raise InvalidValueError(
                "a finished compressor has ranges of its own", where="model", remedy="Call compress() in its place."
            )
        batches = calib.batches()
        example = batches[0]
        network, config_list = engine_config(self.model, example, self.engine)
        cached = calib.read_calibration_cache()
        if cached is not None:
            self._build(network, example, cached)
            return
        for entry in config_list:
            for target, settings in entry["target_settings"].items():
                if target.startswith("_"):
                    settings["observer"] = calib.algorithm.observer
        quantizer = PtqQuantizer(network, config_list, calibration=batches, example_inputs=example)
        quantizer.compress()
        calib.write_calibration_cache(quantizer.get_calibration_config())
        self._build(quantizer, example, None)

    def inference(self, test_data: Any, reset_context: bool = False) -> tuple[Any, float]:
        """Run a batch.

        Args:
            test_data: a tensor, or a tuple of tensors in the order of the model's inputs.
            reset_context: open the engine anew before.

        Returns:
            The outputs, nested as the model's, and the seconds that it took.

        Raises:
            InvalidValueError: nothing is built or loaded yet, or the data does not fit.
        """
        compiled = self._built()
        if reset_context:
            session = engine_of(compiled.engine, to_open=True).open(
                compiled.folder, threads=None, options=compiled.options
            )
            compiled.session = session
        args = tuple(test_data) if isinstance(test_data, (tuple, list)) else (test_data,)
        start = time.perf_counter()
        output = compiled(*args)
        return output, time.perf_counter() - start

    def export_quantized_model(self, path: str | Path) -> Path:
        """Write the engine's files into a folder.

        Raises:
            InvalidValueError: nothing is built yet, or there is a folder of something else.
        """
        return self._built().save(path)

    def load_quantized_model(self, path: str | Path) -> None:
        """Take what :meth:`export_quantized_model` wrote, in place of building.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        self.compiled = CompiledModel.load(path)
        self.engine = self.compiled.engine

    def _built(self) -> CompiledModel:
        if self.compiled is None:
            raise InvalidValueError(
                "nothing is built yet",
                where="ModelSpeedupTensorRT",
                remedy="Call compress(), compress_with_calibrator() or load_quantized_model() first.",
            )
        return self.compiled

    def _example(self) -> Tensor:
        return torch.randn(self.input_shape, generator=torch.Generator().manual_seed(0))

    def _build(self, model: Any, example: Any, calibration: CalibrationConfig | None) -> None:
        speedup = QuantizationSpeedup(
            model,
            example,
            calibration,
            self.engine,
            on_failure="error" if self.strict_datatype else "warn",
            **self.options,
        )
        self.compiled = speedup.compile()
        source = self.compiled.folder / "model.onnx"
        if self.onnx_path is not None and source.exists():
            with replacing_file(self.onnx_path) as temporary:
                shutil.copyfile(source, temporary)
