"""Tersor compresses PyTorch models for real: it prunes, quantizes and distils, then makes them smaller and faster."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tersor import distillation as distillation
from tersor import graph as graph
from tersor import pruning as pruning
from tersor import quantization as quantization
from tersor import speedup as speedup
from tersor import training as training
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
from tersor.wrapping import gather_model as gather_model

if TYPE_CHECKING:
    from tersor.training import AccelerateEvaluator as AccelerateEvaluator
    from tersor.training import DeepspeedTorchEvaluator as DeepspeedTorchEvaluator
    from tersor.training import LightningEvaluator as LightningEvaluator
    from tersor.training import TransformersEvaluator as TransformersEvaluator

__version__ = version("tersor")


def __getattr__(name: str) -> Any:
    """Evaluators that need an optional package, imported when they are first asked for."""
    if name in training.OPTIONAL:
        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
