"""Models for inference engines."""

from tersor.deploy.compiled import CompiledModel as CompiledModel
from tersor.deploy.compiled import DeployReport as DeployReport
from tersor.deploy.engine_targets import engine_config as engine_config
from tersor.deploy.engines import engines as engines
from tersor.deploy.onnx import check_onnx as check_onnx
from tersor.deploy.onnx import export_onnx as export_onnx
from tersor.deploy.onnx import require_onnx as require_onnx
from tersor.deploy.quantization_speedup import QuantizationSpeedup as QuantizationSpeedup
