"""A row's model made ready for a check that can see errors: nothing constant, nothing faded."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tersor.graph.inputs import as_call, copied, named_tensors
from tests.zoo.rows import Row


def seed_all(seed: int) -> None:
    """Seed every generator that a model may draw its weights from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def built(row: Row, seed: int = 0) -> nn.Module:
    """The row's model in eval mode with nothing in it trivially zero or one; the same for the same seed."""
    seed_all(seed)
    model = row.build().eval()
    redraw_constants(model)
    calibrate(model, row.inputs())
    return model


@torch.no_grad()
def redraw_constants(model: nn.Module) -> None:
    """Redraw, in place, parameters that start as one number: norms, biases, layer scales, position tables.

    A constant of zero or one would hide an index that is taken from the wrong place.
    """
    for name, tensor in named_tensors(model).items():
        learned = isinstance(tensor, nn.Parameter) or name.rpartition(".")[2] in ("weight", "bias")  # of a frozen norm
        if not (learned and tensor.is_floating_point() and tensor.numel()):
            continue
        value = float(tensor.flatten()[0])
        if not bool((tensor == value).all()):
            continue
        if value == 0:
            tensor.normal_(std=0.1)
        elif abs(value) < 0.1:  # a layer scale of 1e-6 would silence its whole branch
            tensor.uniform_(0.3, 1.0)
        else:
            tensor.copy_(value * torch.empty_like(tensor).uniform_(0.5, 1.5))


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Any) -> None:
    """Set running statistics to near the real ones, in place.

    With statistics that have nothing to do with the activations the input fades from layer to layer, and an error
    at the front could not be seen at the end.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with suppress(ValueError):  # a single value for each channel has no variance
        args, kwargs = as_call(copied(inputs))
        model(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    for name, tensor in named_tensors(model).items():
        if name.endswith("running_var"):
            tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 2.0)).add_(1e-6)
        elif name.endswith("running_mean"):
            tensor.add_(torch.randn_like(tensor) * (0.3 * float(tensor.std()) if tensor.numel() > 1 else 0.1))
