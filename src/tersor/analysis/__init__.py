"""What a model costs, and what compression changed: parameters, MACs, file size, memory, latency, and a report."""

from tersor.analysis.compare import Comparison as Comparison
from tersor.analysis.compare import Measurement as Measurement
from tersor.analysis.compare import compare as compare
from tersor.analysis.latency import Latency as Latency
from tersor.analysis.latency import Ratio as Ratio
from tersor.analysis.latency import measure as measure
from tersor.analysis.latency import paired_ratio as paired_ratio
from tersor.analysis.layers import Inspection as Inspection
from tersor.analysis.layers import Layer as Layer
from tersor.analysis.layers import LayerChange as LayerChange
from tersor.analysis.layers import inspect as inspect
from tersor.analysis.macs import Counts as Counts
from tersor.analysis.macs import Uncounted as Uncounted
from tersor.analysis.macs import count as count
from tersor.analysis.memory import file_size as file_size
from tersor.analysis.memory import peak_memory as peak_memory
from tersor.analysis.metrics import Metric as Metric
from tersor.analysis.metrics import si as si

__all__ = [
    "compare",
    "Comparison",
    "Measurement",
    "Metric",
    "count",
    "Counts",
    "Uncounted",
    "inspect",
    "Inspection",
    "Layer",
    "LayerChange",
    "measure",
    "Latency",
    "Ratio",
    "paired_ratio",
    "file_size",
    "peak_memory",
    "si",
]
