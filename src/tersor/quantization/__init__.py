"""Quantizers, one file an algorithm; observers and the arithmetic of formats are pure functions."""

from tersor.quantization.adaround import AdaRoundQuantizer as AdaRoundQuantizer
from tersor.quantization.awq import AWQQuantizer as AWQQuantizer
from tersor.quantization.base import CalibrationConfig as CalibrationConfig
from tersor.quantization.base import FakeQuantize as FakeQuantize
from tersor.quantization.base import Quantizer as Quantizer
from tersor.quantization.base import straight_through as straight_through
from tersor.quantization.bnn import BNNQuantizer as BNNQuantizer
from tersor.quantization.calibrated import CalibratedQuantizer as CalibratedQuantizer
from tersor.quantization.cut import Cut as Cut
from tersor.quantization.dorefa import DoReFaQuantizer as DoReFaQuantizer
from tersor.quantization.equalization import Equalization as Equalization
from tersor.quantization.equalization import equalize as equalize
from tersor.quantization.format import Format as Format
from tersor.quantization.gptq import GPTQQuantizer as GPTQQuantizer
from tersor.quantization.observers import Latest as Latest
from tersor.quantization.observers import MinMax as MinMax
from tersor.quantization.observers import MovingAverage as MovingAverage
from tersor.quantization.observers import RangeObserver as RangeObserver
from tersor.quantization.scaling import Scaling as Scaling
from tersor.quantization.scaling import find_scaling as find_scaling
from tersor.quantization.smooth import SmoothQuantizer as SmoothQuantizer
from tersor.quantization.uniform import UniformQuantize as UniformQuantize
