"""Tersor compresses PyTorch models for real: it prunes, quantizes and distils, then makes them smaller and faster."""

from importlib.metadata import version

from tersor import distillation as distillation
from tersor import graph as graph
from tersor import pruning as pruning
from tersor import quantization as quantization
from tersor import speedup as speedup
from tersor.analysis import compare as compare
from tersor.checkpoint import load as load
from tersor.checkpoint import save as save
from tersor.compressor import Compressor as Compressor
from tersor.finalize import Finalized as Finalized
from tersor.finalize import finalize as finalize
from tersor.recipe.fusion import compress as compress
from tersor.recipe.fusion import fuse as fuse
from tersor.storage import load_calibration as load_calibration
from tersor.storage import load_masks as load_masks
from tersor.storage import save_calibration as save_calibration
from tersor.storage import save_masks as save_masks
from tersor.targets.dependency import auto_set_dependency_group_ids as auto_set_dependency_group_ids
from tersor.targets.isomorphic import auto_set_isomorphic_group_ids as auto_set_isomorphic_group_ids
from tersor.targets.plan import Plan as Plan
from tersor.targets.plan import plan as plan
from tersor.targets.settings import DistillationSetting as DistillationSetting
from tersor.targets.settings import PruningSetting as PruningSetting
from tersor.targets.settings import QuantizationSetting as QuantizationSetting
from tersor.training import Evaluator as Evaluator
from tersor.training import TorchEvaluator as TorchEvaluator

__version__ = version("tersor")
