"""What conformance suites look at and compare: masks, values, hooks, outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tersor.pruning import Pruner
from tersor.speedup.verify import outputs_of, relative_error
from tersor.targets.planned import PlannedTarget

Masks = dict[str, dict[str, Tensor]]


def decided(pruner: Pruner) -> list[PlannedTarget]:
    """The targets that a pruner makes masks for by itself."""
    return [target for target in pruner.plan.targets if target.decides]


def elements_of(ratio: float, target: PlannedTarget) -> int:
    """How many elements a ratio removes: whole blocks, rounded down, in each of the parts that lose equally many."""
    assert target.blocks is not None
    blocks = math.floor(ratio * (target.blocks.count // target.parts) + 1e-6)  # 0.29 * 100 is less than 29
    return blocks * target.parts * target.blocks.block_numel


def mask_of(masks: Masks, target: PlannedTarget) -> Tensor:
    """A target's mask; all true where it has none."""
    shape = getattr(target.config.module, target.config.target_name).shape
    whole = torch.ones(shape, dtype=torch.bool)
    return masks.get(target.config.module_name, {}).get(target.config.target_name, whole)


def removed(mask: Tensor) -> int:
    """How many elements a mask removes.

    >>> removed(torch.tensor([1.0, 0.0, 0.0]))
    2
    """
    return int((~mask.bool()).sum())


def flat(masks: Masks) -> dict[str, Tensor]:
    """Copies of masks, by ``module.target``."""
    return {f"{module}.{name}": mask.clone() for module, targets in masks.items() for name, mask in targets.items()}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def hooks_of(model: nn.Module) -> list[tuple[str, object]]:
    """Every hook on every module, with the module's name."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    named = [(name, getattr(module, kind)) for name, module in model.named_modules() for kind in kinds]
    return [(name, hook) for name, hooks in named for hook in hooks.values()]


def assert_exact(pruner: Pruner, ratio: float) -> None:
    """Each target has lost what a ratio comes to, and no element more or less."""
    masks = pruner.get_masks()
    for target in decided(pruner):
        mask, asked = mask_of(masks, target), elements_of(ratio, target)
        assert mask.dtype is torch.bool, f"the mask of {target.name} is of {mask.dtype}"
        gone, all_of_it = removed(mask), mask.numel()
        assert gone == asked, f"{gone} of {all_of_it} elements of {target.name} are masked; {asked} were asked for"


def assert_zero_where_masked(pruner: Pruner) -> None:
    """What is simulated is exactly zero where it is masked, and nowhere else."""
    masks = pruner.get_masks(completed=True)
    for target in decided(pruner):
        value, mask = getattr(target.config.module, target.config.target_name), mask_of(masks, target)
        assert not bool(value[~mask].any()), f"{target.name} is not zero where it is masked"
        assert bool(value[mask].all()), f"{target.name} is zero where it is not masked"


def assert_same_outputs(model: nn.Module, inputs: Tensor, expected: list[Tensor], tolerance: float, what: str) -> None:
    """A model's outputs are what is expected, up to a share of the largest."""
    error = relative_error(outputs_of(model, inputs), expected)
    assert error <= tolerance, f"{what}: they differ by {error:.2g} of the largest"


def assert_equal(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], when: str) -> None:
    """The same names, and under each the same bits."""
    assert expected.keys() == found.keys(), f"others are there {when}: {sorted(expected.keys() ^ found.keys())}"
    differing = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert not differing, f"not the same {when}: {', '.join(differing)}"
