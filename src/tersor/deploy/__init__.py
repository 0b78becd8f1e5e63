"""Models for inference engines."""

from tersor.deploy.onnx import check_onnx as check_onnx
from tersor.deploy.onnx import export_onnx as export_onnx
from tersor.deploy.onnx import require_onnx as require_onnx
