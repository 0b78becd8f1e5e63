"""Weights of a few bits in the files of others: compressed-tensors checkpoints, and GGUF."""

from tersor.deploy.weight_only.compressed_tensors import save_compressed_tensors as save_compressed_tensors
from tersor.deploy.weight_only.gguf import save_gguf as save_gguf
from tersor.deploy.weight_only.source import WeightReport as WeightReport
