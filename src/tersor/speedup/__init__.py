"""Masks to a smaller model: complete, bake, slice, verify."""

from tersor.speedup.model_speedup import LeftAlone as LeftAlone
from tersor.speedup.model_speedup import ModelSpeedup as ModelSpeedup
from tersor.speedup.model_speedup import SpeedupReport as SpeedupReport
from tersor.speedup.resize import size_attributes as size_attributes
