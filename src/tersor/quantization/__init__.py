"""Quantizers, one file an algorithm; observers and affine arithmetic are pure functions."""

from tersor.quantization.base import CalibrationConfig as CalibrationConfig
from tersor.quantization.base import FakeQuantize as FakeQuantize
from tersor.quantization.base import Quantizer as Quantizer
from tersor.quantization.base import straight_through as straight_through
