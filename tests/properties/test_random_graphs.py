"""Random graphs of the supported operators, random masks: what the masked model computes, the small one computes.

100 graphs by default; ``TERSOR_EXAMPLES=2000`` tries as many as it says.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from torch import Tensor, nn

from tersor.errors import EmptyLayerError
from tersor.graph import groups
from tersor.speedup import ModelSpeedup
from tests.properties.graphs import BINARY, UNARY, Network, Program, Step, normal, programs

EXAMPLES = int(os.environ.get("TERSOR_EXAMPLES", "100"))
RATIOS = (0.5, 0.3, 0.8)
VARIANTS = max(3, EXAMPLES // 100)
"""Of each word on its own."""
EXACT = 1e-9

thorough = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def the_same_programs_whatever_is_imported(monkeypatch):
    """One number in twenty is drawn from those in the source of all modules that are imported by then: not here."""
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)
    monkeypatch.setattr(providers, "CONSTANTS_CACHE", type(providers.CONSTANTS_CACHE)(1024))


def masked(model: nn.Module, factors: Mapping[str, Mapping[str, Sequence[Tensor]]]) -> nn.Module:
    """A copy of the model whose parameters are multiplied by their masks, and nothing else."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module, targets in factors.items():
            for target, several in targets.items():
                for factor in several:
                    getattr(model.get_submodule(module), target).mul_(factor)
    return model


def arbitrary_masks(model: nn.Module, seed: int) -> dict[str, dict[str, Tensor]]:
    """Masks that follow no groups: random indices of random dimensions, and now and then single elements."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    masks: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        dims = [dim for dim, size in enumerate(parameter.shape) if size > 1]
        if not dims or draw.random() < 0.5:
            continue
        dim = draw.choice([dims[0], *dims])
        size = parameter.shape[dim]
        vector = torch.ones(size, dtype=torch.bool)
        vector[draw.sample(range(size), draw.randint(1, max(1, size // 2)))] = False
        mask = vector.view([-1 if d == dim else 1 for d in range(parameter.dim())])
        if draw.random() < 0.3:
            mask = mask & (torch.rand(parameter.shape, generator=generator) > 0.2)
        module, _, target = name.rpartition(".")
        masks.setdefault(module, {})[target] = mask
    return masks


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(x.clone()).values())


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest value."""
    assert [a.shape for a in actual] == [b.shape for b in expected]
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in zip(actual, expected, strict=True)
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def removed_share(program: Program, ratio: float | None, seed: int, **options: Any) -> float | None:
    """Check one program; how much of the model was removed, or None where its constants could not all be folded.

    Args:
        program: what to check.
        ratio: of the choices of each group, or None for masks that follow no groups.
        seed: of the masks and the inputs.
        options: of the speedup.
    """
    model = Network(program)
    before, fresh = state(model), normal((program.batch + 2, *model.example.shape[1:]), seed=seed + 1)
    whole, original = copy.deepcopy(model), outputs(model, fresh)
    coupling = groups(model, model.example)
    masks = arbitrary_masks(model, seed) if ratio is None else coupling.random_masks(ratio, seed)
    speedup = ModelSpeedup(model, coupling if seed % 2 else model.example, masks, **options)
    assert unchanged(model, before)
    assert error(outputs(model, fresh), original) == 0
    try:
        complete = coupling.complete(masks)
    except EmptyLayerError:
        assert ratio is None
        with pytest.raises(EmptyLayerError):
            speedup.speedup_model()
        assert unchanged(model, before)
        return 0.0
    small = speedup.speedup_model()
    assert not small.training
    if options.get("constants") == "fold":
        if speedup.report.not_folded:
            return None
        complete = {module: {target: [mask] for target, mask in targets.items()} for module, targets in masks.items()}
    assert error(outputs(small, fresh), outputs(masked(whole, complete), fresh)) < EXACT
    return 1 - size(small) / size(whole)


def shares_of(ratios: Sequence[float | None], **options: Any) -> list[float | None]:
    """What was removed of each example."""
    shares: list[float | None] = []

    @thorough
    @given(programs(), st.sampled_from(ratios), st.integers(0, 99))
    def small_equals_masked(program: Program, ratio: float | None, seed: int) -> None:
        shares.append(removed_share(program, ratio, seed, **options))

    small_equals_masked()
    return shares


