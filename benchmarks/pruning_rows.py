"""What ``benchmarks.pruning`` compares, and how a pruner of Tersor gets a row there: by a line in `PRUNERS`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from examples.mnist import Batches, Data
from tersor.pruning import (
    ActivationAPoZRankPruner,
    ActivationMeanRankPruner,
    ADMMPruner,
    FPGMPruner,
    GroupNormPruner,
    L1NormPruner,
    L2NormPruner,
    MovementPruner,
    OBSPruner,
    Pruner,
    RandomPruner,
    SlimPruner,
    TaylorPruner,
)
from tersor.speedup import ModelSpeedup
from tersor.training import TorchEvaluator

LOOKS = 20
"""Batches that a pruner looks at which needs gradients or activations."""
STEPS = 100
"""Training steps of a pruner that trains."""
LEARNING_RATE = 1e-3
"""Of that training."""
MOST = 0.98
"""No layer loses more than this share, however little it scores beside the others."""

Cut = Callable[[float], nn.Module]
"""From a ratio to the small model, with its weights: the larger the ratio, the smaller."""


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network to cut and the data that a pruner may look at, in an order that depends on the seed."""

    model: nn.Module
    classifier: str
    data: Data
    seed: int

    @property
    def example(self) -> Tensor:
        """A few images, to trace with."""
        return self.data.example_input[:4]

    def copy(self) -> nn.Module:
        """A copy of the network; also starts the random numbers of the seed."""
        torch.manual_seed(self.seed)
        return copy.deepcopy(self.model)

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """As many training batches."""
        torch.manual_seed(self.seed)
        return [batch for batch, _ in zip(self.data.train, range(count), strict=False)]


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        prepare: does once what is the same for all ratios (gathers data, trains), and returns how to cut.
        says: what was run, for the reader of the results.
        like: the method that leaves layers as wide at the same ratio and is cheaper: ratios are searched with that.
    """

    prepare: Callable[[Task], Cut]
    says: str
    like: str | None = None


def ours(
    pruner_class: Callable[..., Pruner],
    *,
    together: bool = False,
    isomorphic: bool = False,
    relative: bool = True,
    calibrated: bool = False,
    norms: bool = False,
    steps: int | None = None,
    anew: bool = False,
    seeded: bool = False,
    **options: Any,
) -> Method:
    """A row for a pruner of Tersor.

    Args:
        pruner_class: the class.
        together: rank the channels of all layers in one global group; otherwise each layer loses the same share.
        isomorphic: rank the channels of layers that are built alike together.
        relative: such a ranking is one of scores relative to their layer's mean; else of the scores as they are.
        calibrated: it takes ``calibration``.
        norms: decide on the scales of batch norms, where the network has any.
        steps: the length of training that ``compress`` is given; None for none.
        anew: what the pruner trains depends on the ratio, so it starts again for each.
        seeded: it takes the ``seed``.
        **options: of the pruner itself.
    """

    def prepare(task: Task) -> Cut:
        def compressed(ratio: float) -> Pruner:
            model = task.copy()
            pruner = pruner_class(
                model,
                _config_list(
                    model, task, ratio, together=together, isomorphic=isomorphic, relative=relative, norms=norms
                ),
                _evaluator(model, task.data.train),
                example_inputs=task.example,
                **options,
                **({"seed": task.seed} if seeded else {}),
                **({"calibration": task.batches(LOOKS)} if calibrated else {}),
            )
            pruner.compress(max_steps=steps)
            return pruner

        once = None if anew else compressed(0.5)

        def cut(ratio: float) -> nn.Module:
            if once is None:
                pruner = compressed(ratio)
            else:
                torch.manual_seed(task.seed)
                pruner = once
                pruner.prune(lambda asked, _, setting="", /: asked if setting == "max_sparse_ratio" else ratio)
            masks = pruner.get_masks()
            model = copy.deepcopy(pruner.unwrap_model())
            pruner.wrap_model()
            return ModelSpeedup(model, task.example, masks).speedup_model()

        return cut

    named = "".join(f", {name}={value!r}" for name, value in options.items())
    ranking = "isomorphic" if isomorphic else "global" if together else ""
    shares = f"{ranking} ranking{', relative to layer means' if relative else ''}; at most {MOST:.0%} of a layer"
    says = f"tersor {getattr(pruner_class, '__name__', pruner_class)}{named}; "
    says += shares if ranking else "the same ratio in each layer"
    says += "; by the scales of batch norms, where there are any" if norms else ""
    says += f"; {LOOKS} calibration batches" if calibrated else ""
    says += "" if steps is None else f"; {steps} training steps"
    uniform = not (together or isomorphic)
    return Method(prepare, says, "L1" if uniform and pruner_class is not L1NormPruner else None)


def _config_list(
    model: nn.Module, task: Task, ratio: float, *, together: bool, isomorphic: bool, relative: bool, norms: bool
) -> list[Any]:
    """All convolutions and linear layers but the classifier; what is added or concatenated is decided as one."""
    norms = norms and any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    asked: dict[str, Any] = {"op_types": ["BatchNorm2d"] if norms else ["Conv2d", "Linear"], "sparse_ratio": ratio}
    if together or isomorphic:
        asked |= {"max_sparse_ratio": MOST, **({"global_normalize": "mean"} if relative else {})}
    if together:
        asked |= {"global_group_id": "all"}
    config_list = [asked] if norms else [asked, {"op_names": [task.classifier], "exclude": True}]
    config_list = tersor.auto_set_dependency_group_ids(model, config_list, task.example)
    return tersor.auto_set_isomorphic_group_ids(model, config_list, task.example) if isomorphic else config_list


def _evaluator(model: nn.Module, loader: Batches) -> TorchEvaluator:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    return TorchEvaluator.from_loader(loader, F.cross_entropy, optimizer, progress=False)


PRUNERS: dict[str, Method] = {
    "Random": ours(RandomPruner, seeded=True),
    "L1": ours(L1NormPruner),
    "L2": ours(L2NormPruner),
    "FPGM": ours(FPGMPruner),
    "Taylor": ours(TaylorPruner, training_steps=LOOKS),
    "APoZ": ours(ActivationAPoZRankPruner, training_steps=LOOKS),
    "Mean rank": ours(ActivationMeanRankPruner, training_steps=LOOKS),
    "ADMM": ours(
        ADMMPruner, anew=True, iterations=4, training_steps=STEPS // 4, granularity="coarse-grained", rho=1e-2
    ),
    "Slim": ours(SlimPruner, norms=True, training_steps=STEPS),
    "Movement": ours(MovementPruner, anew=True, steps=STEPS, warmup_step=10, cooldown_begin_step=STEPS - 20),
    "Group norm": ours(GroupNormPruner),
    "OBS": ours(OBSPruner, anew=True, calibrated=True),
    "L1, global": ours(L1NormPruner, together=True),
    "L2, global": ours(L2NormPruner, together=True),
    "Taylor, global": ours(TaylorPruner, together=True, training_steps=LOOKS),
    "OBS, global": ours(OBSPruner, together=True, relative=False, anew=True, calibrated=True),
    "Group norm, global": ours(GroupNormPruner, together=True),
    "Group norm, isomorphic": ours(GroupNormPruner, isomorphic=True),
}
