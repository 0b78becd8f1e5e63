"""The six networks of ``benchmarks.deploy``: what they are, what they are calibrated on, and what they are measured by.

EfficientNet-Lite0 and MiniLM have the weights of their packages (``benchmarks/efficientnet.py``,
``benchmarks/language_models.py``). The others are drawn at random, with a fixed seed; the statistics of their batch
norms are those of photographs, so that activations are of a sensible size. What is random says how fast a network is
and how far two ways to compute it are apart, and nothing about accuracy.

All networks for images look at the photographs of ``benchmarks/efficientnet.py``; no photograph is both calibrated on
and tested with. MiniLM is calibrated on the first 128 tokens of news, and tested on other documents and on words,
padded to 128 tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import efficientnet, language_models
from benchmarks.efficientnet import SIZE, halves
from tersor import auto_set_dependency_group_ids
from tersor.pruning import L1NormPruner
from tersor.speedup import ModelSpeedup
from tests.torchvision_stub import import_torchvision

with contextlib.suppress(pytest.skip.Exception):
    import_torchvision()  # timm and Transformers import it where it is installed

Inputs = tuple[Tensor, ...]
Call = Callable[..., Tensor]
"""From a network's inputs to its output."""

BATCHES = (1, 16)
TESTED = 32
"""Samples on which outputs are compared."""
TOKENS = 128
DOCUMENTS = 64
"""For one calibration of MiniLM."""


@dataclass(frozen=True)
class Network:
    """A network and its data.

    Attributes:
        title: for the page.
        build: the network in eval mode; the same at each call.
        calibration: inputs to calibrate on, one sample or a few at a time, drawn with a seed; ``half`` is the half of
            the photographs that is looked at.
        tests: inputs to compare outputs on, 16 samples at a time.
        measure: figures of accuracy; None where the weights are random.
        attends: whether it has attention.
        classifies: whether its largest output is an answer.
        channels: whether there is a version with half the channels.
    """

    title: str
    build: Callable[[], nn.Module]
    calibration: Callable[[int, int], list[Inputs]]
    tests: Callable[[], list[Inputs]]
    measure: Callable[[Call, int, int], dict[str, Any]] | None = None
    attends: bool = False
    classifies: bool = True
    channels: bool = False

    def example(self, batch: int) -> Inputs:
        """Real inputs, so many samples."""
        return tuple(value[:batch].clone() for value in self.tests()[0])


# Photographs


@cache
def _halves(seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return halves(seed)


def crops(seed: int, half: int) -> list[Inputs]:
    """Four random squares of each photograph of one half, four at a time."""
    return [(images,) for images in _halves(seed)[half][0].split(4)]


def unseen(count: int = TESTED) -> list[Inputs]:
    """Views of the photographs that the first half's calibration has not seen, from all of them alike."""
    views = _halves(0)[0][1]
    return [(images.contiguous(),) for images in views[:: len(views) // count][:count].split(max(BATCHES))]


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """The same network in eval mode, with the statistics that its batch norms have on photographs."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all that it sees
    model.train()
    for images in _halves(0)[0][0].split(17):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def torchvision_model(name: str) -> nn.Module:
    """One of torchvision's networks, drawn at random."""
    torch.manual_seed(0)
    return settled(import_torchvision().models.get_model(name, weights=None))


def half_the_channels(model: nn.Module) -> nn.Module:
    """The network without half of the channels of every layer, made small."""
    example = torch.randn(2, 3, SIZE, SIZE)
    config_list = auto_set_dependency_group_ids(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}], example)
    pruner = L1NormPruner(model, config_list, example_inputs=example)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, example, masks).speedup_model()
    return settled(model)


def vit_tiny() -> nn.Module:
    """Timm's ViT-Tiny with patches of 16, drawn at random."""
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()


def efficientnet_lite0() -> nn.Module:
    """With its ImageNet weights."""
    model = copy.deepcopy(efficientnet.trained_model())
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model