@pytest.mark.parametrize("word", [*UNARY, *BINARY])
@pytest.mark.filterwarnings("ignore:Sizes stand in the code", "ignore:Left alone, for each")
def test_each_word_behind_values_that_are_not_zero_at_zero(word):
    """A removed channel holds a half or a one here: whatever the word spreads of it shows."""
    shares: list[float] = []
    start, writer = ("image", "image.conv") if word.startswith("image") else ("tokens", "tokens.linear")
    for seed in range(VARIANTS):
        draw = random.Random(f"{word} {seed}")
        numbers = tuple(draw.randrange(12) for _ in range(8))
        steps = (Step(writer, numbers=numbers[-1:]), Step(draw.choice(("sigmoid", "cos"))), Step(word, numbers=numbers))
        program = Program(start, steps, seed)
        if word in Network(program).words[2:]:
            shares.append(removed_share(program, draw.choice(RATIOS), seed))
    assert shares, "the word was never built"


@pytest.mark.filterwarnings("ignore:Sizes stand in the code", "ignore:Left alone, for each")
def test_masks_that_follow_the_groups():
    shares = shares_of(RATIOS)
    assert sum(share > 0 for share in shares) > 0.5 * len(shares)
    assert sum(shares) > 0.2 * len(shares)


@pytest.mark.filterwarnings("ignore:Sizes stand in the code", "ignore:Left alone, for each")
def test_masks_that_follow_nothing():
    shares = shares_of([None])
    assert sum(share > 0 for share in shares) > 0.2 * len(shares)


@pytest.mark.filterwarnings("ignore:Sizes stand in the code", "ignore:Left alone, for each")
def test_channels_in_multiples():
    shares = shares_of(RATIOS, round_to=2)
    assert sum(share > 0 for share in shares) > 0.4 * len(shares)


@pytest.mark.filterwarnings("ignore:Sizes stand in the code", "ignore:Left alone, for each")
def test_folded_constants():
    """Where all are folded, the small model is the model under the given masks alone, shifts and all."""
    shares = shares_of(RATIOS, constants="fold")
    folded = [share for share in shares if share is not None]
    assert len(folded) > 0.3 * len(shares)
    assert sum(share > 0 for share in folded) > 0.3 * len(folded)


FOUND = {
    "heads as a literal, and attention so even that the wrong heads hardly show": (
        Program("tokens", (Step("tokens.experts"), Step("tokens.attention", numbers=(7, 0, 0, 7))), 1), 0.5, 13, {}
    ),
    "as many heads as channels in each, and a step that hides which of the two was made smaller": (
        Program("tokens", (Step("tokens.attention", numbers=(0, 5, 11, 0, 2)), Step("where")), 1, 1), 0.5, 77, {}
    ),
    "rotations": (Program("vector", (Step("tokens.attention", numbers=(0, 0, 0, 0, 0, 0, 3)),)), 0.5, 9, {}),
    "copies one behind the other": (Program("image", (Step("image.interleaved"),)), 0.5, 0, {}),
    "queries that share a key": (
        Program("tokens", (Step("tokens.cross_attention", numbers=(0, 0, 0, 0, 0, 1)),)), 0.5, 85, {}
    ),
    "a single head": (Program("tokens", (Step("tokens.multihead", numbers=(5,)),)), 0.8, 4, {}),
    "a look-up by values of channels": (
        Program("tokens", (Step("tokens.linear"), Step("sigmoid"), Step("tokens.embedded")), 1), 0.5, 0, {}
    ),
    "a norm without parameters behind a literal": (
        Program(
            "image",
            (Step("image.conv"), Step("tokens.heads_norm"), Step("image.group_norm", numbers=(0, 1, 11))),
        ), 0.8, 40, {}
    ),
    "a norm shared by two widths": (
        Program("image", (Step("image.group_norm", numbers=(0, 0, 7)), Step("cat"), Step("again"))), 0.3, 88, {}
    ),
    "a constant read by a computed weight": (
        Program("tokens", (Step("tokens.linear"), Step("tokens.matmul_computed"))), 0.3, 76, {"constants": "fold"}
    ),
    "a constant in a sum over channels": (
        Program("tokens", (Step("tokens.linear"), Step("relu"), Step("gated_by_all"))), 0.3, 2, {"constants": "fold"}
    ),
}  # fmt: skip
"""Programs that once came out wrong."""


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.filterwarnings("ignore:Sizes stand in the code", "ignore:Left alone, for each")
def test_found(name):
    program, ratio, seed, options = FOUND[name]
    share = removed_share(program, ratio, seed, **options)
    assert share is None or 0 <= share < 1
