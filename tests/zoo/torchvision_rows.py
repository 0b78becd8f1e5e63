"""torchvision's architectures: classification, segmentation, video, and the backbones of its detection models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from tests.torchvision_stub import import_torchvision
from tests.zoo.rows import Row

SIDE = 96  # pixels: three positions are left after five strides of two
SIDES = {
    "maxvit_t": 224,  # every stage must be a whole number of windows of 7
    "raft_large": 128,  # the pyramid of correlations halves the eighths three times
    "raft_small": 128,
    "ssd300_vgg16": 300,  # its last convolutions are not padded
    "vit_b_16": 224,  # as it is published; the other transformers are made for the side given here
    "vit_h_14": 98,
}
CLIP, CLIPS = (8, 64, 64), {"s3d": (13, 209, 209)}  # frames and pixels; s3d's last average is over 2 x 7 x 7 positions

# Their own way to draw weights is to change, of which they warn.
ARGUMENTS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
# What the builders fix. A full clip needs 64 GMACs and more; all 32 blocks have 2.5 GB of parameters.
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "mvit_v1_b": ("MViT", {"temporal_size": CLIP[0], "spatial_size": CLIP[1:]}),
    "mvit_v2_s": ("MViT", {"temporal_size": CLIP[0], "spatial_size": CLIP[1:]}),
    "vit_h_14": ("VisionTransformer", {"num_layers": 8}),
}

SAMPLE = """
    resnet18 densenet121 shufflenet_v2_x0_5 squeezenet1_1 mobilenet_v3_small googlenet regnet_y_400mf convnext_tiny
    swin_v2_t lraspp_mobilenet_v3_large mc3_18 mvit_v2_s fasterrcnn_mobilenet_v3_large_fpn ssdlite320_mobilenet_v3_large
"""


def rows() -> list[Row]:
    """Every float architecture that ``torchvision.models.list_models`` knows."""
    import_torchvision()
    from torchvision import models

    parts: list[tuple[ModuleType, str, Callable[[str], Any]]] = [
        (models, "", images),
        (models.segmentation, "", images),
        (models.detection, ".backbone", images),
        (models.video, "", clips),
        (models.optical_flow, "", pairs),
    ]
    sample = SAMPLE.split()
    made = []
    for part, suffix, inputs in parts:
        for name in models.list_models(module=part):
            family = models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
            label = f"torchvision/{name}{suffix}"
            made.append(Row(label, "torchvision", family, partial(build, name), partial(inputs, name), name in sample))
    return made


def build(name: str) -> nn.Module:
    """Make the network, of a detection model its backbone alone."""
    import_torchvision()
    from torchvision import models

    builder = models.get_model_builder(name)
    module = sys.modules[builder.__module__]
    arguments: dict[str, Any] = {"weights": None} | ARGUMENTS.get(name, {})
    if name == "regnet_y_128gf":
        return shallow_regnet(module)
    if module.__name__.startswith("torchvision.models.detection"):
        return builder(weights_backbone=None, **arguments).backbone
    if module.__name__.startswith("torchvision.models.segmentation"):
        return builder(weights_backbone=None, **arguments)
    if name.startswith("vit_"):
        arguments["image_size"] = SIDES.get(name, SIDE)
    if name not in CHANGED:
        return builder(**arguments)
    class_name, changes = CHANGED[name]
    original = getattr(module, class_name)
    with patch.object(module, class_name, lambda **given: original(**(given | changes))):
        return builder(**arguments)


def shallow_regnet(regnet: Any) -> nn.Module:
    """``regnet_y_128gf`` at its widths, with 7 of its 27 blocks: all of them have 2.6 GB of parameters."""
    blocks = regnet.BlockParams.from_init_params(
        depth=27, w_0=456, w_a=160.83, w_m=2.52, group_width=264, se_ratio=0.25
    )
    blocks.depths = [2, 2, 2, 1]
    return regnet.RegNet(blocks, norm_layer=partial(nn.BatchNorm2d, eps=1e-05, momentum=0.1))


def images(name: str) -> Tensor:
    """Two images."""
    side = SIDES.get(name, SIDE)
    return torch.randn(2, 3, side, side)


def clips(name: str) -> Tensor:
    """Two clips: batch, colours, frames, pixels."""
    return torch.randn(2, 3, *CLIPS.get(name, CLIP))


def pairs(name: str) -> tuple[Tensor, Tensor]:
    """Two images, each with the one that follows it."""
    return images(name), images(name)
