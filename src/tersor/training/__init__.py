"""How a user's training loop and a compressor work together.

A compressor never owns a loop. It hands an `Evaluator` its `TrainingHooks`; the evaluator runs the user's training and
calls the hooks at every loss and every optimizer step. `TorchEvaluator` does this for plain PyTorch, with the user's
own training function or with a data loader and a loss alone (`TorchEvaluator.from_loader`). The evaluators for
Lightning, Transformers, Accelerate and DeepSpeed are imported when they are first asked for, and their packages with
them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tersor.training.evaluator import Evaluator, NoHooks, TrainingHooks, TrainingResult, check_limits
from tersor.training.stages import Stage, stages
from tersor.training.torch_evaluator import TorchEvaluator

if TYPE_CHECKING:
    from tersor.training.accelerate import AccelerateEvaluator
    from tersor.training.deepspeed import DeepspeedTorchEvaluator
    from tersor.training.lightning import LightningEvaluator
    from tersor.training.transformers import TransformersEvaluator

OPTIONAL = {
    "AccelerateEvaluator": "tersor.training.accelerate",
    "DeepspeedTorchEvaluator": "tersor.training.deepspeed",
    "LightningEvaluator": "tersor.training.lightning",
    "TransformersEvaluator": "tersor.training.transformers",
}
"""Where the evaluators are that need an optional package."""

__all__ = [
    "Evaluator",
    "TorchEvaluator",
    "LightningEvaluator",
    "TransformersEvaluator",
    "AccelerateEvaluator",
    "DeepspeedTorchEvaluator",
    "TrainingHooks",
    "NoHooks",
    "TrainingResult",
    "check_limits",
    "Stage",
    "stages",
]


def __getattr__(name: str) -> Any:
    """Import an evaluator that needs an optional package; without it a MissingExtraError says which."""
    if name in OPTIONAL:
        return getattr(import_module(OPTIONAL[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
