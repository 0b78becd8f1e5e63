"""Rows of ``benchmarks.pruning`` for other tools: Torch-Pruning 1.6.1 and NNI 3.0, each where it is installed.

Torch-Pruning makes its small models itself; a layer that it would empty it leaves alone. NNI's speedup does not run on
current PyTorch (the row ``NNI 3.0 ModelSpeedup`` holds its error), but its pruners do: their masks, with the dependency
groups that NNI found, are cut out by Tersor's speedup, which removes what they mask and nothing else.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.pruning_rows import LEARNING_RATE, LOOKS, MOST, STEPS, Cut, Method, Task
from tersor.speedup import ModelSpeedup


def torch_pruning(
    importance: Callable[[], Any],
    says: str,
    *,
    together: bool = False,
    isomorphic: bool = False,
    gradients: bool = False,
    sparse_learning: bool = False,
) -> Method:
    """A row for Torch-Pruning.

    Args:
        importance: makes its importance.
        says: what that is.
        together: global ranking.
        isomorphic: ranking within isomorphic substructures.
        gradients: it wants those of the loss in ``.grad``: their sum over some batches.
        sparse_learning: train with the penalty of its ``GroupNormPruner`` first.
    """

    def pruner_of(model: nn.Module, task: Task, ratio: float, **options: Any) -> Any:
        import torch_pruning as tp

        pruner_class = tp.pruner.GroupNormPruner if sparse_learning else tp.pruner.BasePruner
        return pruner_class(
            model,
            task.example,
            importance=importance(),
            pruning_ratio=ratio,
            max_pruning_ratio=MOST,
            global_pruning=together or isomorphic,
            isomorphic=isomorphic,
            ignored_layers=[model.get_submodule(task.classifier)],
            in_channel_groups={},  # the default is one dict for all pruners, and is written into
            out_channel_groups={},
            num_heads={},
            **options,
        )

    def prepare(task: Task) -> Cut:
        trained = task.copy()
        if sparse_learning:
            _learn_sparsely(pruner_of(trained, task, 0.5, reg=1e-3), trained, task)
        if gradients:
            for images, labels in task.batches(LOOKS):
                F.cross_entropy(trained(images), labels).backward()

        def cut(ratio: float) -> nn.Module:
            torch.manual_seed(task.seed)
            small = copy.deepcopy(trained)
            for parameter, original in zip(small.parameters(), trained.parameters(), strict=True):
                parameter.grad = None if original.grad is None else original.grad.clone()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruner_of(small, task, ratio).step()
            return small

        return cut

    ranking = "isomorphic ranking" if isomorphic else "global ranking" if together else "the same ratio in each layer"
    says = f"torch-pruning {says}; {ranking}, at most {MOST:.0%} of a layer"
    says += f"; gradients of {LOOKS} batches" if gradients else ""
    return Method(prepare, says + (f"; {STEPS} training steps with its penalty" if sparse_learning else ""))


def _learn_sparsely(pruner: Any, model: nn.Module, task: Task) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    pruner.update_regularizer()
    model.train()
    for images, labels in task.batches(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        pruner.regularize(model)
        optimizer.step()
    model.eval()


def _torch_pruning_rows() -> dict[str, Method]:
    import torch_pruning as tp

    importance = tp.importance
    return {
        "Torch-Pruning Random": torch_pruning(importance.RandomImportance, "RandomImportance"),
        "Torch-Pruning L1": torch_pruning(lambda: importance.MagnitudeImportance(p=1), "MagnitudeImportance, p=1"),
        "Torch-Pruning L2": torch_pruning(lambda: importance.MagnitudeImportance(p=2), "MagnitudeImportance, p=2"),
        "Torch-Pruning FPGM": torch_pruning(importance.FPGMImportance, "FPGMImportance"),
        "Torch-Pruning Taylor": torch_pruning(importance.TaylorImportance, "TaylorImportance", gradients=True),
        "Torch-Pruning L2, global": torch_pruning(
            lambda: importance.MagnitudeImportance(p=2), "MagnitudeImportance, p=2", together=True
        ),
        "Torch-Pruning Taylor, global": torch_pruning(
            importance.TaylorImportance, "TaylorImportance", together=True, gradients=True
        ),
        "Torch-Pruning Taylor, isomorphic": torch_pruning(
            importance.TaylorImportance, "TaylorImportance", isomorphic=True, gradients=True
        ),
        "Torch-Pruning GroupNorm": torch_pruning(
            lambda: importance.MagnitudeImportance(p=2), "GroupNormPruner", together=True, sparse_learning=True
        ),
    }


def nni(name: str, steps: int = 0) -> Method:
    """A row for a pruner of NNI: its masks, cut out by Tersor's speedup.

    Args:
        name: of the class.
        steps: its ``training_steps``, where it wants an evaluator.
    """

    def prepare(task: Task) -> Cut:
        def cut(ratio: float) -> nn.Module:
            model, masks = _nni_masks(name, task, ratio, steps)
            return ModelSpeedup(model, task.example, masks).speedup_model()

        return cut

    says = f"nni {name}, NNI's dependency groups; the same ratio in each layer; its masks cut out by tersor's speedup"
    return Method(prepare, says + (f"; training_steps={steps}" if steps else ""), like="L1")


def _nni_masks(name: str, task: Task, ratio: float, steps: int = 0) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The network with the weights that NNI's pruner leaves, and its masks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nni as package
        from nni.compression import TorchEvaluator, pruning
        from nni.compression.utils import auto_set_denpendency_group_ids

    logging.getLogger("nni").setLevel(logging.ERROR)
    asked = {"op_types": ["Conv2d", "Linear"], "exclude_op_names": [task.classifier], "sparse_ratio": ratio}
    config_list = auto_set_denpendency_group_ids(task.copy(), [asked], task.example)
    model = task.copy()
    arguments: dict[str, Any] = {}
    if steps:
        optimizer = package.trace(torch.optim.AdamW)(model.parameters(), lr=LEARNING_RATE)
        evaluator = TorchEvaluator(
            _training(task), optimizer, lambda batch, net: F.cross_entropy(net(batch[0]), batch[1])
        )
        arguments = {"evaluator": evaluator, "training_steps": steps}
    pruner = getattr(pruning, name)(model, config_list, **arguments)
    _, masks = pruner.compress(None, None) if steps else pruner.compress()
    pruner.unwrap_model()
    plain = task.copy()
    plain.load_state_dict(model.state_dict())
    return plain, {
        module: {target: mask for target, mask in own.items() if mask is not None} for module, own in masks.items()
    }


def _training(task: Task) -> Callable[..., None]:
    """A training function in NNI's form."""

    def train(model: Any, optimizer: Any, step: Any, _schedulers: Any, max_steps: int, _epochs: Any) -> None:
        for batch in task.batches(max_steps):
            optimizer.zero_grad()
            step(batch, model).backward()
            optimizer.step()

    return train


def _nni_speedup(task: Task) -> Cut:
    """NNI's own way to a small model."""

    def cut(ratio: float) -> nn.Module:
        model, masks = _nni_masks("L1NormPruner", task, ratio)
        from nni.compression.speedup import ModelSpeedup as NNIModelSpeedup

        return NNIModelSpeedup(model, task.example, masks).speedup_model()

    return cut


def _nni_rows() -> dict[str, Method]:
    return {
        "NNI 3.0 L1": nni("L1NormPruner"),
        "NNI 3.0 L2": nni("L2NormPruner"),
        "NNI 3.0 FPGM": nni("FPGMPruner"),
        "NNI 3.0 Taylor": nni("TaylorPruner", LOOKS),
        "NNI 3.0 Slim": nni("SlimPruner", STEPS),
        "NNI 3.0 ModelSpeedup": Method(_nni_speedup, "nni L1NormPruner and nni's own ModelSpeedup", like="L1"),
    }


PEERS: dict[str, Method] = {
    **(_torch_pruning_rows() if find_spec("torch_pruning") else {}),
    **(_nni_rows() if find_spec("nni") else {}),
}
"""The rows of the peers that are installed."""
