"""Masks to a smaller model: complete, cut, make sizes right, verify."""

from tersor.speedup.attention import NarrowMultiheadAttention as NarrowMultiheadAttention
from tersor.speedup.attention import narrow_attention as narrow_attention
from tersor.speedup.model_speedup import LeftAlone as LeftAlone
from tersor.speedup.model_speedup import ModelSpeedup as ModelSpeedup
from tersor.speedup.model_speedup import SpeedupReport as SpeedupReport
from tersor.speedup.replace import Cut as Cut
from tersor.speedup.replace import replace as replace
from tersor.speedup.resize import size_attributes as size_attributes
