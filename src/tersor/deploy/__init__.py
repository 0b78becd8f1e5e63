"""Models for inference engines."""

from tersor.deploy.audit import AuditLine as AuditLine
from tersor.deploy.audit import audit as audit
from tersor.deploy.compiled import CompiledModel as CompiledModel
from tersor.deploy.engine_targets import engine_config as engine_config
from tersor.deploy.engines import engines as engines
from tersor.deploy.onnx import check_onnx as check_onnx
from tersor.deploy.onnx import export_onnx as export_onnx
from tersor.deploy.onnx import require_onnx as require_onnx
from tersor.deploy.operator_changes import compare_operators as compare_operators
from tersor.deploy.plain import Plain as Plain
from tersor.deploy.plain import plain_copy as plain_copy
from tersor.deploy.plain import plain_of as plain_of
from tersor.deploy.post_training import post_training as post_training
from tersor.deploy.quantization_speedup import QuantizationSpeedup as QuantizationSpeedup
from tersor.deploy.record import Deployment as Deployment
from tersor.deploy.record import DeployReport as DeployReport
from tersor.deploy.record import read_deployment as read_deployment
from tersor.deploy.side_by_side import SideBySide as SideBySide
from tersor.deploy.side_by_side import side_by_side as side_by_side
from tersor.deploy.small import make_small as make_small
from tersor.deploy.smaller import slower_layers as slower_layers
from tersor.deploy.weight_only import WeightReport as WeightReport
from tersor.deploy.weight_only import save_compressed_tensors as save_compressed_tensors
from tersor.deploy.weight_only import save_gguf as save_gguf
