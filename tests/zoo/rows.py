"""What a row of the zoo is: an architecture with random weights and the inputs that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Row:
    """One architecture.

    Attributes:
        name: unique, for example ``torchvision/resnet18``.
        source: ``torchvision``, ``timm``, ``transformers`` or ``hard``.
        family: what kind it is; the sample in the test suite is balanced over families.
        build: makes the model with random weights, without any download; the caller seeds torch before.
        inputs: makes example inputs of batch size 2: a tensor, a tuple of arguments or a mapping of keyword arguments.
        in_sample: whether the row is checked by the test suite; the others by ``make zoo`` only.
    """

    name: str
    source: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    in_sample: bool = False
