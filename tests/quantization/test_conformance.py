"""The shipped conformance suite, on every quantizer of ours."""

import pytest

from tersor import quantization
from tersor.testing import QuantizerTestCase as Suite


class TestDoReFa(Suite):
    calibrates = False
    targets = ("weight", "_input_0", "_output_0")
    setting = {"quant_dtype": "int4"}
    channels = False

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.DoReFaQuantizer(model, config_list, evaluator, gradient_bits=6, **kwargs)


class TestDoReFaOfOneBit(TestDoReFa):
    targets = ("weight",)
    setting = {"quant_dtype": "int1"}


class TestBNN(Suite):
    calibrates = False
    targets = ("weight", "_input_0", "_output_0")
    setting = {"quant_dtype": "int1"}
    granularities = ()
    channels = False

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.BNNQuantizer(model, config_list, evaluator, **kwargs)


class TestSmooth(Suite):
    learns = True

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.SmoothQuantizer(model, config_list, evaluator, calibration=self.batches, **kwargs)


class TestAWQ(Suite):
    learns = True
    targets = ("weight",)

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.AWQQuantizer(model, config_list, evaluator, calibration=self.batches, **kwargs)


class TestGPTQ(Suite):
    learns = True

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.GPTQQuantizer(model, config_list, evaluator, calibration=self.batches, **kwargs)


class TestAdaRound(Suite):
    learns = True

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.AdaRoundQuantizer(
            model, config_list, evaluator, calibration=self.batches, iterations=5, **kwargs
        )


class TestPtq(Suite):
    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.PtqQuantizer(model, config_list, evaluator, calibration=self.batches, **kwargs)


class TestPtqWithCorrections(Suite):
    learns = True
    setting = {"quant_dtype": "uint4", "quant_scheme": "affine"}

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.PtqQuantizer(
            model,
            config_list,
            evaluator,
            calibration=self.batches,
            observer="minmax",
            bias_correction=True,
            equalize=hasattr(model, "stem"),  # the other network has no two layers
            **kwargs,
        )


class TestPtqToFloats(Suite):
    setting = {"quant_dtype": "fp8_e4m3"}

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.PtqQuantizer(
            model, config_list, evaluator, calibration=self.batches, observer="minmax", **kwargs
        )


class TestQAT(Suite):
    calibrates = False

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.QATQuantizer(model, config_list, evaluator, quant_start_step=2, **kwargs)


@pytest.mark.filterwarnings("ignore:no value below zero has been seen")
class TestLsq(Suite):
    calibrates = False
    setting = {"quant_dtype": "int4"}

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.LsqQuantizer(model, config_list, evaluator, **kwargs)


class TestLsqPlus(Suite):
    calibrates = False
    setting = {"quant_dtype": "int4", "quant_scheme": "affine"}

    def quantizer(self, model, config_list, evaluator, **kwargs):
        return quantization.LsqPlusQuantizer(model, config_list, evaluator, **kwargs)