@torch.no_grad()
def agreement_with_fp32(call: Call, seed: int, half: int) -> dict[str, Any]:
    """How often the answer is that of the network in fp32, over the views of the half that was not calibrated on."""
    _, views, labels = _halves(seed)[half]
    answers = by_sixteen(call, (views,)).argmax(1)
    exact = _answers(seed, half)
    known = labels >= 0
    return {
        "views": len(views),
        "agreeing": int((answers == exact).sum()),
        "known": int(known.sum()),
        "right": int((answers == labels)[known].sum()),
    }


@cache
def _answers(seed: int, half: int) -> Tensor:
    model = efficientnet_lite0()
    with torch.no_grad():
        return torch.cat([model(images) for images in _halves(seed)[half][1].split(16)]).argmax(1)


def padded(inputs: Inputs) -> Iterator[Inputs]:
    """16 samples at a time, the last ones filled up with zeros: artefacts have a fixed batch size."""
    for parts in zip(*(value.split(max(BATCHES)) for value in inputs), strict=True):
        missing = max(BATCHES) - len(parts[0])
        yield tuple(torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in parts)


def by_sixteen(call: Call, inputs: Inputs) -> Tensor:
    """The outputs of any number of samples."""
    with torch.no_grad():
        return torch.cat([call(*part).clone() for part in padded(inputs)])[: len(inputs[0])]


# Texts


class Encoder(nn.Module):
    """MiniLM from token numbers and a mask to the states of the last layer; sentence embeddings use no pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.bert: Any = language_models.load_minilm()
        self.bert.pooler = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The states, shape (batch, tokens, width)."""
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def encoded(texts: list[str]) -> Inputs:
    """Token numbers and mask, each text cut or padded to 128 tokens."""
    ids, mask = np.zeros((2, len(texts), TOKENS), dtype=np.int64)
    for row, one in enumerate(language_models.minilm_tokenizer().encode_batch(texts)):
        length = min(sum(one.attention_mask), TOKENS)
        ids[row, :length], mask[row, :length] = one.ids[:length], 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def news(seed: int, half: int) -> list[Inputs]:
    """The beginnings of 64 documents of the background that have 128 tokens or more: padding would count as data."""
    del half  # there are no halves: Lee's documents are no part of the background
    ids, mask = encoded(language_models.lines("lee_background.cor"))
    full = torch.nonzero(mask.all(1)).flatten().numpy()
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(full)[:DOCUMENTS])
    return list(zip(ids[chosen].split(4), mask[chosen].split(4), strict=True))


def lee() -> list[Inputs]:
    """The first 32 of Lee's documents."""
    inputs = encoded(language_models.lines("lee.cor")[:TESTED])
    return list(zip(*(value.split(max(BATCHES)) for value in inputs), strict=True))


def likeness(call: Call, seed: int, half: int) -> dict[str, Any]:
    """Correlations with people's judgement; see ``benchmarks/language_models.py``."""
    del seed, half

    class States:
        """What ``measure_minilm`` calls."""

        def __init__(self, states: Tensor) -> None:
            self.last_hidden_state = states

    def model(input_ids: Tensor, attention_mask: Tensor) -> States:
        width = input_ids.shape[1]
        longer = tuple(nn.functional.pad(value, (0, TOKENS - width)) for value in (input_ids, attention_mask))
        return States(by_sixteen(call, longer)[:, :width])

    return {name: round(value, 5) for name, value in language_models.measure_minilm(model).items()}  # pyright: ignore


NETWORKS = {
    "resnet18": Network("ResNet-18", lambda: torchvision_model("resnet18"), crops, unseen),
    "resnet50": Network("ResNet-50", lambda: torchvision_model("resnet50"), crops, unseen, channels=True),
    "mobilenet_v2": Network("MobileNetV2", lambda: torchvision_model("mobilenet_v2"), crops, unseen),
    "efficientnet_lite0": Network("EfficientNet-Lite0", efficientnet_lite0, crops, unseen, measure=agreement_with_fp32),
    "vit_tiny": Network("ViT-Tiny", vit_tiny, crops, unseen, attends=True),
    "minilm": Network("MiniLM-L6", Encoder, news, lee, measure=likeness, attends=True, classifies=False),
}
