"""How a user's training loop and a compressor work together.

A compressor never owns a loop. It hands an `Evaluator` its `TrainingHooks`; the evaluator runs the user's training and
calls the hooks at every loss and every optimizer step. `TorchEvaluator` does this for plain PyTorch, with the user's
own training function or with a data loader and a loss alone (`TorchEvaluator.from_loader`).
"""

from tersor.training.evaluator import Evaluator, NoHooks, TrainingHooks, TrainingResult, check_limits
from tersor.training.stages import Stage, stages
from tersor.training.torch_evaluator import TorchEvaluator

__all__ = [
    "Evaluator",
    "TorchEvaluator",
    "TrainingHooks",
    "NoHooks",
    "TrainingResult",
    "check_limits",
    "Stage",
    "stages",
]
