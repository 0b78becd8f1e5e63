"""The shipped conformance suite, on every quantizer of ours."""

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
