"""Quantizers, one file an algorithm; observers and the arithmetic of formats are pure functions."""

from tersor.quantization.base import CalibrationConfig as CalibrationConfig
from tersor.quantization.base import FakeQuantize as FakeQuantize
from tersor.quantization.base import Quantizer as Quantizer
from tersor.quantization.base import straight_through as straight_through
from tersor.quantization.calibrated import CalibratedQuantizer as CalibratedQuantizer
from tersor.quantization.cut import Cut as Cut
from tersor.quantization.format import Format as Format
from tersor.quantization.lsq import LsqQuantizer as LsqQuantizer
from tersor.quantization.lsq_plus import LsqPlusQuantizer as LsqPlusQuantizer
from tersor.quantization.observers import Latest as Latest
from tersor.quantization.observers import MinMax as MinMax
from tersor.quantization.observers import MovingAverage as MovingAverage
from tersor.quantization.observers import RangeObserver as RangeObserver
from tersor.quantization.qat import QATQuantizer as QATQuantizer
from tersor.quantization.uniform import UniformQuantize as UniformQuantize
